"""Rotary position embedding (arXiv 2104.09864) in its two layouts.

``interleaved`` turns neighbouring pairs (Kyutai's models), ``half`` pairs the two halves of a head (Llama, Qwen).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .kernels import use_kernels

Layout = Literal["interleaved", "half"]
Rotation = tuple[Tensor, Tensor]


def rotation(positions: Tensor, width: int, theta: float, dtype: torch.dtype, layout: Layout) -> Rotation:
    """What ``rotate`` multiplies heads of ``width`` and their partners by, at ``[B, T]`` integer positions: cosines and
    signed sines, each ``[B, T, 1, width]``, of at least float32.

    The angles are computed in float64, so that they stay exact for positions of an hours-long session.
    """
    if dtype.itemsize <= 4 and use_kernels(positions):
        from . import triton_rope

        return triton_rope.rotation(positions, width, theta, layout == "half")
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    angles = positions[..., None, None] * theta**-exponents
    wide = dtype if dtype.itemsize >= 4 else torch.float32
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    if layout == "half":
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)


def rotate(x: Tensor, turn: Rotation, layout: Layout) -> Tensor:
    """``[B, T, H, D] -> [B, T, H, D]``, each head turned by its position's angles."""
    cos, sin = turn
    partner = x.roll(x.shape[-1] // 2, -1) if layout == "half" else x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x * cos + partner * sin).to(x.dtype)
