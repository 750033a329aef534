"""CosyVoice 2's vocoder: mel frames of 20 ms to 24 kHz sound, whole utterances or chunk by chunk with the same result.

HiFTNet (arXiv 2309.09493): a harmonic source at the pitch that the mel frames tell, filtered by upsampling
convolutions that see the source's short-time spectrum, and an inverse short-time Fourier transform at the end
(``HiFTGenerator`` of CosyVoice 2, whose numbers these are).

The network looks both ways. A stream runs behind its input by as much as the network looks ahead (about 20 frames with
the published sizes), each layer keeping the samples that it will look back on: nothing is computed twice, nothing is
faded, and cutting the input differently changes only the last bits. See :mod:`.hift_context`. (Computing eleven frames
to either side of each chunk anew would keep less and, for chunks of 100 down to 10 frames, take 1.2 to 2.3 times as
long: ``apps/bench/vocoder.py``.)
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.streaming import Specs, State, StreamingModel, TensorSpec
from .hift_context import Context, Layout, Signal, Stream, Whole
from .hift_layers import Conv, ResBlock, Strided, Upsample, ahead, fourier, upsample
from .hift_source import Harmonics, Pitch, gaussian

UNKNOWN = 2**40
"""``end`` of an utterance that is still going on."""

_ENDS = 7  # kernel of the first and of the last convolution
_LOUDEST = 100.0  # magnitude of a spectrum
_LAST_SLOPE = 0.01  # of the rectifier before the last convolution


class Sizes(NamedTuple):
    """What a stream keeps besides its phase, and how far it runs behind."""

    pitch: int  # values that the pitch predictor keeps
    tails: int  # values that all other layers keep
    delay: int  # samples from mel frames to sound


@dataclass(frozen=True)
class HiFTConfig:
    """Sizes. The defaults are those of the published CosyVoice 2 vocoder.

    rates, kernels: of the upsampling convolutions. block_kernels: of the residual blocks that follow each of them,
    whose outputs are averaged. source_kernels: of the residual block that the source's spectrum passes at each rate.
    """

    mels: int = 80
    width: int = 512
    pitch_width: int = 512
    harmonics: int = 9
    sample_rate: int = 24000
    rates: tuple[int, ...] = (8, 5, 3)
    kernels: tuple[int, ...] = (16, 11, 7)
    block_kernels: tuple[int, ...] = (3, 7, 11)
    source_kernels: tuple[int, ...] = (7, 7, 11)
    dilations: tuple[int, ...] = (1, 3, 5)
    n_fft: int = 16
    hop: int = 4
    amplitude: float = 0.1
    noise: float = 0.003
    voiced_hertz: float = 10.0
    slope: float = 0.1
    limit: float = 0.99

    def __post_init__(self) -> None:
        stages = len(self.rates)
        if not stages or len(self.kernels) != stages or len(self.source_kernels) != stages:
            raise ValueError(
                f"a vocoder needs as many kernels and source_kernels as rates, got {self.rates}, {self.kernels} and "
                f"{self.source_kernels}"
            )
        for rate, kernel in zip(self.rates, self.kernels, strict=True):
            if rate < 1 or kernel < rate or (kernel - rate) % 2:
                raise ValueError(f"upsampling by {rate} needs a kernel of {rate} plus an even number, got {kernel}")
        for kernel in (*self.block_kernels, *self.source_kernels):
            if kernel < 1 or kernel % 2 == 0:
                raise ValueError(f"a residual block's kernel must be odd, got {kernel}")
        if not self.block_kernels or not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"residual blocks need kernels and dilations, got {self.block_kernels}, {self.dilations}")
        if self.width % 2**stages:
            raise ValueError(f"width {self.width} cannot be halved {stages} times")
        if self.n_fft % 2 or self.n_fft % self.hop or self.frame % 2:
            raise ValueError(f"n_fft {self.n_fft} must be even and a multiple of the hop {self.hop}, a frame even")

    @property
    def frame(self) -> int:
        """Samples a mel frame (480)."""
        return math.prod(self.rates) * self.hop

    @property
    def block_ahead(self) -> int:
        """Samples that the residual blocks after an upsampling look ahead."""
        return max(ahead(kernel, self.dilations) for kernel in self.block_kernels)

    def channels(self, stage: int) -> int:
        """After upsampling ``stage``."""
        return int(self.width // 2 ** (stage + 1))

    def down(self, stage: int) -> tuple[int, int, int]:
        """Kernel, stride and padding of the convolution that brings the source's spectra to the rate of ``stage``."""
        stride = math.prod(self.rates[stage + 1 :])
        return (2 * stride if stride > 1 else 1), stride, stride // 2


