"""What the engine itself costs: CPU per chunk of a thousand sessions that send at the pace of their media."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from toy_models import Null

from antiphon.pipelines.engine import Engine, Lease

SESSIONS, CHUNKS, PERIOD = 1000, 40, 0.08
ALLOWED = 50e-6  # seconds of CPU per chunk, both threads


async def paced(start: float, lease: Lease | None, samples: np.ndarray) -> None:
    """A chunk each period; without a lease, only its timers."""
    loop = asyncio.get_running_loop()
    for index in range(CHUNKS):
        await asyncio.sleep(start + index * PERIOD - loop.time())
        if lease is not None:
            await lease.step({"x": samples})


@pytest.mark.slow
def test_a_chunk_costs_microseconds() -> None:
    async def main() -> tuple[float, float]:
        samples = np.zeros(1280, np.float32)
        phases = np.random.default_rng(0).random(SESSIONS) * PERIOD
        with Engine(limit=10.0) as engine:
            engine.add("null", Null(1280), slots=SESSIONS, exact=False)
            leases = [await engine.open("null") for _ in range(SESSIONS)]
            spent = []
            for chosen in ([None] * SESSIONS, leases):
                start = asyncio.get_running_loop().time() + 0.1
                before = time.process_time()
                await asyncio.gather(
                    *(paced(start + phase, lease, samples) for phase, lease in zip(phases, chosen, strict=True))
                )
                spent.append((time.process_time() - before) / (SESSIONS * CHUNKS))
            assert engine.metrics()["models"]["null"]["variants"]["only"]["rows"] == SESSIONS * CHUNKS
        return spent[0], spent[1]

    timers, total = asyncio.run(main())
    print(f"\n{1e6 * total:.1f} us of CPU per chunk, of which {1e6 * timers:.1f} us are the pacing timers")
    assert total - timers < ALLOWED
