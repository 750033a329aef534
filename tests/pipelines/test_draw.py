"""Pictures: well-formed, complete, with live depths, nothing overlapping."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator

import numpy as np
import pytest

from antiphon.pipelines.chunk import Audio, Chunk
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.edge import Link
from antiphon.pipelines.graph import Graph
from antiphon.pipelines.join import Join
from antiphon.pipelines.served import GRAPHS
from antiphon.pipelines.stage import Context, Input, stage

SVG = "{http://www.w3.org/2000/svg}"


@stage
async def ticks(ctx: Context) -> AsyncIterator[Audio]:
    for i in range(100):
        await ctx.sleep(0.02)
        yield Audio(np.zeros(320, np.float32), rate=16000, start=i * 320)


@stage
async def slowly(ctx: Context, chunks: Input, *, seconds: float = 0.03) -> AsyncIterator[Chunk]:
    async for chunk in chunks:
        await ctx.sleep(seconds)
        yield chunk


def sample() -> Graph:
    source, left, right, join = ticks(), slowly().named('l<&>"'), slowly().named("right"), Join("a", "b")
    last = slowly().named("last")
    return (
        (source >> (left, right))
        | ([left, right] >> join >> Link(items=4, policy="drop_oldest") >> last)
        | (source >> slowly().named("direct"))
        | (last >> Link(feedback=True, policy="error") >> right)
    )


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    found = [r for r in ET.fromstring(svg).iter(f"{SVG}rect") if (r.get("class") or "").startswith("box")]
    return [tuple(float(r.get(k)) for k in ("x", "y", "width", "height")) for r in found]


def test_svg_has_every_stage_and_edge_and_no_overlap() -> None:
    svg = sample().draw()
    root = ET.fromstring(svg)
    assert {"ticks", 'l<&>"', "right", "join", "direct"} <= {text.text for text in root.iter(f"{SVG}text")}
    paths = [path.get("class") for path in root.iter(f"{SVG}path")]
    assert len(paths) == 7 + 1  # seven connections and an open output ('last' feeds back)
    assert paths.count("edge back") == 1
    width, height = float(root.get("width")), float(root.get("height"))
    all_boxes = boxes(svg)
    assert len(all_boxes) == 6
    for i, (x, y, w, h) in enumerate(all_boxes):
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height
        for x2, y2, w2, h2 in all_boxes[i + 1 :]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
    assert "prefers-color-scheme:dark" in svg


@pytest.mark.parametrize("name", sorted(GRAPHS))
@pytest.mark.parametrize("live", [False, True])
def test_labels_of_served_graphs_cover_neither_stages_nor_each_other(name: str, live: bool) -> None:
    async def main() -> str:
        graph = GRAPHS[name]({})
        session = graph.session()
        session._build()
        return graph.draw("svg", session if live else None)

    root = ET.fromstring(run_virtual(main()))
    covered = [(x, y, x + w, y + h) for x, y, w, h in boxes(ET.tostring(root, "unicode"))]
    for pill in root.iter(f"{SVG}rect"):
        if pill.get("class") == "pill":
            x, y, w, h = (float(pill.get(k)) for k in ("x", "y", "width", "height"))
            covered.append((x, y, x + w, y + h))
    for text in root.iter(f"{SVG}text"):
        if text.get("class") == "small port":
            x, y, half = float(text.get("x")), float(text.get("y")), 2.7 * len(text.text)
            covered.append((x - half, y - 8, x + half, y + 2))
    assert len(covered) >= 2
    for i, (left, top, right, bottom) in enumerate(covered):
        for left2, top2, right2, bottom2 in covered[i + 1 :]:
            wide, high = min(right, right2) - max(left, left2), min(bottom, bottom2) - max(top, top2)
            assert wide <= 0 or high <= 0 or wide * high < 30  # square pixels: corners may touch


def test_left_to_right_is_the_direction_of_flow() -> None:
    chain = boxes((ticks() >> slowly() >> slowly() >> slowly()).draw())
    assert [x for x, *_ in chain] == sorted({x for x, *_ in chain})
    assert len({y for _, y, *_ in chain}) == 1


def test_a_running_session_s_depths_and_drops_are_drawn() -> None:
    async def main() -> tuple[str, str]:
        graph = ticks() >> Link(items=5, policy="drop_oldest") >> slowly(seconds=0.1)
        async with graph.session() as session:
            await session.clock.sleep(1.0)
            stats = session.stats()["ticks -> slowly"]
            assert stats.depth == 5
            label = f"5/5, 100 ms, \u2212{stats.dropped}"
            mermaid, svg = graph.draw("mermaid", session), graph.draw(session=session)
            assert f'-->|"{label}"|' in mermaid
            assert label in {text.text for text in ET.fromstring(svg).iter(f"{SVG}text")}
            assert 'class="full"' in svg
            return mermaid, svg

    run_virtual(main())


def test_mermaid_names_ports_links_and_feedback_and_escapes() -> None:
    lines = sample().draw("mermaid").splitlines()
    assert lines[0] == "flowchart LR"
    assert '    s0(["ticks"])' in lines
    assert '    s1["l#lt;#amp;#gt;#quot;"]' in lines
    assert '    s1 -->|"a"| s3' in lines
    assert '    s3 -->|"\u2264 4, drop oldest"| s4' in lines
    assert '    s4 -.->|"error"| s2' in lines


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no such form of picture: 'png' \(known: mermaid, svg\)"):
        sample().draw("png")


def test_a_timeline_has_a_lane_a_stage_and_a_line_an_interruption() -> None:
    async def main() -> str:
        async with (ticks() >> slowly()).session() as session:
            await session.clock.sleep(0.5)
            session.interrupt()
            await session.clock.sleep(0.1)
            return session.trace.draw()

    root = ET.fromstring(run_virtual(main()))
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {"ticks", "slowly", "p50 30 ms, p99 30 ms"} <= texts
    lines = [line.get("class") for line in root.iter(f"{SVG}line")]
    assert (lines.count("lane"), lines.count("cut")) == (2, 1)


def test_an_empty_timeline_is_a_picture_too() -> None:
    async def main() -> str:
        async with ticks().session(trace=0) as session:
            return session.trace.draw()

    ET.fromstring(run_virtual(main()))
