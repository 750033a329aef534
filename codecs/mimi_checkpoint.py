"""Mimi checkpoints by hub name or path: ``kyutai/mimi`` in transformers' layout, Kyutai's own files, and ours.

Kyutai's file is ``tokenizer-*.safetensors`` and comes with their language models; what its shapes do not say is as
published, unless the ``config.json`` beside it names a configuration of the codec. Ours is a folder of
``config.json``, ``model.safetensors`` (float16) and ``README.md``, the card.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..models import hub
from ..models.files import CheckpointError, read_json, read_safetensors, reading
from .mimi import Mimi
from .mimi_config import MimiConfig
from .mimi_names import common, from_layout, layout_of

__all__ = ["CheckpointError", "build", "load", "resolve", "save"]

DEFAULT = "kyutai/mimi"
FORMAT = "antiphon-mimi-1"
KYUTAI_FILE = "tokenizer-*.safetensors"
HEAD = 64  # width of the published transformers' heads

# transformers' settings that we have no other value of, and Kyutai's
HF_FIXED: Mapping[str, Any] = {
    "audio_channels": 1,
    "use_causal_conv": True,
    "use_conv_shortcut": False,
    "pad_mode": "constant",
    "trim_right_ratio": 1.0,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "attention_bias": False,
}
KYUTAI_FIXED: Mapping[str, Mapping[str, Any]] = {
    "seanet": {
        "channels": 1,
        "causal": True,
        "activation": "ELU",
        "disable_norm_outer_blocks": 0,
        "norm": "none",
        "pad_mode": "constant",
        "true_skip": True,
    },
    "transformer": {
        "causal": True,
        "gating": "none",
        "norm": "layer_norm",
        "positional_embedding": "rope",
        "max_period": 10000,
    },
}


def load(
    name: str | PathLike[str] = DEFAULT,
    *,
    steps: Sequence[int] = (1, 2, 4),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Mimi:
    """A codec. steps: frames that its streaming steps may take.

    Raises CheckpointError for a name that is unknown and for files that are damaged or of another kind.
    """
    path = resolve(name)
    config, weights = _read(path)
    with reading(path):
        return build(dataclasses.replace(config, steps=tuple(steps)), weights).to(device=device, dtype=dtype)


def load_part(
    folder: Path,
    settings: Mapping[str, Any],
    prefix: str,
    *,
    steps: Sequence[int] = (1, 2, 4),
    device: torch.device | str = "cpu",
) -> Mimi:
    """A codec whose weights are those of a larger model that begin with ``prefix``, in transformers' layout.

    settings: of the codec, as in its own ``config.json``. Raises CheckpointError.
    """
    weights = read_safetensors(folder, prefix)
    if not weights:
        raise CheckpointError(f"{folder}: holds no codec: no weight's name begins with {prefix}")
    with reading(folder / "config.json"):
        config = dataclasses.replace(config_from_hf({"model_type": "mimi", **settings}), steps=tuple(steps))
    with reading(folder):
        return build(config, weights).to(device=device, dtype=torch.float32)


def build(config: MimiConfig, weights: Mapping[str, Tensor]) -> Mimi:
    """A codec with these weights, under our names, transformers' or Kyutai's.

    Raises ValueError naming weights that are missing, left over or of another shape than configured.
    """
    with torch.device("meta"):
        mimi = Mimi(config)
    layout = layout_of(weights)
    if layout is not None:
        shapes = {key: value.shape for key, value in mimi.state_dict().items()}
        weights = from_layout(weights, config, shapes, layout)
    try:
        mimi.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return mimi.eval()


def save(folder: Path, mimi: Mimi, card: str | None = None) -> None:
    """Write a checkpoint in our layout, with weights in float16. Raises ValueError for weights beyond float16."""
    weights = {key: value.detach().cpu().half().contiguous() for key, value in mimi.state_dict().items()}
    for key, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"weight {key} does not fit into float16")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"format": FORMAT, **dataclasses.asdict(mimi.config)}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def resolve(name: str | PathLike[str]) -> Path:
    """The file or folder of a checkpoint, fetched from the hub where needed. Raises CheckpointError."""
    path = Path(name)
    if path.exists():
        return path
    name = str(name)
    if name.count("/") != 1 or path.suffix == ".safetensors" or name.startswith(("/", ".", "~")):
        raise CheckpointError(f"no file, folder or hub name {name!r}; the published codec is {DEFAULT}")

    def choose(files: Sequence[str]) -> Sequence[str]:
        if any(Path(file).match(KYUTAI_FILE) for file in files):
            return (KYUTAI_FILE, "*.json")
        if {"config.json", "model.safetensors"} <= set(files):
            return ("config.json", "model.safetensors")
        raise CheckpointError(f"{name} on the hub holds neither a {KYUTAI_FILE} nor a config.json with safetensors")

    folder = hub.cached(name)
    if folder is not None and _complete(folder):
        return folder
    return hub.fetch(name, choose, unknown=f"; the published codec is {DEFAULT}")


def _complete(folder: Path) -> bool:
    """Whether a copy from the hub has the codec: one beside a language model may lack it."""
    if any(folder.glob(KYUTAI_FILE)):
        return True
    files = [folder / name for name in ("config.json", "model.safetensors")]
    return all(file.is_file() for file in files) and _settings(folder).get("model_type") == "mimi"


def _settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _read(path: Path) -> tuple[MimiConfig, dict[str, Tensor]]:
    """Configuration and weights, under whosever names."""
    folder = path if path.is_dir() else path.parent
    settings = _settings(folder)
    ours = settings.get("format") == FORMAT
    if path.is_dir() and (ours or settings.get("model_type") == "mimi"):
        weights = read_safetensors(path)
    else:
        path = path if path.is_file() else _kyutai_file(path, settings)
        with reading(path):
            weights = safetensors.torch.load_file(path)
    with reading(path if layout_of(weights) == "kyutai" else folder / "config.json"):
        return _config(folder, settings, weights), weights


def _kyutai_file(folder: Path, settings: Mapping[str, Any]) -> Path:
    files = sorted(folder.glob(settings.get("mimi_name", KYUTAI_FILE)))
    if len(files) != 1:
        raise CheckpointError(f"{folder}: holds neither a config.json of Mimi nor a single {KYUTAI_FILE}")
    return files[0]


def _config(folder: Path, settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> MimiConfig:
    match layout_of(weights):
        case "transformers":
            return config_from_hf(settings)
        case "kyutai":
            name = settings.get("mimi_config_name")
            return config_from_shapes(weights) if name is None else config_from_kyutai(read_json(folder / name))
    if settings.get("format") != FORMAT:
        raise ValueError("holds the weights of no codec that is known")
    known = {key: value for key, value in settings.items() if key != "format"}
    return MimiConfig(**known | {name: tuple(known[name]) for name in ("ratios", "steps")})


def config_from_hf(settings: Mapping[str, Any]) -> MimiConfig:
    """From transformers' ``config.json``. Raises ValueError for settings that we have no other value of."""
    if settings.get("model_type") != "mimi":
        raise ValueError(f"model_type is {settings.get('model_type')!r}, not 'mimi'")
    _check(settings, HF_FIXED)
    get = settings.get
    width, heads = int(get("hidden_size", 512)), int(get("num_attention_heads", 8))
    code_width = int(get("vector_quantization_hidden_dimension", 256))
    rope = get("rope_parameters") or {"rope_theta": get("rope_theta", 10000.0)}
    _check(rope, {"rope_theta": 10000.0, "rope_type": "default"})
    fixed = {"num_key_value_heads": heads, "upsample_groups": width, "codebook_dim": code_width}
    _check(settings, fixed | ({"head_dim": width // heads} if get("head_dim") is not None else {}))
    config = MimiConfig(
        sample_rate=int(get("sampling_rate", 24000)),
        channels=int(get("num_filters", 64)),
        ratios=tuple(reversed(get("upsampling_ratios") or (8, 6, 5, 4))),
        kernel=int(get("kernel_size", 7)),
        last_kernel=int(get("last_kernel_size", 3)),
        residual_kernel=int(get("residual_kernel_size", 3)),
        residuals=int(get("num_residual_layers", 1)),
        dilation=int(get("dilation_growth_rate", 2)),
        compress=int(get("compress", 2)),
        width=width,
        layers=int(get("num_hidden_layers", 8)),
        heads=heads,
        feedforward=int(get("intermediate_size", 2048)),
        window=int(get("sliding_window", 250)),
        codebooks=int(get("num_quantizers", 32)),
        semantic=int(get("num_semantic_quantizers", 1)),
        bins=int(get("codebook_size", 2048)),
        code_width=code_width,
    )
    if get("frame_rate") is not None:
        _check(settings, {"frame_rate": config.frame_rate})
    return config


def config_from_kyutai(settings: Mapping[str, Any]) -> MimiConfig:
    """From the codec's configuration of Kyutai's. Raises ValueError for settings that we have no other value of."""
    seanet, transformer, quantizer = (settings[part] for part in ("seanet", "transformer", "quantizer"))
    for part, fixed in KYUTAI_FIXED.items():
        _check(settings[part], fixed)
    config = MimiConfig(
        sample_rate=int(settings["sample_rate"]),
        channels=int(seanet["n_filters"]),
        ratios=tuple(reversed(seanet["ratios"])),
        kernel=int(seanet["kernel_size"]),
        last_kernel=int(seanet["last_kernel_size"]),
        residual_kernel=int(seanet["residual_kernel_size"]),
        residuals=int(seanet["n_residual_layers"]),
        dilation=int(seanet["dilation_base"]),
        compress=int(seanet["compress"]),
        width=int(seanet["dimension"]),
        layers=int(transformer["num_layers"]),
        heads=int(transformer["num_heads"]),
        feedforward=int(transformer["dim_feedforward"]),
        window=int(transformer["context"]),
        codebooks=int(quantizer["n_q"]),
        semantic=int(quantizer.get("n_q_semantic", 1)),
        bins=int(quantizer["bins"]),
        code_width=int(quantizer["dimension"]),
    )
    _check(settings, {"channels": 1, "frame_rate": config.frame_rate})
    return config


def config_from_shapes(weights: Mapping[str, Tensor]) -> MimiConfig:
    """From the weights of Kyutai's file; dilation, window and the heads' width are as published."""
    shapes = {common(name): tuple(value.shape) for name, value in weights.items()}
    convolutions = [
        shapes[name]
        for name in sorted(shapes, key=lambda name: int(name.split(".")[2]) if name.startswith("encoder.model.") else 0)
        if name.startswith("encoder.model.") and name.endswith(".conv.conv.weight") and ".block." not in name
    ]
    first, *downs, last = convolutions
    residuals = sum(name.startswith("encoder.model.") and name.endswith("block.1.conv.conv.weight") for name in shapes)
    narrow = shapes["encoder.model.1.block.1.conv.conv.weight"]
    up = shapes["encoder_transformer.transformer.layers.0.linear1.weight"]
    bins, code_width = shapes["quantizer.rvq_first.vq.layers.0._codebook.embedding_sum"]
    counts = {
        part: sum(name.startswith(part) and name.endswith(end) for name in shapes)
        for part, end in (
            ("encoder_transformer.", ".linear1.weight"),
            ("quantizer.rvq_first.", ".embedding_sum"),
            ("quantizer.rvq_rest.", ".embedding_sum"),
        )
    }
    layers, semantic, acoustic = counts.values()
    return MimiConfig(
        channels=first[0],
        ratios=tuple(kernel // 2 for _, _, kernel in downs),
        kernel=first[2],
        last_kernel=last[2],
        residual_kernel=narrow[2],
        residuals=residuals // len(downs),
        compress=narrow[1] // narrow[0],
        width=last[0],
        layers=layers,
        heads=max(1, last[0] // HEAD),
        feedforward=up[0],
        codebooks=semantic + acoustic,
        semantic=semantic,
        bins=bins,
        code_width=code_width,
    )


def _check(settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for name, needed in fixed.items():
        value = settings.get(name, needed)
        same = (
            math.isclose(value, needed) if isinstance(needed, float) and not isinstance(value, str) else value == needed
        )
        if not same:
            raise ValueError(f"{name} is {value!r}; only {needed!r} is known")
