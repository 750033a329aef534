"""Repetition-aware sampling of speech tokens (VALL-E 2, arXiv 2406.05370 section 3.2.1) as CosyVoice does it.

A token is drawn from the nucleus. If it occurred among the last few, it is ruled out and another is drawn from all the
rest, so that a loop is left and not only made shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layers.noise import gumbel

MOST_CANDIDATES = 100  # the largest top_k
HISTORY = 50  # the longest window
NONE = -1


@dataclass(frozen=True)
class Sampling:
    """How one session's tokens are drawn.

    The nucleus is the likeliest ``top_k`` tokens as far as ``top_p`` of the probability reaches. A token that makes up
    a share ``tau`` of the last ``window`` (with the defaults: that occurred at all) is drawn again; window 0 lets
    everything repeat. Temperature 0 takes the likeliest token, whatever was before. Seeds are at least 0.
    """

    top_p: float = 0.8
    top_k: int = 25
    window: int = 10
    tau: float = 0.1
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}; it goes from {least:g} to {most:g}")

    def inputs(self) -> dict[str, NDArray[np.generic]]:
        """As a step takes them."""
        return {
            "top_p": np.array(self.top_p, np.float32),
            "top_k": np.array(self.top_k, np.int64),
            "window": np.array(self.window, np.int64),
            "repeats": np.array(self.repeats, np.int64),
            "temperature": np.array(self.temperature, np.float32),
            "seed": np.array(self.seed, np.int64),
        }

    @property
    def repeats(self) -> int:
        """How often a token occurs in the window that must not come again."""
        return max(1, math.ceil(self.window * self.tau))


_RANGES = (
    ("top_p", 0.0, 1.0),
    ("top_k", 1, MOST_CANDIDATES),
    ("window", 0, HISTORY),
    ("tau", 0.0, 1.0),
    ("temperature", 0.0, 100.0),
    ("seed", 0, 2**63 - 1),
)


def draw(
    logits: Tensor,
    recent: Tensor,
    seed: Tensor,
    step: Tensor,
    *,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    window: Tensor,
    repeats: Tensor,
) -> Tensor:
    """A token per row: ``[B, n]`` float32 logits, -inf where a token is ruled out -> ``[B]`` int64.

    recent: ``[B, HISTORY]`` tokens, newest last, ``NONE`` where there is none. seed, step: ``[B]`` int64, from which
    the noise follows. The others: ``[B]`` as in ``Sampling.inputs``.
    """
    most = min(MOST_CANDIDATES, logits.shape[1])
    hot = (temperature > 0)[:, None]
    logits = logits / torch.where(hot, temperature[:, None], 1.0)
    noise = gumbel(seed, step, 0, most + logits.shape[1]).to(logits.dtype)
    best, tokens = logits.topk(most, 1)
    likely = (best - logits.logsumexp(1, keepdim=True)).exp()
    before = likely.cumsum(1) - likely
    nucleus = (before < top_p[:, None]) & (torch.arange(most, device=logits.device) < top_k[:, None])
    nucleus[:, 0] = True
    race = torch.where(nucleus, best, -math.inf) + torch.where(hot, noise[:, :most], 0.0)
    token = tokens.gather(1, race.argmax(1, keepdim=True))
    age = torch.arange(recent.shape[1], 0, -1, device=recent.device)
    again = ((recent == token) & (age <= window[:, None])).sum(1) >= repeats
    others = logits.scatter(1, token, -math.inf) + noise[:, most:]
    return torch.where(again & hot[:, 0], others.argmax(1), token[:, 0])
