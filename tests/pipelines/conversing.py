"""Conversations with a tiny model: the stage in its graph, fed in real time by a virtual clock."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from tiny_duplex import tiny_duplex

from antiphon.pipelines.chunk import Audio, Chunk, Event
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.duplex import Duplex
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.graph import Graph
from antiphon.pipelines.stage import Inlet
from antiphon.pipelines.stages.converse import Converse

RATE, FRAME = 24000, 1920


def noise(frames: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (0.1 * np.random.default_rng(seed).standard_normal((frames, FRAME))).astype(np.float32)


def engine(model: Duplex | None = None, slots: int = 4, **options: Any) -> Engine:
    made = Engine(inline=True, inbox=64, **options)
    made.add("converse", model or tiny_duplex(prefill=4), slots=slots)
    return made


def graph(**options: Any) -> Graph:
    audio, control = Inlet().named("audio"), Inlet().named("control")
    talk = Converse(**{"text_seed": 1, "audio_seed": 2} | options)
    return (audio >> talk) | (control >> talk["control"])


def converse(
    sound: Sequence[np.ndarray[Any, np.dtype[np.float32]]],
    events: dict[int, str | Event] | None = None,
    rate: int = RATE,
    model: Duplex | None = None,
    counters: Counter[str] | None = None,
    **options: Any,
) -> list[Chunk]:
    """What comes out of the graph when the pieces of sound go in in real time, and events before some of them.

    counters: gets the session's.
    """

    async def main() -> list[Chunk]:
        made: list[Chunk] = []
        with engine(model, clock=VirtualClock()) as models:
            async with graph(**options).session(engine=models) as session:

                async def read() -> None:
                    async for chunk in session.outputs():
                        made.append(chunk)

                reader = asyncio.create_task(read())
                start = 0
                for number, pcm in enumerate(sound):
                    if event := (events or {}).get(number):
                        name, data = (event.name, event.data) if isinstance(event, Event) else (event, {})
                        await session.send(Event(name=name, data=data, rate=rate, start=start), "control")
                        await session.clock.sleep(0.001)
                    await session.send(Audio(samples=pcm, rate=rate, start=start), "audio")
                    start += len(pcm)
                    await session.clock.sleep(len(pcm) / rate)
                session.finish()
                await reader
                if counters is not None:
                    counters.update(session.counters)
        return made

    return run_virtual(main())


def sounds(chunks: Sequence[Chunk]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.concatenate([chunk.samples for chunk in chunks if isinstance(chunk, Audio)])


def persona(**changes: Any) -> Duplex:
    return tiny_duplex(prefill=4, card=2048, mimi={"bins": 2048}, **changes)
