"""A few rows' product with a matrix of float32, in Triton: programs of a warp or a few each ask at once for all they
read, so that a matrix of some MB costs little more than one trip to memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 4  # rows up to which it serves
LONGEST = 2048  # numbers a row
WARP = 512  # of them a warp


@triton.jit
def _few(
    x, weight, bias, out, inputs, outputs, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    lane = tl.arange(0, INPUTS)
    real = column < outputs
    place = column[:, None] * inputs + lane[None, :]
    factor = tl.load(weight + place, mask=real[:, None] & (lane < inputs)[None, :], other=0.0)
    value = tl.load(x + row * inputs + lane, mask=lane < inputs, other=0.0)
    made = tl.sum(factor * value[None, :], 1)
    if BIAS:
        made += tl.load(bias + column, mask=real, other=0.0)
    tl.store(out + row * outputs + column, made, mask=real)


def few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[..., in] -> [..., out]`` of at most ``LONGEST`` numbers a row, and a few rows; weight: ``[out, in]``.

    A row's result does not depend on how many rows there are.
    """
    x = x.contiguous()
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    size = sizes(inputs)
    _few[(rows, triton.cdiv(outputs, size["OUTPUTS"]))](
        x, weight, weight if bias is None else bias, out, inputs, outputs, BIAS=bias is not None, **size
    )
    return out


def sizes(inputs: int) -> dict[str, int]:
    """Of a program for rows of ``inputs`` numbers."""
    wide = triton.next_power_of_2(inputs)
    return {"INPUTS": wide, "OUTPUTS": 2 if wide <= WARP else 1, "num_warps": max(1, wide // WARP)}
