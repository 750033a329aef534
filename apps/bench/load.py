"""Open-loop load: sessions that send a chunk whenever their media clock says so, whatever the engine does.

Session ``i`` of ``n`` sends chunk ``j`` at ``(i / n + j) * period``, or with a seed at a phase of its own and up to
``jitter`` later each time; latency runs from when the chunk was complete, the jitter not yet added, to the output's
arrival in the event loop, so a stalled server cannot slow the load that measures it down.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ...pipelines.engine import Engine
from ...pipelines.engine.errors import InboxFull
from ...pipelines.engine.lease import Lease

SEND_EVERY = 0.001  # seconds; chunks due meanwhile go out together, their latency counted from when they were due

Make = Callable[[int, int], dict[str, Any]]


@dataclass
class Load:
    """What one run of ``sessions`` gave. Latencies in seconds."""

    sessions: int
    period: float
    latencies: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0

    def summary(self) -> dict[str, Any]:
        """Percentiles in milliseconds. late: the share later than a period. held: p99 within it and nothing lost."""
        lost = {"refused": self.refused, "failed": self.failed}
        if not self.latencies:
            return {"sessions": self.sessions, "chunks": 0, **lost, "held": False}
        milliseconds = np.array(self.latencies) * 1e3
        p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99])
        late = float(np.mean(milliseconds > self.period * 1e3))
        return {
            "sessions": self.sessions,
            "chunks": len(milliseconds),
            "p50_ms": round(float(p50), 2),
            "p95_ms": round(float(p95), 2),
            "p99_ms": round(float(p99), 2),
            "max_ms": round(float(milliseconds.max()), 2),
            "late": round(late, 5),
            **lost,
            "held": bool(p99 < self.period * 1e3 and late <= 0.01 and not self.refused and not self.failed),
        }


async def run_load(
    engine: Engine,
    name: str,
    variant: Hashable,
    period: float,
    sessions: int,
    make: Make,
    *,
    seconds: float,
    warm: float,
    advance: Callable[[float], None] | None = None,
    opened: Callable[[Lease], object] | None = None,
    seed: int | None = None,
    jitter: float = 0.0,
) -> Load:
    """Open ``sessions`` leases, send for ``warm + seconds`` and record the chunks due after ``warm``.

    make: (session, chunk) -> inputs. advance: told the seconds covered so far, for a progress bar. opened: called with
    each lease in the engine's thread, before it is used. seed, jitter: see the module; the jitter is below a period.
    """
    leases: list[Lease] = [await engine.open(name, variant, paced=False) for _ in range(sessions)]
    if opened is not None:
        for lease in leases:
            await engine.ask(partial(opened, lease))
    load = Load(sessions, period)
    gc.collect()
    gc.freeze()  # a full collection over everything that was imported would stop the server for a chunk
    pending: set[asyncio.Future[Any]] = set()
    try:
        chunks = int((warm + seconds) / period)
        plan = schedule(sessions, chunks, period, seed, jitter)
        await _send(load, leases, make, pending, plan, warm=warm, advance=advance)
        if pending:
            await asyncio.wait(pending, timeout=5 * period + 1)
        load.failed += len(pending)
    finally:
        gc.unfreeze()
        for lease in leases:
            lease.close()
    return load


def schedule(
    sessions: int, chunks: int, period: float, seed: int | None, jitter: float
) -> list[tuple[float, float, int, int]]:
    """When each chunk is sent, when it was due, its session and its number, in the order of sending."""
    rng = np.random.default_rng(seed)
    phases = np.arange(sessions) / sessions if seed is None else rng.random(sessions)
    due = (np.arange(chunks)[:, None] + phases) * period
    sent = due + (rng.random(due.shape) * jitter if jitter else 0.0)
    order = np.argsort(sent, axis=None, kind="stable")
    number, session = np.divmod(order, sessions)
    return list(
        zip(sent.flat[order].tolist(), due.flat[order].tolist(), session.tolist(), number.tolist(), strict=True)
    )


async def _send(
    load: Load,
    leases: Sequence[Lease],
    make: Make,
    pending: set[asyncio.Future[Any]],
    plan: Sequence[tuple[float, float, int, int]],
    *,
    warm: float,
    advance: Callable[[float], None] | None,
) -> None:
    loop = asyncio.get_running_loop()
    start = loop.time() + 0.1
    period, count = load.period, len(leases)

    def arrived(due: float, future: asyncio.Future[Any]) -> None:
        pending.discard(future)
        if future.cancelled() or future.exception() is not None:
            load.failed += 1
        elif due >= start + warm:
            load.latencies.append(loop.time() - due)

    sent = 0
    while sent < len(plan):
        now = loop.time()
        while sent < len(plan) and start + plan[sent][0] <= now:
            _, due, session, chunk = plan[sent]
            due += start
            try:
                future = leases[session].step(make(session, chunk), deadline=due + period)
            except InboxFull:
                load.refused += 1
            else:
                pending.add(future)
                future.add_done_callback(partial(arrived, due))
            sent += 1
        if load.refused > 20 * count:
            return
        if advance is not None:
            advance(now - start)
        if sent < len(plan):
            await asyncio.sleep(max(SEND_EVERY, start + plan[sent][0] - loop.time()))


def bisect(most: int, holds: Callable[[int], bool], may_go_on: Callable[[], bool]) -> int:
    """The largest number from 1 to ``most`` that holds, 0 for none; as far as it may go on. The top is tried first."""
    low, high = 0, most + 1
    count = most
    while high - low > max(1, low // 32) and may_go_on():
        low, high = (count, high) if holds(count) else (low, count)
        count = (low + high) // 2
    return low
