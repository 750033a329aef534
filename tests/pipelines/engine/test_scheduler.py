"""The scheduler's rules, one by one and as properties of random schedules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.pipelines.engine import EDF_TICKS_SLICES, Batch, InboxFull, Lane, Policy, Scheduler, Work
from antiphon.pipelines.engine.scheduler import Barrier


class Recorded:
    """A barrier's call that notes when it ran."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    def __call__(self) -> None:
        self._log.append(self._name)

    def fail(self, error: Exception) -> None:
        self._log.append(f"{self._name} failed")


def lane(name: str = "m", *, buckets: tuple[int, ...] = (4, 8), slices: int = 1, tick: float = 0.02) -> Lane:
    return Lane(name, 1, 0.08, 0.08, buckets, slices, tick)


def work(lane: Lane, lease: object, deadline: float, arrival: float = 0.0, epoch: int = 0) -> Work:
    return Work(lane, lease, deadline, arrival, epoch)


def batch_of(decision: Batch | float | None) -> Batch:
    assert isinstance(decision, Batch)
    return decision


def test_nothing_to_do() -> None:
    scheduler = Scheduler()
    scheduler.add(lane())
    assert scheduler.next(0.0) is None


def test_the_first_work_on_an_idle_device_starts_at_once_and_the_next_waits_for_the_tick() -> None:
    scheduler = Scheduler()
    one = scheduler.add(lane())
    scheduler.submit(work(one, "a", 1.08, 1.0))
    first = batch_of(scheduler.next(1.0))
    scheduler.done(first, 1.001, 0.001)
    scheduler.submit(work(one, "b", 1.085, 1.005))
    scheduler.submit(work(one, "c", 1.090, 1.010))
    assert scheduler.next(1.01) == pytest.approx(1.02)
    assert [item.lease for item in batch_of(scheduler.next(1.02)).works] == ["b", "c"]


def test_rows_beyond_the_largest_bucket_follow_in_the_same_tick() -> None:
    scheduler = Scheduler()
    one = scheduler.add(lane())
    for index in range(19):
        scheduler.submit(work(one, index, 0.08 + index * 1e-4))
    sizes = []
    for _ in range(3):
        batch = batch_of(scheduler.next(0.0))
        sizes.append((len(batch.works), batch.bucket))
        scheduler.submit(work(one, f"late {len(sizes)}", 9.0))
        scheduler.done(batch, 0.0, 0.0)
    assert sizes == [(8, 8), (8, 8), (3, 4)]
    assert scheduler.next(0.0) == pytest.approx(0.02)  # those that came meanwhile wait for the next tick


def test_the_earliest_deadline_goes_first_between_and_inside_lanes() -> None:
    scheduler = Scheduler()
    slow, fast = scheduler.add(lane("slow", buckets=(1,))), scheduler.add(lane("fast"))
    scheduler.submit(work(slow, "late", 0.5))
    scheduler.submit(work(slow, "soon", 0.2))
    scheduler.submit(work(fast, "first", 0.1))
    order = []
    for _ in range(3):
        batch = batch_of(scheduler.next(0.0))
        order += [item.lease for item in batch.works]
        scheduler.done(batch, 0.0, 0.0)
    assert order == ["first", "soon", "late"]


def test_a_sliced_batch_yields_to_an_earlier_deadline() -> None:
    scheduler = Scheduler()
    long, short = scheduler.add(lane("long", slices=3)), scheduler.add(lane("short"))
    scheduler.submit(work(long, "l", 0.25))
    batch = batch_of(scheduler.next(0.0))
    assert (batch.first, batch.last) == (0, 1)
    assert not scheduler.done(batch, 0.01, 0.01)
    scheduler.submit(work(short, "s", 0.05, 0.01))
    other = batch_of(scheduler.next(0.01))
    assert other.lane is short
    assert scheduler.done(other, 0.02, 0.01)
    again = batch_of(scheduler.next(0.02))
    assert again.works is batch.works
    assert (again.first, again.last) == (1, 2)
    scheduler.done(again, 0.03, 0.01)
    assert scheduler.done(batch_of(scheduler.next(0.03)), 0.04, 0.01)
    assert scheduler.next(0.05) is None


