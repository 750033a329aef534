"""Edges: bounds, policies, fences, counters, waiting."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.pipelines.chunk import Audio, Chunk, Event, Text
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.edge import POLICIES, Edge, EdgeFull, Link

RATE = 16000


def audio(index: int, ms: int = 20, **fields: object) -> Audio:
    samples = np.zeros(RATE * ms // 1000, np.float32)
    return Audio(samples, rate=RATE, start=index * len(samples), seq=index, **{"epoch": 0, **fields})


def edge(now: list[float] | None = None, **link: object) -> Edge:
    time = now or [0.0]
    return Edge("a -> b", Link(**link), lambda: time[0])


def put(edge: Edge, chunk: Chunk) -> bool:
    return edge.put_nowait(chunk, chunk.nanoseconds)


def drain(edge: Edge) -> list[int]:
    return [edge.take().seq for _ in range(len(edge))]


def test_bounds_hold_in_items_and_in_media_time() -> None:
    few = edge(items=3, ms=1000)
    assert [put(few, audio(i)) for i in range(5)] == [True, True, True, False, False]
    short = edge(items=100, ms=50)
    assert [put(short, audio(i)) for i in range(4)] == [True, True, False, False]
    assert short.stats().media_ms == 40.0
    assert not short.full
    third = edge(items=100, ms=100 / 3)
    assert [put(third, Text("x", rate=3000, duration=50, seq=i, epoch=0)) for i in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    assert third.full is False


def test_a_chunk_longer_than_the_bound_passes_an_empty_edge() -> None:
    short = edge(ms=50)
    assert put(short, audio(0, ms=500))
    assert short.full
    assert not put(short, audio(1, ms=1))
    assert drain(short) == [0]


def test_drop_oldest_and_newest_keep_the_right_ones_and_count() -> None:
    oldest, newest = edge(items=3, policy="drop_oldest"), edge(items=3, policy="drop_newest")
    for i in range(10):
        assert put(oldest, audio(i))
        assert put(newest, audio(i))
    assert oldest.stats().dropped_policy == newest.stats().dropped_policy == 7
    assert (drain(oldest), drain(newest)) == ([7, 8, 9], [0, 1, 2])


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
def test_finals_and_events_are_never_dropped_by_policy(policy: str) -> None:
    full = edge(items=3, policy=policy)
    kept = [audio(0, final=True), Event("turn_end", rate=1, seq=1, epoch=0), audio(2, final=True)]
    assert put(full, audio(7))
    assert put(full, kept[0])
    assert put(full, audio(8))
    assert put(full, kept[1])  # evicts one piece of media
    assert put(full, kept[2])  # evicts the other
    assert not put(full, Event("more", rate=1, seq=3, epoch=0))  # only such chunks left: it waits
    assert full.stats().dropped_policy == 2
    assert drain(full) == [0, 1, 2]


def test_error_policy_names_edge_bound_and_remedy() -> None:
    full = edge(items=1, policy="error")
    put(full, audio(0))
    with pytest.raises(
        EdgeFull, match=r"edge a -> b is full \(1 chunks, 20 ms\): raise its bound \(1 items, 1000 ms\)"
    ):
        put(full, audio(1))


def test_a_fence_drops_older_chunks_at_once_and_refuses_older_ones() -> None:
    fenced = edge()
    for i in range(4):
        put(fenced, audio(i, epoch=i // 2))
    fenced.fence(1)
    assert len(fenced) == 2
    assert fenced.stats().media_ms == 40.0
    assert put(fenced, audio(9, epoch=0))
    assert fenced.stats().dropped_stale == 3
    assert drain(fenced) == [2, 3]


def test_a_lasting_edge_passes_older_chunks_on_as_new_ones() -> None:
    lasting = Edge("mic -> asr", Link(), lambda: 0.0, lasting=True)
    put(lasting, audio(0))
    lasting.fence(3)
    put(lasting, audio(1, epoch=2))
    chunks = [lasting.take(), lasting.take()]
    assert [(chunk.seq, chunk.epoch) for chunk in chunks] == [(0, 3), (1, 3)]
    assert lasting.stats().dropped == 0


def test_lateness_grows_with_a_backlog_and_not_with_a_constant_delay() -> None:
    now = [0.0]
    steady = edge(now)
    for i in range(10):
        now[0] = 5.0 + (i + 1) * 0.02
        put(steady, audio(i))
        steady.take()
    assert steady.stats().late_ms_max == pytest.approx(0, abs=1e-6)
    for i in range(10, 20):
        now[0] += 0.03
        put(steady, audio(i))
        steady.take()
    assert steady.stats().late_ms == pytest.approx(100)


def test_a_blocked_producer_waits_for_room_and_a_fence_frees_it() -> None:
    async def main() -> None:
        clock = VirtualClock()
        narrow = Edge("e", Link(items=1), clock.now)
        await narrow.put(audio(0))

        async def produce(chunk: Audio) -> float:
            await narrow.put(chunk)
            return clock.now()

        blocked = asyncio.create_task(produce(audio(1)))
        await clock.sleep(1.0)
        assert (await narrow.get()).seq == 0
        assert await blocked == 1.0
        stale = asyncio.create_task(produce(audio(2)))
        await clock.sleep(1.0)
        narrow.fence(1)
        assert await stale == 2.0
        assert len(narrow) == 0
        assert narrow.stats().dropped_stale == 2

    run_virtual(main())


def test_a_cancelled_producer_or_consumer_leaves_nothing_behind() -> None:
    async def main() -> None:
        clock = VirtualClock()
        narrow = Edge("e", Link(items=1), clock.now)
        reader = asyncio.create_task(narrow.get())
        await clock.sleep(0)
        reader.cancel()
        await clock.sleep(0)
        assert put(narrow, audio(0))
        first, second = (asyncio.create_task(narrow.put(audio(i))) for i in (1, 2))
        await clock.sleep(0.1)
        assert narrow.take().seq == 0  # wakes the first, which is cancelled before it runs
        first.cancel()
        await second  # so the room must pass to the second
        assert narrow.take().seq == 2

    run_virtual(main())


def test_close_ends_after_what_is_queued() -> None:
    async def main() -> None:
        closing = edge()
        put(closing, audio(0))
        closing.close()
        assert (await closing.get()).seq == 0
        assert await closing.get() is None
        put(closing, audio(1))
        assert closing.stats().dropped_unread == 1

    run_virtual(main())


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ({"items": 0}, "items=0"),
        ({"ms": -1.0}, "ms=-1.0"),
        ({"policy": "drop"}, "policy='drop': use one of block, drop_oldest"),
        ({"feedback": True}, "feedback=True with policy 'block'"),
    ],
)
def test_a_bad_link_is_refused(link: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Link(**link)


@given(
    policy=st.sampled_from(POLICIES),
    items=st.integers(1, 5),
    ms=st.integers(10, 100),
    steps=st.lists(st.tuples(st.sampled_from("pppgf"), st.integers(1, 60), st.integers(0, 2), st.booleans())),
)
def test_nothing_is_lost_uncounted_and_bounds_always_hold(
    policy: str, items: int, ms: int, steps: list[tuple[str, int, int, bool]]
) -> None:
    """Every chunk put is queued, out, refused or counted; depth and media time stay in bounds; order is kept."""
    bounded, offered, waiting, out, epoch = edge(items=items, ms=ms, policy=policy), 0, 0, [], 0
    for action, length, age, final in steps:
        if action == "p":
            chunk = audio(0, ms=length, epoch=max(epoch - age, 0), final=final)
            object.__setattr__(chunk, "seq", offered)
            offered += 1
            try:
                waiting += not put(bounded, chunk)
            except EdgeFull:
                waiting += 1
        elif action == "g":
            if len(bounded):
                chunk = bounded.take()
                assert chunk.epoch >= epoch
                out.append(chunk.seq)
        else:
            epoch += 1
            bounded.fence(epoch)
        stats = bounded.stats()
        assert stats.depth <= items
        assert stats.media_ms <= ms or stats.depth == 1
        assert offered == waiting + len(out) + stats.depth + stats.dropped
        assert out == sorted(out)


def test_a_producer_cancelled_while_it_waits_ends_as_cancelled_even_if_the_consumer_goes_first() -> None:
    async def main() -> None:
        full = edge(items=1)
        await full.put(audio(0))
        waiting = asyncio.create_task(full.put(audio(1)))
        await asyncio.sleep(0)
        waiting.cancel()
        full.abandon()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run_virtual(main())
