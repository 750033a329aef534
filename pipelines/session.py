"""Sessions: one running graph, its clock, epoch, edges, trace and resources.

    async with graph.session(engine=engine) as session:
        async for chunk in session.outputs():
            ...

A stage is a task, a connection an edge; output ports that nothing takes are the session's outputs. The session ends
when every source has ended and what they sent has drained, when a stage fails (``StageError``), or when its block is
left; either way no task and no resource outlives it. An interruption is an epoch bump: it fences every edge, lease and
sleeping sink at once, in one synchronous call, and cancels nothing.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .chunk import UNSET, Audio, Chunk, Stale
from .clock import Clock, running_clock
from .edge import Edge, EdgeStats, Link
from .graph import Connection, Graph, GraphError, Port, did_you_mean
from .stage import Context, Inlet, Input, Stage, StageError
from .trace import Mark, Trace

if TYPE_CHECKING:
    from .replay import Recorder

_set = object.__setattr__

_HEARD_WITHIN = 0.02  # seconds: a reply is heard to its end when less than a packet of it is left


@dataclass(frozen=True, slots=True)
class Heard:
    """What a sink has played: up to ``seconds`` of media time, in ``epoch``.

    until: media time up to which it will play no more; beyond ``seconds`` where it has left sound out.
    """

    sink: str
    epoch: int
    seconds: float
    until: float


class Session:
    """A running graph. Use as an async context manager; ``Graph.session`` makes one.

    clock: the running loop's by default. engine: what ``ctx.open`` leases from. trace: spans kept for each output.
    record: a ``Recorder`` that sources and outputs are written to. Raises GraphError for a graph that cannot run.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        clock: Clock | None = None,
        engine: Any = None,
        id: str | None = None,
        trace: int = 128,
        record: Recorder | None = None,
    ) -> None:
        graph.validate()
        self.graph, self.engine = graph, engine
        self.id = id or uuid.uuid4().hex[:8]
        self.epoch = 0
        self.began = 0.0  # clock time of the start
        self.heard: Heard | None = None
        self.trace = Trace(trace)
        self.counters: Counter[str] = Counter()
        self.edges: dict[Connection | Port, Edge] = {}
        self.error: StageError | None = None
        self._clock = clock
        self._recorder = record
        self._contexts: dict[Stage, Context] = {}
        self._outlets: dict[Stage, dict[str, Outlet]] = {}
        self._inputs: dict[Stage, tuple[Input, ...]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._resources = AsyncExitStack()
        self._voices: list[Outlet] = []  # where replies leave the graph
        self._fenced: list[Any] = []
        self._sleepers: dict[asyncio.Future[None], int] = {}
        self._loops: list[tuple[set[Stage], list[Edge], list[Edge]]] = []
        self._stopping = False
        self._supervisor: asyncio.Task[None] | None = None
        self._opening = 0  # leases that stages are waiting for
        self._opened: asyncio.Future[None] | None = None

    @property
    def clock(self) -> Clock:
        """The session's clock."""
        if self._clock is None:
            self._clock = running_clock()
        return self._clock

    async def __aenter__(self) -> Session:
        if self._supervisor is not None:
            raise RuntimeError("a session runs once: make another with graph.session(...)")
        self.began = self.clock.now()
        self._build()
        for node, context in self._contexts.items():
            self._start(context, _drive(context, self._inputs[node], self._outlets[node]))
        self._supervisor = asyncio.create_task(self._supervise(), name=f"session {self.id}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        await self._ended()
        if self.error is not None and not isinstance(error, StageError | asyncio.CancelledError):
            raise self.error

    async def run(self) -> None:
        """Run to the end, discarding the outputs. Raises StageError. Enters the session if it is not running."""
        if self._supervisor is None:
            async with self:
                await self.run()
            return
        async for _ in self.outputs():
            pass
        await self._ended()
        if self.error is not None:
            raise self.error

    async def outputs(self, *ports: str) -> AsyncIterator[Chunk]:
        """Chunks of the unconnected output ports (all, or those named) as they come. Raises StageError.

        ports: stage names, or ``stage.port`` where a stage has several outputs.
        """
        edges = [edge for port, edge in self.edges.items() if isinstance(port, Port)]
        if ports:
            named = {edge.name: edge for edge in edges}
            for name in ports:
                if name not in named:
                    raise GraphError(f"the session has no output {name!r}{did_you_mean(name, named)}")
            edges = [named[name] for name in ports]
        if edges:
            async for chunk in Input(Context(self, Stage(), "outputs"), "outputs", edges):
                if self._recorder is not None:
                    self._recorder.output(chunk)
                yield chunk
        await self._ended()
        if self.error is not None:
            raise self.error

    async def send(self, chunk: Chunk, to: str | None = None) -> None:
        """Put a chunk into an ``Inlet`` (by name where there are several), waiting for room."""
        await self._inlet(to).put(chunk)

    def finish(self, to: str | None = None) -> None:
        """No more will be sent to that inlet, or to any."""
        for node in self._contexts:
            if isinstance(node, Inlet) and to in (None, self.graph.names[node]):
                self._outlets[node]["out"].close()
                self._contexts[node].finished.set()
        self.settle()

    async def opened(self) -> None:
        """Wait until the stages that lease places in the engine as they begin have them, or the session has ended."""
        await asyncio.sleep(0)  # the stages' first steps
        while self._opening and self._supervisor is not None and not self._supervisor.done():
            self._opened = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._opened, self._supervisor), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0)  # for a stage that failed on the way to have ended the session

    @property
    def playing(self) -> bool:
        """Whether a reply of this epoch is on its way to the listener: begun, and not yet heard to its end.

        A reply is audio that a stage which is not lasting puts out of the graph or into a sink; its last chunk is
        ``final``. What was heard is what the sinks report.
        """
        heard = self.heard.until if self.heard is not None and self.heard.epoch == self.epoch else float("-inf")
        for outlet in self._voices:
            last = outlet.last
            if not isinstance(last, Audio) or last.epoch != self.epoch:
                continue
            if not last.final or last.end_seconds > heard + _HEARD_WITHIN:
                return True
        return False

    def interrupt(self) -> int:
        """Start a new epoch and return it: everything older is dropped now, on every edge, lease and sink."""
        if self._recorder is not None:
            self._recorder.interrupt()
        return self.advance()

    def stats(self) -> dict[str, EdgeStats]:
        """Every edge's counters, by the edge's name."""
        return {edge.name: edge.stats() for edge in self.edges.values()}

    # What contexts call.

    def advance(self) -> int:
        """Start a new epoch from within the graph: see ``Context.interrupt``."""
        self.epoch += 1
        self.trace.marks.append(Mark(self.epoch, self.clock.now()))
        for resource in self._fenced:
            resource.fence(self.epoch)
        for edge in self.edges.values():
            edge.fence(self.epoch)
        for sleeper, epoch in self._sleepers.items():
            if epoch < self.epoch and not sleeper.done():
                sleeper.set_exception(Stale(f"epoch {epoch} was interrupted"))
        return self.epoch

    def own(self, resource: Any, *, fenced: bool = True) -> None:
        """See ``Context.own``."""
        if hasattr(resource, "aclose"):
            self._resources.push_async_callback(resource.aclose)
        else:
            self._resources.callback(resource.close)
        if fenced and hasattr(resource, "fence"):
            self._fenced.append(resource)

    async def lease(self, engine: Any, models: str | Sequence[str], options: dict[str, Any]) -> Any:
        """See ``Context.open`` and ``Context.open_together``."""
        self._opening += 1
        try:
            if isinstance(models, str):
                return await engine.open(models, **options)
            return await engine.open_together(models, **options)
        finally:
            self._opening -= 1
            if not self._opening and self._opened is not None and not self._opened.done():
                self._opened.set_result(None)

    def spawn(self, context: Context, work: Coroutine[Any, Any, None]) -> None:
        """See ``Context.spawn``."""
        self._start(context, work)

    async def sleep(self, seconds: float, epoch: int | None) -> None:
        """See ``Context.sleep``."""
        if epoch is None:
            return await self.clock.sleep(seconds)
        if epoch < self.epoch:
            raise Stale(f"epoch {epoch} was interrupted")
        loop = asyncio.get_running_loop()
        sleeper = loop.create_future()
        timer = loop.call_later(max(seconds, 0.0), _wake, sleeper)
        self._sleepers[sleeper] = epoch
        try:
            await sleeper
        finally:
            timer.cancel()
            del self._sleepers[sleeper]

    def report_heard(self, sink: str, epoch: int, seconds: float, until: float | None = None) -> None:
        """See ``Context.played``, and ``Heard``. What was reported for later sound stands."""
        until = seconds if until is None else max(seconds, until)
        if self.heard is None or (epoch, until) >= (self.heard.epoch, self.heard.until):
            self.heard = Heard(sink, epoch, seconds, until)

    def settle(self) -> None:
        """End each feedback loop that nothing can move any more: fed no longer, and every stage of it waiting."""
        for stages, entries, returns in self._loops:
            if all(edge.closed for edge in entries) and all(self._idle(node) for node in stages):
                for edge in returns:
                    edge.close()

    # Building, running, ending.

    def _build(self) -> None:
        now, names = self.clock.now, self.graph.names
        for connection in self.graph.connections:
            lasting = connection.source.stage.lasting
            self.edges[connection] = Edge(self.graph.label(connection), connection.link, now, lasting=lasting)
        for port in self.graph.open_outputs:
            name = names[port.stage] if len(port.stage.outputs) == 1 else f"{names[port.stage]}.{port.name}"
            self.edges[port] = Edge(name, Link(), now, lasting=port.stage.lasting)
        for node in self.graph.nodes:
            context = self._contexts[node] = Context(self, node, names[node])
            self._outlets[node] = {name: Outlet(context, self._leaving(node, name)) for name in node.outputs}
            self._inputs[node] = tuple(Input(context, name, self._arriving(node, name)) for name in node.inputs)
            context.blocking = tuple(
                edge for out in self._outlets[node].values() for edge in out.edges if edge.link.policy == "block"
            )
            if self._recorder is not None and not node.inputs:
                for name, out in self._outlets[node].items():
                    out.recorder = self._recorder.source(names[node], name)
            if not node.lasting:
                self._voices += [out for name, out in self._outlets[node].items() if self._leads_out(node, name)]
        for stages in self.graph.loops():
            inner = [c for c in self.graph.connections if c.target.stage in stages]
            entries = [self.edges[c] for c in inner if c.source.stage not in stages]
            returns = [self.edges[c] for c in inner if c.source.stage in stages and c.link.feedback]
            self._loops.append((stages, entries, returns))
            for node in stages:
                self._contexts[node].looped = True
        if self._recorder is not None:
            self._recorder.begin(self)

    def _leaving(self, node: Stage, name: str) -> tuple[Edge, ...]:
        ports = {key: key if isinstance(key, Port) else key.source for key in self.edges}
        return tuple(self.edges[key] for key, port in ports.items() if port.stage is node and port.name == name)

    def _arriving(self, node: Stage, name: str) -> tuple[Edge, ...]:
        targets = [c for c in self.graph.connections if c.target.stage is node and c.target.name == name]
        if not targets:  # an optional input: an edge that ended before it began
            nothing = Edge(name, Link(), self.clock.now)
            nothing.close()
            return (nothing,)
        return tuple(self.edges[c] for c in targets)

    def _leads_out(self, node: Stage, name: str) -> bool:
        """Whether an output port's chunks leave the graph or end in a sink."""
        taking = [c.target.stage for c in self.graph.connections if c.source.stage is node and c.source.name == name]
        return not all(stage.outputs for stage in taking) if taking else name not in node.optional

    def _start(self, context: Context, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"stage {context.name} of session {self.id}")
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._task_done(context, task))

    def _task_done(self, context: Context, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            if self._stopping:
                return
            error: BaseException | None = RuntimeError("its task was cancelled from outside the session")
        else:
            error = task.exception()
        if error is not None and self.error is None:
            self.error = StageError(context.name, context.taken, error)
            self.error.__cause__ = error
            self._stop()
        elif self._loops:
            self.settle()

    def _stop(self) -> None:
        self._stopping = True
        for task in self._tasks:
            task.cancel()

    async def _supervise(self) -> None:
        try:
            while self._tasks:
                await asyncio.wait(set(self._tasks))
        finally:
            self._stopping = True
            self._fenced.clear()
            for edge in self.edges.values():
                edge.close()
            try:
                await self._resources.aclose()
            finally:
                if self._recorder is not None:
                    self._recorder.end()

    async def _ended(self) -> None:
        if self._supervisor is not None:
            await asyncio.shield(self._supervisor)

    def _idle(self, node: Stage) -> bool:
        context = self._contexts[node]
        readers = context.readers.values()
        return context.ended or (bool(readers) and not any(reader.done() for reader in readers))

    def _inlet(self, name: str | None) -> Outlet:
        inlets = {self.graph.names[node]: node for node in self._contexts if isinstance(node, Inlet)}
        if name is None and len(inlets) == 1:
            return self._outlets[next(iter(inlets.values()))]["out"]
        if name not in inlets:
            wanted = "several inlets: say which" if name is None and inlets else f"no inlet {name!r}"
            raise GraphError(f"the session has {wanted}{did_you_mean(name or '', inlets)}")
        return self._outlets[inlets[name]]["out"]


class Outlet:
    """One output port of a running stage: stamps what it emits and puts it on every edge of the port."""

    __slots__ = ("_edge", "_now", "_record", "_seq", "_source", "context", "edges", "last", "recorder", "unwanted")

    def __init__(self, context: Context, edges: tuple[Edge, ...]) -> None:
        self.context, self.edges = context, edges
        self.recorder: Callable[[Chunk], None] | None = None
        self.last: Chunk | None = None  # emitted last
        self._edge = edges[0] if len(edges) == 1 else None
        self.unwanted = False  # every consumer has finished
        self._now = context.clock.now
        self._record = context.session.trace.lane(context.name).record
        self._seq = 0
        self._source = not context.stage.inputs

    def put_nowait(self, chunk: Chunk) -> bool:
        """Stamp the chunk and put it on the edges; False when some edge has to be awaited, with ``put_rest``."""
        if not isinstance(chunk, Chunk):
            raise TypeError(f"it yielded {chunk!r}: yield a chunk, or (port, chunk) from a stage with several outputs")
        context, now = self.context, self._now()
        size = chunk.duration * 1_000_000_000 // chunk.rate  # chunk.nanoseconds, without a call
        if self._source:
            context.epoch, context.taken_at = context.session.epoch, now
        if chunk.epoch == UNSET:
            _set(chunk, "epoch", context.epoch)
        if chunk.seq == UNSET:
            _set(chunk, "seq", self._seq)
            self._seq += 1
        self.last = chunk
        self._record(chunk, size, context.taken_at, now)
        if self.recorder is not None:
            self.recorder(chunk)
        if self._edge is None:
            self.unwanted = all(edge.abandoned for edge in self.edges)
            return False
        self.unwanted = self._edge.abandoned
        return self._edge.put_nowait(chunk, size)

    async def put(self, chunk: Chunk) -> None:
        """Stamp the chunk and put it on every edge, waiting for room where the policy says so."""
        if not self.put_nowait(chunk):
            for edge in self.edges:
                await edge.put(chunk)

    def close(self) -> None:
        """Nothing more will be emitted."""
        for edge in self.edges:
            edge.close()


async def _drive(context: Context, inputs: tuple[Input, ...], outlets: dict[str, Outlet]) -> None:
    """Run one stage: what it yields goes to its outlets, until it ends or nobody wants more."""
    try:
        work = context.stage.run(context, *inputs)
        if not isinstance(work, AsyncGenerator):
            await work
        elif len(outlets) != 1:
            async with aclosing(work):
                await _pump_ports(work, outlets)
        else:
            (outlet,) = outlets.values()
            async with aclosing(work):
                async for chunk in work:
                    if not outlet.put_nowait(chunk):
                        for edge in outlet.edges:
                            await edge.put(chunk)
                    if outlet.unwanted:
                        return
    finally:
        context.ended = True
        for outlet in outlets.values():
            outlet.close()
        for one in inputs:
            one.abandon()


async def _pump_ports(work: AsyncGenerator[Any, None], outlets: dict[str, Outlet]) -> None:
    async for made in work:
        try:
            port, chunk = made
            outlet = outlets[port]
        except (TypeError, ValueError, KeyError):
            raise TypeError(f"it yielded {made!r}: yield (port, chunk), port one of {', '.join(outlets)}") from None
        await outlet.put(chunk)
        if all(outlet.unwanted for outlet in outlets.values()):
            return


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
