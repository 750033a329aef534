"""A residual sum, its layer norm and the product that follows, in one kernel in Triton: for the few rows of a streaming
step, whose product takes no longer than a launch. Each program norms its rows again for its columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 512  # rows up to which norms that are repeated cost less than launches
WIDEST = 512  # numbers of a row that a program holds


@triton.jit
def _norm_linear(
    x, branch, norm_weight, norm_bias, weight, bias, total, out, kept,
    rows, width, outputs, split, steps, kept_row, kept_step, eps,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ADD: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, BLOCK)
    within, wanted = lane < width, column < outputs
    factors = tl.load(
        weight + column[:, None] * width + lane[None, :], mask=wanted[:, None] & within[None, :], other=0.0
    )
    places, real = row[:, None] * width + lane[None, :], (row < rows)[:, None] & within[None, :]
    value = tl.load(x + places, mask=real, other=0.0)
    kind = value.dtype
    value = value.to(tl.float32)
    if ADD:
        value = (value + tl.load(branch + places, mask=real, other=0.0).to(tl.float32)).to(kind)
        if tl.program_id(1) == 0:
            tl.store(total + places, value, mask=real)
        value = value.to(tl.float32)
    value = tl.where(within[None, :], value - (tl.sum(value, 1) / width)[:, None], 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    value = value * tl.load(norm_weight + lane, mask=within, other=0.0).to(tl.float32)[None, :]
    value += tl.load(norm_bias + lane, mask=within, other=0.0).to(tl.float32)[None, :]
    product = tl.dot(value.to(kind), tl.trans(factors), input_precision="ieee")
    if BIAS:
        product += tl.load(bias + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
    if GELU:
        product = product.to(kind).to(tl.float32)
        product = 0.5 * product * (1.0 + tl.erf(product * 0.7071067811865476))
    made = product.to(kind)
    real = (row < rows)[:, None] & wanted[None, :]
    tl.store(out + row[:, None] * split + column[None, :], made, mask=real & (column < split)[None, :])
    line = kept + row // steps * kept_row + row % steps * kept_step - split
    tl.store(line[:, None] + column[None, :], made, mask=real & (column >= split)[None, :])


def norm_linear(
    x: Tensor,
    branch: Tensor | None,
    norm: tuple[Tensor, Tensor],
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gelu: bool = False,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``x + branch`` ``[B, n, d]``, and its layer norm (by weight and bias) times ``weight [outputs, d]``, through GELU
    if wanted.

    kept: ``[B, n, k]``, of any strides but the last, where the last ``k`` outputs go; the product returned is then
    ``[B, n, outputs - k]``.
    """
    x = x.contiguous()
    batch, steps, width = x.shape
    rows, outputs = batch * steps, len(weight)
    split = outputs if kept is None else outputs - kept.shape[2]
    total = x if branch is None else torch.empty_like(x)
    out = x.new_empty(batch, steps, split)
    at = out if kept is None else kept
    setting = sizes(max(16, triton.next_power_of_2(width)), x.element_size())
    grid = (triton.cdiv(rows, setting["ROWS"]), triton.cdiv(outputs, setting["COLUMNS"]))
    _norm_linear[grid](
        x, x if branch is None else branch.contiguous(), *norm, weight, weight if bias is None else bias,
        total, out, at, rows, width, outputs, split, steps, at.stride(0), at.stride(1), eps,
        ADD=branch is not None, BIAS=bias is not None, GELU=gelu, **setting,
    )  # fmt: skip
    return total, out


def sizes(block: int, bytes_: int) -> dict[str, int]:
    """Of a program whose rows have ``block`` numbers of so many bytes: what it holds fits its registers."""
    columns = max(16, 128 * 512 // (block * bytes_ * bytes_))
    return {"BLOCK": block, "ROWS": 32 if bytes_ == 2 else 16, "COLUMNS": min(64, columns), "num_warps": 8}
