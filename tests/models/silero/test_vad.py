"""Silero VAD: the publisher's numbers, its state in slots, and where it hears real speech begin."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

import antiphon
from antiphon.codecs.audio_file import stream
from antiphon.models import ort
from antiphon.models.silero import RATE, WINDOW, SileroVAD, vad
from antiphon.pipelines.chunk import Audio, Event
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.engine.engines import Engines
from antiphon.pipelines.stage import Inlet
from antiphon.pipelines.stages.turns import Turns

SPEECH = Path(antiphon.__file__).parent / "apps" / "samples" / "two_cities.flac"


@pytest.fixture(scope="module")
def speech() -> NDArray[np.float32]:
    return np.concatenate(list(stream(SPEECH, RATE, 10.0)))


def windows(pcm: NDArray[np.float32], count: int, first: int = 0) -> NDArray[np.float32]:
    return pcm[first * WINDOW : (first + count) * WINDOW].reshape(count, WINDOW)


def probabilities(engine: Engine, sounds: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """``[sessions, windows]``, all sessions in one batch."""
    leases = [engine.open_sync("vad") for _ in sounds]
    made = []
    for step in zip(*sounds, strict=True):
        rows = engine.run_sync([(lease, {"pcm": pcm}) for lease, pcm in zip(leases, step, strict=True)])
        made.append([row["speech"].item() for row in rows])
    for lease in leases:
        lease.close()
    return np.array(made, np.float32).T


def test_each_window_is_as_probable_as_the_publishers_wrapper_says(speech: NDArray[np.float32]) -> None:
    """``OnnxWrapper`` of the package imports packages of its own; what it does with its session is repeated here."""
    session = onnxruntime.InferenceSession(vad.packaged(), providers=["CPUExecutionProvider"])
    state, context, expected = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32), []
    heard = windows(speech, 300)
    for pcm in heard:
        framed = np.concatenate((context, pcm[None]), axis=1)
        out, state = session.run(None, {"input": framed, "state": state, "sr": np.array(RATE, np.int64)})
        context = framed[:, -64:]
        expected.append(out[0, 0])
    with Engine(inline=True) as engine:
        engine.add("vad", SileroVAD(), slots=4)
        (made,) = probabilities(engine, [heard])
    np.testing.assert_allclose(made, expected, atol=1e-6)
    assert min(expected) < 0.1
    assert max(expected) > 0.9


def test_the_publishers_own_wrapper_agrees(speech: NDArray[np.float32]) -> None:
    from silero_vad import load_silero_vad

    wrapper = load_silero_vad(onnx=True)
    heard = windows(speech, 200)
    expected = [wrapper(torch.from_numpy(pcm), RATE).item() for pcm in heard]
    with Engine(inline=True) as engine:
        engine.add("vad", SileroVAD(), slots=1)
        (made,) = probabilities(engine, [heard])
    np.testing.assert_allclose(made, expected, atol=1e-6)


def test_nobody_hears_the_neighbours(speech: NDArray[np.float32]) -> None:
    sounds = [windows(speech, 40, first) for first in (0, 11, 40, 77, 100, 111, 150, 200, 240)]
    with Engine(inline=True) as engine:
        engine.add("vad", SileroVAD(), slots=len(sounds))
        together = probabilities(engine, sounds)
        alone = np.concatenate([probabilities(engine, [sound]) for sound in sounds])
        backwards = probabilities(engine, sounds[::-1])[::-1]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, backwards)
    assert np.unique(together[:, -1]).size == len(sounds)


def test_a_snapshot_goes_on_in_another_engine(speech: NDArray[np.float32]) -> None:
    before, after = windows(speech, 60), windows(speech, 60, 60)
    with Engine(inline=True) as first, Engine(inline=True) as second:
        for engine in (first, second):
            engine.add("vad", SileroVAD(), slots=2)
        there, here = first.open_sync("vad"), second.open_sync("vad")
        for pcm in before:
            there.step_sync({"pcm": pcm})
        here.restore(there.pack(there.snapshot_sync()))
        for pcm in after:
            assert torch.equal(there.step_sync({"pcm": pcm})["speech"], here.step_sync({"pcm": pcm})["speech"])
        here.reset()
        assert not torch.equal(there.step_sync({"pcm": pcm})["speech"], here.step_sync({"pcm": pcm})["speech"])


def test_rows_that_are_not_active_keep_their_state() -> None:
    model = SileroVAD()
    state = {name: torch.randn(4, *spec.shape) for name, spec in model.state_spec().items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    active = torch.tensor([True, False, True])
    model.step({"pcm": torch.randn(3, WINDOW)}, state, torch.arange(3), active)
    for name, tensor in state.items():
        assert torch.equal(tensor[[1, 3]], before[name][[1, 3]])
        assert not torch.equal(tensor[0], before[name][0])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SileroVAD(tmp_path / "nowhere.onnx")
    with pytest.raises(ValueError, match="no 'NoSuchProvider'"):
        SileroVAD(providers=["NoSuchProvider"])
    monkeypatch.setattr(vad, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install silero-vad"):
        SileroVAD()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        ort.open_session(SPEECH)


def test_another_device_is_refused_with_the_remedy() -> None:
    model = SileroVAD()
    state = {name: spec.new(2, "meta") for name, spec in model.state_spec().items()}
    with pytest.raises(RuntimeError, match='add it to an Engine\\("cpu"\\)'):
        model.step({"pcm": torch.zeros(1, WINDOW)}, state, torch.zeros(1, dtype=torch.int64), torch.ones(1) > 0)


def test_it_steps_beside_another_engine(speech: NDArray[np.float32]) -> None:
    """As it does beside a CUDA engine: each engine in its own thread."""
    with Engines(Engine(), Engine()) as engines:
        other, own = engines.engines
        other.add("other", SileroVAD(), slots=1)
        own.add("vad", SileroVAD(), slots=1)
        lease = engines.open_sync("vad")
        assert lease.step_sync({"pcm": speech[:WINDOW]})["speech"].item() >= 0
        lease.close()


NOISE = 0.002
STRETCHES = ((1.15, 4.6), (8.75, 12.85), (17.5, 20.5))  # of the recording, each from one pause to another


def energy_onsets(pcm: NDArray[np.float32], pause: float = 0.6) -> list[float]:
    """Seconds at which the loudness of 10 ms first exceeds 5 % of the loudest, after a pause."""
    frames = pcm[: len(pcm) // 160 * 160].reshape(-1, 160)
    loud = np.sqrt((frames**2).mean(1))
    active = np.flatnonzero(loud > 0.05 * loud.max())
    first = np.flatnonzero(np.diff(active, prepend=-1000) > pause * 100)
    return [float(frame) / 100 for frame in active[first]]


def test_onsets_of_real_speech_between_noise_and_silence(speech: NDArray[np.float32]) -> None:
    """Stretches of a recording with gaps of silence and of noise between them."""
    noise = np.random.default_rng(0)

    def gap(seconds: float, level: float) -> NDArray[np.float32]:
        return (noise.standard_normal(int(seconds * RATE)) * level).astype(np.float32)

    said = [speech[int(a * RATE) : int(b * RATE)] for a, b in STRETCHES]
    parts = [gap(1.5, NOISE), said[0], gap(2, NOISE), said[1], gap(2, 0), said[2], gap(1.5, NOISE)]
    levels = [part if i % 2 else np.zeros_like(part) for i, part in enumerate(parts)]
    truth = energy_onsets(np.concatenate(levels))
    sound = np.concatenate(parts)

    async def main() -> list[Event]:
        with Engine(inline=True, clock=VirtualClock()) as engine:
            engine.add("vad", SileroVAD(), slots=1)
            async with (Inlet() >> Turns(silence_ms=600)).session(engine=engine) as session:
                for start in range(0, len(sound), 320):
                    await session.send(Audio(samples=sound[start : start + 320], rate=RATE, start=start))
                session.finish()
                return [chunk async for chunk in session.outputs() if isinstance(chunk, Event)]

    events = run_virtual(main())
    turns, open_turn = [], False
    for event in events:
        if event.name == "speech_start" and not open_turn:
            turns.append(event.start_seconds)
        open_turn = event.name != "turn_end"
    assert len(truth) == len(STRETCHES)
    assert len(turns) == len(truth)
    assert turns == pytest.approx(truth, abs=0.1)
