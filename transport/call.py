"""Calls: one served session of a graph, whatever protocol speaks for it, and however often its connection breaks.

A call owns a running ``Session``. Sound, pictures, text and control events go in through the graph's inlets
(``audio``, ``video``, ``text``, ``control``; a single inlet of another name takes the sound). What leaves the graph
through unconnected output ports comes out as numbered items: ``Text`` captions, ``Audio`` to play, ``Event``s. The last
items are kept, so that a client that reconnects continues after the last number it saw. One connection reads at a time;
another that reads takes over. A reader that falls behind makes the graph wait: every queue on the way is bounded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..pipelines.chunk import Audio, Chunk, Event, Text, Video
from ..pipelines.graph import Graph, Port
from ..pipelines.session import Session
from ..pipelines.stage import Inlet, StageError

UNREAD_ITEMS = 256  # that a reader may be behind before the graph waits for it
KEPT_ITEMS = 1024  # for a client that reconnects
MEDIA_RATE = 16000  # of the media times of events made here


class CallError(RuntimeError):
    """Base of what a call refuses; the message is meant for the client."""


class TakenOver(CallError):
    """Another connection reads this call now."""


class ItemsLost(CallError):
    """The client wants to go on after an item that is no longer kept, or that was never made."""


class NoInlet(CallError):
    """The served graph takes no such input."""


@dataclass(frozen=True, slots=True)
class Item:
    """Something for the client: number ``id`` (from 1, rising), and when it left the graph (clock seconds).

    source: the output it left through, ``stage`` or ``stage.port``; empty for what the call itself says.
    """

    id: int
    chunk: Chunk
    at: float
    source: str = ""


def inlets(graph: Graph) -> dict[str, str]:
    """What a served graph takes, ``audio``, ``video``, ``text`` or ``control``, and the inlet that takes it."""
    names = [graph.names[node] for node in graph.nodes if isinstance(node, Inlet)]
    found = {name: name for name in names if name in ("audio", "video", "text", "control")}
    others = [name for name in names if name not in found]
    if "audio" not in found and len(others) == 1:
        found["audio"] = others[0]
    return found


class Call:
    """A served session; ``Service.connect`` makes one.

    id: names it in logs, metrics and signed tokens. max_seconds: of sound; then the call's input ends with an event
    ``limit``. options: ``Session``'s.
    """

    def __init__(
        self, id: str, graph: Graph, engine: Any, *, max_seconds: float = float("inf"), **options: Any
    ) -> None:
        self.id, self.max_seconds = id, max_seconds
        self.session: Session = graph.session(engine=engine, id=id, **options)
        self.received = 0  # samples of sound taken, at ``rate``
        self.rate: int | None = None  # of the sound coming in; the first chunk sets it
        self.ended = False  # nothing more will come out
        self.resumable = False  # its client has been given what it needs to come back
        self._inlets = inlets(graph)
        self._items: deque[Item] = deque(maxlen=KEPT_ITEMS)
        self._last = 0  # number of the newest item
        self._read = 0  # number of the item that the reader took last
        self._readers = 0
        self._news = asyncio.Event()  # an item has been made, or the call has ended, or the reader was replaced
        self._room = asyncio.Event()  # the reader has caught up
        self._pump: asyncio.Task[None] | None = None
        self.error: StageError | None = None  # that ended it
        self._finished = False
        self._replies: frozenset[str] = frozenset()

    # ---------------------------------------------------------------- in

    def takes(self, inlet: str) -> bool:
        """Whether the graph has this input: ``audio``, ``video``, ``text`` or ``control``."""
        return inlet in self._inlets

    @property
    def heard_seconds(self) -> float:
        """Media time of the sound taken so far."""
        return self.received / self.rate if self.rate else 0.0

    async def hear(self, samples: NDArray[np.float32], rate: int) -> None:
        """Mono float32 sound ``[n]`` at ``rate`` Hz, following what was given before; waits while the graph is full.

        Raises NoInlet, and ValueError when the rate changes.
        """
        if rate != self.rate:
            if self.rate is not None:
                raise ValueError(f"sound at {self.rate} Hz went on at {rate} Hz: a call keeps its first rate")
            self.rate = rate
        if not samples.size or self._finished:
            return
        await self._send("audio", Audio(samples=samples, rate=rate, start=self.received))
        self.received += samples.size  # only now: a cancelled send has put nothing in
        if self.heard_seconds >= self.max_seconds:
            self._add(self._event("limit", {"seconds": self.max_seconds}))
            self.finish()

    async def see(self, pixels: NDArray[np.uint8], ticks: int, rate: int = 90000) -> None:
        """A picture ``[height, width, 3]`` RGB at media time ``ticks / rate`` seconds. Raises NoInlet."""
        await self._send("video", Video(pixels=pixels, rate=rate, start=ticks))

    async def write(self, text: str, *, final: bool = True) -> None:
        """Text for the graph, at the media time of the sound taken so far. Raises NoInlet."""
        await self._send("text", Text(text=text, rate=MEDIA_RATE, start=self._now, final=final))

    async def tell(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """A control event for the graph, at the media time of the sound taken so far. Raises NoInlet."""
        await self._send("control", self._event(name, data))

    def finish(self) -> None:
        """Nothing more will be sent in: what is inside comes out, then the items end."""
        self._finished = True
        self.session.finish()

    def interrupt(self) -> int:
        """Drop everything of the running epoch now; the new epoch."""
        return self.session.interrupt()

    def played(self, epoch: int, seconds: float, until: float | None = None) -> None:
        """The client has played the graph's sound of ``epoch`` up to this media time.

        until: what follows, up to here, it leaves out. That corrects what was reported of the same sound before.
        """
        self.session.report_heard("client", epoch, seconds, until)

    # ---------------------------------------------------------------- out

    @property
    def replies(self) -> frozenset[str]:
        """The sources whose items answer the client: stages that an interruption stops; others tell of its input."""
        return self._replies

    @property
    def last(self) -> int:
        """Number of the newest item."""
        return self._last

    async def items(self, after: int | None = None) -> AsyncIterator[Item]:
        """The items from number ``after + 1`` on (None: from where the last reader stopped), until the call ends.

        Sound that an interruption has overtaken is left out. Raises TakenOver when another reader begins, ItemsLost,
        and StageError where a stage failed.
        """
        self._readers += 1
        reader = self._readers
        self._news.set()
        self._go_on_after(self._read if after is None else after)
        while True:
            if reader != self._readers:
                raise TakenOver(f"call {self.id} was taken over by another connection")
            item = self._next()
            if item is not None:
                if not (isinstance(item.chunk, Audio) and item.chunk.epoch < self.session.epoch):
                    yield item
            elif self.ended:
                if self.error is not None:
                    raise self.error
                return
            else:
                self._news.clear()
                await self._news.wait()

    def _go_on_after(self, number: int) -> None:
        oldest = self._items[0].id if self._items else self._last + 1
        if not oldest - 1 <= number <= self._last:
            raise ItemsLost(
                f"call {self.id} cannot go on after item {number}: it keeps items {oldest} to {self._last}; start a "
                "new call"
            )
        self._read = number
        self._room.set()

    def _next(self) -> Item | None:
        if self._read >= self._last:
            return None
        item = self._items[self._read + 1 - self._items[0].id]
        self._read = item.id
        if self._last - self._read < UNREAD_ITEMS:
            self._room.set()
        return item

    # ---------------------------------------------------------------- its life, for the Service

    async def start(self) -> None:
        """Run the graph, and return when its stages have their places in the engine. Raises StageError."""
        await self.session.__aenter__()
        ports = [(port.stage, edge.name) for port, edge in self.session.edges.items() if isinstance(port, Port)]
        self._replies = frozenset(name for stage, name in ports if not stage.lasting)
        self.session.own(_Fence(self))
        sources = [name for _, name in ports]
        self._pump = asyncio.create_task(self._run(sources), name=f"call {self.id}")
        await self.session.opened()
        if self.session.error is not None:
            await self.close()
            raise self.session.error

    async def close(self) -> None:
        """End the call now, and free everything it holds."""
        self._finished = True
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)

    async def _run(self, sources: list[str]) -> None:
        try:
            if sources:
                await asyncio.gather(*(self._collect(source) for source in sources))
            else:
                await self.session.run()
        except StageError as error:
            self.error = error
        finally:
            self.ended = True
            self._news.set()
            try:
                await self.session.__aexit__(None, None, None)
            except StageError as error:
                self.error = error

    async def _collect(self, source: str) -> None:
        async for chunk in self.session.outputs(source):
            while self._last - self._read >= UNREAD_ITEMS:
                self._room.clear()
                await self._room.wait()
            self._add(chunk, source)

    def _add(self, chunk: Chunk, source: str = "") -> None:
        self._last += 1
        self._items.append(Item(self._last, chunk, self.session.clock.now(), source))
        self._news.set()

    def fenced(self, epoch: int) -> None:
        """The session has been interrupted: the client learns how much of the reply it had heard."""
        heard = self.session.heard
        known = {} if heard is None else {"heard_seconds": heard.seconds, "heard_epoch": heard.epoch}
        self._add(self._event("interrupted", {"epoch": epoch, **known}))

    def _event(self, name: str, data: Mapping[str, Any] | None) -> Event:
        return Event(name=name, data=dict(data or {}), rate=MEDIA_RATE, start=self._now)

    @property
    def _now(self) -> int:
        """Media position of what comes beside the sound: never after the sound taken."""
        return self.received * MEDIA_RATE // self.rate if self.rate else 0

    async def _send(self, inlet: str, chunk: Chunk) -> None:
        if inlet not in self._inlets:
            raise NoInlet(f"the graph served here takes no {inlet}: it has no inlet of that name")
        await self.session.send(chunk, self._inlets[inlet])


class _Fence:
    """Tells a call of interruptions that come from within its graph."""

    def __init__(self, call: Call) -> None:
        self.fence = call.fenced

    def close(self) -> None:
        """Nothing to free."""
