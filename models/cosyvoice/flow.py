"""CosyVoice 2's flow matching: speech tokens to mel frames (arXiv 2412.10117 section 2.4).

An ODE turns noise into mel frames in a few Euler steps. Each step estimates the velocity twice, with and without the
condition (encoder output, speaker, the prompt's frames), and moves past the first, away from the second
(classifier-free guidance, arXiv 2207.12598).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.linear import Linear
from .flow_config import RATE, FlowConfig
from .flow_context import Context, Mask, Whole
from .flow_encoder import FlowEncoder
from .unet import BRANCHES, Estimator

NOISE_FRAMES = 15000  # frames of noise upstream has; later ones start over


def noise_table(mels: int) -> Tensor:
    """``[15000, mels]`` float32: the noise of each frame from the start of the prompt on, as upstream draws it."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, mels, NOISE_FRAMES), generator=generator, device="cpu")[0].T.contiguous()


def times(steps: int) -> list[float]:
    """The ``steps + 1`` times of the Euler steps, dense at the noisy end: 1 - cos(pi t / 2)."""
    return [1 - math.cos(math.pi / 2 * index / steps) for index in range(steps + 1)]


class Condition(NamedTuple):
    """What the frames shall be like: encoder output and prompt frames ``[B, n, mels]``, speaker ``[B, mels]``."""

    mu: Tensor
    speaker: Tensor
    prompt: Tensor


class FlowMatching(nn.Module):
    """Encoder, speaker projection and velocity estimator."""

    noise: Tensor

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = FlowEncoder(config)
        self.speaker = Linear(config.speaker, config.mels)
        self.estimator = Estimator(config)
        self.times = times(config.steps)
        self.register_buffer("noise", noise_table(config.mels), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and the caches."""
        return self.speaker.weight.dtype

    @property
    def sample_dtype(self) -> torch.dtype:
        """Of the mel frames while they form: at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def project(self, embedding: Tensor) -> Tensor:
        """A speaker's embedding ``[..., speaker]`` as the estimator takes it, ``[..., mels]``."""
        projected: Tensor = self.speaker(F.normalize(embedding.to(self.dtype), dim=-1))
        return projected

    def noise_at(self, frames: Tensor) -> Tensor:
        """``[..., mels]`` noise of these frames."""
        return self.noise[frames % NOISE_FRAMES].to(self.sample_dtype)

    def velocity(self, x: Tensor, condition: Condition, shifts: Tensor, context: Context) -> Tensor:
        """One estimate for samples ``[B, n, mels]``, of the same shape and dtype."""
        speaker = condition.speaker[:, None].expand(-1, x.shape[1], -1)
        parts = (x, condition.mu, speaker, condition.prompt)
        velocity: Tensor = self.estimator(torch.cat([part.to(self.dtype) for part in parts], 2), shifts, context)
        return velocity.to(x.dtype)

    def guided(self, x: Tensor, condition: Condition, shifts: Tensor, context: Context) -> Tensor:
        """The velocity with guidance; the context's rows are a session's two branches side by side."""
        both = Condition(*(torch.stack((part, torch.zeros_like(part)), 1).flatten(0, 1) for part in condition))
        velocities = self.velocity(x.repeat_interleave(BRANCHES, 0), both, shifts, context)
        towards, away = velocities.unflatten(0, (-1, BRANCHES)).unbind(1)
        return torch.lerp(away, towards, 1 + self.config.guidance)

    def encode(self, tokens: Tensor, lengths: Tensor, mask: Mask) -> Tensor:
        """tokens ``[B, T]`` int64 of ``lengths [B]`` -> ``[B, 2T, mels]``."""
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        padded = F.pad(torch.where(real, tokens, -1), (0, self.config.lookahead), value=-1)
        contexts = (Whole(mask, lengths, tokens.shape[1] * rate, rate, self.dtype) for rate in (1, RATE))
        mu: Tensor = self.encoder(padded, *contexts)
        return mu

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, lengths: Tensor, prompt: Tensor, embedding: Tensor, mask: Mask, *, every: bool = False
    ) -> Tensor:
        """Whole utterances.

        tokens: ``[B, T]`` int64 of ``lengths [B]``, the prompt's in front. prompt: ``[B, F, mels]`` its mel frames,
        zeros past a row's own. embedding: ``[B, speaker]``.
        Returns ``[B, 2T, mels]``, the prompt's frames included, zeros past a row's end; with ``every`` the samples
        after each Euler step ``[steps, B, 2T, mels]``.
        """
        mu = self.encode(tokens, lengths, mask)
        frames = torch.arange(mu.shape[1], device=mu.device)
        prompt = F.pad(prompt.to(mu), (0, 0, 0, mu.shape[1] - prompt.shape[1]))
        condition = Condition(mu, self.project(embedding), prompt)
        context = Whole(mask, lengths.repeat_interleave(BRANCHES), mu.shape[1], RATE, self.dtype)
        x = self.noise_at(frames).expand(len(tokens), -1, -1)
        samples = []
        for start, end in pairwise(self.times):
            shifts = self.estimator.shifts(torch.tensor([start], dtype=self.sample_dtype, device=mu.device))
            x = x + (end - start) * self.guided(x, condition, shifts, context)
            samples.append(x)
        real = (frames < (lengths * RATE)[:, None])[..., None]
        return torch.where(real, torch.stack(samples) if every else x, 0.0)

    def loss(
        self, mu: Tensor, lengths: Tensor, mel: Tensor, embedding: Tensor, mask: Mask, *, told: float = 0.5
    ) -> Tensor:
        """The training loss of a batch: mean squared error of the velocity, at random times between noise and mel.

        mu ``[B, 2T, mels]`` as ``encode`` gives it for tokens of ``lengths [B]``; mel ``[B, 2T, mels]``; embedding
        ``[B, speaker]``. As upstream, a row in five is trained without condition; a share ``told`` of the rows knows up
        to 30 % of its frames as a prompt.
        """
        rows, device = len(mel), mel.device
        real = (torch.arange(mel.shape[1], device=device) < (lengths * RATE)[:, None])[..., None]
        known = torch.rand(rows, 1, device=device) * 0.3 * RATE * lengths[:, None]
        known = torch.where(torch.rand(rows, 1, device=device) < told, known, 0.0)
        prompt = torch.where((torch.arange(mel.shape[1], device=device) < known)[..., None], mel, 0.0)
        keep = (torch.rand(rows, device=device) > 0.2).to(mel.dtype)[:, None]
        condition = Condition(mu * keep[..., None], self.project(embedding) * keep, prompt * keep[..., None])
        time = 1 - torch.cos(torch.rand(rows, device=device, dtype=mel.dtype) * math.pi / 2)
        noise = torch.randn_like(mel)
        x = torch.lerp(noise, mel, time[:, None, None])
        context = Whole(mask, lengths, mel.shape[1], RATE, self.dtype)
        velocity = self.velocity(x, condition, self.estimator.shifts(time), context)
        return ((velocity - (mel - noise)).square() * real).sum() / (real.sum() * mel.shape[2])
