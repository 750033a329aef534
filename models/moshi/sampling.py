"""Drawing Moshi's tokens: temperature, top-k and repetition penalty, with the noise of :mod:`..layers.noise`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layers.kernels import use_kernels

MOST_CANDIDATES = 512  # the largest top-k; 0 draws from all tokens
HISTORY = 200  # the largest context of a repetition penalty, in words' pieces


@dataclass(frozen=True)
class Sampling:
    """How one session's tokens are drawn.

    Temperature 0 takes the likeliest token; ``top_k`` 0 draws from all. penalty: of text tokens among the last
    ``penalty_context`` that were text, 1 for none. padding_bonus: added to the log-probability of the padding token,
    so that the model says less (or, below 0, more). Seeds are at least 0.
    """

    text_temperature: float = 0.7
    text_top_k: int = 25
    audio_temperature: float = 0.8
    audio_top_k: int = 250
    penalty: float = 1.0
    penalty_context: int = 64
    padding_bonus: float = 0.0
    text_seed: int = 0
    audio_seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}; it goes from {least:g} to {most:g}")

    def inputs(self) -> dict[str, NDArray[np.generic]]:
        """As a step takes them, text before audio."""
        return {
            "temperature": np.array([self.text_temperature, self.audio_temperature], np.float32),
            "top_k": np.array([self.text_top_k, self.audio_top_k], np.int64),
            "seed": np.array([self.text_seed, self.audio_seed], np.int64),
            "penalty": np.array([self.penalty, self.penalty_context], np.float32),
            "padding_bonus": np.array(self.padding_bonus, np.float32),
        }


_RANGES = (
    ("text_temperature", 0.0, 100.0),
    ("audio_temperature", 0.0, 100.0),
    ("text_top_k", 0, MOST_CANDIDATES),
    ("audio_top_k", 0, MOST_CANDIDATES),
    ("penalty", 0.01, 100.0),
    ("penalty_context", 0, HISTORY),
    ("padding_bonus", -100.0, 100.0),
    ("text_seed", 0, 2**63 - 1),
    ("audio_seed", 0, 2**63 - 1),
)


def draw(logits: Tensor, noise: Tensor, temperature: Tensor, top_k: Tensor, force: Tensor | None = None) -> Tensor:
    """A token per row: ``[B, n]`` logits -> ``[B]`` int64.

    noise: ``[B, n]`` Gumbel noise. temperature: ``[B]``, 0 for the likeliest token. top_k: ``[B]`` int64, how many of
    the likeliest tokens to draw from, at most ``MOST_CANDIDATES``; 0 for all. force: ``[B]`` int64, a token to take
    instead, or below -1 none.
    """
    if use_kernels(logits):
        from ..layers import triton_draw

        if logits.shape[1] <= triton_draw.WIDEST:
            return triton_draw.draw(logits, noise, temperature, top_k, force)
    logits = wide(logits)
    most = min(MOST_CANDIDATES, logits.shape[1])
    best = logits.topk(most, 1).values
    last = best.gather(1, (top_k.clamp(1, most) - 1)[:, None])
    logits = logits.masked_fill((logits < last) & (top_k > 0)[:, None], -math.inf)
    hot = (temperature > 0)[:, None]
    scores = logits / torch.where(hot, temperature[:, None], 1.0) + torch.where(hot, noise, 0.0)
    token = scores.argmax(1)
    return token if force is None else torch.where(force < -1, token, force)


def wide(logits: Tensor) -> Tensor:
    """In at least float32."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def penalise(logits: Tensor, history: Tensor, context: Tensor, penalty: Tensor) -> Tensor:
    """``[B, n]`` logits with what was said lately made less likely (CTRL, arXiv 1909.05858 section 4.1).

    history: ``[B, HISTORY]`` tokens, the newest last, negative where there is none. context: ``[B]`` int64, how many
    of them count. penalty: ``[B]``; positive logits are divided by it, others multiplied; 1 changes nothing.
    """
    age = torch.arange(history.shape[1], 0, -1, device=history.device)
    counts = (history >= 0) & (age <= context[:, None])
    said = logits.new_zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool)
    said.scatter_(1, torch.where(counts, history, logits.shape[1]), True)
    factor = penalty[:, None].to(logits.dtype)
    return torch.where(said[:, :-1], torch.where(logits >= 0, logits / factor, logits * factor), logits)


def remember(history: Tensor, tokens: Tensor, worth: Tensor) -> Tensor:
    """The history with those of ``[B, T]`` tokens appended that ``worth`` (``[B, T]`` bool) marks."""
    for token, keep in zip(tokens.split(1, 1), worth.split(1, 1), strict=True):
        history = torch.where(keep, torch.cat((history[:, 1:], token), 1), history)
    return history
