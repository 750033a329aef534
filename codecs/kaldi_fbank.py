"""Kaldi's log-mel filter banks, as speaker models take them (``feature-fbank.cc``, ``feature-window.cc``).

Windows of 25 ms every 10 ms that lie wholly in the sound, each without its mean, with pre-emphasis, under Povey's
window; the power spectrum of 512 points through triangles on Kaldi's mel scale from 20 Hz up; natural logarithm. No
dither, samples in -1 ... 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SAMPLE_RATE = 16000
_WINDOW, _HOP, _N_FFT = 400, 160, 512
_PREEMPHASIS, _POVEY, _LOWEST = 0.97, 0.85, 20.0
_FLOOR = torch.finfo(torch.float32).eps


class KaldiFbank(nn.Module):
    """``[B, n]`` samples at 16 kHz, of which there must be 400 -> ``[B, (n - 240) // 160, mels]`` float32.

    Computed in float64. Raises ValueError for a sound that is too short.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, mels: int = 80) -> None:
        super().__init__()
        window = torch.hann_window(_WINDOW, periodic=False, dtype=torch.float64).pow(_POVEY)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", _triangles(mels), persistent=False)

    def forward(self, pcm: Tensor) -> Tensor:
        if pcm.shape[1] < _WINDOW:
            raise ValueError(f"{pcm.shape[1]} samples are too few for filter banks, which need {_WINDOW}")
        frames = pcm.double().unfold(1, _WINDOW, _HOP)
        frames = frames - frames.mean(2, keepdim=True)
        before = torch.cat((frames[..., :1], frames[..., :-1]), 2)
        spectrum = torch.fft.rfft((frames - _PREEMPHASIS * before) * self.window, n=_N_FFT)
        power = spectrum.real.square() + spectrum.imag.square()
        mel: Tensor = power @ self.filters
        return mel.clamp(min=_FLOOR).log().float()


def _triangles(mels: int) -> Tensor:
    """Filters that are triangles on the mel scale itself, ``[n_fft / 2 + 1, mels]`` float64."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127 * torch.log1p(hertz / 700)

    low, high = mel(torch.tensor([_LOWEST, SAMPLE_RATE / 2], dtype=torch.float64)).tolist()
    edges = torch.linspace(low, high, mels + 2, dtype=torch.float64)
    bins = mel(torch.arange(_N_FFT // 2 + 1, dtype=torch.float64) * (SAMPLE_RATE / _N_FFT))[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
