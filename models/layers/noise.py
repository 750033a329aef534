"""Noise from a counter, so that a session's draws depend on nothing but its seed and its own history.

Word ``i`` of step ``n`` of a session is ``mix(key(seed, n) + i * GAMMA)``, SplitMix64's output function (Steele, Lea,
Flood: Fast splittable pseudorandom number generators, 2014). So there is no generator to advance, and neighbours, batch
sizes and the order of work on a device change nothing. A token is drawn by racing exponential clocks: the largest of
``p / noise`` (equally, of ``logit + Gumbel noise``) is a draw from ``p``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import use_kernels

_BITS = 23  # of a uniform number: the largest, 1 - 2**-24, is still below 1 in float32


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def mix(word: Tensor) -> Tensor:
    """SplitMix64's output function on int64 words (arithmetic wraps)."""
    word = (word ^ _shift(word, 30)) * _FIRST
    word = (word ^ _shift(word, 27)) * _SECOND
    return word ^ _shift(word, 31)


def gumbel(seed: Tensor, step: Tensor, first: int, count: int) -> Tensor:
    """``[B]`` int64 seeds and steps -> ``[B, count]`` float32: words ``first`` and up of the step's Gumbel noise."""
    if use_kernels(seed):
        from . import triton_noise

        return triton_noise.gumbel(seed, step, first, count, _BITS)
    key = mix(mix(seed) + step * GAMMA)
    index = torch.arange(first, first + count, device=seed.device)
    word = mix(key[:, None] + index * GAMMA)
    uniform = (_shift(word, 64 - _BITS).float() + 0.5) * 2.0**-_BITS
    return -(-uniform.log()).log()


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical right shift: int64's own keeps the sign."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)
