"""A few rows' product with a matrix of float32, in Triton: as many programs as a GPU runs at once each ask for all they
read of the matrix, so that a matrix of some MB costs little more than one trip to memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 4  # rows that it serves
LONGEST = 2048  # numbers a row
OUTPUTS = 4  # of a program
PART = 512  # numbers of a row that it multiplies at a time


@triton.jit
def _few(
    x, weight, bias, out, rows, inputs, outputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, ROWS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros((ROWS, OUTPUTS, PART), tl.float32)
    for part in tl.static_range(PARTS):
        lane = part * PART + tl.arange(0, PART)
        inside = lane < inputs
        factor = tl.load(
            weight + column[:, None] * inputs + lane[None, :], mask=(column < outputs)[:, None] & inside[None, :],
            other=0.0,
        )  # fmt: skip
        value = tl.load(
            x + row[:, None] * inputs + lane[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0
        )
        total += factor[None, :, :] * value[:, None, :]
    made = tl.sum(total, 2)
    if BIAS:
        made += tl.load(bias + column, mask=column < outputs, other=0.0)[None, :]
    place = row[:, None] * outputs + column[None, :]
    tl.store(out + place, made, mask=(row < rows)[:, None] & (column < outputs)[None, :])


def few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[..., in] -> [..., out]`` of at most ``FEW`` rows of at most ``LONGEST`` numbers; weight: ``[out, in]``."""
    x = x.contiguous()
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    _few[(triton.cdiv(outputs, OUTPUTS),)](
        x, weight, weight if bias is None else bias, out, rows, inputs, outputs,
        ROWS=triton.next_power_of_2(rows), OUTPUTS=OUTPUTS, PART=PART, PARTS=triton.cdiv(inputs, PART),
        BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    return out
