"""Who runs next on one device: media ticks, earliest deadline first, long steps in slices.

A pure object: no threads, no torch, no clock of its own. The caller submits ``Work``, asks ``next(now)`` for a
``Batch``, a time to ask again, or None, and says ``done``. The policy's parts can be switched off to compare them.

- *Ticks.* A lane (one model and variant) starts at most once per tick, with everything ready then; rows beyond its
  largest bucket follow in further batches of the same tick. Ticks are short while the device idles and stretch to half
  the deadline under load: a step costs almost the same for few rows as for many, so starting rarely is what makes room.
  Nobody is made to wait beyond half a budget before their deadline: what is more urgent than that starts at once.
- *Earliest deadline first* among the lanes that may start, and inside a lane. A batch that is under way is as urgent as
  what waits behind it.
- *Slices.* A model whose step is long (an ODE solver's steps, a prefill) yields after each slice. The next slice may
  start before the last is done: a device that keeps several in its queue runs them in order.

Work without a deadline (files) fills the gaps: it runs when no deadline waits, and ticks do not hold it up. Chunks of
one lease keep their order, at most one of them is ready or running at a time.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from .errors import InboxFull

LOAD_WINDOW = 0.5  # seconds over which the device's busy share is averaged
RELAXED, BUSY = 0.5, 0.75  # busy shares between which ticks stretch from shortest to longest
SHORTEST_TICK = 0.02  # seconds; upper bound of a tick on an idle device


@dataclass(frozen=True)
class Policy:
    """Which parts of the scheduling rule apply."""

    first: Literal["deadline", "arrival"] = "deadline"
    batched: bool = True
    ticks: bool = True
    sliced: bool = True


ONE_AT_A_TIME = Policy("arrival", batched=False, ticks=False, sliced=False)
FIFO = Policy("arrival", ticks=False, sliced=False)
EDF = Policy("deadline", ticks=False, sliced=False)
EDF_TICKS = Policy("deadline", sliced=False)
EDF_TICKS_SLICES = Policy()


class Work:
    """One chunk of one lease. ``payload`` and ``waiter`` belong to the caller; the scheduler does not look at them."""

    __slots__ = ("arrival", "deadline", "epoch", "lane", "lease", "payload", "started", "waiter")

    def __init__(
        self,
        lane: Lane,
        lease: Any,
        deadline: float,
        arrival: float,
        epoch: int = 0,
        payload: Any = None,
        waiter: Any = None,
    ) -> None:
        self.lane = lane
        self.lease = lease
        self.deadline = deadline
        self.arrival = arrival
        self.epoch = epoch
        self.payload = payload
        self.waiter = waiter
        self.started = False


class Call(Protocol):
    """What a barrier runs."""

    def __call__(self) -> None: ...

    def fail(self, error: Exception) -> None:
        """It will not run: tell whoever waits."""


@dataclass(frozen=True, eq=False, slots=True)
class Barrier:
    """A call in a lease's order: it becomes due when everything the lease submitted before is done."""

    lease: Hashable
    call: Call


@dataclass(eq=False, slots=True)
class Lane:
    """One model and variant: what its works are batched by.

    period: media seconds of one step. budget: seconds from arrival to deadline. buckets: batch sizes, ascending.
    slices: parts the step comes in. tick: shortest seconds between two starts; default a quarter of the budget, at most
    20 ms.
    """

    model: str
    variant: Hashable
    period: float
    budget: float
    buckets: tuple[int, ...]
    slices: int = 1
    tick: float = -1.0
    next_start: float = -math.inf
    depth: int = 0  # works submitted and not started
    _ready: list[tuple[float, int, Work]] = field(default_factory=list)
    _quota: int = 0  # rows of this tick that still wait for a batch
    _running: Batch | None = None  # of a sliced batch that is not done, what started last

    def __post_init__(self) -> None:
        if not self.buckets or sorted(set(self.buckets)) != list(self.buckets) or self.buckets[0] < 1:
            raise ValueError(f"buckets are {self.buckets}; give ascending batch sizes of at least 1")
        if not self.budget > 0 or not self.period > 0:
            raise ValueError(f"budget {self.budget} s and period {self.period} s must be above 0")
        if self.tick < 0:
            self.tick = min(self.budget / 4, SHORTEST_TICK)

    def bucket(self, rows: int) -> int:
        """The smallest batch size that holds ``rows``."""
        return next(size for size in self.buckets if size >= rows)


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Works of one lane to step together: slices ``first`` to ``last`` (exclusive) of the lane's ``slices``."""

    lane: Lane
    works: list[Work]
    bucket: int
    urgency: tuple[float, int]
    first: int = 0
    last: int = 0


