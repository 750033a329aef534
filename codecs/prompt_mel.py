"""The mel frames that CosyVoice's flow makes and that its voices are prompted with: 50 a second from 24 kHz sound.

HiFi-GAN's features (arXiv 2010.05646; ``mel_spectrogram`` of Matcha-TTS): a Hann window of 1920 samples every 480,
mirrored by 720 at both ends, magnitudes through slaney mel filters, natural logarithm of at least 1e-5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .mel import MelConfig, slaney_filters

SAMPLE_RATE = 24000
HOP = 480
_WINDOW = 1920
_SIDE = (_WINDOW - HOP) // 2
_POWER_FLOOR, _MEL_FLOOR = 1e-9, 1e-5


class PromptMel(nn.Module):
    """``[B, n]`` samples at 24 kHz, of which there must be more than 720 -> ``[B, n // 480, mels]`` float32.

    f_max: upper end of the highest filter in hertz; 8000 for CosyVoice 2, None (12000) for CosyVoice 3.
    Computed in float64. Raises ValueError for a sound that is too short.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, mels: int = 80, f_max: float | None = 8000.0) -> None:
        super().__init__()
        config = MelConfig(SAMPLE_RATE, mels, n_fft=_WINDOW, window=_WINDOW, hop=HOP, f_max=f_max)
        self.register_buffer("window", torch.hann_window(_WINDOW, dtype=torch.float64), persistent=False)
        self.register_buffer("filters", slaney_filters(config), persistent=False)

    def forward(self, pcm: Tensor) -> Tensor:
        if pcm.shape[1] <= _SIDE:
            raise ValueError(f"a prompt of {pcm.shape[1]} samples is too short: mel frames need more than {_SIDE}")
        padded = F.pad(pcm.double()[:, None], (_SIDE, _SIDE), mode="reflect")[:, 0]
        spectrum = torch.fft.rfft(padded.unfold(1, _WINDOW, HOP) * self.window)
        magnitude = (spectrum.real.square() + spectrum.imag.square() + _POWER_FLOOR).sqrt()
        mel: Tensor = magnitude @ self.filters
        return mel.clamp(min=_MEL_FLOOR).log().float()
