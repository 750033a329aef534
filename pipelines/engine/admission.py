"""Whether one more session fits, from measured step times; and which load to shed, in order, when it did not.

``U = sum over lanes of t(B) / T``: a lane of ``n`` sessions that sends a chunk every ``period`` seconds gets
``B = n T / period`` of them per ``T``, the longest the scheduler lets it wait (half its budget), and steps them in
``t(B)``. A session is admitted while ``U`` with it stays at or below the limit, 0.75 by default.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NoReturn

from .errors import AtCapacity
from .metrics import LaneMetrics
from .scheduler import Lane

LIMIT = 0.75
SMOOTHING = 0.1  # weight of the newest session in the mean session length


class Admission:
    """Counts sessions per lane and predicts the device's utilisation.

    apart: whether streams run at the same time, so that the busiest decides; else their shares add up.
    """

    def __init__(self, measured: Mapping[Lane, LaneMetrics], limit: float = LIMIT, *, apart: bool = True) -> None:
        if not limit > 0:
            raise ValueError(f"limit is {limit}; give the share of the device that sessions may use, such as 0.75")
        self.limit, self._apart = limit, apart
        self.sessions: Counter[Lane] = Counter()
        self._measured = measured
        self._opened: dict[object, float] = {}
        self._mean_length: float | None = None

    def utilisation(self, extra: Lane | None = None, *, less: Lane | None = None) -> float:
        """The share of the device, of its busiest stream where they run at the same time, that the admitted sessions
        need, with one more in ``extra``, one less in ``less``."""
        shares: dict[str, float] = {}
        for lane in self._measured:
            sessions = self.sessions[lane] + (lane is extra) - (lane is less)
            if sessions:
                shares[lane.stream] = shares.get(lane.stream, 0.0) + self._lane_share(lane, sessions)
        return max(shares.values(), default=0.0) if self._apart else sum(shares.values())

    def check(self, lane: Lane, now: float) -> None:
        """Raise AtCapacity unless one more session fits."""
        utilisation = self.utilisation(lane)
        if utilisation > self.limit:
            self.refuse(f"{sum(self.sessions.values())} sessions leave no room for another", utilisation, now)

    def enter(self, lane: Lane, holder: object, now: float) -> None:
        """Count one session more."""
        self.sessions[lane] += 1
        self._opened[holder] = now

    def move(self, source: Lane, target: Lane, now: float) -> None:
        """Count a session in another lane. Raises AtCapacity."""
        utilisation = self.utilisation(target, less=source)
        if utilisation > max(self.limit, self.utilisation()):
            self.refuse(f"no room to move a session to variant {target.variant!r}", utilisation, now)
        self.sessions[source] -= 1
        self.sessions[target] += 1

    def leave(self, lane: Lane, holder: object, now: float) -> None:
        """Count one session less."""
        length = now - self._opened.pop(holder)
        mean = self._mean_length
        self._mean_length = length if mean is None else mean + SMOOTHING * (length - mean)
        self.sessions[lane] -= 1

    def refuse(self, reason: str, utilisation: float, now: float) -> NoReturn:
        """Raise AtCapacity with the expected wait."""
        raise AtCapacity(reason, utilisation, self.expected_wait(now))

    def expected_wait(self, now: float) -> float:
        """Seconds until some session leaves: their mean length (so far, while none has left) over their number."""
        if not self._opened:
            return 0.0
        length = self._mean_length
        if length is None:
            length = sum(now - opened for opened in self._opened.values()) / len(self._opened)
        return length / len(self._opened)

    def _lane_share(self, lane: Lane, sessions: int) -> float:
        interval = max(lane.tick, lane.budget / 2)
        rows = sessions * interval / lane.period
        if rows < 1:
            return sessions / lane.period * self._step(lane, 1)
        full, rest = divmod(rows, lane.buckets[-1])
        busy = full * self._step(lane, lane.buckets[-1])
        if rest:
            busy += self._step(lane, math.ceil(rest))
        return busy / interval

    def _step(self, lane: Lane, rows: int) -> float:
        """Seconds of a whole step (all slices and turns) of ``rows``."""
        return lane.slices * lane.turns * self._measured[lane].steps[lane.bucket(rows)].ewma


class Shedding:
    """What to give up under overload, in a stated order, and how often it was.

    The engine updates the level; whoever can save work asks ``shed(measure)`` and obeys. Every saving is counted.
    ``order``: measures from the first to give up to the last.
    """

    def __init__(
        self,
        order: Sequence[str] = ("video_frames", "lookahead", "flow_steps"),
        *,
        above: float = 0.9,
        below: float = 0.7,
        hold: float = 1.0,
    ) -> None:
        if not below < above:
            raise ValueError(f"below {below} must be less than above {above}")
        self.order = tuple(order)
        self.level = 0
        self.counts: Counter[str] = Counter(dict.fromkeys(self.order, 0))
        self._above, self._below, self._hold = above, below, hold
        self._changed = float("-inf")

    def update(self, load: float, now: float) -> None:
        """Move one level up or down when the device's busy share calls for it, at most once per ``hold`` seconds."""
        if now - self._changed < self._hold:
            return
        if load > self._above and self.level < len(self.order):
            self.level += 1
        elif load < self._below and self.level > 0:
            self.level -= 1
        else:
            return
        self._changed = now

    def shed(self, measure: str, count: int = 1) -> bool:
        """Whether to give ``measure`` up now; counts it when so. Raises ValueError for a measure not in ``order``."""
        if measure not in self.order:
            raise ValueError(f"{measure!r} is not a shedding measure; the order is {', '.join(self.order)}")
        if self.order.index(measure) >= self.level:
            return False
        self.counts[measure] += count
        return True
