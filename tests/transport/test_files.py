"""Files as the ends of a graph, on virtual time."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import numpy as np
import pytest

from antiphon.codecs import audio_file
from antiphon.codecs.audio_file import AudioError
from antiphon.pipelines.chunk import Audio
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.stage import StageError
from antiphon.transport.files import FileSink, FileSource

RATE, SECONDS = 16000, 2.51
SOUND = (0.3 * np.sin(np.arange(int(RATE * SECONDS)) * 0.05)).astype(np.float32)


@pytest.fixture
def recording(tmp_path: Path) -> str:
    path = tmp_path / "a.wav"
    audio_file.write(path, SOUND, RATE)
    return str(path)


async def heard(source: FileSource) -> list[tuple[float, Audio]]:
    clock = asyncio.get_running_loop()
    async with source._graph().session() as session:
        return [(clock.time(), chunk) async for chunk in session.outputs()]


def test_a_realtime_source_gives_each_chunk_when_it_was_spoken(recording: str) -> None:
    chunks = run_virtual(heard(FileSource(recording, realtime=True)))
    assert len(chunks) == 126
    for when, chunk in chunks:
        assert when == pytest.approx(chunk.end_seconds, abs=1e-6)
    assert chunks[-1][0] == pytest.approx(SECONDS)


def test_chunks_are_consecutive_and_only_the_last_is_final(recording: str) -> None:
    timed = run_virtual(heard(FileSource(recording, chunk_ms=100)))
    chunks = [chunk for _, chunk in timed]
    assert {when for when, _ in timed} == {0.0}
    assert [chunk.final for chunk in chunks] == [False] * 25 + [True]
    assert all(a.end == b.start for a, b in itertools.pairwise(chunks))
    np.testing.assert_allclose(np.concatenate([chunk.samples for chunk in chunks]), SOUND, atol=1e-4)


def test_a_source_resamples(recording: str) -> None:
    chunks = run_virtual(heard(FileSource(recording, rate=24000)))
    assert sum(chunk.duration for _, chunk in chunks) == pytest.approx(24000 * SECONDS, abs=1)
    assert chunks[0][1].duration == 480


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".opus"])
def test_a_sink_writes_what_it_is_given(recording: str, tmp_path: Path, suffix: str) -> None:
    async def copy(path: str) -> float:
        async with (FileSource(recording) >> FileSink(path)).session() as session:
            await session.run()
            assert session.heard is not None
            return session.heard.seconds

    target = str(tmp_path / f"b{suffix}")
    assert run_virtual(copy(target)) == pytest.approx(SECONDS)
    written = audio_file.read(target)
    assert len(written) == len(SOUND)
    assert np.abs(written - SOUND)[200:-200].max() < (0.1 if suffix == ".opus" else 1e-3)


@pytest.mark.parametrize(
    ("source", "sink", "message"),
    [
        ("missing.wav", "b.wav", "no such file"),
        (None, "b.txt", "cannot write .txt"),
        (None, "x/y/b.wav", "cannot write"),
    ],
)
def test_errors_end_the_session_with_their_cause(
    recording: str, tmp_path: Path, source: str | None, sink: str, message: str
) -> None:
    async def copy() -> None:
        await (FileSource(source or recording) >> FileSink(str(tmp_path / sink))).session().run()

    with pytest.raises(StageError, match=message) as caught:
        run_virtual(copy())
    assert isinstance(caught.value.__cause__, AudioError)


def test_an_interrupted_copy_leaves_a_readable_file(recording: str, tmp_path: Path) -> None:
    async def leave_early() -> None:
        async with (FileSource(recording, realtime=True) >> FileSink(str(tmp_path / "b.wav"))).session():
            await asyncio.sleep(1.0)

    run_virtual(leave_early())
    assert len(audio_file.read(tmp_path / "b.wav")) == pytest.approx(RATE, abs=RATE / 40)
