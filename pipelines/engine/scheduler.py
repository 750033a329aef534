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
- *Turns.* A step may be made of equal turns (tokens that are drawn one after another): works join the lane's batch
  before any turn and leave it when theirs are over, so that nobody waits for the steps of others to end. A lane that is
  under way takes in whatever waits for a tick.
- *Streams.* Models may be spread over several streams of a device, whose batches run at the same time. One rule
  decides for all: of the lanes whose stream has room, the earliest deadline.

Work without a deadline (files) fills the gaps: it runs when no deadline waits, and ticks do not hold it up. Chunks of
one lease keep their order, at most one of them is ready or running at a time.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Container, Hashable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from .errors import InboxFull

MAIN = "main"  # the stream of models that name none
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

    __slots__ = ("arrival", "deadline", "done", "epoch", "lane", "lease", "payload", "started", "turns", "waiter")

    def __init__(
        self,
        lane: Lane,
        lease: Any,
        deadline: float,
        arrival: float,
        epoch: int = 0,
        payload: Any = None,
        waiter: Any = None,
        turns: int = 1,
    ) -> None:
        self.lane = lane
        self.lease = lease
        self.deadline = deadline
        self.arrival = arrival
        self.epoch = epoch
        self.payload = payload
        self.waiter = waiter
        self.turns = turns
        self.started = 0  # turns
        self.done = False


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
    20 ms. turns: most turns of a step. stream: what its batches run on, one after another. patient: works that can wait
    (until half a budget before their deadline) do so while something that cannot runs on another stream, unless their
    own is busy.
    """

    model: str
    variant: Hashable
    period: float
    budget: float
    buckets: tuple[int, ...]
    slices: int = 1
    tick: float = -1.0
    turns: int = 1
    stream: str = MAIN
    patient: bool = False
    next_start: float = -math.inf
    depth: int = 0  # works submitted and not started
    _ready: list[tuple[float, int, Work]] = field(default_factory=list)
    _quota: int = 0  # rows of this tick that still wait for a batch
    _running: Batch | None = None  # of a sliced batch that is not done, what started last
    _turning: int = 0  # works that have begun and have turns left

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
    """Works of one lane to step together: slices ``first`` to ``last`` (exclusive) of the lane's ``slices``.

    turns: which each work takes, in a lane whose steps are made of them.
    """

    lane: Lane
    works: list[Work]
    bucket: int
    urgency: tuple[float, int]
    first: int = 0
    last: int = 0
    turns: Sequence[int] = ()


class Scheduler:
    """The queue of one device. ``inbox`` bounds the waiting works of a lease."""

    def __init__(self, policy: Policy = EDF_TICKS_SLICES, *, inbox: int = 8) -> None:
        self.policy = policy
        self.inbox = inbox
        self.lanes: dict[tuple[str, Hashable], Lane] = {}
        self._inboxes: dict[Hashable, deque[Work | Barrier]] = {}
        self._due_calls: list[Call] = []
        self._order = itertools.count()
        self._flying: dict[str, deque[bool]] = {}  # of each stream: whether what was started and is not done is urgent
        self._loads: dict[str, tuple[float, float]] = {}  # of each stream: busy share, and when it was that

    def add(self, lane: Lane) -> Lane:
        """Make a lane known."""
        key = (lane.model, lane.variant)
        if key in self.lanes:
            raise ValueError(f"model {lane.model!r} variant {lane.variant!r} was added before; choose another name")
        self.lanes[key] = lane
        self._loads.setdefault(lane.stream, (0.0, -math.inf))
        self._flying.setdefault(lane.stream, deque())
        return lane

    @property
    def streams(self) -> Set[str]:
        """Of all lanes."""
        return self._loads.keys()

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

    def next(self, now: float, streams: Container[str] | None = None) -> Batch | float | None:
        """What to run now, else the time from which something may start, else None (nothing waits).

        streams: those that have room; by default all.
        """
        chosen: Lane | None = None
        urgency: tuple[float, int] = (math.inf, 0)
        wake: float | None = None
        for lane in self.lanes.values():
            if streams is not None and lane.stream not in streams:
                continue
            if lane._running is not None:
                if lane._running.last == lane.slices:
                    continue
                key = lane._running.urgency
                if lane._ready:
                    key = min(key, lane._ready[0][:2])
            elif lane._ready:
                head = lane._ready[0]
                going = lane._quota > 0 or lane._turning > 0
                if now < lane.next_start and not going and (deadline := head[2].deadline) < math.inf:
                    start = min(lane.next_start, deadline - lane.budget / 2)
                    if now < start:
                        wake = start if wake is None else min(wake, start)
                        continue
                key = head[:2]
            else:
                continue
            if lane.patient and now < (start := key[0] - lane.budget / 2) and self._gives_way(lane, now):
                wake = start if wake is None else min(wake, start)
                continue
            if chosen is None or key < urgency:
                chosen, urgency = lane, key
        return wake if chosen is None else self._start(chosen, now)

    def done(self, batch: Batch, now: float, seconds: float, *, failed: bool = False) -> list[int]:
        """The slices of ``batch`` took ``seconds`` of its stream. Returns the rows whose works end with it: all when
        its last slice is done, or one has failed, once, whatever becomes of those that had started by then; of a turn
        those that have no other, or all that had not ended when it failed."""
        lane = batch.lane
        if self._flying[lane.stream]:
            self._flying[lane.stream].popleft()
        self._loads[lane.stream] = (self.load(now, lane.stream) + seconds / LOAD_WINDOW, now)
        if lane.slices > 1:
            gone = lane._running is None or lane._running.works is not batch.works
            if gone or (not failed and batch.last < lane.slices):
                return []
            lane._running = None
        rows = list(range(len(batch.works)))
        if batch.turns:
            rows = [row for row in rows if self._ends(batch, row, failed)]
            if failed:
                lost = {batch.works[row] for row in rows}
                self._drop_ready(lane, lost)
        for row in rows:
            work = batch.works[row]
            work.done = True
            queue = self._inboxes[work.lease]
            queue.popleft()
            self._expose(work.lease, queue)
        return rows

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
            self._drop_ready(head.lane, gone)
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
            lane._quota, lane._running, lane._turning, lane.depth = 0, None, 0, 0
        return items

    def load(self, now: float, stream: str | None = None) -> float:
        """The busy share of a stream, by default of the busiest, averaged over the last half second or so."""
        if stream is None:
            return max((self.load(now, one) for one in self._loads), default=0.0)
        load, at = self._loads[stream]
        return load * math.exp(-max(0.0, now - at) / LOAD_WINDOW)

    def tick(self, lane: Lane, now: float) -> float:
        """Seconds from a start of the lane at ``now`` to its next."""
        if not self.policy.ticks:
            return 0.0
        stretch = min(1.0, max(0.0, (self.load(now, lane.stream) - RELAXED) / (BUSY - RELAXED)))
        return lane.tick + stretch * (max(lane.tick, lane.budget / 2) - lane.tick)

    def _gives_way(self, lane: Lane, now: float) -> bool:
        """Whether something urgent is under way on another stream, and the lane's own is not busy: under load something
        urgent always is, and who waited for it would only be late."""
        return self.load(now, lane.stream) < BUSY and any(
            any(urgent) for stream, urgent in self._flying.items() if stream != lane.stream
        )

    def _ends(self, batch: Batch, row: int, failed: bool) -> bool:
        """Whether a work ends with its turn in ``batch``."""
        work = batch.works[row]
        return not work.done and (failed or batch.turns[row] == work.turns - 1)

    def _drop_ready(self, lane: Lane, works: Container[Work]) -> None:
        """Take works out of what is ready."""
        dropped = [entry[2] for entry in lane._ready if entry[2] in works]
        lane._turning -= sum(work.started > 0 for work in dropped)
        lane._ready = [entry for entry in lane._ready if entry[2] not in works]
        heapq.heapify(lane._ready)

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
        self._flying[lane.stream].append(batch.urgency[0] - lane.budget / 2 <= now)
        if lane.slices > 1:
            lane._running = batch
        return batch

    def _gather(self, lane: Lane, now: float) -> Batch:
        ready = lane._ready
        turning = lane.turns > 1
        if lane._quota <= 0:
            lane._quota = len(ready)
            if ready[0][2].deadline < math.inf and not lane._turning:
                lane.next_start = now + self.tick(lane, now)
        size = min(lane._quota, lane.buckets[-1]) if self.policy.batched else 1
        lane._quota = 0 if turning else lane._quota - size
        if size == len(ready):
            entries = sorted(ready)
            ready.clear()
        else:
            entries = [heapq.heappop(ready) for _ in range(size)]
        works = [entry[2] for entry in entries]
        for work in works:
            lane.depth -= not work.started
            work.started += 1
        if not turning:
            return Batch(lane, works, lane.bucket(size), entries[0][:2])
        for entry in entries:
            work = entry[2]
            if work.started < work.turns:
                heapq.heappush(ready, entry)
        lane._turning = sum(entry[2].started > 0 for entry in ready)
        turns = [work.started - 1 for work in works]
        return Batch(lane, works, lane.bucket(size), entries[0][:2], turns=turns)
