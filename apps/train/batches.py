"""Batches made on the device: all speech lies there as int16, and a batch is one gather.

A batch is a pure function of (seed, step, rank), so a run that resumes at a step draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...codecs.mel import LogMel
from ...models.conformer.config import encoder_frames
from .data import FRAME, RATE, Clip, Shard

LONGEST = 17.5  # seconds; longer clips are left out, shorter ones of a speaker are also joined up to this


@dataclass(frozen=True)
class Batch:
    """mel ``[B, T, F]`` augmented, frames ``[B]``; tokens ``[B, U]`` int64 zero-padded, lengths ``[B]``.

    begin ``[B]`` (samples in the pool) and rate ``[B]`` (pool samples a sample of this batch): where a teacher's
    features of the same speech lie. trusted ``[B]`` bool: the row's words count (False: it is for the teacher only).
    host_frames, host_lengths: encoder frames and tokens of each row on the CPU, for a loss that needs them there.
    """

    mel: Tensor
    frames: Tensor
    tokens: Tensor
    lengths: Tensor
    begin: Tensor
    rate: Tensor
    trusted: Tensor
    host_frames: Tensor
    host_lengths: Tensor


class Pool:
    """Speech of several shards on one device, and the utterances that batches are drawn from.

    encode: text to token ids. share: corpus -> how much of it a batch holds, per second of its speech (default 1).
    keep: which clips take part. trust: which clips' words are right; the others serve distillation only.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        encode: Callable[[str], list[int]],
        device: torch.device | str,
        share: Callable[[Clip], float] = lambda clip: 1.0,
        keep: Callable[[Clip], bool] = lambda clip: True,
        trust: Callable[[Clip], bool] = lambda clip: True,
        buckets: int = 10,
    ) -> None:
        total = sum(len(shard.pcm) for shard in shards)
        self.pcm = torch.zeros(total + FRAME, dtype=torch.int16, device=device)
        self.skipped = 0
        clips: list[Clip] = []
        base = 0
        for shard in shards:
            self.pcm[base : base + len(shard.pcm)] = torch.from_numpy(np.array(shard.pcm)).to(device)
            kept = [clip for clip in shard.clips if keep(clip)]
            short = [clip for clip in kept if 0.3 < clip.seconds <= LONGEST]
            self.skipped += len(kept) - len(short)
            clips += [replace(clip, offset=clip.offset + base) for clip in short]
            base += len(shard.pcm)
        if not clips:
            raise ValueError("no clip to train on: every clip was left out or longer than the limit")
        self.seconds = sum(clip.seconds for clip in clips)
        joined = join(clips)
        self.clips = sorted([*clips, *joined], key=lambda clip: clip.samples)
        encoded = [encode(clip.text) for clip in self.clips]
        self.lengths = np.array([len(ids) for ids in encoded])
        self.tokens = np.zeros((len(encoded), max(1, int(self.lengths.max()))), dtype=np.int64)
        for row, ids in zip(self.tokens, encoded, strict=True):
            row[: len(ids)] = ids
        self.begin = np.array([clip.offset for clip in self.clips])
        self.samples = np.array([clip.samples for clip in self.clips])
        self.trusted = np.array([trust(clip) for clip in self.clips])
        # Seconds, not clips, are drawn evenly; half of them joined where a corpus has joined clips.
        halved = {clip.corpus for clip in joined}
        self.weight = np.array(
            [clip.seconds * share(clip) * (0.5 if clip.corpus in halved else 1) for clip in self.clips]
        )
        edges = np.searchsorted(np.cumsum(self.weight), np.linspace(0, self.weight.sum(), buckets + 1)[1:-1])
        self._buckets = [part for part in np.split(np.arange(len(self.clips)), edges) if len(part)]
        # The longest clip that each clip may meet in a batch.
        self.limit = np.zeros(len(self.clips), dtype=np.int64)
        for part in self._buckets:
            self.limit[part] = self.samples[part[-1]]
        mass = np.array([self.weight[bucket].sum() for bucket in self._buckets])
        self._bucket_odds = mass / mass.sum()

    def draw(self, seconds: float, random: np.random.Generator) -> NDArray[np.int64]:
        """Utterances of similar length, about ``seconds`` of speech in all with padding."""
        bucket = self._buckets[int(random.choice(len(self._buckets), p=self._bucket_odds))]
        rows = max(1, int(seconds * RATE / self.samples[bucket[-1]]))
        odds = self.weight[bucket] / self.samples[bucket]
        chosen: NDArray[np.int64] = bucket[random.choice(len(bucket), size=rows, p=odds / odds.sum())]
        return chosen


