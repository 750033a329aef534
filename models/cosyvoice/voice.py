"""A voice: what CosyVoice needs to know of a speaker, as one safetensors file.

The tokens and the mel frames of a clip, two frames a token, the speaker's embedding, and what is said in the clip.
Where a model was trained on the speaker, the embedding alone is enough: there is no clip then.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..files import CheckpointError, reading

FORMAT = "antiphon-voice"
VERSION = "1"
FRAMES = 2
"""Mel frames a token."""


@dataclass(frozen=True, eq=False)
class Voice:
    """prompt_tokens: ``[n]`` int64. prompt_mel: ``[2 n, mels]`` float32. embedding: ``[width]`` float32.

    n is 0 for a voice that the model knows by its embedding alone. prompt_text: what the clip says; the language model
    reads it in front of what it shall say. name: for people.
    Raises ValueError for tensors of other shapes or dtypes, or with values that are no numbers.
    """

    prompt_tokens: Tensor
    prompt_mel: Tensor
    embedding: Tensor
    prompt_text: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if self.prompt_tokens.dim() != 1 or self.prompt_tokens.dtype != torch.int64:
            raise ValueError(f"a voice's prompt_tokens must be [n] int64, got {_told(self.prompt_tokens)}")
        if len(self.prompt_tokens) and self.prompt_tokens.min() < 0:
            raise ValueError(f"a voice's prompt_tokens must not be negative, got {int(self.prompt_tokens.min())}")
        for key, dimensions in (("prompt_mel", 2), ("embedding", 1)):
            value = getattr(self, key)
            if value.dim() != dimensions or value.dtype != torch.float32 or not value.shape[-1]:
                raise ValueError(f"a voice's {key} must have {dimensions} dimensions in float32, got {_told(value)}")
            if not value.isfinite().all():
                raise ValueError(f"a voice's {key} holds values that are no numbers; make it from the clip again")
        if len(self.prompt_mel) != FRAMES * len(self.prompt_tokens):
            raise ValueError(
                f"a voice of {len(self.prompt_tokens)} tokens has {FRAMES * len(self.prompt_tokens)} mel frames, "
                f"got {len(self.prompt_mel)}: Voice.of cuts both to fit"
            )

    @classmethod
    def of(cls, tokens: Tensor, mel: Tensor, embedding: Tensor, prompt_text: str = "", name: str = "") -> Self:
        """A voice of a clip's tokens and mel frames, whose ends differ by a frame or so: both are cut to fit.

        Raises ValueError for a clip without a whole token, and as the class does.
        """
        count = min(len(tokens), len(mel) // FRAMES)
        if not count:
            raise ValueError(f"a clip of {len(tokens)} tokens and {len(mel)} mel frames is too short for a voice")
        return cls(
            tokens[:count].to(torch.int64).cpu().clone(),
            mel[: FRAMES * count].float().cpu().clone(),
            embedding.float().cpu().clone(),
            prompt_text,
            name,
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the voice as one safetensors file."""
        header = {"format": FORMAT, "version": VERSION, "name": self.name, "prompt_text": self.prompt_text}
        tensors = {key: getattr(self, key).contiguous() for key in _TENSORS}
        safetensors.torch.save_file(tensors, path, metadata=header)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read ``save`` back. Raises CheckpointError for a file that is missing, damaged or no such voice."""
        path = Path(path)
        with reading(path), safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{path}: no voice (its format is {header.get('format')!r}, not {FORMAT!r})")
            if header.get("version") != VERSION:
                raise CheckpointError(
                    f"{path}: a voice of version {header.get('version')!r}; this release reads {VERSION!r}, so make it "
                    "from its clip again"
                )
            if set(file.keys()) != set(_TENSORS):
                raise CheckpointError(f"{path}: holds {sorted(file.keys())}; a voice holds {sorted(_TENSORS)}")
            tokens, mel, embedding = (file.get_tensor(key) for key in _TENSORS)
            return cls(tokens, mel, embedding, header.get("prompt_text", ""), header.get("name", ""))


_TENSORS = ("prompt_tokens", "prompt_mel", "embedding")


def _told(value: Tensor) -> str:
    return f"{[*value.shape]} {value.dtype}"