def test_the_next_slice_may_start_before_the_last_is_done() -> None:
    """What is urgent keeps a device busy that queues two batches: nothing less urgent comes in between."""
    scheduler = Scheduler()
    long, other = scheduler.add(lane("long", slices=3)), scheduler.add(lane("other"))
    scheduler.submit(work(long, "l", 0.05))
    scheduler.submit(work(other, "o", 0.25))
    started = [batch_of(scheduler.next(0.0)) for _ in range(3)]
    assert [(one.first, one.last) for one in started] == [(0, 1), (1, 2), (2, 3)]
    scheduler.submit(work(long, "next", 0.01))
    assert batch_of(scheduler.next(0.0)).lane is other  # the lane has nothing to start until its batch is done
    assert [bool(scheduler.done(one, 0.01, 0.0)) for one in started] == [False, False, True]
    assert batch_of(scheduler.next(0.02)).works[0].lease == "next"


def test_a_batch_is_as_urgent_as_what_waits_behind_it() -> None:
    scheduler = Scheduler()
    long, other = scheduler.add(lane("long", slices=3)), scheduler.add(lane("other", slices=3))
    scheduler.submit(work(long, "patient", 5.0))
    scheduler.submit(work(other, "o", 0.5))
    first = batch_of(scheduler.next(0.0))
    assert first.lane is other
    scheduler.submit(work(long, "x", 0.9))  # joins the batch that has not begun
    patient = scheduler.add(lane("third", slices=2))
    scheduler.submit(work(patient, "third", 3.0))
    assert not scheduler.done(first, 0.01, 0.0)
    for _ in range(2):
        scheduler.done(batch_of(scheduler.next(0.02)), 0.02, 0.0)
    begun = batch_of(scheduler.next(0.05))
    assert {item.lease for item in begun.works} == {"patient", "x"}
    scheduler.submit(work(other, "late", 0.8, 0.06))
    assert batch_of(scheduler.next(0.06)).lane is other
    scheduler.submit(work(long, "urgent", 0.1, 0.06))
    assert batch_of(scheduler.next(0.06)).works is begun.works


def test_slices_behind_a_failed_one_are_forgotten() -> None:
    scheduler = Scheduler()
    long = scheduler.add(lane("long", slices=3))
    scheduler.submit(work(long, "a", 0.1))
    scheduler.submit(work(long, "a", 0.2))
    first, second = (batch_of(scheduler.next(0.0)) for _ in range(2))
    assert scheduler.done(first, 0.0, 0.0, failed=True)
    assert not scheduler.done(second, 0.0, 0.0, failed=True)
    following = batch_of(scheduler.next(0.05))
    assert following.works[0].deadline == 0.2
    assert not scheduler.done(second, 0.06, 0.0)
    assert [bool(scheduler.done(one, 0.1, 0.0)) for one in (following, *(scheduler.next(0.1) for _ in range(2)))] == [
        False, False, True,
    ]  # fmt: skip


def test_an_unsliced_policy_runs_all_slices_at_once() -> None:
    scheduler = Scheduler(Policy(sliced=False))
    long = scheduler.add(lane(slices=3))
    scheduler.submit(work(long, "l", 0.25))
    batch = batch_of(scheduler.next(0.0))
    assert (batch.first, batch.last) == (0, 3)
    assert scheduler.done(batch, 0.03, 0.03)


def test_ticks_stretch_to_half_the_budget_under_load_and_shrink_again() -> None:
    scheduler = Scheduler()
    one = scheduler.add(lane())
    assert scheduler.tick(one, 0.0) == pytest.approx(0.02)
    now = 0.0
    while now < 4.0:
        scheduler.submit(work(one, object(), now + 0.08, now))
        decision = scheduler.next(now)
        if isinstance(decision, Batch):
            now += 0.019
            scheduler.done(decision, now, 0.019)
        now += 0.001
    assert 0.02 < scheduler.tick(one, now) <= 0.04
    assert scheduler.tick(one, now + 5.0) == pytest.approx(0.02)


