"""A codebook's choice and what it leaves to the next, one kernel in Triton: a streaming step has few rows, so that a
launch costs more than its work."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _nearest(scores, book, x, left, codes, bins, width, BINS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    bin_, lane = tl.arange(0, BINS), tl.arange(0, WIDTH)
    score = tl.load(scores + row * bins + bin_, mask=bin_ < bins, other=float("-inf")).to(tl.float32)
    code = tl.minimum(tl.argmax(score, 0), bins - 1).to(tl.int64)  # whatever a score that is no number leads to
    tl.store(codes + row, code)
    inside = lane < width
    value = tl.load(x + row * width + lane, mask=inside, other=0.0)
    entry = tl.load(book + code * width + lane, mask=inside, other=0.0)
    tl.store(left + row * width + lane, value - entry, mask=inside)


def nearest(scores: Tensor, entries: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which entry of each row scores most, the first of equals, ``[N]`` int64; and ``x`` less that entry.

    scores: ``[N, bins]``; entries: ``[bins, width]``; x: ``[N, width]``.
    """
    x = x.contiguous()
    left = torch.empty_like(x)
    codes = torch.empty(len(x), dtype=torch.int64, device=x.device)
    bins, width = entries.shape
    _nearest[(len(x),)](
        scores, entries, x, left, codes, bins, width,
        BINS=triton.next_power_of_2(bins), WIDTH=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return codes, left
