"""The excitation of a neural source-filter vocoder: pitch from mel frames, harmonics of it, noise.

Five convolutions give each frame's fundamental frequency; the phases of its harmonics add up at the frame rate and run
straight between the frames' centres; noise fills unvoiced frames (``ConvRNNF0Predictor`` and ``SineGen2`` of CosyVoice
2; the source module of NSF, arXiv 1904.12088).

Nothing here depends on how the frames were cut into chunks. Phases are kept as integers, fractions of a cycle, so that
their sums are exact; pitch is computed in float64, because a rounding error of it would stay as one of phase; a noise
sample is a function of the session's seed and of the sample's number. The publisher adds noise of its own to each
harmonic before weighing and summing them; that sum is one Gaussian noise again, which is what is drawn here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.layers.noise import GAMMA, mix
from .hift_context import Context, Signal

CYCLE = 2**48
"""One cycle of phase, as an integer."""


class Pitch(nn.Module):
    """Mel frames to their fundamental frequency in hertz."""

    LAYERS = 5

    def __init__(self, mels: int, width: int) -> None:
        super().__init__()
        widths = [mels, *[width] * self.LAYERS]
        # Numbered as in the publisher's checkpoint, where an activation without weights follows each convolution.
        self.condnet = nn.ModuleDict({str(2 * i): nn.Conv1d(widths[i], width, 3) for i in range(self.LAYERS)})
        self.classifier = nn.Linear(width, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of the pitch."""
        return self.classifier.weight.dtype

    def forward(self, mel: Signal, context: Context) -> Signal:
        """``[B, mels, n] -> [B, 1, n]``; a frame is looked ahead by every layer."""
        for conv in self.condnet.values():
            x = F.elu(conv(context.around(mel, 1, 1)))
            mel = context.inside(mel.then(x, context.lag(1)))
        pitch = self.classifier(mel.x.transpose(1, 2)).abs().transpose(1, 2)
        return context.inside(mel.then(pitch))


class Harmonics(nn.Module):
    """Pitch to an excitation signal.

    rate: samples a second. step: samples a frame, an even number. harmonics: how many, the fundamental included.
    amplitude: of a harmonic, and three times that of the noise where there is no voice. noise: its amplitude under
    voice. threshold: hertz up to which there is no voice.
    """

    def __init__(self, rate: int, step: int, harmonics: int, amplitude: float, noise: float, threshold: float) -> None:
        super().__init__()
        self.rate, self.step, self.harmonics = rate, step, harmonics
        self.amplitude, self.noise, self.threshold = amplitude, noise, threshold
        self.l_linear = nn.Linear(harmonics, 1)

    def forward(
        self, pitch: Tensor, before: Tensor, phase: Tensor, first: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        pitch: ``[B, n]`` hertz of frames ``first [B]`` and on, 0 outside of the utterance. before: ``[B]`` hertz of
        the frame in front of those. phase: ``[B, harmonics]`` int64 of that frame. noise: ``[B, step * n]``, standard
        Gaussian.
        Returns samples ``step * first - step // 2`` and on, ``[B, step * n]``, and the phase of the last frame.
        """
        device, dtype, half = pitch.device, self.l_linear.weight.dtype, self.step // 2
        numbers = torch.arange(1, self.harmonics + 1, device=device, dtype=torch.float64)[:, None]
        cycles = (pitch.double()[:, None] * numbers / self.rate).remainder(1) * self.step  # [B, harmonics, n]
        turns = (cycles.remainder(1) * CYCLE).round().long()
        ends = (phase[..., None] + turns.cumsum(2)).remainder(CYCLE)
        starts = torch.cat((phase[..., None], ends[..., :-1]), 2).double() / CYCLE
        # The way from the centre of the frame before to a frame's own. In front of frame 0 there is none.
        way = (torch.arange(self.step, device=device, dtype=torch.float64) + 0.5) / self.step
        frame = first[:, None] + torch.arange(pitch.shape[1], device=device)
        way = torch.where(frame[..., None] == 0, 1.0, way)  # [B, n, step]
        angles = (starts[..., None] + cycles[..., None] * way[:, None]).remainder(1).to(dtype)
        hertz = torch.stack((torch.cat((before[:, None], pitch[:, :-1]), 1), pitch), 2)
        voice = (hertz > self.threshold).to(dtype).repeat_interleave(half, 2)
        weight = self.l_linear.weight[0]
        tone = torch.einsum("bhnk,h->bnk", torch.sin(2 * math.pi * angles), weight * self.amplitude)
        level = weight.norm() * (voice * self.noise + (1 - voice) * (self.amplitude / 3))
        mixed = tone * voice + level * noise.to(dtype).view(level.shape) + self.l_linear.bias
        return torch.tanh(mixed).flatten(1), ends[..., -1]


def gaussian(seed: Tensor, first: Tensor, count: int) -> Tensor:
    """Samples ``first [B]`` and on of the standard Gaussian noise that belongs to ``seed [B]``: ``[B, count]`` float64.

    SplitMix64 of the seed and a sample's number gives two uniforms of 32 bits, of which Box and Muller make a Gaussian.
    Both int64.
    """
    number = first[:, None] + torch.arange(1, count + 1, device=first.device)
    bits = mix(mix(seed)[:, None] + number * GAMMA)
    # In float64, since logarithm and cosine are not rounded alike in different places of a tensor.
    radius = (-2 * (((bits & 0xFFFFFFFF).double() + 1) * 2.0**-32).log()).sqrt()
    return radius * torch.cos((bits >> 32).double() * (2 * math.pi * 2.0**-32))
