"""Sizes of a Mimi codec."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..models.layers.transformer import TransformerConfig

DOWN = 2  # the transformers run at this many times the frame rate


@dataclass(frozen=True)
class MimiConfig:
    """The defaults are those of the published codec: 24 kHz, 12.5 frames a second, 32 codebooks of 2048 entries.

    channels: of the first convolution, doubled at each stage. ratios: strides of the encoder's stages; the decoder's
    are the same backwards. residuals: residual units a stage, each dilated ``dilation`` times as far as the one before
    and ``compress`` times as narrow. width to window: the two transformers, their window in steps of half a frame.
    codebooks, the first ``semantic`` of which are quantised on their own; bins: entries each; code_width: of an entry.
    steps: frames that a streaming step may take, the default first.
    """

    sample_rate: int = 24000
    channels: int = 64
    ratios: tuple[int, ...] = (4, 5, 6, 8)
    kernel: int = 7
    last_kernel: int = 3
    residual_kernel: int = 3
    residuals: int = 1
    dilation: int = 2
    compress: int = 2
    width: int = 512
    layers: int = 8
    heads: int = 8
    feedforward: int = 2048
    window: int = 250
    codebooks: int = 32
    semantic: int = 1
    bins: int = 2048
    code_width: int = 256
    steps: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self) -> None:
        for name in ("sample_rate", "channels", "kernel", "last_kernel", "residual_kernel", "dilation", "compress"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.ratios or min(self.ratios) < 1:
            raise ValueError(f"ratios must be positive strides, got {self.ratios}")
        if not 0 < self.semantic < self.codebooks:
            raise ValueError(f"{self.semantic} of {self.codebooks} codebooks cannot be semantic")
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) != len(self.steps):
            raise ValueError(f"steps must be distinct frame counts of at least 1, got {self.steps}")
        if self.channels % self.compress:
            raise ValueError(f"{self.channels} channels cannot be compressed {self.compress} times")

    @property
    def frame(self) -> int:
        """Samples of a frame."""
        return math.prod(self.ratios) * DOWN

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.frame

    def bit_rate(self, codebooks: int) -> float:
        """Bits a second."""
        return self.frame_rate * codebooks * math.log2(self.bins)

    @property
    def transformer(self) -> TransformerConfig:
        """Of the encoder's transformer and the decoder's."""
        return TransformerConfig(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            feedforward=self.feedforward,
            window=self.window,
            longest=DOWN * max(self.steps),
            norm="layer",
            eps=1e-5,
            gate=False,
            layer_scale=0.01,
        )
