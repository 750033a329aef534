"""A token a row drawn from its likeliest, in Triton: a row a program, which holds it in registers.

The k-th largest number is found by a binary search over the order of float32's bits: no row is sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 32768  # numbers of a row that a program holds


@triton.jit
def _turned(bits):
    """A float32's bits to an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _draw(
    logits, noise, temperature, top_k, force, token,
    width, logits_stride, noise_stride, temperature_stride, top_k_stride, force_stride,
    BLOCK: tl.constexpr, PART: tl.constexpr, FORCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(top_k + row * top_k_stride)
    heat = tl.load(temperature + row * temperature_stride)
    least = float("-inf")
    if wanted > 0 and wanted < width:
        lane = tl.arange(0, BLOCK)
        logit = tl.load(logits + row * logits_stride + lane, mask=lane < width, other=float("-inf"))
        order = _turned(logit.to(tl.float32).to(tl.int32, bitcast=True))
        # The largest integer that as many as wanted reach, from the sign on bit by bit.
        last = tl.where(tl.sum((order >= 0).to(tl.int32), 0) >= wanted, 0, -2147483648)
        for bit in range(31):
            higher = last + (1 << (30 - bit))
            last = tl.where(tl.sum((order >= higher).to(tl.int32), 0) >= wanted, higher, last)
        least = _turned(last).to(tl.float32, bitcast=True)
    part = tl.arange(0, PART)
    best, chosen = tl.full([PART], float("-inf"), tl.float32), part
    for first in range(0, BLOCK, PART):
        lane = first + part
        score = tl.load(logits + row * logits_stride + lane, mask=lane < width, other=float("-inf")).to(tl.float32)
        score = tl.where(score < least, float("-inf"), score)
        if heat > 0:
            score = tl.div_rn(score, tl.zeros_like(score) + heat)
            score += tl.load(noise + row * noise_stride + lane, mask=lane < width, other=0.0)
        chosen = tl.where(score > best, lane, chosen)
        best = tl.maximum(best, score)
    chosen = tl.where(best == tl.max(best, 0), chosen, width)
    drawn = tl.min(chosen, 0).to(tl.int64)
    if FORCE:
        forced = tl.load(force + row * force_stride)
        drawn = tl.where(forced < -1, drawn, forced)
    tl.store(token + row, drawn)


def draw(logits: Tensor, noise: Tensor, temperature: Tensor, top_k: Tensor, force: Tensor | None = None) -> Tensor:
    """As :func:`antiphon.models.moshi.sampling.draw`, of rows of at most ``WIDEST`` numbers."""
    rows, width = logits.shape
    logits, noise = (x if x.stride(1) == 1 else x.contiguous() for x in (logits, noise))
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    block = triton.next_power_of_2(width)
    _draw[(rows,)](
        logits, noise, temperature, top_k, top_k if force is None else force, token,
        width, logits.stride(0), noise.stride(0), temperature.stride(0), top_k.stride(0),
        0 if force is None else force.stride(0),
        FORCE=force is not None, **sizes(block),
    )  # fmt: skip
    return token


def sizes(block: int) -> dict[str, int]:
    """Of a program that holds ``block`` numbers: all of them to find the last candidate, fewer at a time to choose."""
    return {"BLOCK": block, "PART": min(block, 4096), "num_warps": min(16, max(4, block // 1024))}