def test_what_is_urgent_waits_for_no_tick() -> None:
    scheduler = Scheduler()
    one = scheduler.add(lane())
    scheduler.submit(work(one, "a", 1.08, 1.0))
    scheduler.done(batch_of(scheduler.next(1.0)), 1.001, 0.001)
    scheduler.submit(work(one, "b", 1.085, 1.005))
    assert scheduler.next(1.005) == pytest.approx(1.02)
    scheduler.submit(work(one, "c", 1.052, 1.006))  # as if it had come at 0.972
    assert scheduler.next(1.006) == pytest.approx(1.012)
    assert [item.lease for item in batch_of(scheduler.next(1.012)).works] == ["c", "b"]


def test_work_without_deadline_fills_gaps_and_ignores_ticks() -> None:
    scheduler = Scheduler()
    one = scheduler.add(lane(buckets=(1,)))
    scheduler.submit(work(one, "live", 0.08))
    scheduler.submit(work(one, "file", math.inf))
    first = batch_of(scheduler.next(0.0))
    assert first.works[0].lease == "live"
    scheduler.done(first, 0.0, 0.0)
    for _ in range(5):
        batch = batch_of(scheduler.next(0.001))
        assert batch.works[0].lease == "file"
        scheduler.done(batch, 0.001, 0.0)
        scheduler.submit(work(one, "file", math.inf))
    scheduler.submit(work(one, "live", 0.1, 0.001))
    assert scheduler.next(0.001) == pytest.approx(0.02)


def test_two_files_take_turns() -> None:
    scheduler = Scheduler()
    lanes = [scheduler.add(lane(name, buckets=(1,))) for name in "ab"]
    order = []
    for _ in range(3):
        for one in lanes:
            scheduler.submit(work(one, one.model, math.inf))
    while isinstance(batch := scheduler.next(0.0), Batch):
        order.append(batch.lane.model)
        scheduler.done(batch, 0.0, 0.0)
    assert order == ["a", "b"] * 3


def test_a_fence_drops_waiting_work_of_older_epochs_only() -> None:
    scheduler = Scheduler()
    one = scheduler.add(lane())
    works = [work(one, "a", 0.08, epoch=epoch) for epoch in (0, 0, 0, 1)]
    for item in works:
        scheduler.submit(item)
    running = batch_of(scheduler.next(0.0))
    assert scheduler.fence("a", 1) == works[1:3]
    assert one.depth == 1
    scheduler.done(running, 0.0, 0.0)
    assert batch_of(scheduler.next(0.05)).works == works[3:]


def test_a_fence_takes_a_ready_head_back() -> None:
    scheduler = Scheduler()
    one = scheduler.add(lane())
    stale, fresh = work(one, "a", 0.08, epoch=0), work(one, "a", 0.2, epoch=1)
    for item in (stale, fresh, work(one, "b", 0.1)):
        scheduler.submit(item)
    assert scheduler.fence("a", 1) == [stale]
    assert [item.lease for item in batch_of(scheduler.next(0.0)).works] == ["b", "a"]
    assert scheduler.fence("nobody", 1) == []


def test_barriers_keep_a_leases_order() -> None:
    scheduler, log = Scheduler(), []
    one = scheduler.add(lane())
    scheduler.submit(Barrier("a", Recorded(log, "before")))
    scheduler.submit(work(one, "a", 0.08))
    scheduler.submit(Barrier("a", Recorded(log, "after")))
    for call in scheduler.due_calls():
        call()
    assert log == ["before"]
    batch = batch_of(scheduler.next(0.0))
    assert scheduler.due_calls() == []
    scheduler.done(batch, 0.0, 0.0)
    for call in scheduler.due_calls():
        call()
    assert log == ["before", "after"]


def test_an_inbox_is_bounded() -> None:
    scheduler = Scheduler(inbox=3)
    one = scheduler.add(lane())
    scheduler.submit(work(one, "a", 1.0))
    scheduler.next(0.0)
    for _ in range(3):
        scheduler.submit(work(one, "a", 1.0))
    with pytest.raises(InboxFull, match="3 chunks"):
        scheduler.submit(work(one, "a", 1.0))
    scheduler.submit(work(one, "b", 1.0))
    assert one.depth == 4


