"""The microphone and the speaker: over a virtual sound card bit for bit, and over a fake PortAudio where things fail."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from antiphon.codecs import audio_file
from antiphon.pipelines.chunk import Audio
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.session import Session
from antiphon.pipelines.stage import Context, Stage, StageError
from antiphon.transport.devices import DeviceError, devices, find, rates
from antiphon.transport.microphone import Microphone, Speaker

from .pulse import MOUTH_RATE, SPEAKER_RATE, Pulse, missing, offset_of, pulse

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
    """Both directions at once for three seconds, in two streams."""
    sent = noise(3.0, SPEAKER_RATE)

    async def both() -> tuple[np.ndarray, dict[str, int], float]:
        heard: list[np.ndarray] = []
        async with (
            (Saying(sent, SPEAKER_RATE) >> Speaker(device="virtual_speaker")).session() as out,
            Microphone(device="virtual_ear", rate=SPEAKER_RATE).session() as ear,
            Microphone(device="virtual_microphone").session() as microphone,
        ):
            reading = [
                asyncio.create_task(collect(ear, heard)),
                asyncio.create_task(collect(microphone, recorded := [])),
            ]
            began = time.monotonic()
            await out.run()
            took = time.monotonic() - began
            assert out.heard is not None
            assert out.heard.seconds == 3.0
            missing_yet = len(sent) + SPEAKER_RATE // 5
            while sum(map(len, heard)) < missing_yet:
                await asyncio.sleep(0.02)
            for task in reading:
                task.cancel()
            assert sum(map(len, recorded)) > 2.8 * MOUTH_RATE
            return np.concatenate(heard), {**out.counters, **ear.counters, **microphone.counters}, took

    heard, counted, took = asyncio.run(asyncio.wait_for(both(), 15))
    assert counted == {}
    assert took == pytest.approx(3.0, abs=0.3)
    at = offset_of(sent, heard)
    np.testing.assert_array_equal(heard[at : at + len(sent)], sent)


async def collect(session: Session, into: list[np.ndarray]) -> None:
    async for chunk in session.outputs():
        assert isinstance(chunk, Audio)
        into.append(chunk.samples)


@needs_pulse
def test_an_interruption_is_heard_at_once(card: Pulse) -> None:
    """From the interruption to the last sound at the loudspeaker: at most 60 ms, and all that was heard is reported."""
    sent = noise(2.0, SPEAKER_RATE)

    async def interrupt() -> tuple[float, float, np.ndarray]:
        async with (
            (Saying(sent, SPEAKER_RATE) >> Speaker(device="virtual_speaker")).session() as out,
            Microphone(device="virtual_ear", rate=SPEAKER_RATE, chunk_ms=5).session() as ear,
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
