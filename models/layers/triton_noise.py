"""The Gumbel noise of :mod:`.noise` in one kernel in Triton: word by word it is some fifty operations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers that a program makes
GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
FIRST, SECOND = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(word):
    word = (word ^ (word >> 30)) * FIRST
    word = (word ^ (word >> 27)) * SECOND
    return word ^ (word >> 31)


@triton.jit
def _gumbel(seed, step, out, first, count, seed_stride, step_stride, BITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = _mix(tl.load(seed + row * seed_stride).to(tl.uint64, bitcast=True))
    key = _mix(key + tl.load(step + row * step_stride).to(tl.uint64, bitcast=True) * GAMMA)
    word = _mix(key + (first + index).to(tl.uint64) * GAMMA)
    uniform = ((word >> (64 - BITS)).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / (1 << BITS))
    tl.store(out + row * count + index, -tl.log(-tl.log(uniform)), mask=index < count)


def gumbel(seed: Tensor, step: Tensor, first: int, count: int, bits: int) -> Tensor:
    """As :func:`.noise.gumbel`; bits: of a uniform number."""
    out = torch.empty(len(seed), count, dtype=torch.float32, device=seed.device)
    _gumbel[(len(seed), triton.cdiv(count, BLOCK))](
        seed, step, out, first, count, seed.stride(0), step.stride(0), BITS=bits, BLOCK=BLOCK, num_warps=4
    )
    return out
