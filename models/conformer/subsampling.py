"""Causal depthwise-striding subsampling by 8 (FastConformer, arXiv 2305.05084 section 2.1).

Three 3x3 convolutions of stride 2 over (time, mel), the last two depthwise and followed by a pointwise one. Each looks
two frames back and, at the end of an utterance, one zero frame ahead. A session keeps the last input frame of each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.linear import Linear
from ..streaming import State, TensorSpec
from .config import ConformerConfig

LAST_FRAMES = tuple(f"encoder.subsampling.{stage}" for stage in range(3))
FREQUENCY_PADDING = (2, 1)


def inside(start: Tensor, frames: int, length: Tensor) -> Tensor:
    """``[B, frames]`` bool: frames ``start`` and on that lie in ``[0, length)``; start and length ``[B]``."""
    index = start[:, None] + torch.arange(frames, device=start.device)
    return (index >= 0) & (index < length[:, None])


class Subsampling(nn.Module):
    """Mel frames to encoder frames."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        channels = config.channels
        bins = [config.mels]
        for _ in range(3):
            bins.append(bins[-1] // 2 + 1)
        self.bins = tuple(bins)
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs, channels, 3, stride=2, groups=inputs) for inputs in (1, channels, channels)
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.linear = Linear(channels * bins[3], config.width)

    def state_spec(self, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        """The last input frame of each stage."""
        channels = (1, self.linear.in_features // self.bins[3], self.linear.in_features // self.bins[3])
        return {
            name: TensorSpec((count, 1, bins), dtype)
            for name, count, bins in zip(LAST_FRAMES, channels, self.bins, strict=False)
        }

    def stage(self, index: int, x: Tensor) -> Tensor:
        """``[B, C, 2n + 1, F] -> [B, C', n, F // 2 + 1]``."""
        x = self.convs[index](F.pad(x, FREQUENCY_PADDING))
        if index:
            x = self.pointwise[index - 1](x)
        return F.relu(x)

    def flatten(self, x: Tensor) -> Tensor:
        """``[B, C, n, F] -> [B, n, d]``."""
        features: Tensor = self.linear(x.transpose(1, 2).flatten(2))
        return features

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """mel ``[B, T, mels]``, lengths ``[B]`` -> frames ``[B, encoder_frames(T), d]``, lengths ``[B]``."""
        x = mel[:, None]
        start = torch.zeros_like(lengths)
        for index in range(3):
            x = x.masked_fill(~inside(start, x.shape[2], lengths)[:, None, :, None], 0.0)
            x = self.stage(index, F.pad(x, (0, 0, 2, 1)))
            lengths = lengths // 2 + 1
        return self.flatten(x), lengths

    def step(
        self, mel: Tensor, start: Tensor, lengths: Tensor, state: State, slots: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """mel ``[B, 8n, mels]`` from mel frame ``start`` ``[B]`` of utterances of ``lengths`` ``[B]`` mel frames.

        Returns frames ``[B, n, d]`` and the utterances' lengths in encoder frames ``[B]``.
        """
        x = mel[:, None]
        for index, name in enumerate(LAST_FRAMES):
            x = x.masked_fill(~inside(start, x.shape[2], lengths)[:, None, :, None], 0.0)
            x = torch.cat((state[name].index_select(0, slots), x), 2)
            state[name].index_copy_(0, target, x[:, :, -1:])
            x = self.stage(index, x)
            start, lengths = (start + 1) // 2, lengths // 2 + 1
        return self.flatten(x), lengths
