"""Whisper's log-mel features of a stretch of sound, as turn models and speech tokenizers take them.

A centred Hann window of 25 ms every 10 ms, slaney mel filters, decimal logarithm, the loudest 80 dB, brought to about
-1 ... 1; for turn models, of the stretch brought to zero mean and unit variance. Radford et al. 2022, section 2.2; the
numbers are those of ``WhisperFeatureExtractor`` in transformers, with and without ``do_normalize``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .mel import MelConfig, slaney_filters

_CONFIG = MelConfig(n_fft=400)
_VARIANCE_FLOOR, _POWER_FLOOR, _DECADES = 1e-7, 1e-10, 8.0


class WhisperMel(nn.Module):
    """``[B, n]`` samples at 16 kHz, of which there must be more than 200 -> ``[B, mels, n // 160]`` float32.

    normalize: bring the stretch to zero mean and unit variance first. Computed in float64.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, mels: int = 80, *, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        config = replace(_CONFIG, n_mels=mels)
        self.register_buffer("window", torch.hann_window(_CONFIG.window, dtype=torch.float64), persistent=False)
        self.register_buffer("filters", slaney_filters(config), persistent=False)

    def forward(self, pcm: Tensor) -> Tensor:
        pcm = pcm.double()
        if self.normalize:
            variance, mean = torch.var_mean(pcm, 1, correction=0, keepdim=True)
            pcm = (pcm - mean) * (variance + _VARIANCE_FLOOR).rsqrt()
        spectrum = torch.stft(pcm, _CONFIG.n_fft, _CONFIG.hop, window=self.window, return_complex=True)[..., :-1]
        power = torch.einsum("fm,bft->bmt", self.filters, spectrum.abs().square())
        logs = power.clamp(min=_POWER_FLOOR).log10()
        logs = torch.maximum(logs, logs.amax((1, 2), keepdim=True) - _DECADES)
        return ((logs + 4) / 4).float()
