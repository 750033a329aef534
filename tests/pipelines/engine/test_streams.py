"""Models on streams of their own: one scheduler, batches at the same time."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch
from toy_models import Breaks, Chain, Null, Solver

from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.engine import AtCapacity, Batch, Engine, Lane, Scheduler, Stale, StepFailed, Work
from antiphon.pipelines.engine.core import Core
from antiphon.pipelines.engine.drive import _arrived
from antiphon.pipelines.engine.runner import Flight

ONE = {"x": np.float32([1])}


def lane(name: str, stream: str, *, patient: bool = False, slices: int = 1) -> Lane:
    return Lane(name, 1, 0.08, 0.08, (4,), slices, 0.0, stream=stream, patient=patient)


def batch_of(decision: Batch | float | None) -> Batch:
    assert isinstance(decision, Batch)
    return decision


def test_the_earliest_deadline_among_streams_with_room_goes_first() -> None:
    scheduler = Scheduler()
    left, right = scheduler.add(lane("left", "a")), scheduler.add(lane("right", "b"))
    scheduler.submit(Work(left, "x", 0.02, 0.0))
    scheduler.submit(Work(right, "y", 0.01, 0.0))
    assert scheduler.streams == {"a", "b"}
    assert batch_of(scheduler.next(0.0, {"a"})).lane is left
    assert scheduler.next(0.0, {"a"}) is None
    assert batch_of(scheduler.next(0.0)).lane is right


def test_busy_shares_are_each_streams_own() -> None:
    scheduler = Scheduler()
    left, right = scheduler.add(lane("left", "a")), scheduler.add(lane("right", "b"))
    scheduler.submit(Work(left, "x", 0.02, 0.0))
    scheduler.done(batch_of(scheduler.next(0.0)), 0.0, 0.4)
    assert scheduler.load(0.0) == scheduler.load(0.0, "a") == pytest.approx(0.8)
    assert scheduler.load(0.0, "b") == 0.0
    assert (scheduler.tick(left, 0.0), scheduler.tick(right, 0.0)) == (pytest.approx(0.04), 0.0)


def test_the_patient_wait_while_something_urgent_runs_elsewhere_as_long_as_they_can() -> None:
    scheduler = Scheduler()
    first, later = scheduler.add(lane("first", "a", slices=2)), scheduler.add(lane("later", "b", patient=True))
    scheduler.submit(Work(first, "x", 0.03, 0.0))
    scheduler.submit(Work(later, "y", 0.2, 0.0))
    urgent = batch_of(scheduler.next(0.0))
    assert urgent.lane is first
    assert scheduler.next(0.0, {"b"}) == pytest.approx(0.16)
    assert batch_of(scheduler.next(0.16, {"b"})).lane is later
    scheduler.submit(Work(later, "z", 0.5, 0.16))
    assert scheduler.next(0.17, {"b"}) == pytest.approx(0.46)
    scheduler.done(urgent, 0.18, 0.18)
    assert batch_of(scheduler.next(0.18, {"b"})).works[0].lease == "z"  # between two slices nothing runs


def test_the_patient_do_not_wait_once_their_stream_is_busy() -> None:
    scheduler = Scheduler()
    first, later = scheduler.add(lane("first", "a", slices=2)), scheduler.add(lane("later", "b", patient=True))
    scheduler.submit(Work(later, "before", 0.2, 0.0))
    before = batch_of(scheduler.next(0.0))
    scheduler.submit(Work(first, "x", 0.03, 0.0))
    batch_of(scheduler.next(0.0, {"a"}))
    scheduler.done(before, 0.0, 0.4)
    assert scheduler.load(0.0, "b") > 0.75
    scheduler.submit(Work(later, "y", 0.5, 0.0))
    assert batch_of(scheduler.next(0.0, {"b"})).works[0].lease == "y"
    scheduler.submit(Work(later, "z", 0.5, 0.0))
    assert scheduler.next(0.2, {"b"}) == pytest.approx(0.46)  # it is not any more


def timed(streams: tuple[str, str], slowdown: float = 1.0) -> list[float]:
    """When a solver (four slices of 10 ms) and a chain (six turns of 10 ms) were done, begun together."""

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        engine = Engine(inline=True, clock=VirtualClock(), cost=lambda *_: 0.01, limit=100, slowdown=slowdown)
        with engine:
            engine.add("solver", Solver(), slots=4, tick=0.0, stream=streams[0])
            engine.add("chain", Chain(), slots=4, tick=0.0, stream=streams[1])
            solver, chain = await engine.open("solver"), await engine.open("chain")
            begin = loop.time()

            async def until(answer: asyncio.Future[object]) -> float:
                await answer
                return loop.time() - begin

            inputs = ONE | {"wanted": np.array(6)}
            return list(await asyncio.gather(until(solver.step(ONE)), until(chain.step(inputs))))

    return run_virtual(main())


def test_streams_run_at_the_same_time_and_slow_each_other_as_told() -> None:
    assert timed(("main", "main")) == pytest.approx([0.04, 0.1])
    assert timed(("one", "two")) == pytest.approx([0.04, 0.06])
    slow = timed(("one", "two"), 1.5)
    assert 0.055 <= slow[0] <= 0.06 <= slow[1] < 0.09


def test_results_fences_and_errors_are_each_streams_own() -> None:
    async def main() -> None:
        with Engine(inline=True, clock=VirtualClock(), cost=lambda *_: 0.01, limit=100) as engine:
            engine.add("null", Null(), slots=4, tick=0.0, stream="one")
            engine.add("breaks", Breaks(), slots=4, tick=0.0, stream="two", exact=False)
            null, breaks = await engine.open("null"), await engine.open("breaks")
            answers = [null.step(ONE) for _ in range(3)]
            failing = [breaks.step({"x": np.float32([-1])}), breaks.step(ONE)]
            await asyncio.sleep(0.015)
            null.fence(1)
            results = await asyncio.gather(*answers, *failing, return_exceptions=True)
            assert int(results[0]["count"]) == 1  # type: ignore[index]
            assert all(isinstance(result, Stale) for result in results[1:3])
            assert isinstance(results[3], StepFailed)
            assert int(results[4]["count"]) == 1  # type: ignore[index]
            assert int((await null.step(ONE, epoch=1))["count"]) == 3  # the second was being stepped
            null.reset()
            assert int((await null.step(ONE, epoch=1))["count"]) == 1

    run_virtual(main())


def test_admission_counts_the_busiest_stream() -> None:
    def admitted(streams: tuple[str, str]) -> int:
        async def main() -> int:
            with Engine(inline=True, clock=VirtualClock(), cost=lambda *_: 0.02, limit=0.75) as engine:
                for name, stream in zip(("left", "right"), streams, strict=True):
                    engine.add(name, Null(), slots=64, buckets=(1,), stream=stream)
                opened = 0
                try:
                    while opened < 64:
                        await engine.open(("left", "right")[opened % 2])
                        opened += 1
                except AtCapacity:
                    pass
                return opened

        return run_virtual(main())

    assert (admitted(("a", "a")), admitted(("a", "b"))) == (3, 4)  # of 25 % each alone, 50 for two, 100 for three


def test_the_thread_keeps_all_streams_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that hangs on one stream does not keep another's from starting and being answered."""
    released = threading.Event()

    class Hanging:
        def __init__(self, landed: Flight) -> None:
            self._landed = landed

        def ready(self) -> bool:
            return released.is_set()

        def wait(self) -> object:
            released.wait(10)
            return self._landed.wait()

    launch = Core.launch

    def hang(core: Core, batch: Batch) -> Flight | None:
        landed = launch(core, batch)
        return Hanging(landed) if batch.lane.model == "slow" and landed is not None else landed  # type: ignore[return-value]

    monkeypatch.setattr(Core, "launch", hang)
    with Engine() as engine:
        engine.add("slow", Null(), slots=4, tick=0.0, stream="one")
        engine.add("quick", Null(), slots=4, tick=0.0, stream="two")

        async def main() -> None:
            slow, quick = await engine.open("slow", paced=False), await engine.open("quick", paced=False)
            waiting = slow.step(ONE)
            for number in range(5):
                row = await asyncio.wait_for(quick.step(ONE), 10)
                assert int(row["count"]) == number + 1
            assert not waiting.done()
            released.set()
            assert int((await asyncio.wait_for(waiting, 10))["count"]) == 1

        asyncio.run(main())


def test_what_lands_while_the_thread_looks_waits_for_the_batch_before_it() -> None:
    class Late:
        """Lands right after it was looked at for the first time."""

        def __init__(self, looks: int) -> None:
            self.looks = looks

        def ready(self) -> bool:
            self.looks -= 1
            return self.looks < 0

        def wait(self) -> tuple[dict[str, torch.Tensor], float]:
            raise AssertionError("not asked for here")

    left, right = lane("left", "a"), lane("right", "b")
    flights = [(Batch(of, [], 4, (0.0, 0)), Late(looks)) for of, looks in ((left, 1), (left, 0), (right, 0))]
    assert _arrived(flights) == [flights[2]]
    assert _arrived(flights[:2]) == flights[:2]


def test_priorities_of_streams_have_a_range() -> None:
    with Engine(inline=True) as engine, pytest.raises(ValueError, match="priority is 3; it goes from 0 to 2"):
        engine.add("null", Null(), slots=1, priority=3)
