"""Chunks: what flows through a graph, timed by media and never by the wall clock.

A chunk's ``start`` and ``duration`` are integers in units of ``1 / rate`` seconds: samples for audio, frames or
90 kHz ticks for video, samples of the audio it came from for text and tokens. ``seq``, ``epoch`` and ``final``
describe its place in a stream. A stage leaves ``seq`` and ``epoch`` unset: the port that first emits a chunk stamps
them, and after that a chunk never changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNSET = -1
_BILLION = 1_000_000_000


class Stale(Exception):
    """The work belongs to an epoch that an interruption has ended; its result is not wanted."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """A span of media: ``[start, start + duration)`` in units of ``1 / rate`` seconds.

    seq: position in the stream of the port that emitted it. epoch: which stretch between interruptions it belongs to.
    final: the last chunk of an utterance, turn or file. Finals and events are never dropped by an edge's policy.
    """

    rate: int
    start: int = 0
    seq: int = UNSET
    epoch: int = UNSET
    final: bool = False

    @property
    def duration(self) -> int:
        """Units of ``1 / rate`` seconds."""
        return 0

    @property
    def end(self) -> int:
        """The first unit after the chunk."""
        return self.start + self.duration

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.duration / self.rate

    @property
    def start_seconds(self) -> float:
        """Media time of the first unit."""
        return self.start / self.rate

    @property
    def end_seconds(self) -> float:
        """Media time just after the last unit."""
        return (self.start + self.duration) / self.rate

    @property
    def nanoseconds(self) -> int:
        """Duration in whole nanoseconds: what edges add up, without rounding drift."""
        return self.duration * _BILLION // self.rate

    @property
    def droppable(self) -> bool:
        """Whether an edge's drop policy may drop it: media is, finals and events are not."""
        return not self.final

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self) -> int:
        return hash((type(self), self.rate, self.start, self.seq, self.epoch))

    def __str__(self) -> str:
        seq = "" if self.seq == UNSET else f" seq {self.seq}"
        return f"{type(self).__name__}{seq} at {self.start_seconds:.3f} s"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Timed(Chunk):
    """A chunk whose duration is stated rather than counted from its content."""

    duration: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Audio(Chunk):
    """Sound. samples: float32 in [-1, 1], ``[n]`` mono or ``[channels, n]``; the duration is ``n`` at ``rate`` Hz."""

    samples: NDArray[np.float32]

    @property
    def duration(self) -> int:
        count: int = self.samples.shape[-1]
        return count


@dataclass(frozen=True, slots=True)
class Word:
    """A word, and the seconds of media in which it was said."""

    text: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, eq=False)
class Text(_Timed):
    """Text, with the span of media it was said in (or is to be), by word where known. ``final`` closes an utterance.

    settled: words at its beginning that later texts of the utterance repeat; None for all but the last.
    """

    text: str
    words: tuple[Word, ...] = ()
    settled: int | None = None

    @property
    def settled_words(self) -> tuple[Word, ...]:
        """Words that will not change."""
        return self.words if self.final else self.words[: -1 if self.settled is None else self.settled]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens(_Timed):
    """Integer tokens ``[n]`` or ``[codebooks, n]``, int64."""

    ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Video(_Timed):
    """One picture, ``[height, width, 3]`` uint8 RGB."""

    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Event(_Timed):
    """Something that happened at a media time: ``speech_start``, ``turn_end``, ``heard``, ... ``data`` is JSON-like."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def droppable(self) -> bool:
        return False


@dataclass(frozen=True, slots=True, eq=False)
class Joined(_Timed):
    """What several inputs held in one span of media time: a tuple of chunks for each input of a ``Join``."""

    parts: tuple[tuple[Chunk, ...], ...]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return bool(
            isinstance(left, np.ndarray)
            and isinstance(right, np.ndarray)
            and left.dtype == right.dtype
            and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
        )
    return bool(left == right)