def join(clips: Sequence[Clip]) -> list[Clip]:
    """Runs of neighbouring clips as one clip (they lie back to back), each up to ``LONGEST`` seconds.

    Human clips are joined within a speaker; synthetic voices change from clip to clip and may follow each other.
    """
    result = []
    for _, group in groupby(clips, key=lambda clip: (clip.corpus, "" if clip.synthetic else clip.speaker)):
        run: list[Clip] = []
        for clip in group:
            adjacent = run and clip.offset == run[-1].offset + -(-run[-1].samples // FRAME) * FRAME
            if run and (not adjacent or clip.offset + clip.samples - run[0].offset > LONGEST * RATE):
                result.append(run)
                run = []
            run.append(clip)
        result.append(run)
    return [
        replace(
            run[0],
            text=" ".join(clip.text for clip in run),
            doubt=max(clip.doubt for clip in run),
            samples=run[-1].offset + run[-1].samples - run[0].offset,
        )
        for run in result
        if len(run) > 1
    ]


@dataclass(frozen=True)
class Augmentation:
    """How speech is varied. Rates are factors; the noise stays ``snr`` decibels below the speech."""

    speed: tuple[float, float] = (0.88, 1.13)
    formants: tuple[float, float] = (0.87, 1.15)
    gain: tuple[float, float] = (-20.0, 5.0)
    noisy: float = 0.2
    snr: tuple[float, float] = (8.0, 30.0)
    echoing: float = 0.2
    frequency_masks: int = 2
    frequency_width: int = 20
    time_masks: int = 8
    time_width: float = 0.045


class Batcher:
    """Draws and augments batches. noise: ``[N]`` int16 recordings back to back, or None."""

    def __init__(
        self, pool: Pool, mel: LogMel, augmentation: Augmentation | None, noise: Tensor | None, seed: int
    ) -> None:
        self.pool = pool
        self.mel = mel
        self.augmentation = augmentation
        self.noise = noise
        self.seed = seed

    def __call__(self, step: int, seconds: float, rank: int = 0) -> Batch:
        random = np.random.default_rng([self.seed, step, rank])
        return self.batch(self.pool.draw(seconds, random), random)

    def batch(self, rows: NDArray[np.int64], random: np.random.Generator) -> Batch:
        pool, vary = self.pool, self.augmentation
        device = pool.pcm.device

        def send(values: NDArray[np.generic]) -> Tensor:
            return _send(values, device)

        count = len(rows)
        rate = log_uniform(random, vary.speed, count) if vary else np.ones(count)
        samples = (pool.samples[rows] / rate).astype(np.int64)
        begin, rates, sizes = send(pool.begin[rows]), send(rate), send(samples)
        # One width for all batches of a bucket, so that few shapes occur.
        width = int(pool.limit[rows].max() / (vary.speed[0] if vary else 1.0))
        audio = read(pool.pcm, begin, rates, width)
        if vary:
            generator = torch.Generator(device).manual_seed(int(random.integers(2**62)))
            audio = self._distort(audio, sizes, vary, random, generator)
        mel, frames = self.mel(audio, sizes)
        if vary:
            mel = warp_formants(mel, send(log_uniform(random, vary.formants, count)))
            mel = mask(mel, frames, vary, generator)
        longest = max(1, int(pool.lengths[rows].max()))
        return Batch(
            mel=mel,
            frames=frames,
            tokens=send(pool.tokens[rows, :longest]),
            lengths=send(pool.lengths[rows]),
            begin=begin,
            rate=rates,
            trusted=send(pool.trusted[rows]),
            host_frames=torch.tensor([encoder_frames(int(count) // self.mel.config.hop) for count in samples]),
            host_lengths=torch.from_numpy(pool.lengths[rows]),
        )

    def _distort(
        self, audio: Tensor, sizes: Tensor, vary: Augmentation, random: np.random.Generator, generator: torch.Generator
    ) -> Tensor:
        """Echo, noise or a second speaker, gain."""
        count, width = audio.shape

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(count, 1, device=audio.device, generator=generator) * (high - low) + low

        inside = torch.arange(width, device=audio.device) < sizes[:, None]
        audio = torch.where(inside, audio, 0)
        echoing = np.flatnonzero(random.random(count) < vary.echoing)
        if len(echoing):
            chosen = _send(echoing, audio.device)
            audio[chosen] = echo(audio[chosen], generator)
        noisy = (uniform(0, 1) < vary.noisy).to(audio.dtype)
        noise = audio.roll(1, 0)
        if self.noise is not None:
            start = torch.randint(
                max(1, len(self.noise) - width - 1), (count,), device=audio.device, generator=generator
            )
            recorded = read(self.noise, start, torch.ones(count, device=audio.device, dtype=torch.float64), width)
            noise = torch.where(uniform(0, 1) < 0.7, recorded, noise)
        ratio = level(audio) / level(noise).clamp(min=1e-4) * 10 ** (-uniform(*vary.snr) / 20)
        hiss = torch.randn(audio.shape, device=audio.device, generator=generator) * 10 ** uniform(-5, -3)
        audio = audio + noisy * (ratio * noise + hiss)
        return (audio * 10 ** (uniform(*vary.gain) / 20)).clamp(-1, 1)


def _send(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """To the device, without waiting for it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def read(pcm: Tensor, begin: Tensor, rate: Tensor, width: int) -> Tensor:
    """Linear interpolation of int16 ``pcm [N]`` at ``begin + rate * (0 ... width - 1)``: ``[B, width]`` in -1 ... 1."""
    position = rate[:, None] * torch.arange(width, device=pcm.device, dtype=torch.float64)
    whole = position.floor()
    part = (position - whole).float()
    index = (begin[:, None] + whole.long()).clamp(max=len(pcm) - 2)
    low, high = pcm[index].float(), pcm[index + 1].float()
    return (low + part * (high - low)) / 32768


def log_uniform(random: np.random.Generator, between: tuple[float, float], count: int) -> NDArray[np.float64]:
    """``[count]`` factors whose logarithms are uniform."""
    low, high = np.log(between)
    return np.exp(random.uniform(low, high, count))


def level(audio: Tensor) -> Tensor:
    return audio.square().mean(1, keepdim=True).sqrt()


def echo(audio: Tensor, generator: torch.Generator) -> Tensor:
    """A room: exponentially decaying noise after the direct sound, 0.1 to 0.5 s to -60 dB, level unchanged."""
    count, width = audio.shape
    decay = torch.rand(count, 1, device=audio.device, generator=generator) * 0.4 + 0.1
    seconds = torch.arange(RATE // 2, device=audio.device) / RATE
    tail = torch.randn(count, len(seconds), device=audio.device, generator=generator) * torch.exp(
        -6.9 * seconds / decay
    )
    loudness = torch.rand(count, 1, device=audio.device, generator=generator) * 0.8
    room = tail * loudness / tail.norm(dim=1, keepdim=True)
    room[:, 0] = 1
    size = 1 << (width + len(seconds) - 1).bit_length()
    wet = torch.fft.irfft(torch.fft.rfft(audio, size) * torch.fft.rfft(room, size), size)[:, :width]
    result: Tensor = wet * level(audio) / level(wet).clamp(min=1e-6)
    return result


def warp_formants(mel: Tensor, factor: Tensor) -> Tensor:
    """Read mel bin ``f`` at ``f * factor [B]``: a longer or shorter vocal tract at the same pitch and pace."""
    bins = mel.shape[2]
    position = (torch.arange(bins, device=mel.device) * factor[:, None].float()).clamp(max=bins - 1.001)
    index = position.floor().long()
    part = (position - index)[:, None]
    index = index[:, None].expand(-1, mel.shape[1], -1)
    low, high = mel.gather(2, index), mel.gather(2, index + 1)
    return low + part * (high - low)


def mask(mel: Tensor, frames: Tensor, vary: Augmentation, generator: torch.Generator) -> Tensor:
    """SpecAugment (Park et al. 2019): bands and spans become the row's mean."""
    count, width, bins = mel.shape

    def spans(number: int, size: Tensor, limit: Tensor) -> Tensor:
        length = torch.rand(count, number, device=mel.device, generator=generator) * size[:, None]
        start = torch.rand(count, number, device=mel.device, generator=generator) * (limit[:, None] - length)
        place = torch.arange(int(max(width, bins)), device=mel.device)[:, None, None]
        return ((place >= start) & (place < start + length)).any(2).T  # [B, place]

    full = torch.full((count,), float(bins), device=mel.device)
    hidden = spans(vary.frequency_masks, full * vary.frequency_width / bins, full)[:, None, :bins]
    hidden = hidden | spans(vary.time_masks, frames * vary.time_width, frames.float())[:, :width, None]
    mean = mel.sum((1, 2), keepdim=True) / (frames[:, None, None].clamp(min=1) * bins)
    exists = (torch.arange(width, device=mel.device) < frames[:, None])[:, :, None]
    return torch.where(hidden & exists, mean, mel)
