"""SEANet (arXiv 2009.02095) as Mimi has it: causal convolutions from samples to 25 Hz latents, and back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from ..models.layers.conv import CausalConv1d, CausalConvTranspose1d
from .mimi_config import MimiConfig

Convolution = CausalConv1d | CausalConvTranspose1d
Convolve = Callable[[Convolution, Tensor], Tensor]  # runs a layer, over the whole signal or the next of a session's


class Residual(nn.Module):
    """ELU, dilated convolution, ELU, pointwise convolution, on a residual branch."""

    def __init__(self, channels: int, config: MimiConfig, dilation: int) -> None:
        super().__init__()
        narrow = channels // config.compress
        self.narrow = CausalConv1d(channels, narrow, config.residual_kernel, dilation=dilation)
        self.widen = CausalConv1d(narrow, channels, 1)

    def forward(self, x: Tensor, convolve: Convolve) -> Tensor:
        """``[B, C, T] -> [B, C, T]``."""
        return x + convolve(self.widen, F.elu(convolve(self.narrow, F.elu(x)), inplace=True))


class Stage(nn.Module):
    """Residual units on one time scale, and the convolution from it or to it."""

    def __init__(self, channels: int, config: MimiConfig, resample: Convolution) -> None:
        super().__init__()
        dilations = (config.dilation**unit for unit in range(config.residuals))
        self.residuals = nn.ModuleList(Residual(channels, config, dilation) for dilation in dilations)
        self.resample = resample

    def down(self, x: Tensor, convolve: Convolve) -> Tensor:
        """``[B, C, T] -> [B, C', T / stride]``."""
        for residual in self.residuals:
            x = residual(x, convolve)
        return convolve(self.resample, F.elu(x, inplace=True))

    def up(self, x: Tensor, convolve: Convolve) -> Tensor:
        """``[B, C', T] -> [B, C, T * stride]``."""
        x = convolve(self.resample, F.elu(x, inplace=True))
        for residual in self.residuals:
            x = residual(x, convolve)
        return x


class SeanetEncoder(nn.Module):
    """Samples to latents."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        widths = [config.channels << stage for stage in range(len(config.ratios) + 1)]
        self.first = CausalConv1d(1, widths[0], config.kernel)
        self.stages = nn.ModuleList(
            Stage(narrow, config, CausalConv1d(narrow, wide, 2 * ratio, ratio))
            for ratio, (narrow, wide) in zip(config.ratios, pairwise(widths), strict=True)
        )
        self.last = CausalConv1d(widths[-1], config.width, config.last_kernel)

    def forward(self, pcm: Tensor, convolve: Convolve) -> Tensor:
        """``[B, 1, T] -> [B, d, T / hop]``."""
        x = convolve(self.first, pcm)
        for stage in self.stages:
            x = stage.down(x, convolve)  # type: ignore[operator]
        return convolve(self.last, F.elu(x, inplace=True))


class SeanetDecoder(nn.Module):
    """Latents to samples."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        widths = [config.channels << stage for stage in reversed(range(len(config.ratios) + 1))]
        self.first = CausalConv1d(config.width, widths[0], config.kernel)
        self.stages = nn.ModuleList(
            Stage(narrow, config, CausalConvTranspose1d(wide, narrow, 2 * ratio, ratio))
            for ratio, (wide, narrow) in zip(reversed(config.ratios), pairwise(widths), strict=True)
        )
        self.last = CausalConv1d(widths[-1], 1, config.last_kernel)

    def forward(self, x: Tensor, convolve: Convolve) -> Tensor:
        """``[B, d, T] -> [B, 1, T * hop]``."""
        x = convolve(self.first, x)
        for stage in self.stages:
            x = stage.up(x, convolve)  # type: ignore[operator]
        return convolve(self.last, F.elu(x, inplace=True))
