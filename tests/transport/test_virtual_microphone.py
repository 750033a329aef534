"""The microphone and the speaker over a virtual sound card: what goes in comes out, bit for bit."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import jiwer
import numpy as np
import pytest

from antiphon.codecs import audio_file
from antiphon.pipelines.captions import Final
from antiphon.pipelines.chunk import Audio
from antiphon.pipelines.session import Session
from antiphon.pipelines.stage import Context, Stage, StageError
from antiphon.pipelines.transcription import transcribe
from antiphon.transport.devices import devices, find, rates
from antiphon.transport.microphone import Microphone, Speaker

from .pulse import MOUTH_RATE, SPEAKER_RATE, Pulse, missing, offset_of, pulse

SAMPLE = Path(audio_file.__file__).parents[1] / "apps" / "samples" / "two_cities.flac"
SAID = (
    "it was the best of times it was the worst of times it was the age of wisdom it was the age of foolishness "
    "it was the epoch of belief it was the epoch of incredulity it was the season of light it was the season of "
    "darkness it was the spring of hope it was the winter of despair we had everything before us we had nothing "
    "before us"
)

needs_pulse = pytest.mark.skipif(bool(missing()), reason=f"needs a virtual sound card: {missing()}")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pulse]:
    with pulse(tmp_path_factory.mktemp("pulse")) as running:
        yield running


def noise(seconds: float, rate: int) -> np.ndarray:
    """16-bit noise: the least alike to a shifted copy of itself."""
    samples = np.random.default_rng(1).integers(-9000, 9000, round(seconds * rate))
    return (samples / 32768).astype(np.float32)


class Saying(Stage):
    """Gives out ``samples`` as fast as they are taken, until it is interrupted."""

    name = "saying"

    def __init__(self, samples: np.ndarray, rate: int) -> None:
        self.samples, self.rate = samples, rate

    async def run(self, ctx: Context) -> AsyncIterator[Audio]:
        size = self.rate // 50
        for at in range(0, len(self.samples), size):
            if ctx.session.epoch:
                return
            last = at + size >= len(self.samples)
            yield Audio(samples=self.samples[at : at + size], rate=self.rate, start=at, final=last)


@asynccontextmanager
async def listening(chunk_ms: float) -> AsyncIterator[Session]:
    """A session of the virtual ear, once it hears."""
    async with Microphone(device="virtual_ear", rate=SPEAKER_RATE, chunk_ms=chunk_ms).session() as ear:
        await anext(aiter(ear.outputs()))
        yield ear


@needs_pulse
def test_what_is_said_arrives_bit_for_bit(card: Pulse, tmp_path: Path) -> None:
    said = noise(1.0, MOUTH_RATE)
    audio_file.write(tmp_path / "said.wav", said, MOUTH_RATE)

    async def record() -> tuple[list[Audio], dict[str, int]]:
        chunks: list[Audio] = []
        async with Microphone(device="microphone").session() as session:
            async for chunk in session.outputs():
                if not chunks:
                    player = card.play(tmp_path / "said.wav")
                chunks.append(chunk)
                if np.any(chunk.samples):
                    left = len(said) // chunk.duration + 2
                    break
            async for chunk in session.outputs():
                chunks.append(chunk)
                left -= 1
                if not left:
                    break
            player.kill()
            player.wait()
            return chunks, dict(session.counters)

    chunks, counted = asyncio.run(asyncio.wait_for(record(), 15))
    assert counted == {}
    assert [chunk.start for chunk in chunks] == [320 * number for number in range(len(chunks))]
    heard = np.concatenate([chunk.samples for chunk in chunks])
    at = offset_of(said, heard)
    np.testing.assert_array_equal(heard[at : at + len(said)], said)
    assert not np.any(heard[:at])


@needs_pulse
def test_what_is_sent_is_heard_while_the_microphone_runs(card: Pulse) -> None:
    """Both directions at once for two seconds, in two streams."""
    sent = noise(2.0, SPEAKER_RATE)

    async def both() -> tuple[np.ndarray, dict[str, int], float]:
        heard: list[np.ndarray] = []
        recorded: list[np.ndarray] = []
        enough = asyncio.Event()
        async with (
            listening(20) as ear,
            Microphone(device="virtual_microphone").session() as microphone,
            (Saying(sent, SPEAKER_RATE) >> Speaker(device="virtual_speaker")).session() as out,
        ):
            reading = [
                asyncio.create_task(collect(ear, heard, len(sent) + SPEAKER_RATE // 2, enough)),
                asyncio.create_task(collect(microphone, recorded)),
            ]
            began = time.monotonic()
            await out.run()
            took = time.monotonic() - began
            assert out.heard is not None
            assert out.heard.seconds == 2.0
            await asyncio.wait_for(enough.wait(), 5)
            for task in reading:
                task.cancel()
            assert sum(map(len, recorded)) > 1.8 * MOUTH_RATE
            return np.concatenate(heard), {**out.counters, **ear.counters, **microphone.counters}, took

    heard, counted, took = asyncio.run(asyncio.wait_for(both(), 15))
    assert counted == {}
    assert took == pytest.approx(2.0, abs=0.3)
    at = offset_of(sent, heard)
    np.testing.assert_array_equal(heard[at : at + len(sent)], sent)


async def collect(
    session: Session, into: list[np.ndarray], count: int = 0, enough: asyncio.Event | None = None
) -> None:
    """Keep what comes; say when there are ``count`` samples."""
    async for chunk in session.outputs():
        assert isinstance(chunk, Audio)
        into.append(chunk.samples)
        if enough is not None and chunk.end >= count:
            enough.set()


@needs_pulse
def test_an_interruption_is_heard_at_once(card: Pulse) -> None:
    """From the interruption to the last sound at the loudspeaker: at most 60 ms, and all that was heard is reported."""
    sent = noise(2.0, SPEAKER_RATE)

    async def interrupt() -> tuple[float, float, np.ndarray]:
        async with (
            listening(5) as ear,
            (Saying(sent, SPEAKER_RATE) >> Speaker(device="virtual_speaker")).session() as out,
        ):
            loud = interrupted = 0.0
            heard = []
            async for chunk in ear.outputs():
                assert isinstance(chunk, Audio)
                now = time.monotonic()
                heard.append(chunk.samples)
                if np.any(chunk.samples):
                    loud = now
                if not interrupted and out.heard is not None and out.heard.seconds > 0.3:
                    out.interrupt()
                    interrupted = now
                if interrupted and now > interrupted + 0.25:
                    break
            assert out.heard is not None
            assert out.counters["speaker.flushed"] > 0
            return loud - interrupted, out.heard.seconds, np.concatenate(heard)

    sounded_on, reported, heard = asyncio.run(asyncio.wait_for(interrupt(), 15))
    assert 0 < sounded_on <= 0.06
    duration = np.ptp(np.flatnonzero(heard)) / SPEAKER_RATE
    assert reported == pytest.approx(duration, abs=0.011)  # the device takes 10 ms at a time


@needs_pulse
def test_a_microphone_that_is_unplugged_ends_the_session(tmp_path: Path) -> None:
    async def unplug(running: Pulse) -> None:
        async with Microphone(device="virtual_microphone").session() as session:
            async for chunk in session.outputs():
                if chunk.seq == 5:
                    running.kill()

    with pulse(tmp_path) as running, pytest.raises(StageError, match="'virtual_microphone' has stopped: connect it"):
        asyncio.run(asyncio.wait_for(unplug(running), 15))


@needs_pulse
def test_devices_say_what_they_can(card: Pulse) -> None:
    assert [one.name for one in devices()] == ["virtual_microphone", "virtual_speaker", "virtual_ear", "default"]
    assert find(None, "input").name == "default"
    assert {16000, 24000, 48000} <= set(rates(find("virtual_mic", "input"), "input"))


def antiphon(card: Pulse, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from antiphon.apps.cli import main; main()", *map(str, arguments)],
        env={**os.environ, **card.environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@needs_pulse
def test_listen_captions_what_is_said(card: Pulse, tmp_path: Path) -> None:
    """The recording holds the clip bit for bit, and is captioned as it was live, to the word.

    The clip's own captions differ a little from these: the small model hears other words where it starts at another
    phase of its 80 ms frames, after silence. Against the text that was read, both are as good.
    """
    recording = tmp_path / "recording.flac"
    listening = antiphon(card, "listen", "--device", "virtual_microphone", "--record", recording)
    assert listening.stderr is not None
    assert listening.stderr.readline() == "listening to virtual_microphone; Ctrl-C ends\n"
    clip = audio_file.read(SAMPLE)
    audio_file.write(tmp_path / "clip.wav", np.concatenate([clip, np.zeros(MOUTH_RATE // 2, np.float32)]), MOUTH_RATE)
    card.play(tmp_path / "clip.wav").wait(timeout=40)
    listening.send_signal(signal.SIGINT)
    live, closing = listening.communicate(timeout=10)
    assert listening.returncode == 0, closing
    number = r"-?\d+(\.\d+)?"
    spoken = rf"{number} s of audio; first partial {number} s after its word began"
    assert re.match(rf"{spoken}.*; level {number} dBFS", closing)
    assert "too busy" not in closing, closing
    heard = audio_file.read(recording)
    at = offset_of(clip, heard)
    np.testing.assert_array_equal(heard[at : at + len(clip)], clip)
    assert live.splitlines() == captions(recording)
    assert jiwer.wer(SAID, " ".join(live.split())) <= jiwer.wer(SAID, " ".join(captions(SAMPLE))) + 0.1


def captions(path: Path) -> list[str]:
    return [caption.text for caption in transcribe(path) if isinstance(caption, Final)]


@needs_pulse
def test_commands_tell_about_devices(card: Pulse) -> None:
    out, _ = antiphon(card, "mic", "--list").communicate(timeout=20)
    assert [line.split("\t")[:2] for line in out.splitlines()] == [
        ["0", "virtual_microphone"], ["1", "virtual_speaker"], ["2", "virtual_ear"], ["3", "default"],
    ]  # fmt: skip
    assert "input" in out.splitlines()[3]
    out, err = antiphon(card, "mic", "--device", "ear", "--seconds", "0.3").communicate(timeout=20)
    assert out.startswith("nothing but silence: is the microphone muted")
    assert err == "listening to virtual_ear for 0.3 s\n"
