"""Echo cancellation in a synthetic room: how much of what is played is left, and that speech stays."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from antiphon.codecs import audio_file
from antiphon.codecs.resample import resample
from antiphon.pipelines.chunk import Audio
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.edge import Link
from antiphon.pipelines.stage import Context, Input, Stage, StageError
from antiphon.transport.echo_cancel import Alignment, EchoCancel
from antiphon.transport.microphone import Microphone, Speaker

from .fake_portaudio import FakePortAudio, entry

pytest.importorskip("pywebrtc_audio", reason="needs echo cancellation: pip install pywebrtc-audio")

RATE = 16000
SAMPLE = Path(audio_file.__file__).parents[1] / "apps" / "samples" / "two_cities.flac"
LATER = 128  # samples by which sounds come later out of the canceller


class Live(Stage):
    """A live source: chunks of ``chunk_ms`` that arrive when their last sample was made, and up to ``jitter`` later.

    begin: seconds after which its sample 0 is made. gone: a span of seconds in which its chunks are lost.
    """

    def __init__(
        self,
        samples: np.ndarray,
        *,
        rate: int = RATE,
        chunk_ms: float = 20,
        begin: float = 0.0,
        jitter: float = 0.0,
        gone: tuple[float, float] = (0, 0),
    ) -> None:
        self.samples, self.rate, self.size = samples, rate, round(rate * chunk_ms / 1000)
        self.begin, self.jitter, self.gone = begin, jitter, gone
        self.name = "live"

    async def run(self, ctx: Context) -> AsyncIterator[Audio]:
        random = np.random.default_rng(self.size)
        began = ctx.now + self.begin
        for at in range(0, len(self.samples) - self.size + 1, self.size):
            chunk = Audio(samples=self.samples[at : at + self.size], rate=self.rate, start=at)
            await ctx.sleep(began + chunk.end_seconds + random.uniform(0, self.jitter) - ctx.now)
            if not self.gone[0] <= chunk.start_seconds < self.gone[1]:
                yield chunk


def cleaned(near: Live, far: Live) -> tuple[np.ndarray, dict[str, int], list[float]]:
    """The microphone without the echo, what was counted, and how late each chunk was."""

    async def run() -> tuple[np.ndarray, dict[str, int], list[float]]:
        chunks, late = [], []
        async with ([near, far] >> EchoCancel()).session() as session:
            began = session.clock.now() + near.begin
            async for chunk in session.outputs():
                assert isinstance(chunk, Audio)
                assert chunk.start == sum(map(len, chunks))
                chunks.append(chunk.samples)
                late.append(session.clock.now() - began - chunk.end_seconds)
            return np.concatenate(chunks), dict(session.counters), late

    return run_virtual(run())


def room(played: np.ndarray, rate: int, delay: float) -> np.ndarray:
    """What a microphone hears of it: ``delay`` seconds later, with 150 ms of reverberation, and the noise of a room."""
    random = np.random.default_rng(7)
    tail = random.standard_normal(round(0.15 * rate)) * np.exp(-np.arange(round(0.15 * rate)) / (0.03 * rate)) * 0.05
    response = np.concatenate([np.zeros(round(delay * rate)), [0.6], tail])
    size = 1 << (len(played) + len(response)).bit_length()
    echo = np.fft.irfft(np.fft.rfft(played, size) * np.fft.rfft(response, size), size)[: len(played)]
    return (echo + 2e-5 * random.standard_normal(len(played))).astype(np.float32)


def erle(echo: np.ndarray, left: np.ndarray, rate: int = RATE, settled: float = 6.0) -> float:
    """Echo return loss enhancement in decibels, after the canceller has settled."""
    begin = round(settled * rate)
    return float(10 * np.log10(np.mean(echo[begin : len(left)] ** 2) / np.mean(left[begin:] ** 2)))


@pytest.fixture(scope="module")
def voice() -> np.ndarray:
    """Twelve seconds of speech, at the level of a call."""
    return audio_file.read(SAMPLE)[: 12 * RATE] * 3


@pytest.mark.parametrize("rate", [16000, 48000])
@pytest.mark.parametrize("delay", [0.02, 0.06, 0.15])
def test_the_echo_is_gone(voice: np.ndarray, rate: int, delay: float) -> None:
    near = room(resample(voice, RATE, rate), rate, delay)
    left, counted, late = cleaned(Live(near, rate=rate), Live(voice, chunk_ms=10))
    assert erle(near, left, rate) >= 25
    assert sum(counted.values()) <= 0.04 * rate  # before the first of the reference
    assert len(left) == len(near)
    assert max(late[10:]) <= 0.02


@pytest.mark.parametrize("begin", [-0.3, 0.5])
def test_jitter_and_when_the_streams_begin_do_not_matter(voice: np.ndarray, begin: float) -> None:
    echo = room(voice, RATE, 0.06)
    offset = round(abs(begin) * RATE)
    near = Live(echo[offset:] if begin > 0 else echo, begin=max(begin, 0), jitter=0.03)
    far = Live(voice[offset:] if begin < 0 else voice, begin=max(-begin, 0), jitter=0.03, chunk_ms=10)
    left, _, late = cleaned(near, far)
    assert erle(near.samples, left) >= 25
    assert max(late[10:]) <= 0.06 + 0.03


def test_speech_stays(voice: np.ndarray) -> None:
    """With both talking all the time: what is left is nearer to the one at the microphone than what it heard."""
    other = np.roll(voice, 5 * RATE) * 0.6
    heard = room(voice, RATE, 0.06) * 0.5 + other
    left, _, _ = cleaned(Live(heard), Live(voice, chunk_ms=10))
    own = other[6 * RATE : len(left) - LATER]
    before = heard[6 * RATE : len(left) - LATER]
    after = left[6 * RATE + LATER :]

    def nearness(sound: np.ndarray) -> float:
        return float(np.corrcoef(sound, own)[0, 1])

    assert nearness(after) > nearness(before) + 0.02


def test_without_a_reference_sound_passes(voice: np.ndarray) -> None:
    left, counted, late = cleaned(Live(voice[: 3 * RATE]), Live(voice[:0]))
    assert counted == {"echo_cancel.unreferenced": 3 * RATE}
    assert np.corrcoef(left[LATER:], voice[: 3 * RATE - LATER])[0, 1] > 0.9
    assert max(late) <= 0.001


def test_a_lost_piece_of_the_reference_costs_only_itself(voice: np.ndarray) -> None:
    near = room(voice, RATE, 0.06)
    left, counted, _ = cleaned(Live(near), Live(voice, chunk_ms=10, gone=(4.0, 4.2)))
    assert erle(near, left) >= 25
    assert 0 < counted["echo_cancel.unreferenced"] <= 0.25 * RATE


class Reply(Stage):
    """Says ``samples``, as much at a time as it hears."""

    name = "reply"

    def __init__(self, samples: np.ndarray) -> None:
        self.samples = samples

    async def run(self, ctx: Context, audio: Input) -> AsyncIterator[Audio]:
        async for chunk in audio:
            yield Audio(samples=self.samples[chunk.start : chunk.end], rate=RATE, start=chunk.start)


def test_the_speaker_is_the_reference(monkeypatch: pytest.MonkeyPatch, voice: np.ndarray) -> None:
    """A dialogue that only ever hears itself: microphone, canceller, reply, speaker, and back to the canceller."""
    devices = FakePortAudio(entry("Microphone", 1, 0), entry("Speaker", 0, 1))
    monkeypatch.setitem(sys.modules, "sounddevice", devices)
    left: list[np.ndarray] = []
    echo: list[np.ndarray] = []

    class Keep(Stage):
        name = "keep"

        async def run(self, ctx: Context, audio: Input) -> None:
            async for chunk in audio:
                assert isinstance(chunk, Audio)
                left.append(chunk.samples)

    async def talk() -> dict[str, int]:
        clean, speaker = EchoCancel(), Speaker(rate=RATE, reference=True)
        graph = Microphone() >> clean["audio"] | clean >> (reply := Reply(voice), Keep()) | reply >> speaker["audio"]
        graph |= speaker["played"] >> Link(feedback=True, policy="drop_oldest") >> clean["reference"]
        async with graph.session() as session:
            for _ in range(10):
                await asyncio.sleep(0)
            microphone, loudspeaker = sorted(devices.streams, key=lambda stream: stream.device)
            air = [np.zeros(160, np.float32)] * 6  # 60 ms
            for _ in range(len(voice) // 320):
                air += [loudspeaker.take(), loudspeaker.take()]
                heard = 0.5 * np.concatenate([air.pop(0), air.pop(0)])
                echo.append(heard)
                microphone.hear(heard)
                await asyncio.sleep(0.02)
            return dict(session.counters)

    counted = run_virtual(talk())
    assert counted.get("echo_cancel.unreferenced", 0) <= 0.04 * RATE
    assert erle(np.concatenate(echo), np.concatenate(left)) >= 25


def test_alignment_takes_the_promptest_and_follows_drift() -> None:
    alignment = Alignment()
    random = np.random.default_rng(3)
    assert alignment.lead is None
    leads = []
    for number in range(3000):
        now = number * 0.02
        drift = 0.0005 * now  # the far device's clock is slow by as much
        alignment.arrived("near", now - 0.1, now + random.uniform(0, 0.015))
        alignment.arrived("far", now - 0.4 - drift, now + random.uniform(0, 0.015))
        assert alignment.lead is not None
        if number > 250:
            assert alignment.lead == pytest.approx(-0.3 - drift, abs=0.015)
        leads.append(alignment.lead)
    assert 2 <= len(set(leads[250:])) <= 5


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, voice: np.ndarray) -> None:
    monkeypatch.setitem(sys.modules, "pywebrtc_audio", None)
    with pytest.raises(StageError, match=r"echo cancellation needs pywebrtc-audio: pip install 'antiphon\[aec\]'"):
        cleaned(Live(voice[:RATE]), Live(voice[:RATE]))


def test_it_ends_with_the_microphone(voice: np.ndarray) -> None:
    async def run() -> float:
        graph = [Live(voice[:RATE]), Live(voice)] >> EchoCancel()
        async with asyncio.timeout(3), graph.session() as session:
            async for _ in session.outputs():
                pass
            return session.clock.now()

    assert run_virtual(run()) <= 1.1
