"""Graphs: building, validation, fan-out, merge, join, cycles, shutdown."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from antiphon.pipelines.chunk import Audio, Chunk, Event, Joined, Text
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.edge import Link
from antiphon.pipelines.graph import Graph, GraphError
from antiphon.pipelines.join import Join
from antiphon.pipelines.stage import Context, Inlet, Input, Stage, stage


@stage
async def tone(
    ctx: Context, *, chunks: int = 10, ms: int = 20, offset: int = 0, every: float = 0.02
) -> AsyncIterator[Audio]:
    for i in range(chunks):
        await ctx.sleep(every)
        yield Audio(np.full(16 * ms, i, np.float32), rate=16000, start=16 * (offset + i * ms))


@stage
async def delay(ctx: Context, chunks: Input, *, seconds: float = 0.0) -> AsyncIterator[Chunk]:
    async for chunk in chunks:
        await ctx.sleep(seconds)
        yield chunk


@stage
async def collect(ctx: Context, chunks: Input, *, into: list) -> None:
    async for chunk in chunks:
        into.append(chunk)


@stage(outputs=("even", "odd"))
async def split(ctx: Context, chunks: Input) -> AsyncIterator[tuple[str, Chunk]]:
    async for chunk in chunks:
        yield ("odd" if chunk.seq % 2 else "even"), replace(chunk, seq=-1)


@stage
async def first(ctx: Context, chunks: Input, *, count: int) -> AsyncIterator[Chunk]:
    left = count
    async for chunk in chunks:
        yield chunk
        left -= 1
        if not left:
            return


def outputs(graph: Graph | Stage, *ports: str) -> list[Chunk]:
    async def main() -> list[Chunk]:
        async with graph.session() as session:
            return [chunk async for chunk in session.outputs(*ports)]

    return run_virtual(main())


def test_a_chain_carries_everything_in_order_with_media_time() -> None:
    chunks = outputs(tone(chunks=5) >> delay(seconds=0.5) >> delay(0.1))
    assert [chunk.seq for chunk in chunks] == [0, 1, 2, 3, 4]
    assert [chunk.start_seconds for chunk in chunks] == [0.0, 0.02, 0.04, 0.06, 0.08]
    assert chunks[3] == Audio(np.full(320, 3, np.float32), rate=16000, start=960, seq=3, epoch=0)


def test_a_graph_is_a_value_that_runs_any_number_of_times() -> None:
    base = tone(chunks=3) >> delay()
    longer = base >> delay(seconds=0.1)
    assert len(base.nodes) == 2
    assert outputs(base) == outputs(base) == outputs(longer)


def test_fan_out_gives_every_branch_every_chunk_and_the_slow_one_holds_back_no_other_by_more_than_its_bound() -> None:
    fast: list[Chunk] = []
    slow: list[Chunk] = []
    graph = tone(chunks=20) >> (collect(into=fast), delay(seconds=0.1) >> collect(into=slow))
    run_virtual(graph.session().run())
    assert fast == slow
    assert len(fast) == 20
    assert fast[7] is slow[7]


def test_several_edges_into_one_port_merge_by_media_time() -> None:
    early, late = tone(chunks=3, every=0.0).named("early"), tone(chunks=3, every=0.0, offset=10).named("late")
    merged = outputs([early, late] >> delay(seconds=0.01))
    assert [round(chunk.start_seconds * 1000) for chunk in merged] == [0, 10, 20, 30, 40, 50]


def test_named_output_ports() -> None:
    parts = split()
    graph = tone(chunks=5) >> parts
    assert [chunk.samples[0] for chunk in outputs(graph, "split.odd")] == [1, 3]
    odd: list[Chunk] = []
    assert [chunk.samples[0] for chunk in outputs(graph | (parts["odd"] >> collect(into=odd)))] == [0, 2, 4]
    assert [chunk.seq for chunk in odd] == [0, 1]


def test_join_aligns_by_media_time_whatever_the_chunk_sizes_and_delays() -> None:
    lead = tone(chunks=6, ms=40, every=0.04)
    words = tone(chunks=12, ms=20, every=0.02) >> delay(seconds=0.015)
    joined = outputs([lead, words] >> Join("audio", "words", skew_ms=500))
    assert all(isinstance(chunk, Joined) for chunk in joined)
    assert [chunk.start_seconds for chunk in joined] == pytest.approx([i * 0.04 for i in range(6)])
    assert [[len(part) for part in chunk.parts] for chunk in joined] == [[1, 2]] * 6
    for chunk in joined:
        (audio,), (one, two) = chunk.parts
        assert (one.start_seconds, two.end_seconds) == (audio.start_seconds, audio.end_seconds)


def test_join_waits_no_longer_than_its_skew_and_counts_what_came_too_late() -> None:
    async def main() -> tuple[list[Joined], int]:
        lead, lagging = tone(chunks=30).named("lead"), tone(chunks=30) >> delay(seconds=0.04)
        async with ([lead, lagging] >> Join("a", "b", skew_ms=100)).session() as session:
            chunks = [chunk async for chunk in session.outputs()]
            return chunks, session.counters["join.late"]

    joined, late = run_virtual(main())
    missing = [chunk for chunk in joined if not chunk.parts[1]]
    assert len(joined) == 30
    assert 0 < late < 30
    assert len(missing) >= late
    assert joined[0].parts[1]


def test_join_ends_with_its_lead_and_goes_on_without_an_ended_input() -> None:
    short = outputs([tone(chunks=3).named("lead"), tone(chunks=50)] >> Join("a", "b"))
    assert len(short) == 3
    alone = outputs([tone(chunks=5).named("lead"), tone(chunks=1)] >> Join("a", "b"))
    assert [len(chunk.parts[1]) for chunk in alone] == [1, 0, 0, 0, 0]


@stage
class Ring(Stage):
    """Counts each chunk down around a loop; emits what has gone round."""

    outputs = ("again", "done")

    async def run(self, ctx: Context, fresh: Input, back: Input) -> AsyncIterator[tuple[str, Chunk]]:
        from antiphon.pipelines.stage import select

        while port := await select(back, fresh):
            chunk = port.get_nowait()
            rounds = 3 if port is fresh else chunk.data["rounds"] - 1
            data = Event("lap", {"rounds": rounds}, rate=chunk.rate, start=chunk.start)
            yield ("again" if rounds else "done"), data


def test_a_cycle_shuts_down_when_its_sources_have_ended_and_nothing_moves_any_more() -> None:
    ring = Ring()
    feedback = ring["again"] >> delay(seconds=0.5) >> Link(feedback=True, policy="error") >> ring["back"]
    laps = outputs((tone(chunks=4) >> ring["fresh"]) | feedback)
    assert [lap.start_seconds for lap in laps] == [0.0, 0.02, 0.04, 0.06]


def test_a_cycle_without_a_source_that_ever_speaks_ends_too() -> None:
    ring = Ring()
    feedback = ring["again"] >> Link(feedback=True, policy="drop_oldest") >> ring["back"]
    assert outputs((tone(chunks=0) >> ring["fresh"]) | feedback) == []


def test_when_nobody_wants_more_the_stages_before_are_stopped() -> None:
    async def main() -> float:
        async with (tone(chunks=10**9) >> delay() >> first(count=5)).session() as session:
            assert len([chunk async for chunk in session.outputs()]) == 5
            return session.clock.now()

    # The fifth chunk is there at 0.1 s; each stage before notices when it emits its next.
    assert run_virtual(main()) == pytest.approx(0.14)


def test_an_inlet_feeds_a_graph_from_outside() -> None:
    async def main() -> list[str]:
        async with (Inlet() >> delay(seconds=0.1)).session() as session:
            for word in ["to", "be", "or", "not"]:
                await session.send(Text(word, rate=1))
            session.finish()
            return [chunk.text async for chunk in session.outputs()]

    assert run_virtual(main()) == ["to", "be", "or", "not"]


def test_an_inlet_name_that_is_not_there_is_refused_with_the_nearest() -> None:
    async def main() -> None:
        graph = (Inlet().named("audio") >> delay()) | (Inlet().named("text") >> delay())
        async with graph.session() as session:
            with pytest.raises(GraphError, match="no inlet 'audoi'; did you mean 'audio'"):
                await session.send(Text("x", rate=1), to="audoi")
            with pytest.raises(GraphError, match="several inlets: say which"):
                await session.send(Text("x", rate=1))

    run_virtual(main())


SINK = collect(into=[])
JOIN = Join("audio", "text")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: (tone() >> JOIN["audio"]).validate(), r"stage 'join', input 'text': nothing feeds it; .*Inlet"),
        (lambda: tone() >> JOIN["txt"], r"stage 'join' has no port 'txt'; did you mean 'text'"),
        (lambda: tone() >> JOIN, r"1 outputs \(tone.out\) do not fit 2 inputs \(join.audio, join.text\)"),
        (lambda: tone() >> SINK >> delay(), r"stage 'collect' has no output"),
        (lambda: delay() >> tone(), r"stage 'tone' has no input"),
        (lambda: (tone() >> Link(items=3)).validate(), r"ends in a Link"),
        (lambda: Graph().validate(), r"no stages"),
        (
            lambda: delay(secs=1),
            r"stage 'delay': got an unexpected keyword argument 'secs'; its parameters are \(seconds",
        ),
    ],
)
def test_a_mistake_names_stage_port_and_remedy(build: object, message: str) -> None:
    with pytest.raises((GraphError, TypeError), match=message):
        build()


def test_a_cycle_needs_a_feedback_edge() -> None:
    one, two = delay().named("one"), delay().named("two")
    graph = (tone() >> one >> two) | (two >> one)
    with pytest.raises(GraphError, match=r"stages one -> two -> one form a cycle: mark the edge .*feedback=True"):
        graph.session()


def test_stages_of_one_kind_get_names_of_their_own() -> None:
    assert list((tone() >> delay() >> delay() >> delay()).names.values()) == ["tone", "delay", "delay-2", "delay-3"]


def test_a_stage_name_is_taken_once() -> None:
    async def other(ctx: Context, chunks: Input) -> None: ...

    with pytest.raises(ValueError, match=r"stage name 'tone' is taken by .*test_graph.tone"):
        stage(name="tone")(other)


def test_an_inlet_alone_stays_open_until_it_is_finished() -> None:
    async def main() -> list[str]:
        async with Inlet().session() as session:
            await session.clock.sleep(1.0)
            await session.send(Text("late", rate=1))
            session.finish()
            return [chunk.text async for chunk in session.outputs()]

    assert run_virtual(main()) == ["late"]
