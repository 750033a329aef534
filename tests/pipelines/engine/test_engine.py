"""The engine's life: sessions, epochs, errors and closing, in its own thread and inline on virtual time."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
import torch
from toy_models import Breaks, Null, Solver, Toy

from antiphon.apps.bench.load import run_load
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.engine import (
    AtCapacity,
    BadInput,
    BadSnapshot,
    Closed,
    Engine,
    InboxFull,
    Lease,
    Stale,
    StepFailed,
    default_buckets,
)
from antiphon.pipelines.engine.core import Core
from antiphon.pipelines.engine.cuda import held

Main = Callable[[Engine], Coroutine[Any, Any, None]]


def x(value: float) -> dict[str, np.ndarray]:
    return {"x": np.float32([value])}


def in_thread(main: Main) -> None:
    async def run() -> None:
        with Engine(inbox=4) as engine:
            await asyncio.wait_for(main(engine), 20)

    asyncio.run(run())
    assert [thread for thread in threading.enumerate() if thread.name.startswith("engine")] == []


def inline(main: Main) -> None:
    async def run() -> None:
        with Engine(clock=VirtualClock(), inline=True, inbox=4, cost=lambda *_: 0.001) as engine:
            await main(engine)

    run_virtual(run())


@pytest.fixture(params=[in_thread, inline])
def run(request: pytest.FixtureRequest) -> Callable[[Main], None]:
    return request.param


def counts(engine: Engine) -> dict[str, int]:
    return {name: count for name, count in engine.metrics()["counts"].items() if count}


def test_steps_come_back_in_order(run: Callable[[Main], None]) -> None:
    async def main(engine: Engine) -> None:
        engine.add("null", Null(), slots=3)
        leases = [await engine.open("null") for _ in range(3)]
        rows = await asyncio.gather(*(lease.step(x(index)) for index in range(4) for lease in leases))
        assert [row["y"].item() for row in rows] == [1.0 + index for index in range(4) for _ in leases]
        assert [row["count"].item() for row in rows] == [1 + index for index in range(4) for _ in leases]
        assert set(rows[0]) == {"y", "count"}
        assert len(rows[0]) == 2
        assert engine.metrics()["models"]["null"]["used"] == 3

    run(main)


def test_reset_and_restore_keep_their_place_among_steps(run: Callable[[Main], None]) -> None:
    async def main(engine: Engine) -> None:
        engine.add("null", Null(), slots=2)
        lease = await engine.open("null")
        first = lease.step(x(0))
        second = lease.step(x(0))
        snapshot = lease.snapshot()
        lease.reset()
        third = lease.step(x(0))
        assert [(await future)["count"].item() for future in (first, second, third)] == [1, 2, 1]
        snapshot = await snapshot
        assert snapshot["count"].item() == 1
        lease.restore({"count": torch.tensor(40)})
        assert (await lease.step(x(0)))["count"].item() == 41
        with pytest.raises(BadSnapshot):
            lease.restore({"other": torch.tensor(40)})

    run(main)


def test_a_fence_reaches_waiting_chunks_at_once(run: Callable[[Main], None]) -> None:
    async def main(engine: Engine) -> None:
        engine.add("null", Null(), slots=2)
        lease, other = await engine.open("null"), await engine.open("null")
        old = [lease.step(x(index)) for index in range(3)]
        neighbour = other.step(x(0))
        lease.fence(2)
        assert all(isinstance(future.exception(), Stale) for future in old)
        with pytest.raises(Stale, match="epoch 1"):
            lease.step(x(0), epoch=1)
        new = await lease.step(x(7), epoch=2)
        assert new["y"].item() == 8.0
        assert (await neighbour)["y"].item() == 1.0
        # what was running when the fence came finished, and nothing else of the old epoch ran
        assert new["count"].item() in (1, 2)
        counted = counts(engine)
        assert counted.get("fenced", 0) + counted.get("discarded", 0) == 3
        lease.fence(1)
        assert lease.epoch == 2

    run(main)


def test_a_result_in_flight_is_discarded_when_fenced() -> None:
    async def main(engine: Engine) -> None:
        engine.add("null", Null(), slots=1)
        lease = await engine.open("null")
        old = [lease.step(x(0)), lease.step(x(0))]
        await asyncio.sleep(0.0005)  # the first is half done
        lease.fence(1)
        assert all(isinstance(future.exception(), Stale) for future in old)
        assert (await lease.step(x(0)))["count"].item() == 2
        assert counts(engine) == {"admitted": 1, "fenced": 1, "discarded": 1}

    inline(main)


def test_a_newer_epoch_waits_behind_nothing_old(run: Callable[[Main], None]) -> None:
    async def main(engine: Engine) -> None:
        engine.add("null", Null(), slots=1)
        lease = await engine.open("null")
        old, new = lease.step(x(1)), lease.step(x(2), epoch=1)
        lease.fence(1)
        assert (await new)["y"].item() == 3.0
        assert isinstance(old.exception(), Stale)

    run(main)


def test_an_error_in_a_step_reaches_its_batch_only(run: Callable[[Main], None]) -> None:
    async def main(engine: Engine) -> None:
        engine.add("breaks", Breaks(), slots=2, exact=False)
        engine.add("null", Null(), slots=1)
        lease, other, quiet = await engine.open("breaks"), await engine.open("breaks"), await engine.open("null")
        steps = [lease.step(x(-1)), quiet.step(x(0))]
        with pytest.raises(StepFailed, match=r"model 'breaks' variant 'only' failed: ValueError: negative") as failure:
            await steps[0]
        assert isinstance(failure.value.__cause__, ValueError)
        assert (await steps[1])["y"].item() == 1.0
        assert (await lease.step(x(1)))["y"].item() == 2.0
        assert (await other.step(x(1)))["y"].item() == 2.0
        assert counts(engine)["failed"] == 1

    run(main)


def test_an_error_inside_a_slice_frees_the_lane() -> None:
    class Breaking(Solver):
        def step_slice(self, index, inputs, state, slots, active):
            if index == 2 and bool((inputs["x"] < 0).any()):
                raise ValueError("negative input")
            return super().step_slice(index, inputs, state, slots, active)

    async def main(engine: Engine) -> None:
        engine.add("solver", Breaking(), slots=1, exact=False)
        lease = await engine.open("solver")
        with pytest.raises(StepFailed):
            await lease.step(x(-1))
        lease.reset()
        assert (await lease.step(x(2)))["sum"].item() == 8.0

    inline(main)
    in_thread(main)


def test_inputs_are_checked_before_they_are_queued(run: Callable[[Main], None]) -> None:
    async def main(engine: Engine) -> None:
        engine.add("toy", Toy(), slots=1, variants=(1,))
        lease = await engine.open("toy")
        good = {"frames": torch.zeros(1, 64), "gain": 2}
        assert (await lease.step(good))["count"].tolist() == [1]
        for bad, message in [
            ({"frames": np.zeros((1, 64), np.float32)}, "'gain' is missing"),
            ({**good, "extra": 1}, "'extra'"),
            ({**good, "frames": np.zeros((2, 64), np.float32)}, r"shape \[2, 64\], the step takes \[1, 64\]"),
            ({**good, "gain": 1j}, "complex"),
        ]:
            with pytest.raises(BadInput, match=message):
                lease.step(bad)
        assert (await lease.step({**good, "frames": np.zeros((1, 64))}))["count"].tolist() == [2]

    run(main)


def test_an_inbox_holds_so_many_chunks(run: Callable[[Main], None]) -> None:
    async def main(engine: Engine) -> None:
        engine.add("null", Null(), slots=1)
        lease = await engine.open("null")
        futures = [lease.step(x(0)) for _ in range(4)]
        with pytest.raises(InboxFull, match="4 chunks"):
            lease.step(x(0))
        await futures[0]
        futures.append(lease.step(x(0)))
        assert [(await future)["count"].item() for future in futures] == [1, 2, 3, 4, 5]

    run(main)


def test_closing_a_lease_frees_its_slot_and_never_answers_the_next_owner(run: Callable[[Main], None]) -> None:
    async def main(engine: Engine) -> None:
        engine.add("null", Null(), slots=1)
        for round_ in range(5):
            lease = await engine.open("null")
            first = lease.step(x(round_))
            if round_ % 2:
                assert (await first)["count"].item() == 1
            waiting = [first, lease.step(x(0))]
            lease.close()
            lease.close()
            assert isinstance(waiting[1].exception(), Closed)
            with pytest.raises(Closed):
                lease.step(x(0))
            for call in (lease.reset, lambda leased=lease: leased.fence(9)):
                with pytest.raises(Closed):
                    call()
            while True:  # the slot is free once the running chunk is done
                try:
                    follower = await engine.open("null")
                    break
                except AtCapacity:
                    await asyncio.sleep(0.001)
            assert (await follower.step(x(10)))["count"].item() == 1
            follower.close()

    run(main)


def test_abandoned_results_are_counted(run: Callable[[Main], None]) -> None:
    async def main(engine: Engine) -> None:
        engine.add("null", Null(), slots=1)
        lease = await engine.open("null")
        lease.step(x(0)).cancel()
        assert (await lease.step(x(0)))["count"].item() == 2
        assert counts(engine) == {"admitted": 1, "abandoned": 1}

    run(main)


def test_closing_the_engine_answers_everyone(run: Callable[[Main], None]) -> None:
    async def main(engine: Engine) -> None:
        engine.add("null", Null(), slots=2)
        leases = [await engine.open("null") for _ in range(2)]
        futures = [lease.step(x(0)) for _ in range(4) for lease in leases]
        engine.close()
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(outcome, Closed) or outcome["y"].item() == 1.0 for outcome in outcomes)
        assert isinstance(outcomes[-1], Closed)
        assert counts(engine)["unanswered"] == sum(isinstance(outcome, Closed) for outcome in outcomes)
        with pytest.raises(Closed, match="engine was closed"):
            leases[0].step(x(0))
        with pytest.raises(Closed):
            await engine.open("null")
        leases[0].close()
        engine.close()

    run(main)


def test_an_error_that_ends_the_engine_reaches_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fatal(Null):
        armed = False

        def step(self, inputs, state, slots, active):
            if self.armed:
                raise SystemExit("gone")
            return super().step(inputs, state, slots, active)

    reported = []
    monkeypatch.setattr(threading, "excepthook", reported.append)

    async def main(engine: Engine) -> None:
        model = Fatal()
        engine.add("fatal", model, slots=1)
        lease = await engine.open("fatal")
        model.armed = True
        with pytest.raises(Closed, match="SystemExit: gone"):
            await lease.step(x(0))
        with pytest.raises(Closed):
            await lease.step(x(0))

    in_thread(main)


def test_an_error_that_no_step_should_raise_leaves_nobody_waiting_inline() -> None:
    class OddError(Exception):
        pass

    class Raises(Null):
        def step(self, inputs, state, slots, active):
            if bool((inputs["x"] < 0).any()):
                raise OddError
            return super().step(inputs, state, slots, active)

    with Engine(inline=True) as engine:
        engine.add("raises", Raises(), slots=2, exact=False)
        lease = engine.open_sync("raises")
        with pytest.raises(OddError):
            lease.step_sync(x(-1))
        assert lease.step_sync(x(1))["y"].item() == 2.0

    async def main(engine: Engine) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        engine.add("raises", Raises(), slots=2, exact=False)
        lease, other = await engine.open("raises"), await engine.open("raises")
        steps = [lease.step(x(-1)), other.step(x(0))]
        for step in steps:
            with pytest.raises(Closed, match="OddError"):
                await step
        assert (await other.step(x(1)))["y"].item() == 2.0

    inline(main)


def test_a_closed_event_loop_is_no_problem() -> None:
    with Engine() as engine:
        engine.add("null", Null(), slots=1)
        leases: list[Lease] = []

        async def walk_away() -> None:
            leases.append(await engine.open("null"))
            for _ in range(4):
                leases[0].step(x(0))

        asyncio.run(walk_away())
        leases[0].close()

        async def come_back() -> None:
            while True:
                try:
                    lease = await engine.open("null")
                    break
                except AtCapacity:
                    await asyncio.sleep(0.001)
            assert (await lease.step(x(0)))["count"].item() == 1

        asyncio.run(come_back())


def test_files_run_without_an_event_loop() -> None:
    for engine in (Engine(inline=True), Engine()):
        with engine:
            engine.add("null", Null(), slots=3)
            leases = [engine.open_sync("null") for _ in range(3)]
            for index in range(50):
                rows = engine.run_sync([(lease, x(index)) for lease in leases])
                assert [row["count"].item() for row in rows] == [index + 1] * 3
            assert leases[0].step_sync(x(0))["count"].item() == 51
            assert leases[0].snapshot_sync()["count"].item() == 51
            steps = engine.metrics()["models"]["null"]["variants"]["only"]
            assert steps["rows"] == 151
    assert [thread for thread in threading.enumerate() if thread.name.startswith("engine")] == []


def test_a_file_wakes_an_engine_that_sleeps_until_a_tick() -> None:
    async def main(engine: Engine) -> None:
        engine.add("soon", Null(), slots=2, tick=60.0)
        engine.add("late", Null(), slots=2, tick=90.0)
        soon, late, file = await engine.open("soon"), await engine.open("late"), await engine.open("late", paced=False)
        await asyncio.gather(soon.step(x(0)), late.step(x(0)))
        held = soon.step(x(0))  # for a minute: the engine sleeps
        assert (await file.step(x(0)))["count"].item() == 1
        assert not held.done()

    in_thread(main)


def test_virtual_time_is_deterministic_and_ticks_hold() -> None:
    def once() -> list[tuple[float, int]]:
        log: list[tuple[float, int]] = []

        async def session(engine: Engine, clock: VirtualClock, number: int) -> None:
            lease = await engine.open("null")
            start = clock.now() + number * 0.003
            for index in range(20):
                await clock.sleep_until(start + index * 0.08)
                await lease.step(x(0))
                log.append((round(clock.now(), 6), number))

        async def main() -> None:
            clock = VirtualClock()
            with Engine(clock=clock, inline=True, cost=lambda *_: 0.005) as engine:
                engine.add("null", Null(), slots=16)
                await asyncio.gather(*(session(engine, clock, number) for number in range(16)))
                lane = engine.metrics()["models"]["null"]["variants"]["only"]
                assert lane["rows"] == 320
                assert lane["batches"] <= 20 * 4 + 4  # at most one start each 20 ms
                assert lane["lateness"]["late"] == 0
                assert lane["lateness"]["max"] <= 0.005 + 0.020 + 0.005 - 0.08
                assert lane["steps"][4]["median"] == pytest.approx(0.005)

        run_virtual(main())
        return log

    first = once()
    assert first == once()
    assert len({moment for moment, _ in first}) < 100


def test_names_and_variants_are_checked(run: Callable[[Main], None]) -> None:
    async def main(engine: Engine) -> None:
        engine.add("toy", Toy(), slots=1, variants=(3,))
        with pytest.raises(ValueError, match="no model named 'tony'"):
            await engine.open("tony")
        with pytest.raises(ValueError, match="does not serve variant 1"):
            await engine.open("toy", 1)
        with pytest.raises(ValueError, match="added before"):
            engine.add("toy", Toy(), slots=1)
        with pytest.raises(ValueError, match="no variant 9"):
            engine.add("tony", Toy(), slots=1, variants=(9,))
        with pytest.raises(ValueError, match="slots is 0"):
            engine.add("tony", Toy(), slots=0)
        lease = await engine.open("toy")
        assert (lease.model, lease.variant) == ("toy", 3)
        assert isinstance(engine.model("toy"), Toy)
        with pytest.raises(ValueError, match="no model named 'tony'"):
            engine.model("tony")

    run(main)


def test_a_virtual_clock_needs_the_inline_engine() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="inline=True"):
            Engine(clock=VirtualClock())

    run_virtual(main())
    with pytest.raises(ValueError, match="inline=True"):
        Engine(cost=lambda *_: 1.0)


def test_a_dropped_engine_leaves_no_warning() -> None:
    async def main() -> None:
        with Engine() as engine:
            engine.add("null", Null(), slots=1)
            lease = await engine.open("null")
            futures = [lease.step(x(0)) for _ in range(3)]
            lease.fence(5)
            lease.close()
        del futures

    unhandled: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        await main()
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(watched())
    assert unhandled == []


def test_an_engine_whose_device_cannot_be_set_up_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Core) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(Core, "setup", broken)
    before = threading.active_count()
    for inline in (False, True):
        with pytest.raises(RuntimeError, match="no such device"):
            Engine(inline=inline)
    assert threading.active_count() == before


def test_a_model_is_prepared_once_it_is_in_place() -> None:
    class Prepared(Toy):
        moves = 0
        prepared_after = -1

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            self.moves += 1
            return super()._apply(fn, recurse)

        def prepare(self) -> None:
            self.prepared_after = self.moves

    model = Prepared()
    Engine(inline=True).add("toy", model, slots=1, variants=(1,))
    assert model.prepared_after == model.moves > 0


def test_what_a_model_holds_is_found_for_a_graph_to_keep() -> None:
    model = Toy()
    model.conv.made = (torch.ones(3), {"later": [torch.zeros(2)]})
    places = [tensor.data_ptr() for tensor in held(model)]
    expected = [*model.parameters(), model.conv.made[0], model.conv.made[1]["later"][0]]
    assert sorted(places) == sorted(tensor.data_ptr() for tensor in expected)


def test_batch_sizes_go_up_to_what_the_slots_need() -> None:
    assert default_buckets(1) == (1,)
    assert default_buckets(5) == (1, 2, 4, 8)
    assert default_buckets(3, 4) == (4,)
    assert default_buckets(40, 4) == (4, 8, 16, 32, 48)
    assert default_buckets(70, 4) == (4, 8, 16, 32, 48, 64, 80)
    assert default_buckets(1000, 4) == default_buckets(256, 4)
    assert default_buckets(256, 4)[-5:] == (128, 160, 192, 224, 256)
    assert default_buckets(256, 64)[:2] == (64, 80)


def test_sessions_just_beyond_a_batch_size_do_not_break_the_rhythm() -> None:
    """Full-duplex frames of 80 ms at the step times of an H200 (apps/bench/results/duplex_cuda.json): with powers of
    two alone, 128 sessions would step for 128 where 70 are ready, and be late for good."""
    sizes, seconds = zip(*((1, 0.009), (16, 0.014), (32, 0.0195), (64, 0.030), (128, 0.046), (256, 0.080)), strict=True)

    def late(buckets: tuple[int, ...]) -> float:
        async def main() -> float:
            cost = lambda model, variant, bucket: float(np.interp(bucket, sizes, seconds))  # noqa: E731
            with Engine(clock=VirtualClock(), inline=True, cost=cost, limit=1e9) as engine:
                engine.add("frames", Null(), slots=128, buckets=buckets, exact=False)
                load = await run_load(
                    engine, "frames", "only", 0.08, 128, lambda *_: x(0), seconds=3, warm=1, seed=1, jitter=0.005
                )
            return float(load.summary()["late"])

        return run_virtual(main())

    assert late(default_buckets(128)) == 0
    assert late((1, 2, 4, 8, 16, 32, 64, 128)) > 0.1
