"""The chunk-aware causal UNet that estimates the flow's velocity (Matcha-TTS, arXiv 2309.03199, made causal).

It has one level, so nothing is downsampled: a first stage, middle stages, and a last stage that also gets the first's
output; ``cosyvoice/flow/decoder.py`` upstream.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.linear import Linear
from .flow_config import RATE, FlowConfig
from .flow_context import CacheShape, Context
from .flow_layers import CausalConv, number

KERNEL = 3
BRANCHES = 2  # with and without condition


class TransformerBlock(nn.Module):
    """Attention without positions and a feed-forward with GELU, each on a normalised residual branch."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        width = config.channels
        self.heads, self.head_width = config.unet_heads, config.unet_head_width
        inner = self.heads * self.head_width
        self.norm1 = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * inner, bias=False)
        self.out = Linear(inner, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, x: Tensor, layer: int, context: Context) -> Tensor:
        """``[B, n, C] -> [B, n, C]``."""
        projected = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, self.head_width))
        keys, values = context.remember(layer, projected[:, :, 1:]).transpose(1, 3).unbind(2)
        heard = F.scaled_dot_product_attention(projected[:, :, 0].transpose(1, 2), keys, values, attn_mask=context.bias)
        x = x + self.out(heard.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Residual(nn.Module):
    """Two causal convolutions with the time between them, around a skip."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv1 = CausalConv(inputs, channels, KERNEL)
        self.norm1 = nn.LayerNorm(channels)
        self.time = Linear(4 * channels, channels)
        self.conv2 = CausalConv(channels, channels, KERNEL)
        self.norm2 = nn.LayerNorm(channels)
        self.skip = Linear(inputs, channels)

    def forward(self, x: Tensor, shift: Tensor, context: Context) -> Tensor:
        """x ``[B, n, inputs]``, shift ``[B or 1, 1, channels]`` from the time -> ``[B, n, channels]``."""
        h = F.mish(self.norm1(self.conv1.convolve(x, context))) + shift
        h = F.mish(self.norm2(self.conv2.convolve(h, context)))
        return h + self.skip(x)


class Stage(nn.Module):
    """A residual block and its transformer blocks."""

    def __init__(self, inputs: int, config: FlowConfig) -> None:
        super().__init__()
        self.residual = Residual(inputs, config.channels)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.stage_blocks))

    def forward(self, x: Tensor, shift: Tensor, layer: int, context: Context) -> Tensor:
        """``[B, n, inputs] -> [B, n, C]``; layer: the number of its first block."""
        x = self.residual(x, shift, context)
        for index, block in enumerate(self.blocks):
            x = block(x, layer + index, context)
        return x


class Estimator(nn.Module):
    """The velocity of mel frames at a time of the flow."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        channels, inputs = config.channels, 4 * config.mels
        self.time1 = Linear(inputs, 4 * channels)
        self.time2 = Linear(4 * channels, 4 * channels)
        sizes = (inputs, *[channels] * config.middle_stages, 2 * channels)
        self.stages = nn.ModuleList(Stage(size, config) for size in sizes)
        self.after_first = CausalConv(channels, channels, KERNEL)
        self.after_last = CausalConv(channels, channels, KERNEL)
        self.final = CausalConv(channels, channels, KERNEL)
        self.norm = nn.LayerNorm(channels)
        self.project = Linear(channels, config.mels)
        self._columns = number(self)

    @property
    def cache(self) -> CacheShape:
        """What streaming keeps, per Euler step and branch."""
        config = self.config
        return CacheShape(
            "unet",
            RATE,
            len(self.stages) * config.stage_blocks,
            config.unet_heads,
            config.unet_head_width,
            keep=KERNEL - 1,
            columns=self._columns,
            passes=config.steps,
            branches=BRANCHES,
        )

    def shifts(self, time: Tensor) -> Tensor:
        """What each stage adds for the time ``[B]`` in 0 to 1: ``[B, stages, C]``."""
        half = 2 * self.config.mels
        # The weights were trained with rates in float32.
        rates = torch.exp(torch.arange(half, device=time.device).float() * -(math.log(10000) / (half - 1)))
        angles = 1000 * time[:, None] * rates
        x = torch.cat((angles.sin(), angles.cos()), 1).to(self.time1.weight.dtype)
        x = F.mish(self.time2(F.silu(self.time1(x))))
        return torch.stack([cast(Stage, stage).residual.time(x) for stage in self.stages], 1)

    def forward(self, x: Tensor, shifts: Tensor, context: Context) -> Tensor:
        """x ``[B, n, 4 mels]``: sample, encoder output, speaker and prompt frames; shifts as ``shifts`` has them for B
        or one time. Returns ``[B, n, mels]``."""
        each = self.config.stage_blocks
        skip = x
        for index, stage in enumerate(self.stages):
            if index == len(self.stages) - 1:
                x = torch.cat((x, skip), 2)
            x = stage(x, shifts[:, index, None], index * each, context)
            if index == 0:
                skip = x
                x = self.after_first.convolve(x, context)
        x = self.final.convolve(self.after_last.convolve(x, context), context)
        velocity: Tensor = self.project(F.mish(self.norm(x)))
        return velocity
