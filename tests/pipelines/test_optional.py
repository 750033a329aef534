"""Optional ports: inputs and outputs that may stay unconnected."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from antiphon.pipelines.chunk import Audio, Chunk, Text
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.graph import GraphError
from antiphon.pipelines.replay import Recorder, Recording, replay
from antiphon.pipelines.spec import SpecError, parse_graph
from antiphon.pipelines.stage import Context, Inlet, Input, select, stage


@stage(name="opt_talk", outputs=("out", "copy"), optional=("copy",))
async def talk(ctx: Context, *, chunks: int = 3) -> AsyncIterator[tuple[str, Audio]]:
    for i in range(chunks):
        for port in ("out", "copy"):
            yield port, Audio(samples=np.zeros(160, np.float32), rate=16000, start=160 * i)


@stage(name="opt_label", optional=("text",))
async def label(ctx: Context, audio: Input, text: Input) -> AsyncIterator[Text]:
    """One text a chunk of audio: what came last on ``text``."""
    last = "nothing"
    async for chunk in text:
        assert isinstance(chunk, Text)
        last = chunk.text
    async for chunk in audio:
        yield Text(text=last, rate=chunk.rate, start=chunk.start)


@stage(name="opt_read", optional=("text",))
async def read(ctx: Context, audio: Input, text: Input) -> AsyncIterator[Text]:
    while ready := await select(text, audio):
        chunk = ready.get_nowait()
        assert isinstance(chunk, Audio), f"an unconnected input gave {chunk}"
        yield Text(text="end", rate=chunk.rate, start=chunk.start)


@stage(name="opt_words")
async def words(ctx: Context) -> AsyncIterator[Text]:
    yield Text(text="word", rate=16000)


async def outputs(graph: Any, **options: Any) -> list[Chunk]:
    async with graph.session(**options) as session:
        return [chunk async for chunk in session.outputs()]


def test_an_unconnected_optional_input_has_ended_and_an_unconnected_optional_output_is_nobodys() -> None:
    for reader, said in ((label(), "nothing"), (read(), "end")):
        graph = talk() >> reader
        assert [port.name for port in graph.open_outputs] == ["out"]
        made = run_virtual(outputs(graph))
        assert [chunk.text for chunk in made if isinstance(chunk, Text)] == [said] * 3
        assert len(made) == 3


def test_optional_ports_are_joined_by_name() -> None:
    speech, reader = talk(), label()
    graph = (speech >> reader) | (words() >> reader["text"]) | (speech["copy"] >> read())
    texts = [chunk.text for chunk in run_virtual(outputs(graph)) if isinstance(chunk, Text)]
    assert len(texts) == 6
    assert texts.count("end") == 3
    assert texts.count("word") == 3


def test_other_inputs_are_still_needed() -> None:
    reader = label()
    with pytest.raises(GraphError, match="input 'audio': nothing feeds it"):
        (words() >> reader["text"]).validate()


def test_in_yaml_and_in_pictures() -> None:
    stages = "stages: {talk: opt_talk, words: opt_words, label: opt_label}\nedges:\n"
    graph = parse_graph(stages + "  - talk >> label\n  - words >> label.text\n")
    assert len(run_virtual(outputs(graph))) == 3
    assert "text" in graph.draw("svg")
    alone = parse_graph("stages: {talk: opt_talk, label: opt_label}\nedges:\n  - talk >> label\n")
    assert "copy" not in alone.draw("svg")
    assert "copy" not in alone.draw("mermaid")
    with pytest.raises(SpecError, match="input 'audio': nothing feeds it"):
        parse_graph("stages: {words: opt_words, label: opt_label}\nedges:\n  - words >> label.text\n")


def test_a_name_that_is_no_port_is_refused() -> None:
    async def wrong(ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
        yield await audio.__anext__()

    with pytest.raises(ValueError, match="optional port 'txt'"):
        stage(name="opt_wrong", optional=("txt",))(wrong)
    with pytest.raises(ValueError, match="'audio' is an input and an output"):
        stage(name="opt_wrong", outputs=("audio",), optional=("audio",))(wrong)


def test_a_recording_replays(tmp_path: Any) -> None:
    graph = talk() >> label()
    made = run_virtual(outputs(graph, record=Recorder(tmp_path / "call")))
    again = run_virtual(replay(tmp_path / "call", talk() >> label()))
    assert [entry.chunk for entry in Recording.read(tmp_path / "call").outputs] == made
    assert len(again) == 3


@stage(name="opt_reply")
async def reply(ctx: Context, ask: Input) -> AsyncIterator[Audio]:
    """A reply of 0.1 s to everything, in two chunks."""
    at = 0
    async for _ in ask:
        for final in (False, True):
            yield Audio(samples=np.zeros(800, np.float32), rate=16000, start=at, final=final)
            at += 800


def test_a_session_knows_whether_a_reply_is_being_played() -> None:
    async def main() -> None:
        async with (Inlet() >> reply()).session() as session:
            assert not session.playing
            await session.send(Text(text="hello", rate=16000))
            heard = []
            async for chunk in session.outputs():
                heard.append(chunk)
                assert session.playing
                session.report_heard("client", 0, chunk.start_seconds + chunk.seconds / 2)
                assert session.playing  # half of the chunk is still to come
                session.report_heard("client", 0, chunk.end_seconds)
                if len(heard) == 1:
                    await session.clock.sleep(0.01)
                    assert session.playing  # the last chunk is still to come
                if chunk.final:
                    break
            assert not session.playing
            await session.send(Text(text="again", rate=16000))
            await session.clock.sleep(0.01)
            assert session.playing
            session.interrupt()
            assert not session.playing
            session.finish()

    run_virtual(main())
