"""Cosines and sines of rotary positions, in one kernel in Triton: operation by operation they are a dozen launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotation(positions, cos, sin, WIDTH: tl.constexpr, BLOCK: tl.constexpr, THETA: tl.constexpr, HALF: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    lane = tl.arange(0, BLOCK)
    if HALF:
        pair, first = lane % (WIDTH // 2), lane < WIDTH // 2
    else:
        pair, first = lane // 2, lane % 2 == 0
    rate = tl.exp(pair.to(tl.float64) * (-2.0 / WIDTH) * tl.log(tl.full([BLOCK], THETA, tl.float64)))
    angle = tl.load(positions + at).to(tl.float64) * rate
    tl.store(cos + at * WIDTH + lane, tl.cos(angle).to(tl.float32), mask=lane < WIDTH)
    turned = tl.sin(angle)
    tl.store(sin + at * WIDTH + lane, tl.where(first, -turned, turned).to(tl.float32), mask=lane < WIDTH)


def rotation(positions: Tensor, width: int, theta: float, half: bool) -> tuple[Tensor, Tensor]:
    """As :func:`.rope.rotation`, in float32."""
    positions = positions.contiguous()
    cos, sin = (torch.empty(*positions.shape, 1, width, device=positions.device) for _ in range(2))
    _rotation[(positions.numel(),)](
        positions, cos, sin, WIDTH=width, BLOCK=triton.next_power_of_2(width), THETA=theta, HALF=half, num_warps=1
    )
    return cos, sin
