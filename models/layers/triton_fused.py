"""What lies between a block's products, a kernel each in Triton: a streaming step has few rows, so that a launch costs
more than its work."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_norm(
    x, branch, scale, weight, bias, total, normed, width, eps,
    BLOCK: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    real = lane < width
    value = tl.load(x + row * width + lane, mask=real, other=0.0)
    kind = value.dtype
    value = value.to(tl.float32)
    if ADD:
        added = tl.load(branch + row * width + lane, mask=real, other=0.0).to(tl.float32)
        if SCALE:
            added = (added * tl.load(scale + lane, mask=real, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
        value = (value + added).to(kind).to(tl.float32)
        tl.store(total + row * width + lane, value.to(kind), mask=real)
    factor = tl.load(weight + lane, mask=real, other=0.0).to(tl.float32)
    if LAYER:
        value = tl.where(real, value - tl.sum(value, 0) / width, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / width + eps) * factor
    if LAYER:
        value += tl.load(bias + lane, mask=real, other=0.0).to(tl.float32)
    tl.store(normed + row * width + lane, value.to(kind), mask=real)


def add_norm(
    x: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``x + branch * scale`` and its norm, all ``[..., d]``: layer norm with a ``bias``, root mean square without."""
    x = x.contiguous()
    total = x if branch is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    _add_norm[(x.numel() // width,)](
        x, x if branch is None else branch.contiguous(), weight if scale is None else scale, weight,
        weight if bias is None else bias, total, normed, width, eps,
        BLOCK=block, ADD=branch is not None, SCALE=scale is not None, LAYER=bias is not None,
        num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip
    return total, normed


@triton.jit
def _gated(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = lane < width
    gate = tl.load(x + row * 2 * width + lane, mask=real, other=0.0).to(tl.float32)
    value = tl.load(x + row * 2 * width + width + lane, mask=real, other=0.0)
    tl.store(out + row * width + lane, (gate * tl.sigmoid(gate) * value.to(tl.float32)).to(value.dtype), mask=real)


def gated(x: Tensor) -> Tensor:
    """``[..., 2 n] -> [..., n]``: the first half through SiLU, times the second."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    _gated[(out.numel() // width, triton.cdiv(width, 1024))](x, out, width, BLOCK=1024, num_warps=4)
    return out


@triton.jit
def _frame(
    heads, cache, out, first, steps, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    shared = head // (QUERIES // KEYS)
    lane, step = tl.arange(0, WIDTH), tl.arange(0, STEPS)
    given = heads + row * (QUERIES + 2 * KEYS) * WIDTH
    query = tl.load(given + head * WIDTH + lane).to(tl.float32)
    fresh_key = tl.load(given + (QUERIES + shared) * WIDTH + lane)
    fresh_value = tl.load(given + (QUERIES + KEYS + shared) * WIDTH + lane)
    keys = cache + (row * 2 * KEYS + shared) * steps * WIDTH
    values = keys + KEYS * steps * WIDTH
    if head % (QUERIES // KEYS) == 0:
        tl.store(keys + first * WIDTH + lane, fresh_key)
        tl.store(values + first * WIDTH + lane, fresh_value)
    places, old = step[:, None] * WIDTH + lane[None, :], (step < first)[:, None]
    key = tl.load(keys + places, mask=old, other=0.0).to(tl.float32)
    value = tl.load(values + places, mask=old, other=0.0).to(tl.float32)
    key = tl.where((step == first)[:, None], fresh_key.to(tl.float32)[None, :], key)
    value = tl.where((step == first)[:, None], fresh_value.to(tl.float32)[None, :], value)
    score = tl.where(step <= first, tl.sum(key * query[None, :], 1) * scale, float("-inf"))
    weight = tl.exp(score - tl.max(score, 0))
    heard = tl.sum(value * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (row * QUERIES + head) * WIDTH + lane, heard.to(fresh_value.dtype))


def frame(heads: Tensor, cache: Tensor, first: int) -> Tensor:
    """The next position of each row's frame, without positions of its own: ``[B, 1, H + 2 K, D] -> [B, 1, H, D]``.

    cache: ``[B, 2, K, steps, D]`` keys and values before ``first``, which those of this position join.
    """
    rows, _, total, width = heads.shape
    keys, steps = cache.shape[2], cache.shape[3]
    queries = total - 2 * keys
    out = heads.new_empty(rows, 1, queries, width)
    _frame[(rows, queries)](
        heads.contiguous(), cache, out, first, steps, width**-0.5,
        QUERIES=queries, KEYS=keys, WIDTH=width, STEPS=triton.next_power_of_2(steps), num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _looked_up(x, table, token, out, width, x_stride, token_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(token + row * token_stride)
    value = tl.load(x + row * x_stride + lane, mask=lane < width, other=0.0)
    known = (lane < width) & (chosen + lane * 0 >= 0)
    found = tl.load(table + chosen * width + lane, mask=known, other=0.0)
    tl.store(out + row * width + lane, (value.to(tl.float32) + found.to(tl.float32)).to(value.dtype), mask=lane < width)


def looked_up(x: Tensor, table: Tensor, token: Tensor) -> Tensor:
    """``x [B, d]`` plus the lines of ``table [n, d]`` that ``token [B]`` names, nothing where it is negative."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    out = x.new_empty(rows, width)
    _looked_up[(rows, triton.cdiv(width, 1024))](
        x, table, token, out, width, x.stride(0), token.stride(0), BLOCK=1024, num_warps=4
    )
    return out
