"""A stage with 30 ms of work per 20 ms chunk for ten virtual minutes: memory stays bounded under every policy."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections import deque
from collections.abc import AsyncIterator

import numpy as np
import pytest

from antiphon.pipelines.chunk import Audio
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.edge import Link
from antiphon.pipelines.session import Session
from antiphon.pipelines.stage import Context, Input, StageError, stage

CHUNKS = 10 * 60 * 50  # ten minutes of 20 ms
ITEMS = 8


ALIVE = 0  # chunks whose samples exist


def counted(value: int) -> np.ndarray:
    """320 samples that count themselves while they live."""
    global ALIVE
    samples = np.full(320, value, np.float32)
    ALIVE += 1
    weakref.finalize(samples, died)
    return samples


def died() -> None:
    global ALIVE
    ALIVE -= 1


def oracle(policy: str) -> list[int]:
    """Which chunks a consumer gets, in whole milliseconds: it looks before the producer where both act at once."""
    queue: deque[int] = deque()
    seen, free = [], 0
    for i in range(CHUNKS):
        now = (i + 1) * 20
        while queue and free <= now:
            seen.append(queue.popleft())
            free += 30
        if not queue and free <= now:
            seen.append(i)
            free = now + 30
        elif len(queue) < ITEMS:
            queue.append(i)
        elif policy == "drop_oldest":
            queue.popleft()
            queue.append(i)
    return seen + list(queue)


@stage
async def every_20_ms(ctx: Context) -> AsyncIterator[Audio]:
    """20 ms of audio every 20 ms, whatever becomes of it."""
    begin = ctx.now
    for i in range(CHUNKS):
        await ctx.clock.sleep_until(begin + (i + 1) * 0.02)
        yield Audio(counted(i), rate=16000, start=i * 320)


class Result:
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.most_alive = 0
        self.ended = 0.0


def run(policy: str) -> tuple[Result, Session]:
    result = Result()

    @stage(name=f"slow_{policy}")
    async def slow(ctx: Context, chunks: Input) -> None:
        async for chunk in chunks:
            await ctx.sleep(0.03)
            result.seen.append(chunk.seq)
            if len(result.seen) % 1000 == 0:
                result.most_alive = max(result.most_alive, ALIVE)
        result.ended = ctx.now

    session = (every_20_ms() >> Link(items=ITEMS, policy=policy) >> slow()).session(trace=64)
    run_virtual(session.run())
    return result, session


@pytest.mark.parametrize("policy", ["block", "drop_oldest", "drop_newest"])
def test_memory_stays_bounded_and_every_chunk_is_accounted_for(policy: str) -> None:
    run(policy)  # first run: imports and caches
    gc.collect()
    assert ALIVE == 0
    tracemalloc.start()
    result, session = run(policy)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stats = next(iter(session.stats().values()))

    assert stats.depth_max == ITEMS
    assert stats.media_ms_max == ITEMS * 20.0
    assert 0 < result.most_alive <= ITEMS + 3  # the edge, one in work, one waiting to get in, one being made
    assert peak < 3_000_000  # 30,000 chunks of 1.3 kB are 38 MB; the list of sequence numbers is 1 MB
    assert stats.passed + stats.dropped_policy == CHUNKS
    assert stats.passed == len(result.seen)
    if policy == "block":
        assert stats.dropped == 0
        assert result.seen == list(range(CHUNKS))
        assert result.ended == pytest.approx(0.02 + CHUNKS * 0.03)
    else:
        assert result.seen == oracle(policy)
        # In 600 s it starts one chunk at 20 ms and one each 30 ms after it, and the edge is full at the end.
        assert stats.dropped_policy == CHUNKS - (1 + (CHUNKS * 20 - 20) // 30) - ITEMS == 9992
        if policy == "drop_oldest":
            assert stats.late_ms_max <= ITEMS * 30  # a full edge, worked off


def test_error_policy_stops_the_session_when_the_edge_is_full() -> None:
    with pytest.raises(StageError, match=r"'every_20_ms' failed: EdgeFull: edge every_20_ms -> slow_error is full \(8"):
        run("error")
