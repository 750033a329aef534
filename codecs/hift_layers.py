"""Layers of the HiFT vocoder, written once for whole utterances and for streams (see :mod:`.hift_context`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .hift_context import Context, Signal


class Snake(nn.Module):
    """``x + sin(alpha x)^2 / alpha`` (arXiv 2006.08195), alpha per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, n] -> [B, C, n]``."""
        alpha = self.alpha[:, None]
        return torch.addcmul(x, torch.sin(x * alpha).square(), 1 / (alpha + 1e-9))


class Conv(nn.Conv1d):
    """A convolution of odd kernel that looks as far ahead as back; zeros lie around the utterance."""

    def forward(self, signal: Signal, context: Context, wait: int = 0) -> Signal:  # type: ignore[override]
        """``[B, C, n] -> [B, C', n]``, ``lag(kernel // 2 + wait)`` samples later."""
        side = self.kernel_size[0] // 2
        window = context.around(signal, side, side + wait)[..., : signal.x.shape[2] + 2 * side]
        return context.inside(signal.then(super().forward(window), context.lag(side + wait)))


class Strided(nn.Conv1d):
    """A convolution without padding."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, stride * (n - 1) + kernel] -> [B, C', n]``."""
        if self.kernel_size[0] > 1:
            return super().forward(x)
        # As a matrix product: a row of a convolution of one tap changes its last bits with the number of rows.
        assert self.bias is not None
        return self.weight[..., 0] @ x + self.bias[:, None]


class ResBlock(nn.Module):
    """Residual units of two convolutions, of which the first is dilated (HiFi-GAN's, with Snake)."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.side, self.dilations = kernel // 2, tuple(dilations)
        self.convs1 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, dilation=d) for d in dilations)
        self.convs2 = nn.ModuleList(Conv(channels, channels, kernel) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, signal: Signal, context: Context, wait: int = 0) -> Signal:
        """``[B, C, n] -> [B, C, n]``, ``lag(ahead + wait)`` samples later."""
        count = signal.x.shape[2]
        units = zip(self.dilations, self.convs1, self.convs2, self.activations1, self.activations2, strict=True)
        for dilation, conv1, conv2, active1, active2 in units:
            side = self.side * dilation
            window = context.around(signal, side, side + wait)
            y = signal.then(conv1(active1(window[..., : count + 2 * side])), context.lag(side + wait))
            y = context.inside(y)
            y = conv2(y.then(active2(y.x)), context)
            # The sample of the window that belongs to the first of y.
            first = side - context.lag(self.side)
            signal, wait = context.inside(y.then(y.x + window[..., first : first + count])), 0
        return signal


def ahead(kernel: int, dilations: Sequence[int]) -> int:
    """Samples that a residual block looks ahead."""
    return kernel // 2 * sum(dilation + 1 for dilation in dilations)


class Upsample(nn.ConvTranspose1d):
    """A transposed convolution that cuts ``(kernel - stride) / 2`` of its outputs off at either end."""

    def forward(self, signal: Signal, context: Context) -> Signal:  # type: ignore[override]
        """``[B, C, n] -> [B, C', stride * n]``, a few samples later."""
        (kernel,), (stride,) = self.kernel_size, self.stride
        return upsample(signal, self.weight, self.bias, stride, (kernel - stride) // 2, context)


def upsample(signal: Signal, weight: Tensor, bias: Tensor | None, rate: int, crop: int, context: Context) -> Signal:
    """A transposed convolution of stride ``rate`` without its first ``crop`` outputs, ``lag(crop)`` samples later.

    ``[B, C, n]``, weight ``[C, C', kernel]`` -> ``[B, C', rate * n]``.
    """
    back = -(-weight.shape[2] // rate) - 1  # earlier inputs that reach an output
    y = F.conv_transpose1d(context.around(signal, back, 0), weight, bias, rate)
    first = back * rate + crop - context.lag(crop)
    x = y[..., first : first + rate * signal.x.shape[2]]
    return Signal(x, signal.rate * rate, signal.delay * rate + context.lag(crop), signal.extra * rate)


def fourier(n_fft: int) -> tuple[Tensor, Tensor]:
    """The short-time Fourier transform under a periodic Hann window, as the weights of convolutions.

    Returns ``[n_fft + 2, 1, n_fft]`` that makes real parts and imaginary parts, and ``[n_fft + 3, 2, n_fft]`` for a
    transposed convolution: of those and a channel of ones for each spectrum it adds up the windowed sound and the
    squared windows that the sound is to be divided by.
    """
    bins, samples = n_fft // 2 + 1, torch.arange(n_fft, dtype=torch.float64)
    angles = 2 * math.pi / n_fft * torch.arange(bins, dtype=torch.float64)[:, None] * samples
    window = torch.hann_window(n_fft, dtype=torch.float64)
    waves = torch.cat((angles.cos(), -angles.sin()))
    twice = torch.full((bins, 1), 2.0, dtype=torch.float64)
    twice[0] = twice[-1] = 1.0
    inverse = torch.zeros(2 * bins + 1, 2, n_fft, dtype=torch.float64)
    inverse[:-1, 0] = waves * torch.cat((twice, twice)) * window / n_fft
    inverse[-1, 1] = window.square()
    return (waves * window)[:, None], inverse
