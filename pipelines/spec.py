"""Graphs in YAML.

    stages:
      mic: inlet                              # name: kind
      asr: {stage: transcribe, lookahead: 80} # with parameters
      log: collect
    edges:
      - mic >> asr
      - asr >> log: {ms: 200, policy: drop_oldest}
      - log.heard >> asr.heard: {feedback: true, policy: error}    # ports by name where a stage has several

Kinds are the registered stages. Every error is a ``SpecError`` that names file and line, the value, and what would do.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .edge import Link
from .graph import Graph, GraphError, Port, did_you_mean
from .stage import REGISTRY, Stage

_LINK_TYPES = get_type_hints(Link)


class SpecError(ValueError):
    """A YAML graph that cannot be built: ``file:line: what, and the remedy``."""


def load_graph(path: str | PathLike[str]) -> Graph:
    """The graph that a YAML file describes. Raises SpecError, and OSError for a file that cannot be read."""
    return parse_graph(Path(path).read_text(encoding="utf-8"), str(path))


def parse_graph(text: str, name: str = "<graph>") -> Graph:
    """The graph that YAML text describes; ``name`` stands for the file in errors. Raises SpecError."""
    return _Reader(name).graph(text)


class _Reader:
    def __init__(self, name: str) -> None:
        self.name = name

    def error(self, node: yaml.Node | yaml.Mark | None, message: str) -> SpecError:
        mark = node.start_mark if isinstance(node, yaml.Node) else node
        return SpecError(f"{self.name}:{mark.line + 1 if mark is not None else 1}: {message}")

    def graph(self, text: str) -> Graph:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            raise self.error(error.problem_mark, f"not YAML: {error.problem}") from None
        except yaml.YAMLError as error:
            raise self.error(None, f"not YAML: {error}") from None
        if root is None:
            raise self.error(None, "the file is empty: it needs `stages:` and `edges:`")
        top = {key: value for key, _, value in self.entries(root, "the file", ("stages", "edges"))}
        if "stages" not in top:
            raise self.error(root, "no `stages:`: a mapping of names to kinds")
        stages: dict[str, Stage] = {}
        for name, key, value in self.entries(top["stages"], "`stages`"):
            if not name.replace("-", "_").isidentifier():
                raise self.error(key, f"stage name {name!r}: use letters, digits, - and _")
            stages[name] = self.stage(name, value)
        graph = Graph(tuple(stages.values()))
        edges = top.get("edges")
        for edge in self.items(edges, "`edges`") if edges is not None else ():
            graph = self.edge(graph, stages, edge)
        try:
            graph.validate()
        except GraphError as error:
            raise self.error(top["stages"], str(error)) from None
        return graph

    def stage(self, name: str, node: yaml.Node) -> Stage:
        options: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        kind_node = node
        if isinstance(node, yaml.MappingNode):
            options = {key: (key_node, value) for key, key_node, value in self.entries(node, f"stage {name!r}")}
            if "stage" not in options:
                raise self.error(node, f"stage {name!r} does not say its kind: add `stage: ...`")
            kind_node = options.pop("stage")[1]
        kind = self.scalar(kind_node)
        if kind not in REGISTRY:
            raise self.error(kind_node, f"stage {name!r}: no kind {kind!r}{did_you_mean(str(kind), REGISTRY)}")
        made = REGISTRY[kind]
        known = [p for p in made.parameters.parameters.values() if p.name != "self"]
        hints = _hints(made)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in known)
        arguments: dict[str, Any] = {}
        for key, (key_node, value) in options.items():
            names = [p.name for p in known if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            ports = next((p.name for p in known if p.kind is p.VAR_POSITIONAL), None)
            if key not in names and key != ports and not open_ended:
                raise self.error(key_node, f"stage {name!r}: {kind} has no parameter {key!r}{did_you_mean(key, names)}")
            hint = hints.get(key, Any)
            arguments[key] = self.value(value, list[hint] if key == ports else hint, f"stage {name!r}, {key}")  # type: ignore[valid-type]
        positional: list[Any] = next((arguments.pop(p.name, []) for p in known if p.kind is p.VAR_POSITIONAL), [])
        try:
            return made(*positional, **arguments).named(name)
        except (TypeError, ValueError) as error:
            raise self.error(node, f"stage {name!r}: {error}") from None

    def edge(self, graph: Graph, stages: Mapping[str, Stage], node: yaml.Node) -> Graph:
        link, text_node = Link(), node
        if isinstance(node, yaml.MappingNode):
            if len(node.value) != 1:
                raise self.error(node, "an edge is one `a >> b: {...}`: put a dash before each")
            text_node, options = node.value[0]
            given = {}
            for key, _, value in self.entries(options, "the edge", [f.name for f in fields(Link)]):
                given[key] = self.value(value, _LINK_TYPES[key], f"the edge's {key}")
            try:
                link = Link(**given)
            except ValueError as error:
                raise self.error(options, str(error)) from None
        text = str(self.scalar(text_node))
        ends = [end.strip() for end in text.split(">>")]
        if len(ends) < 2:
            raise self.error(text_node, f"edge {text!r}: write `source >> target`, with .port where there are several")
        for source, target in pairwise(ends):
            try:
                graph = graph.connect(self.port(stages, source, "outputs"), self.port(stages, target, "inputs"), link)
            except GraphError as error:
                raise self.error(text_node, str(error)) from None
        return graph

    @staticmethod
    def port(stages: Mapping[str, Stage], text: str, side: Literal["inputs", "outputs"]) -> Port:
        name, _, port = text.partition(".")
        if name not in stages:
            raise GraphError(f"edge names no stage of this file: {name!r}{did_you_mean(name, stages)}")
        ports = getattr(stages[name], side)
        if port:
            return Port(stages[name], port)
        needed = [one for one in ports if one not in stages[name].optional]
        if len(needed) != 1:
            listed = ", ".join(ports) or "none"
            raise GraphError(f"stage {name!r} has {len(ports)} {side} ({listed}): name one, as {name}.PORT")
        return Port(stages[name], needed[0])

    def entries(
        self, node: yaml.Node, what: str, known: tuple[str, ...] | list[str] | None = None
    ) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"{what} is not a mapping (`key: value` lines)")
        seen: set[str] = set()
        for key_node, value in node.value:
            key = str(self.scalar(key_node))
            if key in seen:
                raise self.error(key_node, f"{what} has {key!r} twice")
            if known is not None and key not in known:
                raise self.error(key_node, f"{what} has no {key!r}{did_you_mean(key, known)}")
            seen.add(key)
            yield key, key_node, value

    def items(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(node, f"{what} is not a list (`- ...` lines)")
        return list(node.value)

    def scalar(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, "a plain value is expected here")
        return self.construct(node)

    def construct(self, node: yaml.Node) -> Any:
        try:
            return yaml.SafeLoader("").construct_document(node)
        except yaml.MarkedYAMLError as error:
            raise self.error(error.problem_mark or node, f"{error.problem}") from None

    def value(self, node: yaml.Node, hint: Any, what: str) -> Any:
        value = self.construct(node)
        if not _fits(value, hint):
            near = did_you_mean(str(value), get_args(hint)) if get_origin(hint) is Literal else ""
            raise self.error(node, f"{what} is {value!r}: {_said(hint)} is expected{near}")
        return value


def _hints(made: type[Stage]) -> dict[str, Any]:
    """The parameters' types; those that cannot be resolved are not checked."""
    body = getattr(made, "body", made.__init__)
    try:
        return get_type_hints(body)
    except NameError:
        return {p.name: Any for p in inspect.signature(body).parameters.values()}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value is of a type: plain types, unions, literals, lists and mappings of those."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if kind in (list, tuple) or (kind is not str and issubclass(kind, list | tuple)):
        return isinstance(value, list) and (not inner or all(_fits(one, inner[0]) for one in value))
    return isinstance(value, kind)


def _said(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint)
