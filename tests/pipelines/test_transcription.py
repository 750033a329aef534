"""The whole recogniser: streaming equals offline, batched equals alone, files equal live audio."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from antiphon.codecs.audio_file import AudioError, write
from antiphon.codecs.mel import LogMel, MelConfig
from antiphon.models.conformer.checkpoint import load
from antiphon.models.layers.packing import HAS_ONEDNN, Packable
from antiphon.pipelines.captions import Caption, Final, Partial
from antiphon.pipelines.chunk import Audio, Event, Text
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.recognizer import Blocks, Recognizer
from antiphon.pipelines.stage import Inlet
from antiphon.pipelines.stages.transcribe import Transcribe
from antiphon.pipelines.transcription import End, Transcriber, Transcription

from .recognisers import saved

Pcm = NDArray[np.float32]
LOOKAHEADS = (0, 1, 3)
SAMPLES = (5_000, 40_000, 16_000, 800, 30_000, 12_000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def recognizer(checkpoint: Path) -> Recognizer:
    return Recognizer(load(checkpoint))


def noise(samples: int, seed: int) -> Pcm:
    rng = np.random.default_rng(seed)
    loud = np.repeat(rng.random(samples // 800 + 1), 800)[:samples]
    return (rng.standard_normal(samples) * 0.2 * loud).astype(np.float32)


def offline(recognizer: Recognizer, pcm: Pcm, lookahead: int) -> list[tuple[int, int]]:
    """Tokens and frames of one masked pass over everything."""
    with torch.inference_mode():
        mel, length = recognizer.mel(torch.from_numpy(pcm)[None], torch.tensor([len(pcm)]))
        frames, count = recognizer.asr.encoder(mel, length, lookahead)
        valid = torch.arange(frames.shape[1])[None] < count[:, None]
        state = {name: spec.new(2) for name, spec in recognizer.head.state_spec().items()}
        tokens, times, number = recognizer.head.decode(
            frames, valid, state, torch.tensor([0]), torch.tensor([True])
        )  # fmt: skip
    return list(zip(tokens[0, : number[0]].tolist(), times[0, : number[0]].tolist(), strict=True))


class Session:
    """Streams one recording through a lease."""

    def __init__(self, engine: Engine, lookahead: int, pcm: Pcm, cuts: int = 0) -> None:
        self.lease = engine.open_sync("asr", lookahead)
        blocks = Blocks(lookahead)
        pieces = np.split(pcm, sorted(np.random.default_rng(cuts).integers(0, len(pcm), cuts))) if cuts else [pcm]
        self.blocks = [block for piece in pieces for block in blocks.push(piece)] + blocks.finish()
        self.at = 0
        self.frames = 0
        self.heard: list[tuple[int, int]] = []

    @property
    def inputs(self) -> dict[str, object]:
        block = self.blocks[self.at]
        return {"pcm": block.pcm, "end": np.int64(block.end)}

    def take(self, out: dict[str, torch.Tensor]) -> None:
        count = int(out["count"])
        times = (out["times"][:count] + self.frames).tolist()
        self.heard += zip(out["tokens"][:count].tolist(), times, strict=True)
        self.frames += int(out["frames"])
        self.at += 1

    @property
    def done(self) -> bool:
        return self.at == len(self.blocks)


def alone(
    recognizer: Recognizer, lookahead: int, pcm: Pcm, *, device: str = "cpu", bucket: int = 4
) -> list[tuple[int, int]]:
    with Engine(device, inline=True) as engine:
        engine.add("asr", recognizer, slots=1, variants=[lookahead], buckets=[bucket])
        session = Session(engine, lookahead, pcm)
        while not session.done:
            session.take(engine.run_sync([(session.lease, session.inputs)])[0])
    return session.heard


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("samples", [1, 200, 1280, 20_000, 33_333])
def test_streaming_gives_the_tokens_of_one_pass(recognizer: Recognizer, lookahead: int, samples: int) -> None:
    pcm = noise(samples, samples)
    expected = offline(recognizer, pcm, lookahead)
    assert alone(recognizer, lookahead, pcm) == expected
    if samples > 10_000:
        assert len(expected) > 3


@pytest.mark.parametrize("decoder", ["rnnt", "beam"])
def test_sessions_that_come_and_go_hear_what_they_hear_alone(checkpoint: Path, decoder: str) -> None:
    recognizer = Recognizer(load(checkpoint), decoder)
    rng = np.random.default_rng(5)
    recordings = [(int(rng.choice(LOOKAHEADS)), noise(int(rng.integers(300, 30_000)), seed)) for seed in range(14)]
    expected = [alone(recognizer, lookahead, pcm) for lookahead, pcm in recordings]
    heard: dict[int, list[tuple[int, int]]] = {}
    with Engine(inline=True) as engine:
        engine.add("asr", recognizer, slots=8)
        waiting = list(range(len(recordings)))
        live: dict[int, Session] = {}
        while waiting or live:
            while waiting and len(live) < 8 and rng.random() < 0.7:
                number = waiting.pop()
                live[number] = Session(engine, *recordings[number], cuts=7)
            ready = {number: live[number] for number in live if rng.random() < 0.7}
            rows = engine.run_sync([(session.lease, session.inputs) for session in ready.values()])
            for (number, session), out in zip(ready.items(), rows, strict=True):
                session.take(out)
                if session.done:
                    session.lease.close()
                    heard[number] = session.heard
                    del live[number]
    assert [heard[number] for number in range(len(recordings))] == expected


def test_a_snapshot_continues_in_another_engine(recognizer: Recognizer) -> None:
    pcm = noise(24_000, 3)
    expected = alone(recognizer, 1, pcm)
    with Engine(inline=True) as first, Engine(inline=True) as second:
        for engine, slots in ((first, 3), (second, 5)):
            engine.add("asr", recognizer, slots=slots, buckets=[4])
        session = Session(first, 1, pcm)
        for _ in range(4):
            session.take(first.run_sync([(session.lease, session.inputs)])[0])
        packed = session.lease.pack(session.lease.snapshot_sync())
        second.open_sync("asr", 1)
        session.lease = second.open_sync("asr", 1)
        session.lease.restore(packed)
        while not session.done:
            session.take(second.run_sync([(session.lease, session.inputs)])[0])
    assert session.heard == expected


def test_files_together_say_what_each_says_alone(checkpoint: Path, tmp_path: Path) -> None:
    paths = []
    for number, samples in enumerate(SAMPLES):
        paths.append(tmp_path / f"{number}.wav")
        write(paths[-1], noise(samples, number), 16_000)
    with Transcriber(checkpoint, 80) as transcriber:
        together: dict[int, list[object]] = {number: [] for number in range(len(paths))}
        for number, event in transcriber.transcribe_many(paths):
            together[number].append(event)
        for number, path in enumerate(paths):
            *captions, end = together[number]
            assert captions == list(transcriber.transcribe(path))
            assert isinstance(end, End)
            assert end == End(pytest.approx(SAMPLES[number] / 16_000))
        assert sum(map(len, together.values())) > 10


def test_a_file_that_cannot_be_read_does_not_stop_the_others(checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path / "good.wav", noise(20_000, 1), 16_000)
    (tmp_path / "bad.wav").write_bytes(b"RIFF????WAVE")
    with Transcriber(checkpoint) as transcriber:
        events = list(transcriber.transcribe_many([tmp_path / "bad.wav", tmp_path / "good.wav"]))
        ends = {number: event for number, event in events if isinstance(event, End)}
        assert isinstance(ends[0].error, AudioError)
        assert ends[1] == End(1.25)
        assert transcriber.engine.metrics()["models"]["asr"]["used"] == 0
        with pytest.raises(AudioError, match=r"bad\.wav"):
            list(transcriber.transcribe(tmp_path / "bad.wav"))


def test_the_stage_says_what_the_file_says(checkpoint: Path, recognizer: Recognizer, tmp_path: Path) -> None:
    pcm = np.round(noise(40_000, 9) * 32767).astype(np.int16)
    write(tmp_path / "a.wav", pcm.astype(np.float32) / 32768, 16_000)
    with Transcriber(checkpoint, 0) as transcriber:
        expected = [(c.text, isinstance(c, Final)) for c in transcriber.transcribe(tmp_path / "a.wav")]

    async def live() -> list[tuple[str, bool]]:
        with Engine(inline=True, clock=VirtualClock()) as engine:
            engine.add("asr", recognizer, slots=2)
            graph = Inlet() >> Transcribe(lookahead=0)
            async with graph.session(engine=engine) as session:

                async def speak() -> None:
                    samples = pcm.astype(np.float32) / 32768
                    for start in range(0, len(samples), 320):
                        await session.clock.sleep(0.02)
                        await session.send(Audio(samples=samples[start : start + 320], rate=16_000, start=start))
                    session.finish()

                speaking = asyncio.create_task(speak())
                out = [(c.text, c.final) async for c in session.outputs() if isinstance(c, Text)]
                await speaking
            assert engine.metrics()["models"]["asr"]["used"] == 0
            return out

    assert run_virtual(live()) == expected
    assert len(expected) > 5


def test_a_commit_ends_what_is_said_without_more_sound_and_what_follows_is_heard_afresh(recognizer: Recognizer) -> None:
    first, second, commit = noise(20_000, 9), noise(24_000, 3), Event(name="commit", rate=16_000, start=20_000)

    async def live(*given: Pcm | Event) -> list[Text]:
        """The captions; nothing is sent between one commit and what came of it."""
        out: list[Text] = []
        with Engine(inline=True, clock=VirtualClock()) as engine:
            engine.add("asr", recognizer, slots=1)
            stage, at = Transcribe(lookahead=80), 0
            graph = (Inlet().named("audio") >> stage) | (Inlet().named("control") >> stage["control"])
            async with graph.session(engine=engine) as session:
                outputs = session.outputs()
                for one in given:
                    if isinstance(one, Event):
                        await session.send(one, "control")
                        while not (out and out[-1].final and out[-1].end_seconds >= one.start_seconds):
                            out.append(await anext(outputs))
                    else:
                        await session.send(Audio(samples=one, rate=16_000, start=at), "audio")
                        at += len(one)
                session.finish()
                out += [chunk async for chunk in outputs]
        return out

    def words(captions: list[Text], begin: float = 0.0) -> list[tuple[str, float, float]]:
        return [
            (word.text, pytest.approx(begin + word.start, abs=2e-3), pytest.approx(begin + word.end, abs=2e-3))
            for caption in captions
            if caption.final
            for word in caption.words
        ]

    async def main() -> None:
        alone = words(await live(first)), words(await live(second), begin=1.25)
        both = await live(first, commit, second)
        assert words(both) == [*alone[0], *alone[1]]
        assert len(alone[0]) > 2
        assert len(alone[1]) > 2
        (nothing,) = await live(Event(name="commit", rate=16_000, start=0))
        assert (nothing.text, nothing.final, nothing.duration) == ("", True, 0)
        twice = await live(first, commit, Event(name="clear", rate=16_000, start=20_000))
        assert words(twice) == alone[0]

    run_virtual(main())


def test_what_does_not_fit_is_named(checkpoint: Path, recognizer: Recognizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no lookahead of 100 ms; it has: 0, 80, 240"):
        Transcription(recognizer, 100)
    with pytest.raises(ValueError, match="no choice of language, got 'fr'"):
        Transcription(recognizer, language="fr")
    with pytest.raises(ValueError, match="no 'lstm' decoder; it has: rnnt, ctc"):
        Recognizer(recognizer.asr, "lstm")
    with Transcriber(checkpoint) as transcriber, pytest.raises(AudioError, match=r"missing\.wav"):
        list(transcriber.transcribe(tmp_path / "missing.wav"))


def test_the_engine_steps_packed_weights(checkpoint: Path) -> None:
    recognizer = Recognizer(load(checkpoint))
    with Engine(inline=True) as engine:
        engine.add("asr", recognizer, slots=1, variants=[1])
        layers = [layer for layer in recognizer.modules() if isinstance(layer, Packable)]
        assert layers
        assert all((layer.packed is not None) == HAS_ONEDNN for layer in layers)


def test_ctc_streams_too(checkpoint: Path) -> None:
    recognizer = Recognizer(load(checkpoint), "ctc")
    pcm = noise(20_000, 1)
    assert alone(recognizer, 1, pcm) == offline(recognizer, pcm, 1)


def test_what_a_beam_search_leaves_open_is_shown_and_settled_at_the_end(checkpoint: Path) -> None:
    recognizer = Recognizer(load(checkpoint), "beam")
    pcm = noise(48_000, 3)
    session = Transcription(recognizer, 80)
    captions: list[Caption] = []
    with Engine(inline=True) as engine:
        engine.add("asr", recognizer, slots=1, variants=[1])
        lease = engine.open_sync("asr", 1)
        for block in (*session.push(pcm), *session.flush()):
            captions += session.take(engine.run_sync([(lease, session.inputs(block))])[0], block)
    captions += session.finish()
    shown = [caption.text for caption in captions if isinstance(caption, Partial)]
    assert any(not later.startswith(earlier) for earlier, later in itertools.pairwise(shown))  # some were revised
    said = [word for caption in captions if isinstance(caption, Final) for word in caption.words]
    tokens = alone(recognizer, 1, pcm)
    text = recognizer.asr.vocabulary.decode([token for token, _ in tokens])
    assert "".join(word.text for word in said) == text.replace(" ", "")
    assert said[-1].end == pytest.approx((tokens[-1][1] + 1) * 0.08)


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["rnnt", "beam"])
@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_captured_steps_hear_what_the_cpu_hears(checkpoint: Path, lookahead: int, decoder: str) -> None:
    recognizer = Recognizer(load(checkpoint), decoder)
    captured = Recognizer(load(checkpoint, device="cuda"), decoder)
    pcm = noise(160_000, 4)
    expected, heard = alone(recognizer, lookahead, pcm), alone(captured, lookahead, pcm, device="cuda")
    assert abs(len(heard) - len(expected)) <= 0.02 * len(expected)
    assert (Counter(heard) & Counter(expected)).total() >= 0.97 * len(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_on_the_gpu_change_no_token(checkpoint: Path, dtype: torch.dtype) -> None:
    captured = Recognizer(load(checkpoint, device="cuda", dtype=dtype))
    recordings = [noise(20_000 + 1000 * seed, seed) for seed in range(16)]
    expected = [alone(captured, 1, pcm, device="cuda", bucket=16) for pcm in recordings]
    with Engine("cuda", inline=True) as engine:
        engine.add("asr", captured, slots=16, variants=[1], buckets=[16])
        sessions = [Session(engine, 1, pcm) for pcm in recordings]
        while running := [session for session in sessions if not session.done]:
            rows = engine.run_sync([(session.lease, session.inputs) for session in running])
            for session, out in zip(running, rows, strict=True):
                session.take(out)
    assert [session.heard for session in sessions] == expected


def test_the_default_is_the_first_variant(recognizer: Recognizer) -> None:
    assert recognizer.variant(None) == recognizer.variants[0] == 1
    assert recognizer.tick(1) == pytest.approx(0.16)
    assert MelConfig.from_nemo(recognizer.asr.mel) == LogMel().config
