"""Stages: async transforms of chunks, and what they see of their session.

    @stage
    async def gain(ctx: Context, audio: Input, *, db: float = 0.0) -> AsyncIterator[Audio]:
        async for chunk in audio:
            yield replace(chunk, samples=chunk.samples * 10 ** (db / 20))

    graph = microphone() >> gain(db=6.0) >> speaker()

The arguments after ``ctx`` are the input ports, the keyword-only ones the parameters (typed, so that a YAML graph can
be checked). A stage without inputs is a source, one that does not yield is a sink. With several outputs, declared as
``@stage(outputs=("audio", "events"))``, it yields ``(port, chunk)``. A class with such a ``run`` method works the same;
a stage object is only its configuration, for any number of sessions, so a session's state lives in ``run``.

A stage gets a chunk only when it has asked for one and each of its blocking outputs has room. What it yields belongs
to the epoch of the chunk it last took, unless it says otherwise: after an interruption such work is stale. Yielding
it is harmless (the edges refuse and count it); awaiting ``ctx.sleep`` or a lease raises ``Stale``, to be met with
``with suppress(Stale):`` around the work on one chunk. A stage whose work stays true after an interruption
(a microphone, a recogniser) is declared ``lasting=True``: neither its output nor its leases are fenced.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, cast, overload, runtime_checkable

from .chunk import Chunk, Stale
from .clock import Clock
from .edge import Edge
from .graph import Chain, Graph, GraphError, Port, did_you_mean

if TYPE_CHECKING:
    from .session import Heard, Session
    from .trace import Trace

R = TypeVar("R")
C = TypeVar("C", bound="type[Stage]")

REGISTRY: dict[str, type[Stage]] = {}


class Stage(Chain):
    """One node of a graph: a name, ports, and ``run(ctx, *inputs)``. Subclass it, or decorate a function.

    optional: ports that may stay unconnected. Such an input has ended from the start; what is put to such an output is
    dropped. ``>>`` joins the others; name an optional port to join it.
    """

    name: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    lasting: bool = False
    parameters: ClassVar[inspect.Signature] = inspect.Signature()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "run" in cls.__dict__:
            ports = list(inspect.signature(cls.run).parameters.values())[2:]
            if all(port.kind is port.POSITIONAL_OR_KEYWORD for port in ports):
                cls.inputs = tuple(port.name for port in ports)
            if "outputs" not in cls.__dict__:
                cls.outputs = ("out",) if inspect.isasyncgenfunction(cls.run) else ()
        cls.name = cls.__dict__.get("name", cls.__name__.lower())
        cls.parameters = inspect.signature(cls.__init__) if "__init__" in cls.__dict__ else cls.parameters

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """``run(self, ctx: Context, *inputs: Input)``: an async generator of chunks, or a coroutine for a sink."""
        raise NotImplementedError(f"stage {self.name!r} has no run method")

    def named(self, name: str) -> Stage:
        """This stage under another name (in errors, traces, pictures and YAML)."""
        renamed = copy.copy(self)
        renamed.name = name
        return renamed

    def __getitem__(self, port: str) -> Port:
        if port not in (*self.inputs, *self.outputs):
            raise GraphError(
                f"stage {self.name!r} has no port {port!r}{did_you_mean(port, (*self.inputs, *self.outputs))}"
            )
        return Port(self, port)

    def _graph(self) -> Graph:
        heads = tuple(Port(self, name) for name in self.inputs if name not in self.optional)
        tails = tuple(Port(self, name) for name in self.outputs if name not in self.optional)
        return Graph((self,), (), heads, tails)

    def __repr__(self) -> str:
        return f"<stage {self.name}>"


@overload
def stage(body: C) -> C: ...
@overload
def stage(body: Callable[..., Any]) -> type[Stage]: ...
@overload
def stage(
    *,
    name: str | None = None,
    outputs: Sequence[str] | None = None,
    optional: Sequence[str] | None = None,
    lasting: bool = False,
) -> Callable[[Any], type[Stage]]: ...
def stage(
    body: Any = None,
    *,
    name: str | None = None,
    outputs: Sequence[str] | None = None,
    optional: Sequence[str] | None = None,
    lasting: bool = False,
) -> Any:
    """Make a stage of an async function, and register it (or a ``Stage`` class) under its name for YAML graphs.

    Raises TypeError for a body that is neither, and ValueError for a name that another stage has.
    """
    if body is None:
        return lambda body: _declare(body, name, outputs, optional, lasting)
    return _declare(body, name, outputs, optional, lasting)


def _declare(
    body: Any, name: str | None, outputs: Sequence[str] | None, optional: Sequence[str] | None, lasting: bool
) -> type[Stage]:
    if inspect.isclass(body) and issubclass(body, Stage):
        made = body
        made.lasting = lasting or made.lasting
    elif inspect.isasyncgenfunction(body) or inspect.iscoroutinefunction(body):
        made = _from_function(body)
        made.lasting = lasting
    else:
        raise TypeError(f"@stage takes an async function or a Stage class, not {body!r}")
    made.name = name or made.name
    if outputs is not None:
        made.outputs = tuple(outputs)
    if optional is not None:
        made.optional = tuple(optional)
    if unknown := [name for name in made.optional if name not in (*made.inputs, *made.outputs)]:
        raise ValueError(f"stage {made.name!r}: optional port {unknown[0]!r} is none of its ports")
    if twofold := [name for name in made.optional if name in made.inputs and name in made.outputs]:
        raise ValueError(f"stage {made.name!r}: {twofold[0]!r} is an input and an output; optional could mean either")
    known = REGISTRY.get(made.name)
    if known is not None and (known.__module__, known.__qualname__) != (made.__module__, made.__qualname__):
        raise ValueError(
            f"stage name {made.name!r} is taken by {known.__module__}.{known.__qualname__}: choose another"
        )
    REGISTRY[made.name] = made
    return made


def _from_function(body: Callable[..., Any]) -> type[Stage]:
    signature = inspect.signature(body)
    ports = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY][1:]
    options = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    bound = inspect.Signature([p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in options])

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it becomes the class's
        try:
            given = bound.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"stage {self.name!r}: {error}; its parameters are {bound}") from None
        given.apply_defaults()
        self.options = given.arguments

    def run(self: Any, ctx: Context, *inputs: Input) -> Any:
        return body(ctx, *inputs, **self.options)

    made = type(
        body.__name__,
        (Stage,),
        {"__init__": __init__, "__doc__": body.__doc__, "__module__": body.__module__, "body": staticmethod(body)},
    )
    cls = cast("type[Stage]", made)
    cls.__qualname__ = body.__qualname__
    cls.run = run  # type: ignore[method-assign]
    cls.inputs = tuple(p.name for p in ports)
    cls.outputs = ("out",) if inspect.isasyncgenfunction(body) else ()
    cls.parameters = bound
    return cls


@runtime_checkable
class Closable(Protocol):
    """A resource of a session: closed when the session ends; ``fence(epoch)`` is called too where it has one."""

    def close(self) -> Any:
        """Free it."""


class StageError(RuntimeError):
    """An exception in a stage, named with the stage and the chunk it was working on. ``__cause__`` is the original."""

    def __init__(self, stage: str, chunk: Chunk | None, error: BaseException) -> None:
        where = f" on {chunk}" if chunk is not None else ""
        hint = ""
        if isinstance(error, Stale):
            hint = "; put `with suppress(Stale):` around the work on one chunk, or declare the stage lasting"
        super().__init__(f"stage {stage!r} failed{where}: {type(error).__name__}: {error}{hint}")
        self.stage, self.chunk = stage, chunk


class Context:
    """What a stage sees of its session."""

    __slots__ = (
        "blocking",
        "clock",
        "ended",
        "epoch",
        "finished",
        "loop",
        "looped",
        "name",
        "readers",
        "session",
        "stage",
        "taken",
        "taken_at",
    )

    def __init__(self, session: Session, stage: Stage, name: str) -> None:
        self.session, self.stage, self.name = session, stage, name
        self.clock: Clock = session.clock
        self.loop = asyncio.get_running_loop()
        self.epoch = session.epoch  # the epoch of the chunk taken last: what is made now belongs to it
        self.taken: Chunk | None = None
        self.taken_at = self.clock.now()
        self.blocking: tuple[Edge, ...] = ()  # the output edges that must have room before a chunk is handed over
        self.ended = False
        self.finished = asyncio.Event()  # of an inlet: nothing more will be sent
        self.looped = False  # in a feedback loop: the session needs to know when this stage waits
        self.readers: dict[object, asyncio.Future[None]] = {}  # in a loop: what each of its tasks waits or waited for

    @property
    def now(self) -> float:
        """Seconds on the session's clock."""
        return self.clock.now()

    @property
    def stale(self) -> bool:
        """Whether an interruption has overtaken the chunk this stage took last."""
        return self.epoch < self.session.epoch

    @property
    def engine(self) -> Any:
        """The engine the session was given. Raises RuntimeError when it has none."""
        if self.session.engine is None:
            raise RuntimeError(f"stage {self.name!r} needs an engine: pass one, graph.session(engine=Engine(...))")
        return self.session.engine

    @property
    def trace(self) -> Trace:
        """The session's trace."""
        return self.session.trace

    @property
    def heard(self) -> Heard | None:
        """The media position that a sink last reported as played: cut a dialogue's memory to it."""
        return self.session.heard

    @property
    def playing(self) -> bool:
        """Whether a reply of this epoch is under way to the listener: see ``Session.playing``."""
        return self.session.playing

    async def open(self, model: str, **options: Any) -> Any:
        """A lease of a slot of the engine's ``model``, closed with the session and fenced unless lasting."""
        return self.own(await self.session.lease(self.engine, model, options))

    async def open_together(self, models: Sequence[str], **options: Any) -> list[Any]:
        """``open`` for several models of one engine: all, or none."""
        return [self.own(lease) for lease in await self.session.lease(self.engine, models, options)]

    def own(self, resource: R) -> R:
        """Close ``resource`` (``aclose`` or ``close``) when the session ends, however it ends.

        Its ``fence(epoch)``, if it has one, is called at once on an interruption, unless the stage is lasting.
        """
        self.session.own(resource, fenced=not self.stage.lasting)
        return resource

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a helper task beside the stage; its failure ends the session, the session's end cancels it."""
        self.session.spawn(self, work)

    async def sleep(self, seconds: float) -> None:
        """Wait on the session's clock; raises Stale as soon as an interruption overtakes the chunk in hand."""
        fenced = self.stage.inputs and not self.stage.lasting
        await self.session.sleep(seconds, self.epoch if fenced else None)

    def interrupt(self) -> int:
        """Start a new epoch: everything older is dropped at once, everywhere. This stage's work is of the new one."""
        self.epoch = self.session.advance()
        return self.epoch

    def played(self, chunk: Chunk, seconds: float | None = None) -> None:
        """For sinks: ``chunk`` has been played, or only its first ``seconds``."""
        played = chunk.seconds if seconds is None else min(max(seconds, 0.0), chunk.seconds)
        self.session.report_heard(self.name, chunk.epoch, chunk.start_seconds + played)

    def count(self, what: str, number: int = 1) -> None:
        """Count something worth knowing about this session, such as late parts or shed frames."""
        self.session.counters[f"{self.name}.{what}"] += number


