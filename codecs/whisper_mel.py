"""Whisper's log-mel features of a stretch of sound, as turn models take them.

Zero mean and unit variance over the stretch, a centred Hann window of 25 ms every 10 ms, slaney mel filters, decimal
logarithm, the loudest 80 dB, brought to about -1 ... 1. Radford et al. 2022, section 2.2; the numbers are those of
``WhisperFeatureExtractor(do_normalize=True)`` in transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .mel import MelConfig, slaney_filters

_CONFIG = MelConfig(n_fft=400)
_VARIANCE_FLOOR, _POWER_FLOOR, _DECADES = 1e-7, 1e-10, 8.0


class WhisperMel(nn.Module):
    """``[B, n]`` samples at 16 kHz -> ``[B, 80, n // 160]`` float32; 160 divides n. Computed in float64."""

    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(_CONFIG.window, dtype=torch.float64), persistent=False)
        self.register_buffer("filters", slaney_filters(_CONFIG), persistent=False)

    def forward(self, pcm: Tensor) -> Tensor:
        pcm = pcm.double()
        variance, mean = torch.var_mean(pcm, 1, correction=0, keepdim=True)
        pcm = (pcm - mean) * (variance + _VARIANCE_FLOOR).rsqrt()
        spectrum = torch.stft(pcm, _CONFIG.n_fft, _CONFIG.hop, window=self.window, return_complex=True)[..., :-1]
        power = torch.einsum("fm,bft->bmt", self.filters, spectrum.abs().square())
        logs = power.clamp(min=_POWER_FLOOR).log10()
        logs = torch.maximum(logs, logs.amax((1, 2), keepdim=True) - _DECADES)
        return ((logs + 4) / 4).float()