class Scheduler:
    """The queue of one device. ``inbox`` bounds the waiting works of a lease."""

    def __init__(self, policy: Policy = EDF_TICKS_SLICES, *, inbox: int = 8) -> None:
        self.policy = policy
        self.inbox = inbox
        self.lanes: dict[tuple[str, Hashable], Lane] = {}
        self._inboxes: dict[Hashable, deque[Work | Barrier]] = {}
        self._due_calls: list[Call] = []
        self._order = itertools.count()
        self._load = 0.0
        self._load_at = 0.0

    def add(self, lane: Lane) -> Lane:
        """Make a lane known."""
        key = (lane.model, lane.variant)
        if key in self.lanes:
            raise ValueError(f"model {lane.model!r} variant {lane.variant!r} was added before; choose another name")
        self.lanes[key] = lane
        return lane

    def submit(self, item: Work | Barrier) -> None:
        """Queue a work or a barrier behind what its lease submitted before. Raises InboxFull."""
        queue = self._inboxes.get(item.lease)
        if queue is None:
            queue = self._inboxes[item.lease] = deque()
        elif len(queue) > self.inbox:
            raise InboxFull(f"a lease may have {self.inbox} chunks waiting; await one before submitting the next")
        queue.append(item)
        if isinstance(item, Work):
            item.lane.depth += 1
        if len(queue) == 1:
            self._expose(item.lease, queue)

    def next(self, now: float) -> Batch | float | None:
        """What to run now, else the time from which something may start, else None (nothing waits)."""
        chosen: Lane | None = None
        urgency: tuple[float, int] = (math.inf, 0)
        wake: float | None = None
        for lane in self.lanes.values():
            if lane._running is not None:
                if lane._running.last == lane.slices:
                    continue
                key = lane._running.urgency
                if lane._ready:
                    key = min(key, lane._ready[0][:2])
            elif lane._ready:
                head = lane._ready[0]
                if now < lane.next_start and lane._quota <= 0 and (deadline := head[2].deadline) < math.inf:
                    start = min(lane.next_start, deadline - lane.budget / 2)
                    if now < start:
                        wake = start if wake is None else min(wake, start)
                        continue
                key = head[:2]
            else:
                continue
            if chosen is None or key < urgency:
                chosen, urgency = lane, key
        return wake if chosen is None else self._start(chosen, now)

    def done(self, batch: Batch, now: float, seconds: float, *, failed: bool = False) -> bool:
        """The slices of ``batch`` took ``seconds`` of the device. True once for a batch: when its last slice is done,
        or one has failed, whatever becomes of those that had started by then."""
        self._load = self.load(now) + seconds / LOAD_WINDOW
        self._load_at = max(now, self._load_at)
        lane = batch.lane
        if lane.slices > 1:
            gone = lane._running is None or lane._running.works is not batch.works
            if gone or (not failed and batch.last < lane.slices):
                return False
            lane._running = None
        for work in batch.works:
            queue = self._inboxes[work.lease]
            queue.popleft()
            self._expose(work.lease, queue)
        return True

    def fence(self, lease: Hashable, epoch: float) -> list[Work]:
        """Drop the lease's waiting works of epochs before ``epoch`` and return them. Running ones finish."""
        queue = self._inboxes.get(lease)
        if queue is None:
            return []
        dropped = [item for item in queue if isinstance(item, Work) and not item.started and item.epoch < epoch]
        if not dropped:
            return []
        head = queue[0]
        gone = set(dropped)
        kept = [item for item in queue if item not in gone]
        queue.clear()
        queue.extend(kept)
        for work in dropped:
            work.lane.depth -= 1
        if isinstance(head, Work) and head in gone:
            head.lane._ready = [entry for entry in head.lane._ready if entry[2] is not head]
            heapq.heapify(head.lane._ready)
            head.lane._quota = min(head.lane._quota, len(head.lane._ready))
            self._expose(lease, queue)
        return dropped

    def due_calls(self) -> list[Call]:
        """Barriers that are due, in order; the caller runs them before asking for the next batch."""
        calls, self._due_calls = self._due_calls, []
        return calls

    def drain(self) -> list[Work | Barrier]:
        """Forget everything and return it: what a closing engine has to answer."""
        items = [item for queue in self._inboxes.values() for item in queue]
        self._inboxes.clear()
        for lane in self.lanes.values():
            lane._ready.clear()
            lane._quota, lane._running, lane.depth = 0, None, 0
        return items

    def load(self, now: float) -> float:
        """The device's busy share, averaged over the last half second or so."""
        return self._load * math.exp(-max(0.0, now - self._load_at) / LOAD_WINDOW)

    def tick(self, lane: Lane, now: float) -> float:
        """Seconds from a start of the lane at ``now`` to its next."""
        if not self.policy.ticks:
            return 0.0
        stretch = min(1.0, max(0.0, (self.load(now) - RELAXED) / (BUSY - RELAXED)))
        return lane.tick + stretch * (max(lane.tick, lane.budget / 2) - lane.tick)

    def _expose(self, lease: Hashable, queue: deque[Work | Barrier]) -> None:
        """Make the head of a lease's queue ready, and the barriers before it due."""
        while queue:
            head = queue[0]
            if isinstance(head, Work):
                first = head.deadline if self.policy.first == "deadline" else head.arrival
                heapq.heappush(head.lane._ready, (first, next(self._order), head))
                return
            self._due_calls.append(head.call)
            queue.popleft()
        del self._inboxes[lease]

    def _start(self, lane: Lane, now: float) -> Batch:
        batch = lane._running
        if batch is None:
            batch = self._gather(lane, now)
        last = batch.last + 1 if self.policy.sliced else lane.slices
        batch = replace(batch, first=batch.last, last=last)
        if lane.slices > 1:
            lane._running = batch
        return batch

    def _gather(self, lane: Lane, now: float) -> Batch:
        ready = lane._ready
        if lane._quota <= 0:
            lane._quota = len(ready)
            if ready[0][2].deadline < math.inf:
                lane.next_start = now + self.tick(lane, now)
        size = min(lane._quota, lane.buckets[-1]) if self.policy.batched else 1
        lane._quota -= size
        if size == len(ready):
            entries = sorted(ready)
            ready.clear()
        else:
            entries = [heapq.heappop(ready) for _ in range(size)]
        works = [entry[2] for entry in entries]
        for work in works:
            work.started = True
        lane.depth -= size
        return Batch(lane, works, lane.bucket(size), entries[0][:2])
