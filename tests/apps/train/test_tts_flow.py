"""The flow's training on tones: it learns to draw them by the streaming mask, and what it writes speaks in streams."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from on_device import Device
from toy_speech import toy_speech

from antiphon.apps.train import tts_flow
from antiphon.apps.train.tts_bank import SpeechBank
from antiphon.apps.train.tts_flow import Examples, FlowTraining, Recipe, load_flow
from antiphon.apps.train.tts_sizes import VOICES
from antiphon.models.cosyvoice.flow_config import FlowConfig, FlowLimits
from antiphon.models.cosyvoice.flow_context import Mask
from antiphon.models.cosyvoice.flow_hops import Hops
from antiphon.models.cosyvoice.flow_stream import StreamingFlow
from antiphon.pipelines.engine import Engine

CONFIG = FlowConfig(
    vocabulary=40, speaker=4, chunk=5, width=16, heads=2, feedforward=32, layers=1, up_layers=1, channels=16,
    unet_heads=2, unet_head_width=8, stage_blocks=1, middle_stages=1, steps=4,
)  # fmt: skip
RECIPE = Recipe(room=250, rate=5e-3, warmup=5, average=0.9)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> SpeechBank:
    """Its tokens count the loudest mel."""
    bank = toy_speech(tmp_path_factory.mktemp("speech"))
    from antiphon.apps.train.tts_tokens import features

    mel = features(bank, 20, None, torch.device("cpu")).mel
    np.save(bank.folder / "mel.npy", mel.numpy())
    np.save(bank.folder / "tokens.npy", (mel[::2].argmax(1) % 40).short().numpy())
    return bank


def training(bank: SpeechBank, out: Path, steps: int = 8, seed: int = 0, config: FlowConfig = CONFIG) -> FlowTraining:
    examples, _ = Examples.of(bank, torch.device("cpu"))
    return FlowTraining(config, RECIPE, examples, out, steps, seed)


def test_it_begins_at_the_frames_mean(bank: SpeechBank, tmp_path: Path) -> None:
    run = training(bank, tmp_path)
    with torch.no_grad():
        losses = run.losses(run.student, *run.examples.batch(*run.batches(0)))
    frames = run.examples.mel.float()
    assert float(losses["prior"]) < 1.2 * float((frames - frames.mean(0)).abs().mean())
    assert float(losses["flow"]) < 1.5 * (1 + float(frames.var(0).mean()))


def test_losses_fall_and_frames_come_near(bank: SpeechBank, tmp_path: Path) -> None:
    run = training(bank, tmp_path, 100)
    before = run.measured(run.examples, 2)
    run.run()
    after = run.measured(run.examples, 2)
    for name in ("flow", "prior", "drawn"):
        assert after[name] < 0.9 * before[name], (before, after)
    assert run.skipped() == 0


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(bank: SpeechBank, tmp_path: Path) -> None:
    whole = training(bank, tmp_path / "whole")
    whole.run()
    training(bank, tmp_path / "halves").run(until=5)
    second = training(bank, tmp_path / "halves")
    assert second.resume()
    second.run()
    assert torch.equal(second.weights.flat, whole.weights.flat)
    assert torch.equal(second.weights.average, whole.weights.average)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another recipe"):
        training(bank, tmp_path / "halves", seed=1).resume()


def test_a_step_stays_on_the_device(bank: SpeechBank, tmp_path: Path) -> None:
    run = training(bank, tmp_path)
    width, chosen = run.batches(0)
    batch = run.examples.batch(width, chosen)
    run._step(width, *batch)  # the optimiser sets itself up
    with Device() as device:
        run._step(width, *batch)
    assert not device.found, device.found[0]


def test_a_frame_is_trained_on_what_it_sees_in_a_stream(bank: SpeechBank, tmp_path: Path) -> None:
    """Tokens behind a chunk and its lookahead change nothing of it; those within do."""
    run = training(bank, tmp_path)
    flow = run.student.flow
    tokens, count = torch.randint(40, (1, 20)), torch.tensor([20])
    tokens[0] = torch.arange(20)
    frames = 2 * CONFIG.chunk

    def drawn(changed: int) -> torch.Tensor:
        other = tokens.clone()
        other[0, changed] = 33
        return flow.generate(other, count, torch.zeros(1, 0, 80), run.student.voices.weight[:1], run.mask)[0, :frames]

    with torch.no_grad():
        last = CONFIG.chunk - 1 + CONFIG.lookahead
        assert not torch.equal(drawn(last), drawn(19))
        assert torch.equal(drawn(last + 1), drawn(19))
    assert run.mask == Mask(CONFIG.chunk)


def test_what_is_written_streams_without_a_prompt_as_it_was_trained(bank: SpeechBank, tmp_path: Path) -> None:
    run = training(bank, tmp_path, 3)
    run.run()
    run.save_model()
    (tmp_path / "run.json").write_text(json.dumps(run.settings), encoding="utf-8")
    flow, voices = load_flow(tmp_path)
    assert list(voices) == sorted(VOICES)
    spoken = torch.from_numpy(np.array(bank.tokens[:23], np.int64))
    whole = flow.generate(
        spoken[None], torch.tensor([23]), torch.zeros(1, 0, 80), voices["michael"][None], Mask(CONFIG.chunk)
    )[0]
    streaming = StreamingFlow(flow, FlowLimits(hops=(5, 10), left=200))
    engine = Engine("cpu", inline=True)
    engine.add("flow", streaming, slots=1)
    voice = engine.ask_sync(lambda: streaming.add_voice([], torch.zeros(0, 80), voices["michael"]))
    hops = Hops(voice, streaming.config, streaming.limits, (5, 10))
    lease = engine.open_sync("flow")
    parts = []
    for hop in [*hops.push(spoken.tolist()), *hops.finish()]:
        lease.use(hop.variant)
        (row,) = engine.run_sync([(lease, hop.inputs)])
        parts.append(row["mel"][hop.skip : hop.frames].clone())
    lease.close()
    engine.close()
    assert len(parts) > 2
    assert torch.allclose(torch.cat(parts), whole, atol=1e-4)


def test_the_command_writes_a_run(bank: SpeechBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tts_flow, "FLOW", replace(CONFIG, chunk=4))
    tts_flow.train(bank.folder, tmp_path, steps=2, room=250)
    flow, voices = load_flow(tmp_path)
    assert flow.config.chunk == 4
    assert set(voices) == set(VOICES)
