"""Steps made of turns: works join a lane's batch before any turn and leave it after their last."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from toy_models import Chain

from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.engine import Batch, Engine, Lane, Lease, Scheduler, StepFailed, Work
from antiphon.pipelines.engine.runner import Row
from antiphon.pipelines.engine.scheduler import Barrier

URGENT = 0.01


def lane(*, buckets: tuple[int, ...] = (2, 4), tick: float = 0.0) -> Lane:
    return Lane("m", 1, 0.08, 0.08, buckets, tick=tick, turns=6)


def work(lane: Lane, lease: str, turns: int, deadline: float = URGENT) -> Work:
    return Work(lane, lease, deadline, 0.0, turns=turns)


def start(scheduler: Scheduler, now: float = 0.0) -> Batch:
    batch = scheduler.next(now)
    assert isinstance(batch, Batch)
    return batch


def rows(batch: Batch) -> dict[object, int]:
    """The turn of each lease."""
    return dict(zip([one.lease for one in batch.works], batch.turns, strict=True))


def test_works_join_and_leave_between_turns() -> None:
    scheduler = Scheduler()
    turning = scheduler.add(lane())
    scheduler.submit(work(turning, "long", 3))
    first = start(scheduler)
    assert rows(first) == {"long": 0}
    scheduler.submit(work(turning, "short", 1))
    second, third = start(scheduler), start(scheduler)  # before the first is done
    assert (rows(second), rows(third)) == ({"long": 1, "short": 0}, {"long": 2})
    assert scheduler.next(0.0) is None
    assert [scheduler.done(one, 0.0, 0.0) for one in (first, second, third)] == [[], [1], [0]]
    assert turning.depth == 0


def test_more_works_than_rows_take_turns_by_deadline() -> None:
    scheduler = Scheduler()
    turning = scheduler.add(lane(buckets=(2,)))
    for number, name in enumerate("cba"):
        scheduler.submit(work(turning, name, 2, URGENT * (3 - number)))
    started = [start(scheduler) for _ in range(3)]
    assert [rows(batch) for batch in started[:2]] == [{"a": 0, "b": 0}, {"a": 1, "b": 1}]
    assert rows(started[2]) == {"c": 0}
    assert rows(start(scheduler)) == {"c": 1}


def test_what_waits_for_a_tick_joins_a_lane_that_is_under_way() -> None:
    scheduler = Scheduler()
    turning = scheduler.add(lane(tick=0.02))
    scheduler.submit(work(turning, "a", 2, 1.0))
    assert rows(start(scheduler)) == {"a": 0}
    scheduler.submit(work(turning, "b", 2, 1.0))
    assert rows(start(scheduler, 0.001)) == {"a": 1, "b": 0}
    assert rows(start(scheduler, 0.002)) == {"b": 1}
    scheduler.submit(work(turning, "c", 1, 1.0))
    assert scheduler.next(0.003) == pytest.approx(0.02)


def test_a_failed_turn_ends_the_works_that_were_in_it_once() -> None:
    scheduler = Scheduler()
    turning = scheduler.add(lane())
    for name, turns in (("a", 3), ("b", 1)):
        scheduler.submit(work(turning, name, turns))
    first, second = start(scheduler), start(scheduler)
    assert scheduler.done(first, 0.0, 0.0, failed=True) == [0, 1]
    assert scheduler.done(second, 0.0, 0.0) == []
    scheduler.submit(work(turning, "a", 1))
    assert rows(start(scheduler)) == {"a": 0}


def test_barriers_and_fences_let_a_work_that_has_begun_end() -> None:
    class Noted:
        def __call__(self) -> None:
            raise AssertionError

        def fail(self, error: Exception) -> None:
            raise AssertionError

    scheduler = Scheduler()
    turning = scheduler.add(lane())
    scheduler.submit(work(turning, "a", 2))
    first = start(scheduler)
    scheduler.submit(Barrier("a", Noted()))
    waiting = work(turning, "a", 1)
    scheduler.submit(waiting)
    assert scheduler.fence("a", 5) == [waiting]
    second = start(scheduler)
    assert scheduler.done(first, 0.0, 0.0) == [] == scheduler.due_calls()
    assert scheduler.done(second, 0.0, 0.0) == [0]
    assert len(scheduler.due_calls()) == 1


def total(x: float, wanted: int) -> float:
    return x * (2**wanted - 1)


async def ask(lease: Lease, x: float, wanted: int) -> Row:
    return await lease.step({"x": np.float32([x]), "wanted": np.array(wanted)})


def test_sessions_get_what_they_would_alone_whenever_they_join() -> None:
    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        with Engine(inline=True, clock=VirtualClock(), cost=lambda *_: 0.001) as engine:
            engine.add("chain", Chain(), slots=8, tick=0.0)
            leases = [await engine.open("chain", paced=False) for _ in range(8)]

            async def session(number: int) -> float:
                await asyncio.sleep(0.0005 * number)
                begin = loop.time()
                taken = 0
                for turn in range(12):
                    wanted = 1 + (number + turn) % 6
                    row = await ask(leases[number], number + turn, wanted)
                    taken += wanted
                    assert row["total"].item() == total(number + turn, wanted)
                    assert int(row["turns"]) == taken
                return (loop.time() - begin) / taken

            paces = await asyncio.gather(*map(session, range(8)))
            metrics = engine.metrics()["models"]["chain"]["variants"]["only"]
            return max(paces), metrics["rows"] / metrics["batches"]

    slowest, together = run_virtual(main())
    # Whoever joins waits for one turn at most: half a turn's wait for each of 3.5 on average.
    assert slowest < 0.0014
    assert together > 6


def test_a_failing_session_takes_its_turn_down_and_no_more() -> None:
    async def main() -> None:
        with Engine(inline=True, clock=VirtualClock(), cost=lambda *_: 0.001) as engine:
            engine.add("chain", Chain(), slots=4, tick=0.0)
            bad, good, late = [await engine.open("chain", paced=False) for _ in range(3)]
            answers = [asyncio.ensure_future(ask(bad, -10, 4)), asyncio.ensure_future(ask(good, 1, 2))]
            await asyncio.sleep(0.0025)
            answers.append(asyncio.ensure_future(ask(late, 3, 3)))
            results = await asyncio.gather(*answers, return_exceptions=True)
            assert isinstance(results[0], StepFailed)
            assert isinstance(results[1], Row)
            again = await ask(bad, 2, 2)
            assert again["total"].item() == total(2, 2)
            assert engine.metrics()["counts"]["failed"] == 1

    run_virtual(main())


def test_blocking_calls_take_all_turns_and_match_the_whole_step() -> None:
    model = Chain()
    with Engine(inline=True) as engine:
        engine.add("chain", model, slots=4)
        leases = [engine.open_sync("chain") for _ in range(3)]
        chunks = [(lease, {"x": np.float32([1 + n]), "wanted": np.array(6 - n)}) for n, lease in enumerate(leases)]
        made = [row["total"].item() for row in engine.run_sync(chunks)]
        states = [lease.snapshot_sync() for lease in leases]
    assert made == [total(1 + n, 6 - n) for n in range(3)]
    state = {name: spec.new(4) for name, spec in model.state_spec().items()}
    inputs = {"x": torch.tensor([[1.0], [2.0], [3.0]]), "wanted": torch.tensor([6, 5, 4])}
    whole = model.step(inputs, state, torch.arange(3), torch.ones(3, dtype=torch.bool))
    assert whole["total"][:, 0].tolist() == made
    assert [int(one["turns"]) for one in states] == state["turns"][:3].tolist()
