"""How long packets take, compared with each other: what a playout buffer waits for.

A packet's *transit* is its arrival time minus its media time, both in seconds; only differences of transits mean
anything, for the two clocks share no origin. A quantile of the last transits follows jitter up within a few packets and
down again as a burst leaves the window, and follows drifting clocks and changed routes by itself (compare RFC 3550
appendix A.8, and the playout algorithms of Ramjee, Kurose, Towsley and Schulzrinne, INFOCOM 1994).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

WINDOW = 64  # packets: 1.3 seconds of 20 ms ones
PUNCTUAL = 0.97  # the share of packets that a buffer should be in time for


class Transits:
    """The transits of the last ``window`` packets, in seconds."""

    def __init__(self, window: int = WINDOW) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._window = window

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, transit: float) -> None:
        """Take a packet's transit, in order of arrival."""
        self._recent.append(transit)
        insort(self._sorted, transit)
        if len(self._recent) > self._window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def clear(self) -> None:
        """Forget all: the stream begins anew."""
        self._recent.clear()
        self._sorted.clear()

    @property
    def fastest(self) -> float:
        """The shortest transit. Like the others, defined when there is one at all."""
        return self._sorted[0]

    @property
    def median(self) -> float:
        """The one in the middle."""
        return self._sorted[len(self._sorted) // 2]

    @property
    def punctual(self) -> float:
        """The transit that ``PUNCTUAL`` of the packets do not exceed."""
        return self._sorted[int(PUNCTUAL * (len(self._sorted) - 1) + 0.5)]
