"""The speech tokenizer's training on tones: tokens tell letters, a resumed run is the uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from toy_speech import toy_speech

from antiphon.apps.train import tts_tokens
from antiphon.apps.train.codec import Teacher
from antiphon.apps.train.tts_bank import SpeechBank
from antiphon.apps.train.tts_sizes import TOKEN
from antiphon.apps.train.tts_tokens import Features, Recipe, TokensTraining, encoded, features
from antiphon.codecs.mel import LogMel
from antiphon.codecs.prompt_mel import PromptMel
from antiphon.codecs.speech_tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from antiphon.codecs.whisper_mel import WhisperMel
from antiphon.models.conformer.config import ConformerConfig
from antiphon.models.conformer.encoder import ConformerEncoder

CONFIG = SpeechTokenizerConfig(mels=20, width=32, heads=2, layers=1, digits=4)
RECIPE = Recipe(room=250, rate=3e-3, warmup=5, average=0.9, ctc_from=0.2)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> SpeechBank:
    return toy_speech(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def made(bank: SpeechBank) -> Features:
    torch.manual_seed(0)
    encoder = ConformerEncoder(ConformerConfig(width=16, layers=1, heads=2, feedforward=32, channels=4))
    return features(bank, CONFIG.mels, Teacher(encoder, LogMel(), 0), torch.device("cpu"))


def training(bank: SpeechBank, made: Features, out: Path, steps: int = 12, seed: int = 0) -> TokensTraining:
    return TokensTraining(CONFIG, RECIPE, bank.utterances, made, out, steps, seed)


def test_features_lie_as_the_samples_do(bank: SpeechBank, made: Features) -> None:
    count = len(bank.pcm) // TOKEN
    assert (len(made.heard), len(made.mel), len(made.taught)) == (4 * count, 2 * count, count // 2)
    one = bank.utterances[5]
    sound = torch.from_numpy(np.array(bank.pcm[one.samples])).float()[None] / 32768
    alone = PromptMel()(sound)[0]
    assert torch.allclose(made.mel[one.frames].float()[:-2], alone[:-2], atol=0.01)
    from antiphon.apps.train.voices.signal import PLAIN, resample

    heard = WhisperMel(CONFIG.mels, normalize=False)(resample(sound[0], PLAIN)[None])[0].T
    inside = slice(4 * one.begin + 4, 4 * (one.begin + one.count) - 4)
    assert torch.allclose(made.heard[inside].float(), heard[4:-4], atol=0.01)
    assert made.taught.float().std(0).mean() == pytest.approx(1, abs=0.1)


def test_digits_start_on_all_levels(bank: SpeechBank, made: Features, tmp_path: Path) -> None:
    run = training(bank, made, tmp_path)
    assert float(run.losses(run.student, *run.batches(0))["used"]) > 15


def test_losses_fall_and_tokens_come_to_tell_letters(bank: SpeechBank, made: Features, tmp_path: Path) -> None:
    run = training(bank, made, tmp_path, 80)
    before = run.measured(run)
    run.run()
    after = run.measured(run)
    for name in ("mel", "distil", "ctc"):
        assert after[name] < 0.8 * before[name], name
    assert run.skipped() == 0


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(bank: SpeechBank, made: Features, tmp_path: Path) -> None:
    whole = training(bank, made, tmp_path / "whole")
    whole.run()
    training(bank, made, tmp_path / "halves").run(until=7)
    second = training(bank, made, tmp_path / "halves")
    assert second.resume()
    second.run()
    assert torch.equal(second.weights.flat, whole.weights.flat)
    assert torch.equal(second.weights.average, whole.weights.average)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another recipe"):
        training(bank, made, tmp_path / "halves", seed=1).resume()


def test_gradients_reach_the_encoder_through_the_rounding(bank: SpeechBank, made: Features, tmp_path: Path) -> None:
    run = training(bank, made, tmp_path)
    losses = run.losses(run.student, *run.batches(0))
    losses["ctc"].backward()
    tokenizer = run.student.tokenizer
    assert [name for name, weight in tokenizer.named_parameters() if weight.grad is None] == []
    assert tokenizer.project_down.weight.grad is not None
    assert tokenizer.project_down.weight.grad.any()


def test_a_bank_s_tokens_are_those_of_each_clip(bank: SpeechBank, made: Features) -> None:
    torch.manual_seed(1)
    tokenizer = SpeechTokenizer(CONFIG).eval()
    tokens = encoded(tokenizer, bank, made.heard)
    assert tokens.dtype == np.int16
    assert len(tokens) == len(bank.pcm) // TOKEN
    for one in bank.utterances[::7]:
        mel = made.heard[4 * one.begin : 4 * (one.begin + one.count)].float().T[None]
        alone, count = tokenizer(mel, torch.tensor([mel.shape[2]]))
        assert int(count) == one.count
        assert (tokens[one.tokens] == alone[0].numpy()).mean() > 0.98  # rounding may turn on the last bit


def test_the_commands_write_what_the_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = toy_speech(tmp_path / "bank")
    torch.manual_seed(0)
    encoder = ConformerEncoder(ConformerConfig(width=16, layers=1, heads=2, feedforward=32, channels=4))
    monkeypatch.setattr(Teacher, "embedded", classmethod(lambda cls, lag, device: cls(encoder, LogMel(), lag)))
    monkeypatch.setattr(tts_tokens, "TOKENIZER", CONFIG)
    tts_tokens.train(bank.folder, tmp_path / "run", steps=2, room=250)
    tokens, mel = np.array(bank.tokens), np.array(bank.mel)
    assert len(mel) == 2 * len(tokens) == 2 * len(bank.pcm) // TOKEN
    assert 0 <= tokens.min() < tokens.max() < CONFIG.vocabulary
    (bank.folder / "tokens.npy").unlink()
    tts_tokens.encode(bank.folder, tmp_path / "run")
    assert np.array_equal(bank.tokens, tokens)
    assert set(safetensors.torch.load_file(tmp_path / "run" / "tokens.safetensors")) == set(
        SpeechTokenizer(CONFIG).state_dict()
    )
