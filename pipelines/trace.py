"""A session's trace: when each chunk entered and left each stage, in bounded rings that hold no media.

The rings are flat lists written in place: a record leaves no object behind for the garbage collector to count, whose
runs over a full house of sessions would cost more than everything else here.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from .chunk import Chunk

_FIELDS = 8


class Span(NamedTuple):
    """A stage took a chunk at ``taken`` and emitted this one at ``emitted`` (clock seconds).

    start: the emitted chunk's media time in units of ``1 / rate`` seconds. nanoseconds: its duration.
    """

    stage: str
    kind: str
    seq: int
    epoch: int
    start: int
    nanoseconds: int
    rate: int
    taken: float
    emitted: float

    @property
    def latency(self) -> float:
        """Seconds from taking the input to emitting this output."""
        return self.emitted - self.taken


class Mark(NamedTuple):
    """An interruption: ``epoch`` began at ``at`` (clock seconds)."""

    epoch: int
    at: float


class Lane:
    """The ring of one output port."""

    __slots__ = ("_at", "_ring", "stage")

    def __init__(self, stage: str, size: int) -> None:
        self.stage = stage
        self._ring: list[Any] = [None] * (size * _FIELDS)
        self._at = 0

    def record(self, chunk: Chunk, nanoseconds: int, taken: float, emitted: float) -> None:
        """The stage emitted ``chunk``, made of what it took at ``taken``."""
        ring, at = self._ring, self._at
        if ring:
            ring[at : at + _FIELDS] = (
                type(chunk),
                chunk.seq,
                chunk.epoch,
                chunk.start,
                nanoseconds,
                chunk.rate,
                taken,
                emitted,
            )
            at += _FIELDS
            self._at = at if at < len(ring) else 0

    def spans(self) -> list[Span]:
        """Oldest first."""
        ring = self._ring[self._at :] + self._ring[: self._at]
        rows = (ring[i : i + _FIELDS] for i in range(0, len(ring), _FIELDS))
        return [Span(self.stage, row[0].__name__, *row[1:]) for row in rows if row[0] is not None]


class Trace:
    """The last ``size`` spans of each output port, and as many interruptions (0 keeps none)."""

    def __init__(self, size: int = 128) -> None:
        self.size = size
        self.marks: deque[Mark] = deque(maxlen=size)
        self._lanes: list[Lane] = []

    def lane(self, stage: str) -> Lane:
        """A ring for one more output port."""
        self._lanes.append(Lane(stage, self.size))
        return self._lanes[-1]

    @property
    def spans(self) -> list[Span]:
        """In the order they were emitted."""
        return sorted((span for lane in self._lanes for span in lane.spans()), key=lambda span: span.emitted)

    def draw(self) -> str:
        """An SVG timeline, one lane a stage."""
        from .draw import draw_timeline

        return draw_timeline(self)
