"""All steps that make an embedded voice, at toy size, by the command: what comes out is a checkpoint that speaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_speech import toy_speech

from antiphon.apps.train import tts, tts_flow, tts_lm, tts_tokens, tts_vocoder
from antiphon.apps.train.codec import Teacher
from antiphon.apps.train.tts_sizes import FLOW, LM, VOCODER, VOICES
from antiphon.codecs.mel import LogMel
from antiphon.codecs.speech_tokenizer import SpeechTokenizerConfig
from antiphon.models.conformer.config import ConformerConfig
from antiphon.models.conformer.encoder import ConformerEncoder
from antiphon.pipelines import speech_checkpoint
from antiphon.pipelines.synthesizer import Synthesizer

TOKENIZER = SpeechTokenizerConfig(mels=20, width=16, heads=2, layers=1, digits=3)


def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    speech = TOKENIZER.vocabulary
    monkeypatch.setattr(tts_tokens, "TOKENIZER", TOKENIZER)
    flow = replace(
        FLOW, vocabulary=speech, chunk=10, width=16, heads=2, feedforward=32, layers=1, up_layers=1, channels=16,
        unet_heads=2, unet_head_width=8, middle_stages=1, steps=2,
    )  # fmt: skip
    monkeypatch.setattr(tts_flow, "FLOW", flow)
    lm = replace(LM, speech=speech, width=16, layers=1, heads=2, kv_heads=1, feedforward=32, prefill=(8, 32))
    monkeypatch.setattr(tts_lm, "LM", lm)
    vocoder = replace(VOCODER, width=16, pitch_width=16, block_kernels=(3,), dilations=(1,))
    monkeypatch.setattr(tts_vocoder, "VOCODER", vocoder)
    torch.manual_seed(0)
    encoder = ConformerEncoder(ConformerConfig(width=16, layers=1, heads=2, feedforward=32, channels=4))
    monkeypatch.setattr(Teacher, "embedded", classmethod(lambda cls, lag, device: cls(encoder, LogMel(), lag)))


@pytest.mark.usefixtures("one_thread")
def test_the_steps_make_a_checkpoint_that_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    bank = toy_speech(tmp_path / "bank").folder
    for step, size in (("tokens", "--room=250"), ("flow", "--room=250"), ("vocoder", "--rows=1"), ("lm", "--room=250")):
        tts.main([step, "--bank", str(bank), "--out", str(tmp_path / step), "--steps", "2", size])
    parts = [part for step in ("lm", "flow", "vocoder") for part in (f"--{step}", str(tmp_path / step))]
    tts.main(["card", *parts, "--out", str(tmp_path / "voice")])
    loaded = speech_checkpoint.load(tmp_path / "voice")
    assert list(loaded.voices) == ["heart", *sorted(set(VOICES) - {"heart"})]
    with Synthesizer(loaded.speech) as synthesizer:
        for name, voice in loaded.voices.items():
            synthesizer.register(name, voice)
        sounds = {}
        for name in ("heart", "michael"):
            sounds[name] = np.concatenate([piece.samples for piece in synthesizer.speak("A bad egg.", name, seed=3)])
            assert len(sounds[name]) > 0
            assert np.isfinite(sounds[name]).all()
        assert not np.array_equal(sounds["heart"], sounds["michael"])


def test_the_command_lists_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    tts.main(["--help"])
    told = capsys.readouterr().out
    assert [step for step in ("bank", "tokens", "encode", "flow", "vocoder", "lm", "card") if step not in told] == []
