"""What a neural codec is trained with: distances of log-mel spectra at several resolutions, and discriminators on
complex spectra. Weights and shapes follow the Descript Audio Codec (arXiv 2306.06546), smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from ...codecs.mel import MelConfig, slaney_filters

SPECTRA = ((128, 10), (512, 40), (1024, 80), (2048, 120))  # window in samples, mels
FLOOR = 1e-5


def spectrum(audio: Tensor, size: int, window: Tensor) -> Tensor:
    """``[B, T] -> [B, size / 2 + 1, frames]`` complex, a quarter of a window apart."""
    with torch.autocast(audio.device.type, enabled=False):
        return torch.stft(audio.float(), size, size // 4, window=window, return_complex=True)


class MelDistance(nn.Module):
    """Mean absolute difference of log-mel spectra, summed over resolutions."""

    def __init__(self, rate: int) -> None:
        super().__init__()
        for size, mels in SPECTRA:
            config = MelConfig(sample_rate=rate, n_mels=mels, n_fft=size, window=size, hop=size // 4)
            self.register_buffer(f"window{size}", torch.hann_window(size), persistent=False)
            self.register_buffer(f"filters{size}", slaney_filters(config).float(), persistent=False)

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        """``[B, T]`` both; a scalar."""
        total = made.new_zeros((), dtype=torch.float32)
        for size, _ in SPECTRA:
            logs = []
            for audio in (made, real):
                power = spectrum(audio, size, getattr(self, f"window{size}")).abs()
                with torch.autocast(audio.device.type, enabled=False):
                    mel = power.transpose(1, 2) @ getattr(self, f"filters{size}")
                logs.append(mel.clamp(min=FLOOR).log10())
            total = total + (logs[0] - logs[1]).abs().mean()
        return total


class SpectrumJudge(nn.Module):
    """Convolutions over a complex spectrum."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("window", torch.hann_window(size), persistent=False)
        shapes: list[tuple[int, tuple[int, int], tuple[int, int]]] = [
            (2, (3, 9), (1, 1)),
            *[(channels, (3, 9), (1, 2))] * 3,
            (channels, (3, 3), (1, 1)),
        ]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(inputs, channels, kernel, stride, (kernel[0] // 2, kernel[1] // 2)))
            for inputs, kernel, stride in shapes
        )
        self.verdict = weight_norm(nn.Conv2d(channels, 1, (3, 3), padding=1))

    def forward(self, audio: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``[B, T]`` -> scores and the features of every layer."""
        x = torch.view_as_real(spectrum(audio, self.size, self.window)).permute(0, 3, 2, 1)  # type: ignore[arg-type]
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
            features.append(x)
        return self.verdict(x), features


class Judges(nn.Module):
    """One ``SpectrumJudge`` a resolution."""

    def __init__(self, channels: int = 16, sizes: Sequence[int] = (512, 1024, 2048)) -> None:
        super().__init__()
        self.judges = nn.ModuleList(SpectrumJudge(size, channels) for size in sizes)

    def forward(self, audio: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        return [judge(audio) for judge in self.judges]

    def to_tell(self, made: Tensor, real: Tensor) -> Tensor:
        """Their own loss (least squares): real is 1, made is 0. ``made`` must be detached."""
        return _sum((1 - on_real).square().mean() + on_made.square().mean()
                    for (on_made, _), (on_real, _) in zip(self(made), self(real), strict=True))  # fmt: skip

    def to_fool(self, made: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The codec's losses: to be taken for real, and to look alike in every layer."""
        with torch.no_grad():
            wanted = [features for _, features in self(real)]
        judged = self(made)
        fool = _sum((1 - score).square().mean() for score, _ in judged)
        alike = _sum(
            (mine - other).abs().mean()
            for (_, features), others in zip(judged, wanted, strict=True)
            for mine, other in zip(features, others, strict=True)
        )
        return fool, alike


def _sum(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack([loss.float() for loss in losses]).sum()