class Input:
    """One input port of a running stage: ``async for chunk in input``. Several edges merge by media time."""

    __slots__ = ("_edges", "_only", "context", "name")

    def __init__(self, context: Context, name: str, edges: Sequence[Edge]) -> None:
        self.context, self.name = context, name
        self._edges = tuple(edges)
        self._only = edges[0] if len(edges) == 1 else None

    def __aiter__(self) -> Input:
        return self

    async def __anext__(self) -> Chunk:
        for out in self.context.blocking:
            while out.full:
                await out.room()
        edge = self._only if self._only is not None else self._earliest()
        while not edge.items:
            if edge.closed and self.ended:
                raise StopAsyncIteration
            await _wait(self.context, self._edges)
            edge = self._only if self._only is not None else self._earliest()
        return self._take(edge)

    def get_nowait(self) -> Chunk | None:
        """The next chunk, or None when there is none now."""
        edge = self._earliest()
        return self._take(edge) if edge.items else None

    def _take(self, edge: Edge) -> Chunk:
        context, chunk = self.context, edge.take()
        context.taken, context.taken_at, context.epoch = chunk, edge.taken_at, chunk.epoch
        return chunk

    def _earliest(self) -> Edge:
        """The edge whose oldest chunk starts first in media time."""
        return min(self._edges, key=_head_seconds)

    @property
    def ready(self) -> bool:
        """Whether a chunk is there."""
        return any(edge.items for edge in self._edges)

    @property
    def ended(self) -> bool:
        """Whether no chunk will ever come again."""
        for edge in self._edges:  # noqa: SIM110 - once a chunk; all() of a generator costs three times this
            if edge.items or not edge.closed:
                return False
        return True

    def abandon(self) -> None:
        """Take no more: whatever still comes is counted as unread."""
        for edge in self._edges:
            edge.abandon()


async def select(*inputs: Input) -> Input | None:
    """The first of these inputs (in this order) that has a chunk, waiting for one; None when all have ended."""
    context = inputs[0].context
    for edge in context.blocking:
        while edge.full:
            await edge.room()
    while True:
        for one in inputs:
            if one.ready:
                return one
        if all(one.ended for one in inputs):
            return None
        await _wait(context, [edge for one in inputs for edge in one._edges if not edge.ended])


def _wait(context: Context, edges: Sequence[Edge]) -> asyncio.Future[None]:
    """Resolved when a chunk arrives at one of the edges, or one closes."""
    reader: asyncio.Future[None] = asyncio.Future(loop=context.loop)
    for edge in edges:
        edge.reader = reader
    if context.looped:
        context.readers[asyncio.current_task()] = reader
        context.session.settle()
    return reader


def _head_seconds(edge: Edge) -> float:
    return edge.head_seconds


@stage(lasting=True)
class Inlet(Stage):
    """A source fed from outside: ``await session.send(chunk)``, ended by ``session.finish()``."""

    outputs = ("out",)

    async def run(self, ctx: Context) -> None:
        """Only waits for the end: the session puts what it is sent straight into the output."""
        await ctx.finished.wait()
