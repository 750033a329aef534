"""Rotary position embedding (arXiv 2104.09864) in its two layouts.

``interleaved`` turns neighbouring pairs (Kyutai's models), ``half`` pairs the two halves of a head (Llama, Qwen).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["interleaved", "half"]
Rotation = tuple[Tensor, Tensor]


def rotation(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Cosines and sines for ``[B, T]`` integer positions: each ``[B, T, 1, width / 2]``, of at least float32.

    The angles are computed in float64, so that they stay exact for positions of an hours-long session.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    angles = positions[..., None, None] * theta**-exponents
    wide = dtype if dtype.itemsize >= 4 else torch.float32
    return angles.cos().to(wide), angles.sin().to(wide)


def rotate(x: Tensor, turn: Rotation, layout: Layout) -> Tensor:
    """``[B, T, H, D] -> [B, T, H, D]``, each head turned by its position's angles."""
    cos, sin = turn
    pairs = (
        x.unflatten(-1, (-1, 2)).movedim(-1, 0) if layout == "interleaved" else x.unflatten(-1, (2, -1)).movedim(-2, 0)
    )
    real, imaginary = pairs.to(cos.dtype)
    turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    joined = torch.stack(turned, -1).flatten(-2) if layout == "interleaved" else torch.cat(turned, -1)
    return joined.to(x.dtype)
