"""Recording and replay: identical outputs, and clear errors for recordings that are not whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.pipelines.chunk import Audio, Chunk, Event, Text, Tokens, Video, Word
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.edge import Link
from antiphon.pipelines.graph import Graph
from antiphon.pipelines.replay import Recorded, Recorder, Recording, RecordingError, replay
from antiphon.pipelines.stage import Context, Inlet, Input, stage


@stage(lasting=True)
async def jittery(ctx: Context, *, seed: int, chunks: int = 60) -> AsyncIterator[Audio]:
    """Noise at uneven times: another seed, another session."""
    random = np.random.default_rng(seed)
    for i in range(chunks):
        await ctx.sleep(float(random.uniform(0.005, 0.035)))
        yield Audio(random.standard_normal(320).astype(np.float32), rate=16000, start=320 * i, final=i % 20 == 19)


@stage
async def loud_words(ctx: Context, audio: Input) -> AsyncIterator[Text]:
    """A word for each loud chunk, later for louder ones; interrupts on the loudest."""
    async for chunk in audio:
        level = float(np.abs(chunk.samples).max())
        await asyncio.sleep(level / 100)
        if level > 3.4:
            ctx.interrupt()
        start = chunk.start_seconds
        yield Text(f"{level:.6f}", (Word("é", start, start + 0.02),), rate=16000, start=chunk.start, duration=320)


def graph(seed: int) -> Graph:
    return jittery(seed=seed) >> Link(items=2, policy="drop_oldest") >> loud_words()


def record(path: Path, seed: int = 1, interrupts: tuple[float, ...] = (0.3, 0.71)) -> list[Recorded]:
    async def main() -> list[Recorded]:
        async with graph(seed).session(record=Recorder(path)) as session:

            async def interrupt() -> None:
                for at in interrupts:
                    await session.clock.sleep_until(session.began + at)
                    session.interrupt()

            task = asyncio.create_task(interrupt())
            outputs = [Recorded(round(session.clock.now() - 5.0, 9), chunk) async for chunk in session.outputs()]
            await task
            return outputs

    return run_virtual(main(), start=5.0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), interrupts=st.lists(st.floats(0, 1.2), max_size=4).map(lambda at: tuple(sorted(at))))
def test_a_session_replays_to_identical_outputs(
    tmp_path_factory: pytest.TempPathFactory, seed: int, interrupts: tuple[float, ...]
) -> None:
    path = tmp_path_factory.mktemp("replay") / "call.antiphon"
    outputs = record(path, seed, interrupts)
    assert outputs
    assert Recording.read(path).outputs == outputs
    again = run_virtual(replay(path, graph(seed + 1)), start=5.0)  # the recorded source, not the graph's own
    assert again == outputs
    elsewhere = run_virtual(replay(path, graph(0)), start=1e4)  # where times round to the nanosecond differently
    assert [one.chunk for one in elsewhere] == [one.chunk for one in outputs]
    assert [one.at for one in elsewhere] == pytest.approx([one.at for one in outputs], abs=2e-9)


def test_another_input_gives_other_outputs(tmp_path: Path) -> None:
    assert record(tmp_path / "a", 1) != record(tmp_path / "b", 2)


def test_every_kind_of_chunk_survives_the_file(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    chunks: list[Chunk] = [
        Audio(np.array([np.nan, np.inf, -1.0], np.float32), rate=8000),
        Audio(random.standard_normal((2, 7)).astype(np.float32)[:, ::2], rate=48000, start=2**40, final=True),
        Text("„ja“\n\u2028", (Word("ja", 0.1, 0.25),), rate=10, duration=3),
        Tokens(random.integers(-(2**60), 2**60, (4, 3)), rate=25, duration=1),
        Video(random.integers(0, 255, (4, 6, 3), dtype=np.uint8), rate=90000, duration=3600),
        Event("odd", {"kind": "Audio", "array": [1], "nested": {"json": [None, True, 1.5]}}, rate=1),
    ]

    async def main() -> list[Chunk]:
        async with Inlet().session(record=Recorder(tmp_path / "r")) as session:
            for chunk in chunks:
                await session.send(chunk)
            session.finish()
            return [chunk async for chunk in session.outputs()]

    assert run_virtual(main()) == chunks
    recording = Recording.read(tmp_path / "r")
    assert [one.chunk for one in recording.outputs] == chunks
    assert [one.chunk for one in recording.sources["inlet", "out"]] == chunks


def test_a_recording_cut_anywhere_says_where(tmp_path: Path) -> None:
    record(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    cut = tmp_path / "cut"
    for length in [*range(0, 400, 7), *range(400, len(whole) - 1, 5003), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(RecordingError, match=r"cut is (cut short at byte \d+|not an antiphon recording)"):
            Recording.read(cut)


@settings(max_examples=150, deadline=None)
@given(where=st.floats(0, 0.9999), flip=st.integers(1, 255))
def test_a_damaged_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, where: float, flip: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "damage"
    if not folder.exists():
        folder.mkdir()
        record(folder / "whole", interrupts=())
    data = bytearray((folder / "whole").read_bytes())
    data[int(where * len(data))] ^= flip
    (folder / "bad").write_bytes(data)
    with pytest.raises(RecordingError, match="bad"):
        Recording.read(folder / "bad")


def test_a_recording_of_another_graph_is_refused(tmp_path: Path) -> None:
    record(tmp_path / "r")
    other = Inlet() >> loud_words()
    with pytest.raises(RecordingError, match=r"no source jittery.out in this graph \(its sources: inlet.out\)"):
        run_virtual(replay(tmp_path / "r", other))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"RIFF....WAVE")
    with pytest.raises(RecordingError, match="is not an antiphon recording"):
        Recording.read(tmp_path / "x.wav")