def test_a_failed_slice_ends_its_batch() -> None:
    scheduler = Scheduler()
    long = scheduler.add(lane(slices=3))
    scheduler.submit(work(long, "a", 0.1))
    scheduler.submit(work(long, "a", 0.2))
    batch = batch_of(scheduler.next(0.0))
    assert scheduler.done(batch, 0.0, 0.0, failed=True)
    assert batch_of(scheduler.next(0.05)).works is not batch.works


@pytest.mark.parametrize("buckets", [(), (4, 4), (8, 4), (0, 4)])
def test_bad_buckets_are_named(buckets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="buckets are"):
        lane(buckets=buckets)


def test_a_lane_is_added_once() -> None:
    scheduler = Scheduler()
    scheduler.add(lane())
    with pytest.raises(ValueError, match="added before"):
        scheduler.add(lane())


STEPS = st.lists(
    st.tuples(
        st.integers(0, 11),  # lease
        st.integers(0, 2),  # lane
        st.one_of(st.floats(0.001, 0.3), st.just(math.inf)),  # seconds to the deadline
        st.floats(0.0, 0.03),  # seconds until the next submission
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, buckets=st.sampled_from([(1,), (2, 4), (64,)]), took=st.floats(0.0, 0.02))
def test_properties_of_any_schedule(
    steps: list[tuple[int, int, float, float]], buckets: tuple[int, ...], took: float
) -> None:
    """Every work runs once, leases keep their order and never run twice at once, the chosen batch holds the earliest
    deadline of all that may start, and a lane keeps its ticks."""
    scheduler = Scheduler(EDF_TICKS_SLICES, inbox=1000)
    lanes = [
        scheduler.add(lane(name, buckets=buckets, slices=slices)) for name, slices in (("a", 1), ("b", 1), ("c", 3))
    ]
    now, waiting, finished = 0.0, {}, {}
    starts: dict[str, float] = {}
    running: dict[str, Batch] = {}
    pending = list(steps)
    submitted = 0
    next_arrival = 0.0
    for _ in range(3000):
        while pending and next_arrival <= now:
            lease, index, budget, gap = pending.pop(0)
            item = work(lanes[index], lease, next_arrival + budget, next_arrival)
            waiting.setdefault(lease, []).append(item)
            scheduler.submit(item)
            submitted += 1
            next_arrival += gap
        decision = scheduler.next(now)
        if isinstance(decision, Batch):
            name = decision.lane.model
            heads = [items[0] for items in waiting.values() if items]
            in_flight = {item.lease for batch in running.values() for item in batch.works}
            if name not in running:
                leases = [item.lease for item in decision.works]
                assert len(set(leases)) == len(leases)
                assert not in_flight & set(leases)
                assert all(item in heads for item in decision.works)
                assert len(decision.works) <= decision.bucket <= buckets[-1]
                first = min(item.deadline for item in decision.works)
                others = [
                    item.deadline
                    for item in heads
                    if item.lane is decision.lane and item not in decision.works and item.lease not in in_flight
                ]
                assert all(first <= other for other in others)
                if buckets == (64,) and now < first - decision.lane.budget / 2 < math.inf:
                    assert now - starts.get(name, -math.inf) >= decision.lane.tick - 1e-9
                if buckets == (64,) and first < math.inf:
                    starts[name] = now

            def urgency(lane: Lane, works: list[Work], heads: list[Work] = heads) -> float:
                return min(item.deadline for item in (*works, *(head for head in heads if head.lane is lane)))

            for one in lanes:
                if one is not decision.lane and one.model in running:
                    assert urgency(decision.lane, decision.works) <= urgency(one, running[one.model].works)
            now += took
            if scheduler.done(decision, now, took):
                running.pop(name, None)
                for item in decision.works:
                    assert waiting[item.lease].pop(0) is item
                    finished[item] = now
            else:
                running[name] = decision
        elif decision is None and not pending:
            break
        else:
            times = ([decision] if decision is not None else []) + ([next_arrival] if pending else [])
            assert min(times) >= now
            now = min(times)
    assert len(finished) == submitted == len(steps)
    assert not scheduler._inboxes
    assert all(one.depth == 0 for one in lanes)
