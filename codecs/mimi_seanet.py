"""SEANet (arXiv 2009.02095) as Mimi has it: causal convolutions from samples to 25 Hz latents, and back."""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from ..models.layers.conv import CausalConv1d, CausalConvTranspose1d
from .mimi_config import MimiConfig

Convolution = CausalConv1d | CausalConvTranspose1d


class Convolve(Protocol):
    """Runs a layer, over the whole signal or the next of a session's."""

    def __call__(self, layer: Convolution, x: Tensor, branch: Tensor | None = None, elu: bool = False) -> Tensor:
        """``[B, C, T] -> [B, C', T']``, of ``x + branch``, through ELU if asked for."""


class Residual(nn.Module):
    """ELU, dilated convolution, ELU, pointwise convolution, on a residual branch."""

    def __init__(self, channels: int, config: MimiConfig, dilation: int) -> None:
        super().__init__()
        narrow = channels // config.compress
        self.narrow = CausalConv1d(channels, narrow, config.residual_kernel, dilation=dilation)
        self.widen = CausalConv1d(narrow, channels, 1)

    def forward(self, x: Tensor, convolve: Convolve) -> Tensor:
        """What to add to ``[B, C, T]``."""
        return convolve(self.widen, F.elu(convolve(self.narrow, x, elu=True), inplace=True))


class Stage(nn.Module):
    """Residual units on one time scale, and the convolution from it or to it."""

    def __init__(self, channels: int, config: MimiConfig, resample: Convolution) -> None:
        super().__init__()
        dilations = (config.dilation**unit for unit in range(config.residuals))
        self.residuals = nn.ModuleList(Residual(channels, config, dilation) for dilation in dilations)
        self.resample = resample

    def down(self, x: Tensor, convolve: Convolve) -> Tensor:
        """``[B, C, T] -> [B, C', T / stride]``."""
        return convolve(self.resample, *self._refined(x, convolve), elu=True)

    def up(self, x: Tensor, branch: Tensor | None, convolve: Convolve) -> tuple[Tensor, Tensor | None]:
        """``[B, C', T] -> [B, C, T * stride]``, both as a signal and a branch that waits to be added."""
        return self._refined(convolve(self.resample, x, branch, elu=True), convolve)

    def _refined(self, x: Tensor, convolve: Convolve) -> tuple[Tensor, Tensor | None]:
        branch: Tensor | None = None
        for residual in self.residuals:
            x = x if branch is None else x + branch
            branch = residual(x, convolve)
        return x, branch


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
        return convolve(self.last, x, elu=True)


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
        x, branch = convolve(self.first, x), None
        for stage in self.stages:
            x, branch = stage.up(x, branch, convolve)  # type: ignore[operator]
        return convolve(self.last, x, branch, elu=True)
