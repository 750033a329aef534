"""A session's trace: when each chunk entered and left each stage, in a bounded ring that holds no media."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


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


class Trace:
    """The last ``size`` spans and interruptions of a session (0 keeps none)."""

    def __init__(self, size: int = 512) -> None:
        self._spans: deque[tuple[str, str, int, int, int, int, int, float, float]] = deque(maxlen=size)
        self.marks: deque[Mark] = deque(maxlen=size)
        self.record = self._spans.append  # takes a plain tuple in Span's order: made once a chunk and stage

    @property
    def spans(self) -> list[Span]:
        """Oldest first."""
        return [Span._make(span) for span in self._spans]

    def draw(self) -> str:
        """An SVG timeline, one lane a stage."""
        from .draw import draw_timeline

        return draw_timeline(self)
