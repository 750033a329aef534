"""Where an encoder layer finds what lies outside its input: the whole utterance, or a session's slot.

The layers are written once, against the three questions below. :class:`WholeUtterance` answers them from the input
itself with masks, :class:`StreamStep` from the rings and windows of the sessions' slots.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..streaming import State
from .config import ConformerConfig

if TYPE_CHECKING:
    from .attention import RelativeAttention


class Context(Protocol):
    """What a layer asks for. ``n`` is frames of the input, ``m`` frames that may be attended."""

    valid: Tensor  # [B, n, 1], 1 for frames of the utterance and 0 for padding, in the model's dtype

    def remember(self, layer: int, keys_values: Tensor) -> Tensor:
        """``[B, n, 2, H, dk] -> [B, m, 2, H, dk]``: everything that may be attended."""

    def position_scores(self, attention: RelativeAttention, layer: int, query: Tensor) -> Tensor:
        """``[B, H, n, dk] -> [B, H, n, m]``: unscaled scores by distance, -inf where attention is not allowed."""

    def history(self, layer: int, x: Tensor) -> Tensor:
        """``[B, n, d] -> [B, kernel - 1 + n, d]``: the input behind the frames that a causal convolution needs."""


def sinusoids(distances: Tensor, width: int) -> Tensor:
    """Relative position embeddings: ``[P]`` distances -> ``[P, width]`` float64, sine and cosine in turn."""
    index = torch.arange(0, width, 2, dtype=torch.float64, device=distances.device)
    rates = torch.exp(index * -(math.log(10000.0) / width))
    angles = distances.double()[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)


def chunk_mask(frames: int, config: ConformerConfig, lookahead: int | None, device: torch.device) -> Tensor:
    """``[frames, frames]`` bool: query i may attend key j (``chunked_limited``; everything if lookahead is None)."""
    if lookahead is None:
        return torch.ones(frames, frames, dtype=torch.bool, device=device)
    chunk = torch.arange(frames, device=device) // (lookahead + 1)
    behind = chunk[:, None] - chunk
    return (behind >= 0) & (behind <= config.left // (lookahead + 1))


class WholeUtterance:
    """All frames at once: attention under a mask, convolution behind zeros."""

    def __init__(self, config: ConformerConfig, mask: Tensor, lengths: Tensor, dtype: torch.dtype) -> None:
        """mask: ``[n, n]`` bool of allowed (query, key) pairs; lengths: ``[B]`` frames per row."""
        frames = mask.shape[-1]
        real = torch.arange(frames, device=mask.device) < lengths[:, None]
        # Padding attends to itself, so that no softmax is empty.
        itself = torch.eye(frames, dtype=torch.bool, device=mask.device)
        self.forbidden = ~((mask & real[:, None, :]) | itself)[:, None]
        self.valid = real[..., None].to(dtype)
        self.padding = config.kernel - 1
        distances = torch.arange(frames - 1, -frames, -1, device=mask.device)
        self.embeddings = sinusoids(distances, config.width).to(dtype)

    def remember(self, layer: int, keys_values: Tensor) -> Tensor:
        return keys_values

    def position_scores(self, attention: RelativeAttention, layer: int, query: Tensor) -> Tensor:
        scores = query @ attention.project_positions(self.embeddings)
        rows, heads, frames, distances = scores.shape
        # Query i meets key j at column frames - 1 - i + j: shift each row left by its own amount (relative shift).
        shifted = F.pad(scores, (1, 0)).view(rows, heads, distances + 1, frames)[:, :, 1:].view(scores.shape)
        return shifted[..., :frames].masked_fill(self.forbidden, -math.inf)

    def history(self, layer: int, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, self.padding, 0))


class StreamStep:
    """One chunk of ``B`` sessions: keys and values in rings, convolution inputs in windows, both in the slots."""

    def __init__(
        self,
        config: ConformerConfig,
        tables: Tensor,
        state: State,
        slots: Tensor,
        target: Tensor,
        seen: Tensor,
        total: Tensor,
        frames: int,
    ) -> None:
        """
        tables: ``[layers, H, dk, P]`` projected embeddings of distances ``1 - config.longest`` and up.
        target: ``[B]`` the slots to write: ``slots``, or scratch for rows that must leave no trace.
        seen, total: ``[B]`` frames before the chunk, frames of the whole utterance.
        """
        ring = config.ring
        steps = torch.arange(frames, device=slots.device)
        first = seen[:, None]
        last = first + (frames - 1)
        # Ring entry r holds the newest frame that is congruent to r.
        held = last - (last - torch.arange(ring, device=slots.device)) % ring
        # A chunk wholly past the end attends as if it were not, so that no softmax is empty.
        ended = (held >= total[:, None]) & (first < total[:, None])
        forbidden = (held < first - config.window(frames - 1)) | (held < 0) | ended
        self.forbidden = forbidden[:, None, None, :]
        distance = first[:, :, None] + steps[:, None] - held[:, None, :]
        self.columns = (distance + (frames - 1))[:, None].expand(-1, config.heads, -1, -1)
        self.tables = tables[..., config.longest - frames :]
        self.rings, self.slots = state["encoder.rings"], slots
        self.write = (target[:, None], (first + steps) % ring)
        self.valid = (first + steps < total[:, None])[..., None].to(tables.dtype)
        tails = state["encoder.tails"].index_select(0, slots)
        self.keep = tails.shape[2]
        self.windows = tails.new_empty(*tails.shape[:2], self.keep + frames, tails.shape[3])
        self.windows[:, :, : self.keep] = tails

    def remember(self, layer: int, keys_values: Tensor) -> Tensor:
        ring = self.rings[:, layer]
        ring.index_put_(self.write, keys_values)
        return ring.index_select(0, self.slots)

    def position_scores(self, attention: RelativeAttention, layer: int, query: Tensor) -> Tensor:
        return (query @ self.tables[layer]).gather(3, self.columns).masked_fill_(self.forbidden, -math.inf)

    def history(self, layer: int, x: Tensor) -> Tensor:
        window = self.windows[:, layer]
        window[:, self.keep :] = x
        return window

    def tails(self) -> Tensor:
        """``[B, layers, kernel - 1, d]``: what the next chunk's convolutions need."""
        return self.windows[:, :, -self.keep :]
