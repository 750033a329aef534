"""What lies in front of a causal convolution's product, in one kernel in Triton: a residual sum, or a layer norm with
Mish and what is added to it; then the windows that the product takes, and the rows that the next call looks back at."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _mish(x):
    small = tl.exp(-tl.abs(x))
    over = tl.where(x < 0, small * (small + 2.0), 1.0 + 2.0 * small)
    under = tl.where(x < 0, over + 2.0, over + 2.0 * small * small)
    return x * over / under


@triton.jit
def _windows(
    x, added, weight, bias, tails, last, total, out, kept,
    steps, width, added_row, added_step, tails_row, tails_step, kept_row, kept_step, eps,
    BLOCK: tl.constexpr, KERNEL: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, TAILS: tl.constexpr,
):  # fmt: skip
    BEHIND: tl.constexpr = KERNEL - 1
    places = BEHIND + steps
    row, place = tl.program_id(0).to(tl.int64) // places, tl.program_id(0) % places
    lane = tl.arange(0, BLOCK)
    real = lane < width
    kind = out.dtype.element_ty
    if place < BEHIND:
        value = tl.zeros([BLOCK], kind)
        if TAILS:
            value = tl.load(tails + row * tails_row + place * tails_step + lane, mask=real, other=0.0)
    else:
        step = place - BEHIND
        at = (row * steps + step) * width + lane
        value = tl.load(x + at, mask=real, other=0.0)
        if NORM:
            wide = value.to(tl.float32)
            wide = tl.where(real, wide - tl.sum(wide, 0) / width, 0.0)
            wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
            wide = wide * tl.load(weight + lane, mask=real, other=0.0).to(tl.float32)
            wide += tl.load(bias + lane, mask=real, other=0.0).to(tl.float32)
            value = _mish(wide.to(kind).to(tl.float32)).to(kind)
        if ADD:
            more = tl.load(added + row * added_row + step * added_step + lane, mask=real, other=0.0)
            value = (value.to(tl.float32) + more.to(tl.float32)).to(kind)
            if not NORM:
                tl.store(total + at, value, mask=real)
    for tap in tl.static_range(KERNEL):
        step = place - tap
        if (step >= 0) & (step < steps):
            tl.store(out + ((row * steps + step) * KERNEL + tap) * width + lane, value, mask=real)
    if TAILS:
        after = place - tl.load(last + row)
        if (after >= 0) & (after < BEHIND):
            tl.store(kept + row * kept_row + after * kept_step + lane, value, mask=real)


def windows(
    x: Tensor, branch: Tensor | None, kernel: int, tails: Tensor, last: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """``x + branch`` ``[B, n, d]``, and its windows ``[B, n, kernel * d]`` behind ``tails [B, kernel - 1, d]``.

    kept: ``[B, kernel - 1, d]``, which gets the rows of both, one behind the other, from ``last [B]`` on. It may not
    share memory with ``tails``.
    """
    total = x if branch is None else torch.empty_like(x)
    out = _launch(x, None, 0.0, branch, kernel, (tails, last, kept), total)
    return total, out


def mish_windows(
    x: Tensor, norm: tuple[Tensor, Tensor], eps: float, shift: Tensor, kernel: int,
    tails: Tensor, last: Tensor, kept: Tensor,
) -> Tensor:  # fmt: skip
    """As :func:`windows`, of Mish of the layer norm of ``x``, plus a ``shift`` that expands to ``x``."""
    return _launch(x, norm, eps, shift, kernel, (tails, last, kept), x)


def mish(x: Tensor, norm: tuple[Tensor, Tensor], eps: float, added: Tensor | None) -> Tensor:
    """Mish of the layer norm of ``x [B, n, d]``, plus ``added`` of the same shape."""
    return _launch(x, norm, eps, added, 1, None, x)


def _launch(
    x: Tensor,
    norm: tuple[Tensor, Tensor] | None,
    eps: float,
    added: Tensor | None,
    kernel: int,
    edges: tuple[Tensor, Tensor, Tensor] | None,
    total: Tensor,
) -> Tensor:
    x = x.contiguous()
    rows, steps, width = x.shape
    out = x.new_empty(rows, steps, kernel * width)
    more = x if added is None else added.expand(rows, steps, width)
    more = more if more.stride(2) == 1 else more.contiguous()
    tails, last, kept = (x, x, x) if edges is None else edges
    weight, bias = (x, x) if norm is None else norm
    block = triton.next_power_of_2(width)
    _windows[(rows * (kernel - 1 + steps),)](
        x, more, weight, bias, tails, last, total, out, kept,
        steps, width, more.stride(0), more.stride(1), tails.stride(0), tails.stride(1),
        kept.stride(0), kept.stride(1), eps,
        BLOCK=block, KERNEL=kernel, NORM=norm is not None, ADD=added is not None, TAILS=edges is not None,
        num_warps=min(4, max(1, block // 256)),
    )  # fmt: skip
    return out
