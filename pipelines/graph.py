"""Graphs as values: stages joined by ``>>``.

    graph = Microphone() >> Transcribe(lookahead=1) >> Converse() >> Speak() >> Speaker()
    graph = source >> (left, right)                               # fan-out: both get every chunk
    graph = [a, b] >> Join("audio", "text") >> sink               # several inputs, in port order
    graph = a["events"] >> Link(ms=200, policy="drop_oldest") >> b["text"]        # named ports, bounds
    graph = forward | (speaker["heard"] >> Link(feedback=True, policy="drop_oldest") >> converse["heard"])

A graph holds no session: any number of sessions may run from one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from .edge import Link

if TYPE_CHECKING:
    from .session import Session
    from .stage import Stage


class GraphError(ValueError):
    """A graph that cannot run; the message names the stage and port, and the remedy."""


class Chain:
    """Whatever ``>>`` joins: a stage, a port, a graph."""

    def _graph(self) -> Graph:
        raise NotImplementedError

    def __rshift__(self, other: Target | Link) -> Graph:
        return self._graph()._then(other)

    def __rrshift__(self, other: Sequence[Chain]) -> Graph:
        return _side_by_side(other)._then(self)

    def __or__(self, other: Chain) -> Graph:
        return self._graph()._union(other._graph())

    def session(self, **options: Any) -> Session:
        """A session of this graph; the options are ``Session``'s."""
        from .session import Session

        return Session(self._graph(), **options)

    def draw(self, form: str = "svg", session: Session | None = None) -> str:
        """The graph as an ``svg`` or ``mermaid`` text; with a session, with its edges' live depths and drops."""
        from .draw import draw

        return draw(self._graph(), form, session)


Target: TypeAlias = "Chain | Sequence[Chain]"


@dataclass(frozen=True, eq=False)
class Port(Chain):
    """One named port of a stage: ``stage["name"]``. An output on the left of ``>>``, an input on its right."""

    stage: Stage
    name: str

    def _graph(self) -> Graph:
        if self.name not in (*self.stage.inputs, *self.stage.outputs):
            raise GraphError(_no_port(self.stage, self.name, (*self.stage.inputs, *self.stage.outputs), ""))
        heads = (self,) if self.name in self.stage.inputs else ()
        tails = (self,) if self.name in self.stage.outputs else ()
        return Graph((self.stage,), (), heads, tails)


@dataclass(frozen=True, eq=False)
class Connection:
    """From an output port to an input port."""

    source: Port
    target: Port
    link: Link


