"""YAML graphs: what loads, and errors that name file, line, value and remedy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest

import antiphon.pipelines.join  # noqa: F401  # registers the kind
from antiphon.pipelines.chunk import Chunk, Text
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.spec import SpecError, load_graph, parse_graph
from antiphon.pipelines.stage import Context, Input, Stage, stage


@stage
async def say(
    ctx: Context,
    *,
    words: list[str],
    every: float = 0.1,
    style: Literal["plain", "loud"] = "plain",
    times: int | None = None,
) -> AsyncIterator[Text]:
    for word in words * (times or 1):
        await ctx.sleep(every)
        yield Text(word.upper() if style == "loud" else word, rate=1)


@stage(name="sort_words", outputs=("short", "long"))
class SortWords(Stage):
    def __init__(self, limit: int = 3) -> None:
        if limit < 1:
            raise ValueError(f"limit={limit}: at least 1")
        self.limit = limit

    async def run(self, ctx: Context, words: Input) -> AsyncIterator[tuple[str, Chunk]]:
        async for word in words:
            yield ("short" if len(word.text) <= self.limit else "long"), word


GRAPH = """\
stages:
  left: {stage: say, words: [a, quick, fox], every: 1}
  right:
    stage: say
    words: [jumps]
    style: loud
  sorter: {stage: sort_words, limit: 3}
  both: {stage: join, ports: [one, two], skew_ms: 10}
edges:
  - left >> sorter: {items: 4, policy: drop_oldest}
  - sorter.long >> both.one
  - right >> both.two: {ms: 250.5}
"""


def test_a_graph_loads_and_runs(tmp_path: Path) -> None:
    (tmp_path / "graph.yaml").write_text(GRAPH)
    graph = load_graph(tmp_path / "graph.yaml")
    assert [graph.label(c) for c in graph.connections] == [
        "left -> sorter",
        "sorter.long -> both.one",
        "right -> both.two",
    ]
    links = [(c.link.items, c.link.ms, c.link.policy) for c in graph.connections]
    assert links == [(4, 1000.0, "drop_oldest"), (32, 1000.0, "block"), (32, 250.5, "block")]

    async def main() -> list[str]:
        async with graph.session() as session:
            return [chunk.text async for chunk in session.outputs() if isinstance(chunk, Text)]

    assert run_virtual(main()) == ["a", "fox"]


def test_a_chain_of_edges_on_one_line() -> None:
    graph = parse_graph(
        "stages: {a: {stage: say, words: [x]}, b: sort_words, c: sort_words}\nedges: [a >> b, b.long >> c]"
    )
    assert len(graph.connections) == 2


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("stage: sort_words", "stage: sort_word", 7, "stage 'sorter': no kind 'sort_word'; did you mean 'sort_words'?"),
        ("limit: 3", "limt: 3", 7, "sort_words has no parameter 'limt'; did you mean 'limit'? (known: limit)"),
        ("limit: 3", "limit: three", 7, "stage 'sorter', limit is 'three': int is expected"),
        ("limit: 3", "limit: true", 7, "limit is True: int is expected"),
        ("limit: 3", "limit: 0", 7, "stage 'sorter': limit=0: at least 1"),
        ("words: [jumps]", "words: [1]", 5, "words is [1]: list[str] is expected"),
        ("style: loud", "style: lout", 6, "style is 'lout': one of 'plain', 'loud' is expected; did you mean 'loud'?"),
        ("    words: [jumps]\n", "", 4, "stage 'right': stage 'say': missing a required argument: 'words'"),
        ("    stage: say\n", "", 4, "stage 'right' does not say its kind: add `stage: ...`"),
        ("- left >> sorter", "- lfet >> sorter", 10, "edge names no stage of this file: 'lfet'; did you mean 'left'?"),
        ("sorter.long >>", "sorter.lng >>", 11, "stage 'sorter' has no output port 'lng'; did you mean 'long'?"),
        ("sorter.long >>", "sorter >>", 11, "stage 'sorter' has 2 outputs (short, long): name one, as sorter.PORT"),
        (">> both.two", "both.two", 12, "edge 'right both.two': write `source >> target`"),
        ("policy: drop_oldest", "policy: drop_oldst", 10, "policy is 'drop_oldst': one of 'block', 'drop_oldest'"),
        ("items: 4", "items: 0", 10, "Link items=0: an edge holds at least 1"),
        ("items: 4", "item: 4", 10, "the edge has no 'item'; did you mean 'items'?"),
        ("{items: 4, policy: drop_oldest}", "{feedback: true}", 10, "feedback=True with policy 'block'"),
        ("edges:", "edge:", 9, "the file has no 'edge'; did you mean 'edges'?"),
        ("  right:\n", "  left:\n", 3, "`stages` has 'left' twice"),
        ("  - right >> both.two: {ms: 250.5}\n", "", 2, "stage 'both', input 'two': nothing feeds it"),
        ("every: 1}", "every: 1", 3, "not YAML:"),
        ("every: 1}", "every: !!python/object:os.system {}}", 2, "could not determine a constructor for the tag"),
        ("ports: [one, two]", "ports: [one]", 8, "name at least two different ports"),
    ],
)
def test_an_error_names_file_line_value_and_remedy(old: str, new: str, line: int, message: str) -> None:
    assert GRAPH.count(old) == 1
    with pytest.raises(SpecError) as caught:
        parse_graph(GRAPH.replace(old, new), "talk.yaml")
    assert str(caught.value).startswith(f"talk.yaml:{line}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("- a", "is not a mapping"),
        ("edges: []", "no `stages:`"),
        ("stages: [a]", "`stages` is not a mapping"),
        ("stages: {}", "no stages"),
        ("stages: {a: {stage: say, words: [x]}}\nedges: a", "2: `edges` is not a list"),
        ("stages: {a b: say}", "stage name 'a b'"),
        ("stages: {a: [1]}", "plain value"),
        ("\t", "not YAML"),
    ],
)
def test_a_file_of_another_shape_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message.replace("[", r"\[")):
        parse_graph(text)
