"""Reads the speech tokenizer's weights in the layout of the pip package ``s3tokenizer``, strict on every key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..models.files import CheckpointError, reading
from .speech_tokenizer import SpeechTokenizer, SpeechTokenizerConfig

_OURS, _THEIRS = "project_down.", "quantizer._codebook.project_down."


def from_upstream(weights: Mapping[str, Tensor], tokenizer: SpeechTokenizer) -> dict[str, Tensor]:
    """Their weights under our names.

    Raises ValueError naming keys that are missing, left over or of another shape than the configuration says.
    """
    wanted = {
        (_THEIRS + key.removeprefix(_OURS) if key.startswith(_OURS) else key): key for key in tokenizer.state_dict()
    }
    for problem, keys in (("lacks", wanted.keys() - weights.keys()), ("has no place for", weights.keys() - wanted)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"the configured speech tokenizer {problem} {', '.join(sorted(keys)[:3])}{more}")
    made = {ours: weights[theirs] for theirs, ours in wanted.items()}
    for key, value in tokenizer.state_dict().items():
        if made[key].shape != value.shape:
            raise ValueError(f"{key} is {[*made[key].shape]}, the configuration says {[*value.shape]}")
    return made


def load(path: Path, config: SpeechTokenizerConfig | None = None) -> SpeechTokenizer:
    """The network of a ``.safetensors`` or ``.pt`` file; config: its sizes, by default the published ones.

    A ``.pt`` is read with ``weights_only``: nothing in it is run. Raises CheckpointError for a file that is missing,
    damaged, or of another model.
    """
    with reading(path):
        if path.suffix == ".onnx":
            raise CheckpointError(f"{path}: OnnxSpeechTokenizer runs this file as it is")
        if path.suffix == ".safetensors":
            weights = safetensors.torch.load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise CheckpointError(f"{path}: holds no mapping of names to tensors")
        tokenizer = SpeechTokenizer(config)
        tokenizer.load_state_dict(from_upstream(weights, tokenizer))
    return tokenizer.eval()