@dataclass(frozen=True, eq=False)
class Graph(Chain):
    """Stages and connections. Build one with ``>>`` and ``|``.

    heads, tails: the ports that the next ``>>`` on the left and on the right joins.
    """

    nodes: tuple[Stage, ...] = ()
    connections: tuple[Connection, ...] = ()
    heads: tuple[Port, ...] = field(default=(), repr=False)
    tails: tuple[Port, ...] = field(default=(), repr=False)
    link: Link | None = field(default=None, repr=False)

    @cached_property
    def names(self) -> dict[Stage, str]:
        """Every stage's name in this graph: its own, numbered where several share it."""
        names: dict[Stage, str] = {}
        for node in self.nodes:
            name, count = node.name, 2
            while name in names.values():
                name, count = f"{node.name}-{count}", count + 1
            names[node] = name
        return names

    def stage(self, name: str) -> Stage:
        """The stage of that name. Raises GraphError with the nearest name."""
        for node, its_name in self.names.items():
            if its_name == name:
                return node
        raise GraphError(f"no stage {name!r} in this graph{did_you_mean(name, self.names.values())}")

    def label(self, connection: Connection) -> str:
        """``source.port -> target.port``, ports left out where there is one only."""
        return f"{self._port_label(connection.source, True)} -> {self._port_label(connection.target, False)}"

    def _port_label(self, port: Port, output: bool) -> str:
        name = self.names[port.stage]
        alone = len(port.stage.outputs if output else port.stage.inputs) == 1
        return name if alone else f"{name}.{port.name}"

    def connect(self, source: Port, target: Port, link: Link | None = None) -> Graph:
        """This graph with one more connection. Raises GraphError for a port that does not exist."""
        if source.name not in source.stage.outputs:
            raise GraphError(_no_port(source.stage, source.name, source.stage.outputs, "output "))
        if target.name not in target.stage.inputs:
            raise GraphError(_no_port(target.stage, target.name, target.stage.inputs, "input "))
        nodes = tuple(dict.fromkeys((*self.nodes, source.stage, target.stage)))
        return replace(self, nodes=nodes, connections=(*self.connections, Connection(source, target, link or Link())))

    @cached_property
    def open_outputs(self) -> tuple[Port, ...]:
        """Output ports that nothing takes, optional ones aside: the session's outputs."""
        taken = {(c.source.stage, c.source.name) for c in self.connections}
        return tuple(
            Port(node, name)
            for node in self.nodes
            for name in node.outputs
            if (node, name) not in taken and name not in node.optional
        )

    def validate(self) -> None:
        """Raise GraphError for an unfinished ``>>``, an unconnected input, or a cycle without a feedback edge."""
        if not self.nodes:
            raise GraphError("the graph has no stages: join some with >>")
        if self.link is not None:
            raise GraphError("the graph ends in a Link: put a stage after it")
        fed = {(c.target.stage, c.target.name) for c in self.connections}
        for node in self.nodes:
            for name in node.inputs:
                if (node, name) not in fed and name not in node.optional:
                    raise GraphError(
                        f"stage {self.names[node]!r}, input {name!r}: nothing feeds it; connect an output to it "
                        f'(source >> stage["{name}"]), or an Inlet() to feed it from outside'
                    )
        cycle = self._cycle()
        if cycle:
            raise GraphError(
                f"the stages {' -> '.join(self.names[node] for node in cycle)} form a cycle: mark the edge that closes "
                'it, with Link(feedback=True, policy="drop_oldest") or policy="error"'
            )

    def _cycle(self) -> list[Stage]:
        """Stages of a cycle of forward edges, first repeated at the end; empty when there is none."""
        onward: dict[Stage, list[Stage]] = {node: [] for node in self.nodes}
        for c in self.connections:
            if not c.link.feedback:
                onward[c.source.stage].append(c.target.stage)
        done: set[Stage] = set()

        def walk(node: Stage, path: list[Stage]) -> list[Stage]:
            if node in path:
                return [*path[path.index(node) :], node]
            if node not in done:
                for following in onward[node]:
                    if found := walk(following, [*path, node]):
                        return found
                done.add(node)
            return []

        return next((found for node in self.nodes if (found := walk(node, []))), [])

    def loops(self) -> list[set[Stage]]:
        """Groups of stages that feed each other in a circle (feedback edges included)."""
        reach: dict[Stage, set[Stage]] = {node: set() for node in self.nodes}
        for node in self.nodes:
            todo = [node]
            while todo:
                here = todo.pop()
                for c in self.connections:
                    if c.source.stage is here and c.target.stage not in reach[node]:
                        reach[node].add(c.target.stage)
                        todo.append(c.target.stage)
        groups: list[set[Stage]] = []
        for node in self.nodes:
            if node in reach[node] and not any(node in group for group in groups):
                groups.append({other for other in reach[node] if node in reach[other]})
        return groups

    def _graph(self) -> Graph:
        return self

    def _then(self, other: Target | Link) -> Graph:
        if isinstance(other, Link):
            if not self.tails:
                raise GraphError(f"{self._end()} has no output for a Link to follow")
            return replace(self, link=other)
        right = other._graph() if isinstance(other, Chain) else _side_by_side(other)
        if not self.tails:
            raise GraphError(f"{self._end()} has no output: it cannot stand on the left of >>")
        if not right.heads:
            raise GraphError(f"stage {right.nodes[0].name!r} has no input: it cannot stand on the right of >>")
        joined = replace(self._union(right), heads=self.heads, tails=right.tails, link=right.link)
        for source, target in self._pairs(right):
            joined = joined.connect(source, target, self.link)
        return joined

    def _pairs(self, right: Graph) -> list[tuple[Port, Port]]:
        """Which tail joins which head: all to one, one to each stage, or in order to the ports of one stage."""
        stages = {head.stage for head in right.heads}
        if len(right.heads) == 1 or (len(self.tails) == 1 and len(stages) == len(right.heads)):
            return [(tail, head) for tail in self.tails for head in right.heads]
        if len(stages) == 1 and len(self.tails) == len(right.heads):
            return list(zip(self.tails, right.heads, strict=True))
        raise GraphError(
            f"{len(self.tails)} outputs ({_listed(self.tails)}) do not fit {len(right.heads)} inputs "
            f'({_listed(right.heads)}): name the ports, as in a["out"] >> b["in"], and unite the parts with |'
        )

    def _union(self, other: Graph) -> Graph:
        return Graph(
            tuple(dict.fromkeys((*self.nodes, *other.nodes))),
            tuple(dict.fromkeys((*self.connections, *other.connections))),
            (*self.heads, *other.heads),
            (*self.tails, *other.tails),
        )

    def _end(self) -> str:
        return f"stage {self.nodes[-1].name!r}" if self.nodes else "an empty graph"


def _side_by_side(parts: Iterable[Chain]) -> Graph:
    graph = Graph()
    for part in parts:
        graph = graph._union(part._graph())
    return graph


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``: did you mean 'x'? (known: ...)`` for an error about an unknown name."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (known: {', '.join(names) or 'none'})"


def _no_port(stage: Stage, name: str, known: Sequence[str], kind: str) -> str:
    return f"stage {stage.name!r} has no {kind}port {name!r}{did_you_mean(name, known)}"


def _listed(ports: Iterable[Port]) -> str:
    return ", ".join(f"{port.stage.name}.{port.name}" for port in ports)