class HiFT(StreamingModel):
    """The vocoder, over slots and for whole utterances.

    hops: the variants of ``step``, in mel frames a call. together: compute the rows of a step together; by default on
    all devices but the CPU, which one row fills.
    """

    forth: Tensor
    back: Tensor

    def __init__(
        self, config: HiFTConfig | None = None, hops: Sequence[int] = (50, 25, 10), *, together: bool | None = None
    ) -> None:
        super().__init__()
        self.together = together
        self.config = config = config or HiFTConfig()
        if not hops or min(hops) < 1:
            raise ValueError(f"a vocoder's hops are positive numbers of mel frames, got {tuple(hops)}")
        self._hops = tuple(hops)
        self.f0_predictor = Pitch(config.mels, config.pitch_width)
        self.m_source = Harmonics(
            config.sample_rate, config.frame, config.harmonics, config.amplitude, config.noise, config.voiced_hertz
        )
        self.conv_pre = Conv(config.mels, config.width, _ENDS)
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        self.source_resblocks, self.resblocks = nn.ModuleList(), nn.ModuleList()
        channels = config.width
        for stage, (rate, kernel) in enumerate(zip(config.rates, config.kernels, strict=True)):
            self.ups.append(Upsample(channels, config.channels(stage), kernel, rate))
            channels = config.channels(stage)
            size, stride, _ = config.down(stage)
            self.source_downs.append(Strided(config.n_fft + 2, channels, size, stride))
            self.source_resblocks.append(ResBlock(channels, config.source_kernels[stage], config.dilations))
            self.resblocks.extend(ResBlock(channels, size, config.dilations) for size in config.block_kernels)
        self.conv_post = Conv(channels, config.n_fft + 2, _ENDS)
        forth, back = fourier(config.n_fft)
        self.register_buffer("forth", forth.to(self.dtype), persistent=False)
        self.register_buffer("back", back.to(self.dtype), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights but the pitch's, of the tails and of the sound."""
        return self.conv_post.weight.dtype

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Found by running a frame of nothing."""
        device = self.conv_post.weight.device
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        mel = torch.zeros(1, self.config.mels, 1, device=device)
        beside, context = Layout(device), Layout(device)
        with torch.no_grad():
            pcm, _ = self._stream(mel, zero, zero, zero.expand(1, self.config.harmonics), beside, context)
        return Sizes(beside.kept().shape[1], context.kept().shape[1], pcm.delay)

    @property
    def delay(self) -> int:
        """Samples by which a stream's sound trails its mel frames."""
        return self.sizes.delay

    @property
    def flush(self) -> int:
        """Mel frames past an utterance's last that bring out the rest of its sound."""
        return -(-self.delay // self.config.frame)

    @property
    def variants(self) -> tuple[int, ...]:
        return self._hops

    @property
    def batched(self) -> bool:
        """Whether rows of a step are computed together; where not, a larger batch saves nothing."""
        return self.back.device.type != "cpu" if self.together is None else self.together

    def tick(self, variant: Hashable) -> float:
        return _frames(variant) * self.config.frame / self.config.sample_rate

    def prepare(self) -> None:
        """Eval mode, and the pitch in float64 (see :mod:`.hift_source`)."""
        self.eval()
        self.f0_predictor.double()

    def state_spec(self) -> Specs:
        return {
            "hift.seen": TensorSpec((), torch.int64),
            "hift.seed": TensorSpec((), torch.int64),
            "hift.phase": TensorSpec((self.config.harmonics,), torch.int64),
            "hift.pitch": TensorSpec((self.sizes.pitch,), self.f0_predictor.dtype),
            "hift.tails": TensorSpec((self.sizes.tails,), self.dtype),
        }

    def input_spec(self, variant: Hashable) -> Specs:
        return {
            "mel": TensorSpec((_frames(variant), self.config.mels)),
            "end": TensorSpec((), torch.int64, UNKNOWN),
            "seed": TensorSpec((), torch.int64),
        }

    @torch.no_grad()
    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """inputs: ``mel [B, n, mels]``, the next frames of each session, anything past the end; ``end [B]``, frames of
        the whole utterance, 2**40 while it goes on; ``seed [B]`` of the session's noise, which is read at frame 0.

        Returns ``pcm [B, 480 n]`` and ``first [B]``, the number of its first sample in the utterance: what lies before
        sample 0 or past the utterance is zero. ``flush`` frames more than the utterance has bring out all of it.
        """
        if self.batched:
            return self._step(inputs, state, slots, active)
        rows, frames = inputs["mel"].shape[:2]
        pcm = torch.zeros(rows, frames * self.config.frame, dtype=self.dtype)
        first = torch.zeros(rows, dtype=torch.int64)
        for row in active.nonzero().flatten().tolist():
            one = slice(row, row + 1)
            made = self._step({name: value[one] for name, value in inputs.items()}, state, slots[one], active[one])
            pcm[row], first[row] = made["pcm"][0], made["first"][0]
        return {"pcm": pcm, "first": first}

    def _step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        seen, end, frames = state["hift.seen"][slots], inputs["end"], inputs["mel"].shape[1]
        seed = torch.where(seen == 0, inputs["seed"], state["hift.seed"][slots])
        margin = self.flush + 1
        beside = Stream(state["hift.pitch"][slots], seen, end, frames, margin)
        context = Stream(state["hift.tails"][slots], seen, end, frames, margin)
        phase = state["hift.phase"][slots]
        pcm, phase = self._stream(_real(inputs["mel"], seen, end), seen, seed, phase, beside, context)
        target = torch.where(active, slots, len(state["hift.seen"]) - 1)
        after = {"seen": seen + frames, "seed": seed, "phase": phase, "pitch": beside.kept(), "tails": context.kept()}
        for name, value in after.items():
            state[f"hift.{name}"].index_copy_(0, target, value)
        return {"pcm": pcm.x[:, 0], "first": seen * self.config.frame - pcm.delay}

    def sound(self, pcm: Tensor, first: int, end: int = UNKNOWN) -> Tensor:
        """What of a session's ``pcm``, whose first sample is number ``first``, belongs to its utterance."""
        return pcm[max(0, -first) : max(0, end * self.config.frame - first)]

    def _stream(
        self, mel: Tensor, seen: Tensor, seed: Tensor, phase: Tensor, beside: Stream, context: Stream
    ) -> tuple[Signal, Tensor]:
        """The next ``mel [B, mels, n]`` to their sound and the phase of the last frame whose pitch is known.

        beside: the tails of the pitch predictor, which differ in precision.
        """
        frame = self.config.frame
        pitch = self.f0_predictor(Signal(mel.to(self.f0_predictor.dtype)), beside)
        hertz = beside.around(pitch, 1, 0)[:, 0]
        first = seen - pitch.delay
        noise = gaussian(seed, first * frame - frame // 2, mel.shape[2] * frame)
        source, phase = self.m_source(hertz[:, 1:], hertz[:, 0], phase, first, noise)
        source = Signal(source[:, None], frame, pitch.delay * frame + frame // 2)
        return self._filter(Signal(mel.to(self.dtype)), source, context), phase

    def forward(
        self, mel: Tensor, frames: Tensor | None = None, seed: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Whole utterances: ``mel [B, T, mels]`` of ``frames [B]`` each (all T by default) to sound ``[B, 480 T]``,
        zero past a row's end.

        seed: ``[B]`` int64, by default 0. noise: ``[B, 480 T]`` instead of that which belongs to the seed.
        """
        frame, half = self.config.frame, self.config.frame // 2
        zero = torch.zeros(len(mel), dtype=torch.int64, device=mel.device)
        frames = zero + mel.shape[1] if frames is None else frames
        if noise is None:
            noise = gaussian(zero if seed is None else seed, zero, mel.shape[1] * frame)
        context = Whole(frames, edge=frame)
        # Nothing is to be learnt from the phases that a pitch leads to.
        pitch = self.pitch(mel, frames).detach()
        mel = _real(mel, zero, frames)
        phase = zero[:, None].expand(-1, self.config.harmonics)
        # The source runs from half a frame before the utterance to half a frame past it.
        source, _ = self.m_source(
            F.pad(pitch, (0, 1)), pitch.new_zeros(len(mel)), phase, zero, F.pad(noise, (half, half))
        )
        source = Signal(source[:, None, half:-half], frame)
        sound = self._filter(Signal(mel.to(self.dtype)), source, context)
        return sound.x[:, 0, : noise.shape[1]]

    def pitch(self, mel: Tensor, frames: Tensor) -> Tensor:
        """``mel [B, T, mels]`` of ``frames [B]`` each to hertz, ``[B, T]``: 0 past a row's end, low without voice."""
        heard = _real(mel, torch.zeros_like(frames), frames).to(self.f0_predictor.dtype)
        hertz: Tensor = self.f0_predictor(Signal(heard), Whole(frames)).x[:, 0]
        return hertz

    def _filter(self, mel: Signal, source: Signal, context: Context) -> Signal:
        """``[B, mels, n]`` and ``[B, 1, 480 n]`` to sound ``[B, 1, 480 n]``."""
        config, blocks = self.config, len(self.config.block_kernels)
        wait, history = _waits(config)
        waves, begin = context.reflected(source, history)
        x = self.conv_pre(mel, context, wait)
        for stage, up in enumerate(self.ups):
            x = up(x.then(F.leaky_relu(x.x, config.slope)), context)
            if stage == len(self.ups) - 1:
                x = context.mirrored(x)
            x = context.inside(x.then(x.x + self._spectra(stage, x, waves, begin, context).x))
            made = [
                block(x, context, config.block_ahead - ahead(kernel, config.dilations))
                for kernel, block in zip(
                    config.block_kernels, self.resblocks[stage * blocks : (stage + 1) * blocks], strict=True
                )
            ]
            x = made[0].then(torch.stack([y.x for y in made]).mean(0))
        x = self.conv_post(x.then(F.leaky_relu(x.x, _LAST_SLOPE)), context)
        return self._sound(x, context)

    def _spectra(self, stage: int, x: Signal, waves: Tensor, begin: int, context: Context) -> Signal:
        """What the source ``waves [B, m]``, whose first sample is number ``begin``, adds to ``x`` at ``stage``."""
        config = self.config
        kernel, stride, padding = config.down(stage)
        delay = x.delay - context.lag(ahead(config.source_kernels[stage], config.dilations))
        behind = stride * delay + padding  # spectra by which the first that is needed lies before the chunk's first
        first = -(config.hop * behind + config.n_fft // 2) - begin
        count = stride * (x.x.shape[2] - 1) + kernel
        waves = waves[:, None, first : first + config.hop * (count - 1) + config.n_fft]
        spectra = Signal(F.conv1d(waves, self.forth, stride=config.hop), x.rate * stride, behind, 1)
        y = context.inside(Signal(self.source_downs[stage](context.inside(spectra).x), x.rate, delay, x.extra))
        added: Signal = self.source_resblocks[stage](y, context)
        return added

    def _sound(self, x: Signal, context: Context) -> Signal:
        """Logarithms of magnitudes, and phases, ``[B, n_fft + 2, n]``, to sound."""
        magnitude, phase = x.x.chunk(2, 1)
        magnitude, phase = magnitude.exp().clamp(max=_LOUDEST), phase.sin()
        spectra = torch.cat((magnitude * phase.cos(), magnitude * phase.sin(), torch.ones_like(magnitude[:, :1])), 1)
        sound = upsample(
            context.inside(x.then(spectra)), self.back, None, self.config.hop, self.config.n_fft // 2, context
        )
        waves, windows = sound.x.chunk(2, 1)
        pcm = (waves / windows.clamp(min=1e-11)).clamp(-self.config.limit, self.config.limit)
        return context.inside(sound._replace(x=pcm, extra=0))


def _frames(variant: Hashable) -> int:
    if not isinstance(variant, int):
        raise TypeError(f"a vocoder's variant is its hop in mel frames, got {variant!r}")
    return variant


def _real(mel: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """``mel [B, n, mels]``, frames ``first [B]`` and on -> ``[B, mels, n]``, zero from frame ``end [B]`` on."""
    index = first[:, None] + torch.arange(mel.shape[1], device=mel.device)
    return torch.where((index < end[:, None])[:, None], mel.transpose(1, 2), 0)


@functools.cache
def _waits(config: HiFTConfig) -> tuple[int, int]:
    """Mel frames that a stream's filter waits for its source, and source samples that it keeps from before a chunk's.

    The pitch predictor looks five frames ahead, the harmonics half a frame, and the source passes a residual block
    before it meets the filter; from then on it is the filter that is late, and the source that is kept.
    """
    late = Pitch.LAYERS * config.frame + config.frame // 2
    for wait in itertools.count():
        delay, spare, history = _ENDS // 2 + wait, [], 0
        for stage, (rate, kernel) in enumerate(zip(config.rates, config.kernels, strict=True)):
            delay = delay * rate + (kernel - rate) // 2 + (stage == len(config.rates) - 1)
            taps, stride, padding = config.down(stage)
            spectra = stride * (delay - ahead(config.source_kernels[stage], config.dilations)) + padding
            # From the first sample that the stage needs to the chunk's first. It needs the window of its last spectrum
            # whole, and at the utterance's ends one sample more to either side for the mirror.
            behind = config.hop * spectra + config.n_fft // 2
            spare.append(behind - late - config.hop * (taps - stride - 1) - config.n_fft - 1)
            history = max(history, behind + 1 - late)
            delay += config.block_ahead
        if min(spare) >= 0:
            return wait, history
    raise AssertionError("unreachable: every frame waited for is one more to spare")
