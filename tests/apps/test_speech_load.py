"""How many streams of speech the engine's rules carry, in virtual time: what steps cost is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import pytest
import torch

from antiphon.apps.bench.speech_load import run_load
from antiphon.apps.bench.speech_models import NAME, SHAPES, Random, Settings
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.engine import Engine

SESSIONS = 20
SHAPE = dataclasses.replace(SHAPES["tiny"], words=18)
SETTINGS = Settings((25, 50, 75), 60, None, (32,), (64,), (100, 50, 25, 10), {"lm": 64, "flow": 8, "vocoder": 16})
SECONDS = {"lm": (0.0018, 0.00002), "flow": (0.010, 0.002), "vocoder": (0.008, 0.001)}  # of a slice or turn, and a row


def cost(name: str, variant: Hashable, rows: int) -> float:
    """Seconds of a slice or turn."""
    least, more = SECONDS[name.removeprefix(f"{NAME}.")]
    return least + more * rows


@pytest.fixture(scope="module")
def random() -> Random:
    return Random(SHAPE, SETTINGS, torch.device("cpu"), torch.float32)


def test_a_load_holds_that_bursts_one_after_another_on_one_stream_do_not(random: Random) -> None:
    async def main() -> dict[str, Any]:
        with Engine(inline=True, clock=VirtualClock(), cost=cost, limit=1e9, slowdown=1.2) as engine:
            random.install(engine, SESSIONS)
            load = await run_load(
                engine, NAME, SESSIONS, random.seconds, SHAPE.words, seconds=4, warm=1, limit=0.2, jitter=0.3
            )
            return load.summary()

    summary = run_virtual(main())
    assert summary["held"], summary
    assert summary["p50_ms"] < 140
