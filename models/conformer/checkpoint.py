"""Checkpoints by name or path: load any layout, save ours.

Ours is a folder of ``config.json``, ``model.safetensors`` (float16), a tokenizer and ``README.md``, the card.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor

from ..files import CheckpointError, read_json, read_safetensors, reading
from . import hf, hub, nemo
from .config import ASRConfig, BeamConfig, ConformerConfig, LanguageModelConfig, PromptConfig, TransducerConfig
from .hub import FORMAT
from .model import ConformerASR
from .names import HF, from_layout, nemo_layout
from .tokenizer import Source, Tokenizer

__all__ = ["CheckpointError", "load", "save"]

TOKENIZERS = ("tokenizer.model", "tokenizer.json")


def load(
    name: str | PathLike[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ConformerASR:
    """A recogniser, ready to stream.

    name: of an embedded checkpoint, a hub name, or the path of a ``.nemo`` file or of a folder in our or in
    transformers' layout; None for the embedded default.
    Raises CheckpointError for a name that is unknown and for files that are damaged, unsafe or of another kind.
    """
    path = hub.resolve(name)
    asr = _read(path)
    return asr.to(device=device, dtype=dtype).prepare()


def _read(path: Path) -> ConformerASR:
    if path.is_file():
        config, tokenizer, weights = nemo.read(path)
        layout = nemo_layout(weights)
    elif not (path / "config.json").is_file():
        archives = sorted(path.glob("*.nemo"))
        if len(archives) != 1:
            raise CheckpointError(f"{path}: holds neither a config.json nor a single .nemo file")
        return _read(archives[0])
    elif read_json(path / "config.json").get("format", FORMAT + "?") == FORMAT:
        return _read_ours(path)
    else:
        config, tokenizer, weights = hf.read(path)
        layout = HF
    with reading(path):
        asr = _empty(config, tokenizer)
        shapes = {key: value.shape for key, value in asr.state_dict().items()}
        asr.load_state_dict(from_layout(weights, shapes, layout), assign=True)
    return asr


def _empty(config: ASRConfig, tokenizer: Tokenizer) -> ConformerASR:
    """The networks without memory for their weights."""
    with torch.device("meta"):
        return ConformerASR(config, tokenizer)


def _read_ours(folder: Path) -> ConformerASR:
    settings = read_json(folder / "config.json")
    with reading(folder / "config.json"):
        config = config_from(settings)
    name = next((name for name in TOKENIZERS if (folder / name).is_file()), None)
    if name is None:
        raise CheckpointError(f"{folder}: holds no {' or '.join(TOKENIZERS)}")
    with reading(folder / name):
        tokenizer = Tokenizer(Source(cast(Any, name), (folder / name).read_bytes()))
    weights = read_safetensors(folder)
    with reading(folder / "model.safetensors"):
        asr = _empty(config, tokenizer)
        asr.load_state_dict(weights, assign=True)
    return asr


def config_from(settings: Mapping[str, Any]) -> ASRConfig:
    """From our ``config.json``. Raises TypeError or ValueError for settings that do not exist or do not fit."""
    known = {key: value for key, value in settings.items() if key != "format"}
    encoder = dict(known.pop("encoder"))
    kinds: dict[str, type[Any]] = {
        "transducer": TransducerConfig,
        "prompt": PromptConfig,
        "beam": BeamConfig,
        "language_model": LanguageModelConfig,
    }
    for name, kind in kinds.items():
        if known.get(name) is not None:
            known[name] = kind(**known[name])
    return ASRConfig(ConformerConfig(**encoder | {"lookaheads": tuple(encoder["lookaheads"])}), **known)


def save(
    folder: Path, config: ASRConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer, card: str | None = None
) -> None:
    """Write a checkpoint in our layout, with weights in float16.

    weights: at least those of :class:`ConformerASR` under its names; others are left out.
    Raises ValueError for weights that are missing, of another shape, or beyond float16.
    """
    kept: dict[str, Tensor] = {}
    for key, value in _empty(config, tokenizer).state_dict().items():
        if key not in weights or weights[key].shape != value.shape:
            got = list(weights[key].shape) if key in weights else "missing"
            raise ValueError(f"weight {key} should be {list(value.shape)}, is {got}")
        weight = weights[key].detach().cpu()
        kept[key] = (weight.half() if weight.is_floating_point() else weight).contiguous().clone()
        if not kept[key].isfinite().all():
            raise ValueError(f"weight {key} does not fit into float16")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"format": FORMAT, **dataclasses.asdict(config)}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / tokenizer.source.name).write_bytes(tokenizer.source.content)
    safetensors.torch.save_file(kept, folder / "model.safetensors")
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
