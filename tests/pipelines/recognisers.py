"""A tiny recogniser with random weights that speaks: made once, saved in our layout."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch

from antiphon.models.conformer.checkpoint import save
from antiphon.models.conformer.config import ASRConfig, ConformerConfig, TransducerConfig
from antiphon.models.conformer.model import ConformerASR
from antiphon.models.conformer.tokenizer import WORD_START, Source, Tokenizer

WORDS = 24
LEFT = 8
MEL = {"features": 80, "window_size": 0.025, "window_stride": 0.01, "n_fft": 512, "normalize": "NA"}


def tokenizer() -> Tokenizer:
    """Every other piece starts a word."""
    pieces = {(WORD_START if index % 2 else "") + chr(97 + index): index for index in range(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token=WORD_START + "b"))
    made.decoder = tokenizers.decoders.Metaspace()
    return Tokenizer(Source("tokenizer.json", made.to_str().encode()))


def build(seed: int = 0, *, ctc: bool = True) -> ConformerASR:
    """Not yet prepared. Emits on something like a third of the frames of noise or speech."""
    torch.manual_seed(seed)
    encoder = ConformerConfig(
        width=32, layers=2, heads=4, feedforward=64, channels=16, left=LEFT, lookaheads=(1, 0, 3)
    )  # fmt: skip
    decoder = TransducerConfig(vocabulary=WORDS, encoder_width=32, width=24, joint_width=24, max_symbols=3)
    asr = ConformerASR(ASRConfig(encoder, WORDS, decoder, ctc=ctc, mel=MEL), tokenizer())
    with torch.no_grad():
        for name, parameter in asr.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * (1.5 if "embedding" in name else 0.25))
        assert asr.transducer is not None
        head = asr.transducer.head
        head.weight.mul_(3)
        head.bias.zero_()
        head.bias[-1] = 2.2
    return asr


def saved(folder: Path) -> Path:
    """The folder of a checkpoint in our layout."""
    asr = build()
    save(folder, asr.config, asr.state_dict(), asr.vocabulary)
    return folder
