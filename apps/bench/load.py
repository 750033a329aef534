"""Open-loop load: sessions that send a chunk whenever their media clock says so, whatever the engine does.

Session ``i`` of ``n`` sends chunk ``j`` at ``(i / n + j) * period``; latency runs from that scheduled moment to the
output's arrival in the event loop, so a stalled server cannot slow the load that measures it down.
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
) -> Load:
    """Open ``sessions`` leases, send for ``warm + seconds`` and record the chunks due after ``warm``.

    make: (session, chunk) -> inputs. advance: told the seconds covered so far, for a progress bar.
    """
    leases: list[Lease] = [await engine.open(name, variant, paced=False) for _ in range(sessions)]
    load = Load(sessions, period)
    gc.collect()
    gc.freeze()  # a full collection over everything that was imported would stop the server for a chunk
    pending: set[asyncio.Future[Any]] = set()
    try:
        await _send(load, leases, make, pending, seconds=seconds, warm=warm, advance=advance)
        if pending:
            await asyncio.wait(pending, timeout=5 * period + 1)
        load.failed += len(pending)
    finally:
        gc.unfreeze()
        for lease in leases:
            lease.close()
    return load


async def _send(
    load: Load,
    leases: Sequence[Lease],
    make: Make,
    pending: set[asyncio.Future[Any]],
    *,
    seconds: float,
    warm: float,
    advance: Callable[[float], None] | None,
) -> None:
    loop = asyncio.get_running_loop()
    start = loop.time() + 0.1
    period, count = load.period, len(leases)
    total = int((warm + seconds) / period) * count

    def arrived(due: float, future: asyncio.Future[Any]) -> None:
        pending.discard(future)
        if future.cancelled() or future.exception() is not None:
            load.failed += 1
        elif due >= start + warm:
            load.latencies.append(loop.time() - due)

    sent = 0
    while sent < total:
        now = loop.time()
        while sent < total and (due := start + sent * period / count) <= now:
            chunk, session = divmod(sent, count)
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
        await asyncio.sleep(max(SEND_EVERY, start + sent * period / count - loop.time()))
