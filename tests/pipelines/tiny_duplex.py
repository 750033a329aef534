"""A tiny random full-duplex model: Moshi's streams and delays, Mimi's frame, a tokenizer of a few words."""

from __future__ import annotations

import io
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from antiphon.codecs import mimi_checkpoint
from antiphon.codecs.mimi import Mimi
from antiphon.codecs.mimi_config import MimiConfig
from antiphon.models.conformer.tokenizer import Source, Tokenizer
from antiphon.models.moshi import checkpoint
from antiphon.pipelines.duplex import Duplex

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "moshi"))
from tiny_moshi import CARD, SETTINGS, TEXT, tiny_lm

MIMI: dict[str, Any] = {
    "channels": 2,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "feedforward": 32,
    "window": 20,
    "codebooks": 8,
    "bins": CARD,
    "code_width": 8,
    "steps": (1,),
}


@lru_cache
def tokenizer_bytes() -> bytes:
    """A SentencePiece model of ``TEXT`` pieces, the fourth of which is padding."""
    words = ["moshi moshi", "good day to you", "what is it", "one two three", "yes", "no", "so it goes"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 10),
        model_writer=model,
        vocab_size=TEXT,
        pad_id=3,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return model.getvalue()


def tiny_mimi(dtype: torch.dtype = torch.float32, **changes: Any) -> Mimi:
    mimi = Mimi(MimiConfig(**MIMI | changes)).to(dtype)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, value in sorted(mimi.state_dict().items()):
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            matrix = value.dim() > 1 and not name.endswith("embedding")
            value.copy_(noise * (value[0].numel() ** -0.5 if matrix else 0.3 if "embedding" not in name else 1.0))
    return mimi.eval()


def tiny_duplex(dtype: torch.dtype = torch.float32, mimi: dict[str, Any] | None = None, **changes: Any) -> Duplex:
    """changes: of the language model."""
    codec = tiny_mimi(dtype, **(mimi or {}))
    return Duplex(tiny_lm(dtype=dtype, **changes), codec, Tokenizer(Source("tokenizer.model", tokenizer_bytes())))


SMALLEST: dict[str, Any] = {
    "n_q": 2,
    "dep_q": 1,
    "delays": [0, 0, 1],
    "num_layers": 1,
    "num_heads": 2,
    "dim": 16,
    "context": 8,
    "card": 8,
    "depformer_num_layers": 1,
    "depformer_num_heads": 1,
    "depformer_dim": 8,
    "depformer_dim_feedforward": 16,
}
SMALLEST_MIMI: dict[str, Any] = {
    "channels": 1,
    "compress": 1,
    "width": 8,
    "heads": 1,
    "feedforward": 8,
    "window": 4,
    "codebooks": 2,
    "bins": 8,
    "code_width": 2,
}


def smallest_duplex(ratios: tuple[int, ...] = (32, 30)) -> Duplex:
    """As few operations as there can be: one codebook each way. ratios: half the samples of a frame, in stages."""
    return tiny_duplex(mimi=SMALLEST_MIMI | {"ratios": ratios}, **SMALLEST)


def write_smallest(folder: Path) -> Path:
    """``smallest_duplex`` as files."""
    checkpoint.save(folder, tiny_lm(**SMALLEST), SETTINGS | SMALLEST)
    mimi_checkpoint.save(folder / "mimi", tiny_mimi(ratios=(32, 30), **SMALLEST_MIMI))
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    return folder


def write_persona(folder: Path) -> Path:
    """A model of PersonaPlex's streams and codes, as files."""
    changes: dict[str, Any] = {"card": 2048, "context": 64, "num_layers": 1, "depformer_num_layers": 1}
    checkpoint.save(folder, tiny_lm(**changes), SETTINGS | changes | {"model_type": "personaplex", "version": "1"})
    mimi_checkpoint.save(folder / "mimi", tiny_mimi(bins=2048))
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    return folder
