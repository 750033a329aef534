"""Edges: bounded channels between two stages, fenced by epoch.

An edge holds at most so many items *and* so much media time. What happens when it is full is its policy: ``block``
the producer, ``drop_oldest``, ``drop_newest``, or ``error``. Everything dropped is counted with its reason. Finals and
events are never dropped by policy: they evict media, or block when only such chunks are queued. A chunk longer than
the whole bound still passes through an empty edge.

One producer and one consumer, on one event loop. The way through is synchronous whenever there is an item or room.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from .chunk import Chunk

Policy = Literal["block", "drop_oldest", "drop_newest", "error"]
POLICIES: tuple[str, ...] = get_args(Policy)

_NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Link:
    """How an edge is to behave; written between two stages: ``a >> Link(ms=200, policy="drop_oldest") >> b``.

    items, ms: the bound in chunks and in milliseconds of media. feedback: the edge closes a cycle; such an edge may
    not block (a full cycle would never move again), so its policy must be another.
    """

    items: int = 32
    ms: float = 1000.0
    policy: Policy = "block"
    feedback: bool = False

    def __post_init__(self) -> None:
        if self.items < 1:
            raise ValueError(f"Link items={self.items}: an edge holds at least 1")
        if not self.ms > 0:
            raise ValueError(f"Link ms={self.ms}: the media bound is positive (float('inf') for none)")
        if self.policy not in POLICIES:
            raise ValueError(f"Link policy={self.policy!r}: use one of {', '.join(POLICIES)}")
        if self.feedback and self.policy == "block":
            raise ValueError("Link feedback=True with policy 'block' can stop its cycle for ever: use another policy")


class EdgeFull(RuntimeError):
    """A chunk met a full edge whose policy is ``error``."""


@dataclass(frozen=True, slots=True)
class EdgeStats:
    """An edge's counters at one moment. Times in milliseconds; lateness is relative to the edge's best chunk."""

    depth: int
    depth_max: int
    media_ms: float
    media_ms_max: float
    late_ms: float
    late_ms_max: float
    passed: int
    dropped_policy: int
    dropped_stale: int
    dropped_unread: int

    @property
    def dropped(self) -> int:
        """All drops."""
        return self.dropped_policy + self.dropped_stale + self.dropped_unread


class Edge:
    """A running edge. ``put`` and ``get`` for single chunks; stages use it through their ports.

    lasting: what flows here stays true after an interruption (what the user said), so fences do not drop it; chunks
    of an older epoch are passed on as chunks of the new one.

    Lateness is how much longer after its media time a chunk leaves the edge than the promptest chunk since the last
    final or fence did: a backlog anywhere upstream shows in it, a constant delay does not.
    """

    __slots__ = (
        "_best",
        "_blocks",
        "_depth_max",
        "_dropped_policy",
        "_dropped_stale",
        "_dropped_unread",
        "_late",
        "_late_max",
        "_max_items",
        "_max_ns",
        "_now",
        "_ns",
        "_ns_max",
        "_passed",
        "_writers",
        "abandoned",
        "closed",
        "epoch",
        "full",
        "items",
        "lasting",
        "link",
        "name",
        "reader",
        "taken_at",
    )

    def __init__(self, name: str, link: Link, now: Callable[[], float], *, lasting: bool = False) -> None:
        self.name, self.link, self.lasting = name, link, lasting
        self.epoch = 0
        self.taken_at = 0.0  # clock time of the last get
        self.reader: asyncio.Future[None] | None = None  # set by whoever waits for a chunk; resolved by what brings one
        self._now = now
        self.closed = False  # the producer has finished; queued chunks may remain
        self.abandoned = False  # the consumer has finished; what is put is counted as unread
        self.full = False  # a producer should wait before it makes another chunk (only where the policy is to block)
        self.items: deque[tuple[Chunk, int]] = deque()  # with their nanoseconds; others only look at it
        self._writers: deque[asyncio.Future[None]] = deque()
        self._max_items = link.items
        self._max_ns = link.ms * _NS_PER_MS
        self._blocks = link.policy == "block"
        self._ns = self._ns_max = self._depth_max = 0
        self._passed = self._dropped_policy = self._dropped_stale = self._dropped_unread = 0
        self._best = float("inf")
        self._late = self._late_max = 0.0

    def __len__(self) -> int:
        return len(self.items)

    @property
    def head_seconds(self) -> float:
        """Media time at which the oldest queued chunk starts; infinite when the edge is empty."""
        return self.items[0][0].start_seconds if self.items else float("inf")

    @property
    def ended(self) -> bool:
        """Whether nothing will ever come out again."""
        return self.closed and not self.items

    def put_nowait(self, chunk: Chunk, size: int) -> bool:
        """Take the chunk of ``size`` nanoseconds, or drop and count it; False when it must wait. Raises EdgeFull."""
        if chunk.epoch < self.epoch and not self.lasting:
            self._dropped_stale += 1
            return True
        if self.abandoned or self.closed:
            self._dropped_unread += 1
            return True
        items = self.items
        if items and (len(items) >= self._max_items or self._ns + size > self._max_ns):
            policy = self.link.policy
            if policy == "block":
                return False
            if policy == "error":
                raise EdgeFull(
                    f"edge {self.name} is full ({len(items)} chunks, {self._ns / _NS_PER_MS:g} ms): raise its bound "
                    f"({self._max_items} items, {self.link.ms:g} ms), speed up its consumer or choose a drop policy"
                )
            if policy == "drop_newest" and chunk.droppable:
                self._dropped_policy += 1
                return True
            if not self._evict(size, newest=policy == "drop_newest"):
                return False
        items.append((chunk, size))
        self._ns = ns = self._ns + size
        depth = len(items)
        if depth > self._depth_max:
            self._depth_max = depth
        if ns > self._ns_max:
            self._ns_max = ns
        if depth >= self._max_items or ns >= self._max_ns:
            self.full = self._blocks
        reader = self.reader
        if reader is not None and not reader.done():
            reader.set_result(None)
        return True

    async def put(self, chunk: Chunk) -> None:
        """``put_nowait``, waiting for room where the policy says so."""
        size = chunk.nanoseconds
        while not self.put_nowait(chunk, size):
            await self.room()

    async def room(self) -> None:
        """Wait until something has left the edge."""
        writer = asyncio.get_running_loop().create_future()
        self._writers.append(writer)
        try:
            await writer
        except asyncio.CancelledError:
            # A cancelled writer that is still queued is skipped when its turn comes; one that was woken passes it on.
            if not writer.cancelled():
                self._wake_writer()
            raise

    def take(self) -> Chunk:
        """The oldest of the chunks that are there."""
        items = self.items
        chunk, size = items.popleft()
        self._ns -= size
        self._passed += 1
        if self.full:
            self.full = len(items) >= self._max_items or self._ns >= self._max_ns
        self.taken_at = now = self._now()
        lag = now - chunk.start / chunk.rate - size * 1e-9
        if lag < self._best:
            self._best = lag
        self._late = late = lag - self._best
        if late > self._late_max:
            self._late_max = late
        if chunk.final:
            self._best = float("inf")
        if self._writers:
            self._wake_writer()
        if chunk.epoch < self.epoch:
            return replace(chunk, epoch=self.epoch)
        return chunk

    async def get(self) -> Chunk | None:
        """The oldest chunk, waiting for one; None when the edge has ended."""
        while not self.items:
            if self.closed:
                return None
            self.reader = asyncio.get_running_loop().create_future()
            try:
                await self.reader
            finally:
                self.reader = None
        return self.take()

    def fence(self, epoch: int) -> None:
        """Drop every chunk older than ``epoch`` now, and refuse such chunks from now on."""
        self.epoch = epoch
        self._best = float("inf")
        if self.lasting:
            return
        kept = [item for item in self.items if item[0].epoch >= epoch]
        self._dropped_stale += len(self.items) - len(kept)
        self.items = deque(kept)
        self._ns = sum(size for _, size in kept)
        self.full = self._blocks and (len(kept) >= self._max_items or self._ns >= self._max_ns)
        self._wake_writers()

    def close(self) -> None:
        """The producer has finished: the consumer gets what is queued, then the end."""
        self.closed = True
        self.full = False
        if self.reader is not None and not self.reader.done():
            self.reader.set_result(None)
        self._wake_writers()

    def abandon(self) -> None:
        """The consumer has finished: count what is queued and whatever still comes as unread."""
        self.abandoned = True
        self._dropped_unread += len(self.items)
        self.items.clear()
        self._ns = 0
        self.full = False
        self._wake_writers()

    def stats(self) -> EdgeStats:
        """The counters now."""
        return EdgeStats(
            depth=len(self.items),
            depth_max=self._depth_max,
            media_ms=self._ns / _NS_PER_MS,
            media_ms_max=self._ns_max / _NS_PER_MS,
            late_ms=self._late * 1e3,
            late_ms_max=self._late_max * 1e3,
            passed=self._passed,
            dropped_policy=self._dropped_policy,
            dropped_stale=self._dropped_stale,
            dropped_unread=self._dropped_unread,
        )

    def _evict(self, size: int, *, newest: bool) -> bool:
        """Drop queued media from one side until ``size`` more nanoseconds fit; False when that is not enough."""
        items = self.items
        while items and (len(items) >= self._max_items or self._ns + size > self._max_ns):
            order = range(len(items) - 1, -1, -1) if newest else range(len(items))
            at = next((i for i in order if items[i][0].droppable), None)
            if at is None:
                return False
            self._ns -= items[at][1]
            del items[at]
            self._dropped_policy += 1
        return True

    def _wake_writer(self) -> None:
        while self._writers:
            writer = self._writers.popleft()
            if not writer.done():
                writer.set_result(None)
                return

    def _wake_writers(self) -> None:
        while self._writers:
            self._wake_writer()
