"""Marks: control events that come out of a recogniser again once all that was said before them is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from .chunk import UNSET, Event

MOST = 1024  # on their way


class Marks:
    """The marks on their way through a stage, in the order of their media times."""

    def __init__(self) -> None:
        self._waiting: deque[Event] = deque()

    def add(self, event: Event) -> None:
        """Take note of a control event; only those named ``mark`` are. Raises ValueError for too many."""
        if event.name != "mark":
            return
        if len(self._waiting) == MOST:
            raise ValueError(f"{MOST} marks wait for sound: send sound between them")
        self._waiting.append(replace(event, seq=UNSET))

    def passed(self, seconds: float = float("inf")) -> Iterator[Event]:
        """Those that text reaches which tells of this much media."""
        while self._waiting and self._waiting[0].start_seconds <= seconds:
            yield self._waiting.popleft()
