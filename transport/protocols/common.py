"""What the protocols share: 16-bit sound, a connection's two directions, and how errors are named to clients."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipelines.stage import StageError
from ..call import ItemsLost, NoInlet, TakenOver
from ..service import Full, NoSuchCall
from ..tokens import BadToken
from ..websocket import ERROR, POLICY, TRY_LATER

Samples = NDArray[np.float32]

RATES = (8000, 48000)  # hertz of sound from clients, lowest and highest

REFUSALS: tuple[tuple[type[Exception], str, int], ...] = (
    (Full, "full", TRY_LATER),
    (NoSuchCall, "no_such_call", POLICY),
    (BadToken, "bad_token", POLICY),
    (TakenOver, "taken_over", POLICY),
    (ItemsLost, "items_lost", POLICY),
    (NoInlet, "no_inlet", POLICY),
    (StageError, "failed", ERROR),
    (ValueError, "bad_request", POLICY),
)
"""Errors that a client is told about: the error, its code in messages, and the code that closes a websocket."""

TOLD = tuple(kind for kind, _, _ in REFUSALS)


def told(error: Exception) -> str:
    """What a client is told of an error. Of a stage that had taken a chunk its name alone: the rest may be of what
    someone said."""
    if isinstance(error, StageError) and error.chunk is not None:
        return f"stage {error.stage!r} failed: start a new call"
    return str(error)


def refusal(error: Exception) -> tuple[str, str, int]:
    """Of one of the errors ``TOLD``: its code and its text for messages, and the code that closes a websocket."""
    for kind, code, close in REFUSALS:
        if isinstance(error, kind):
            return code, told(error), close
    raise error


def from_pcm16(data: bytes) -> Samples:
    """Little-endian 16-bit PCM as float32 in [-1, 1). Raises ValueError for half a sample."""
    if len(data) % 2:
        raise ValueError(f"{len(data)} bytes of 16-bit sound: a message holds whole samples")
    return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)


def to_pcm16(samples: Samples) -> bytes:
    """Float32 as little-endian 16-bit PCM, clipped; the inverse of ``from_pcm16``."""
    data: bytes = np.clip(np.rint(samples * np.float32(32768)), -32768, 32767).astype("<i2").tobytes()
    return data


def whole(name: str, value: str | None, default: int, bounds: tuple[int, int]) -> int:
    """A whole number from a client's options. Raises ValueError that names it and its bounds."""
    low, high = bounds
    text = str(default) if value is None else value
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise ValueError(f"{name}={text[:40]!r}: give a whole number from {low} to {high}")
    return int(text)


async def until_one_ends(*directions: Coroutine[Any, Any, None]) -> None:
    """Run the directions of a connection until the first ends, then cancel the others; raises what it raised."""
    tasks = [asyncio.create_task(direction) for direction in directions]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def foreign(language: str | None, native: str | None) -> dict[str, Any]:
    """The option ``language``, unless it is the ``native`` one (``en-GB`` is ``en``), that a model is not told."""
    if not language or (native is not None and language.partition("-")[0].lower() == native):
        return {}
    return {"language": language[:40]}
