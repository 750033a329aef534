"""Read what ``pack`` wrote: 8-bit weights with their scales, as float32 parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

STYLES = "styles.safetensors"


def unpack(folder: Path) -> dict[str, torch.Tensor]:
    """Float32 parameters from packed files. Raises FileNotFoundError when there are none."""
    files = sorted(folder.glob("weights-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights-*.safetensors: make it with voices.pack")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((".scale", ".zero")):
            continue
        value = tensor.float()
        if (scale := tensors.get(f"{name}.scale")) is not None:
            value = (value - tensors[f"{name}.zero"].float()) * scale
        out[name] = value
    return out
