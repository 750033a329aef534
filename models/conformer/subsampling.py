"""Causal depthwise-striding subsampling by 8 (FastConformer, arXiv 2305.05084 section 2.1).

Three 3x3 convolutions of stride 2 over (time, mel), the last two depthwise and followed by a pointwise one. Each looks
two frames back and, at the end of an utterance, one zero frame ahead. A session keeps the last input frame of each.
Activations are ``[B, time, mel, channels]``, so that the pointwise and the first convolution are matrix products.
"""

from __future__ import annotations

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


class Depthwise(nn.Conv2d):
    """A 3x3 convolution of stride 2 over ``[B, 2n + 1, 2m + 1 or 2m + 2, C]``, each channel by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """-> ``[B, n, m, C]``."""
        if x.is_cuda or torch.is_grad_enabled():
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # A sum of nine strided views: on the CPU, faster than a convolution for the few frames of a step.
        frames, bins = ((size - 3) // 2 * 2 + 1 for size in x.shape[1:3])
        taps = self.weight.flatten(1).t().contiguous()
        assert self.bias is not None
        total = torch.addcmul(self.bias, x[:, 0:frames:2, 0:bins:2], taps[0])
        for tap in range(1, 9):
            row, column = divmod(tap, 3)
            total.addcmul_(x[:, row : row + frames : 2, column : column + bins : 2], taps[tap])
        return total


class Subsampling(nn.Module):
    """Mel frames to encoder frames."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        channels = config.channels
        bins = [config.mels]
        for _ in range(3):
            bins.append(bins[-1] // 2 + 1)
        self.inputs = ((config.mels, 1), (bins[1], channels), (bins[2], channels))
        self.first = Linear(9, channels)
        self.depthwise = nn.ModuleList(Depthwise(channels) for _ in range(2))
        self.pointwise = nn.ModuleList(Linear(channels, channels) for _ in range(2))
        self.linear = Linear(channels * bins[3], config.width)

    def state_spec(self, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The last input frame of each stage."""
        return {name: TensorSpec((1, *shape), dtype) for name, shape in zip(LAST_FRAMES, self.inputs, strict=True)}

    def stage(self, index: int, x: Tensor) -> Tensor:
        """``[B, 2n + 1, F, C] -> [B, n, F // 2 + 1, C']``."""
        x = F.pad(x, (0, 0, *FREQUENCY_PADDING))
        if index == 0:
            x = self.first(x[..., 0].unfold(1, 3, 2).unfold(2, 3, 2).flatten(3))
        else:
            x = self.pointwise[index - 1](self.depthwise[index - 1](x))
        return F.relu(x)

    def flatten(self, x: Tensor) -> Tensor:
        """``[B, n, F, C] -> [B, n, d]``."""
        return self.linear(x.transpose(2, 3).flatten(2))

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """mel ``[B, T, mels]``, lengths ``[B]`` -> frames ``[B, encoder_frames(T), d]``, lengths ``[B]``."""
        x = mel[..., None]
        start = torch.zeros_like(lengths)
        for index in range(3):
            x = x.masked_fill(~inside(start, x.shape[1], lengths)[..., None, None], 0.0)
            x = self.stage(index, F.pad(x, (0, 0, 0, 0, 2, 1)))
            lengths = lengths // 2 + 1
        return self.flatten(x), lengths

    def step(
        self, mel: Tensor, start: Tensor, lengths: Tensor, state: State, slots: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """mel ``[B, 8n, mels]`` from mel frame ``start`` ``[B]`` of utterances of ``lengths`` ``[B]`` mel frames.

        Returns frames ``[B, n, d]`` and the utterances' lengths in encoder frames ``[B]``.
        """
        x = mel[..., None]
        for index, name in enumerate(LAST_FRAMES):
            x = x.masked_fill(~inside(start, x.shape[1], lengths)[..., None, None], 0.0)
            x = torch.cat((state[name].index_select(0, slots), x), 1)
            state[name].index_copy_(0, target, x[:, -1:])
            x = self.stage(index, x)
            start, lengths = (start + 1) // 2, lengths // 2 + 1
        return self.flatten(x), lengths
