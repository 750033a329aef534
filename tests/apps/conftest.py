"""A small recogniser with random weights, in the layout that checkpoints ship in."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
import torch

from antiphon.models.conformer.checkpoint import save
from antiphon.models.conformer.config import ASRConfig, ConformerConfig
from antiphon.models.conformer.model import ConformerASR
from antiphon.models.conformer.tokenizer import Source, Tokenizer

TEXT = "it was the best of times it was the worst of times it was the age of wisdom it was the age of foolishness"
MEL = {"normalize": "NA", "window_size": 0.025, "window_stride": 0.01, "features": 80, "n_fft": 512}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CTC recogniser that hears words in anything, the same ones every time."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([TEXT]), model_writer=model, vocab_size=24, minloglevel=2
    )
    tokenizer = Tokenizer(Source("tokenizer.model", model.getvalue()))
    encoder = ConformerConfig(
        width=32, layers=2, heads=4, feedforward=64, channels=16, lookaheads=(6, 0, 1, 13), conv_bias=False
    )
    config = ASRConfig(encoder, vocabulary=len(tokenizer), ctc=True, mel=MEL)
    torch.manual_seed(1)
    asr = ConformerASR(config, tokenizer).eval()
    with torch.no_grad():  # centre the labels' scores, or one label would win on every frame
        frames, _ = asr.encoder(torch.randn(1, 800, 80) * 3 - 8, torch.tensor([800]), 6)
        asr.ctc.linear.bias.copy_(-asr.ctc.linear.weight @ frames[0].mean(0))
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save(folder, config, asr.state_dict(), tokenizer, card="---\nlicense: apache-2.0\nlanguage: en\n---\n# Tiny\n")
    return folder
