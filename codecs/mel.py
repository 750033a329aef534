"""Log-mel features of NeMo's recognisers, whole utterances at once or chunk by chunk with the same result.

Pre-emphasis, a centred Hann window, power spectrum, slaney mel filters, ``log(x + guard)``; no normalisation
(``AudioToMelSpectrogramPreprocessor`` and ``FilterbankFeatures`` in NeMo's
``collections/asr/parts/preprocessing/features.py``). Frame ``t`` is centred on sample ``t * hop``; samples and
pre-emphasised samples outside the recording are zero, and a recording of ``N`` samples has ``N // hop`` frames.

Both passes run the same arithmetic on the same frames, so on the CPU they agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..models.streaming import Specs, State, TensorSpec

UNKNOWN = 2**40
"""``audio_end`` of a recording that is still going on."""

# A matrix product of one to three rows takes another kernel, with other rounding, than one of four or more.
_FEWEST_FRAMES = 8


@dataclass(frozen=True)
class MelConfig:
    """What the features are. Lengths are in samples, frequencies in hertz.

    ``chunk_frames`` is the number of frames an encoder makes one of its own from. It fixes where streaming blocks
    fall: a block's last encoder frame is centred on its last mel frame.
    """

    sample_rate: int = 16000
    n_mels: int = 80
    n_fft: int = 512
    window: int = 400
    hop: int = 160
    preemphasis: float = 0.97
    guard: float = 2.0**-24
    f_min: float = 0.0
    f_max: float | None = None
    chunk_frames: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.hop <= self.window <= self.n_fft:
            raise ValueError(
                f"mel needs 0 < hop <= window <= n_fft, got hop {self.hop}, window {self.window}, n_fft {self.n_fft}"
            )
        if self.window % 2:
            raise ValueError(f"mel window must be an even number of samples, got {self.window}")
        if self.guard <= 0:
            raise ValueError(f"mel guard must be above 0 so that silence has a logarithm, got {self.guard}")
        if self.n_mels < 1 or self.chunk_frames < 1 or self.sample_rate < 1:
            raise ValueError(f"mel needs positive n_mels, chunk_frames and sample_rate, got {self}")

    @classmethod
    def from_nemo(cls, preprocessor: Mapping[str, Any]) -> Self:
        """From the ``preprocessor`` section of a NeMo ``model_config.yaml``.

        Raises ValueError for a setting these features do not have (normalisation, other windows or guards).
        """
        rate = int(preprocessor.get("sample_rate", 16000))
        window = int(preprocessor.get("n_window_size") or preprocessor.get("window_size", 0.02) * rate)
        fixed = {
            "normalize": (preprocessor.get("normalize", "per_feature"), ("NA", None, False)),
            "window": (preprocessor.get("window", "hann"), ("hann",)),
            "log": (preprocessor.get("log", True), (True,)),
            "log_zero_guard_type": (preprocessor.get("log_zero_guard_type", "add"), ("add",)),
            "mag_power": (preprocessor.get("mag_power", 2.0), (2.0,)),
            "mel_norm": (preprocessor.get("mel_norm", "slaney"), ("slaney",)),
            "exact_pad": (preprocessor.get("exact_pad", False), (False,)),
            "frame_splicing": (preprocessor.get("frame_splicing", 1), (1,)),
        }
        for name, (value, supported) in fixed.items():
            if value not in supported:
                raise ValueError(f"preprocessor.{name} = {value!r} is not supported; streaming needs {supported[0]!r}")
        f_max = preprocessor.get("highfreq")
        return cls(
            sample_rate=rate,
            n_mels=int(preprocessor.get("features", preprocessor.get("nfilt", 64))),
            n_fft=int(preprocessor.get("n_fft") or 2 ** math.ceil(math.log2(window))),
            window=window,
            hop=int(preprocessor.get("n_window_stride") or preprocessor.get("window_stride", 0.01) * rate),
            preemphasis=float(preprocessor.get("preemph", 0.97) or 0.0),
            guard=_guard(preprocessor.get("log_zero_guard_value", 2.0**-24)),
            f_min=float(preprocessor.get("lowfreq", 0.0)),
            f_max=None if f_max is None else float(f_max),
        )

    @property
    def lead_frames(self) -> int:
        """Frames before the first that the first block has room for."""
        return self.chunk_frames - 1

    @property
    def lead_samples(self) -> int:
        """Samples before the first that the first block has room for (1080): block ``k`` of ``n`` samples is samples
        ``k * n - lead_samples`` and on, which ends with the last sample that the block's last frame sees."""
        return self.chunk_frames * self.hop - self.window // 2

    @property
    def history(self) -> int:
        """Samples before a block that its first frame sees: its overlap, and one for pre-emphasis."""
        return self.window - self.hop + 1

    def block(self, lookahead: int) -> int:
        """Samples of a block for a lookahead in encoder frames."""
        return self.chunk_frames * self.hop * (lookahead + 1)


def _guard(value: float | str) -> float:
    """NeMo's ``log_zero_guard_value``: a number, or the name of a property of float32."""
    if value in ("tiny", "eps"):
        return float(getattr(torch.finfo(torch.float32), str(value)))
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"preprocessor.log_zero_guard_value = {value!r} is neither a number, tiny nor eps") from error


def slaney_filters(config: MelConfig) -> Tensor:
    """Triangular mel filters of unit area on Slaney's scale, ``[n_fft // 2 + 1, n_mels]`` float64.

    The scale of Malcolm Slaney's Auditory Toolbox (1998): 15 mels a kilohertz up to 1 kHz, then 27 mels a factor of
    6.4.
    """
    log_step = math.log(6.4) / 27

    def to_mel(hertz: float) -> float:
        return hertz * 0.015 if hertz < 1000 else 15 + math.log(hertz / 1000) / log_step

    f_max = config.sample_rate / 2 if config.f_max is None else config.f_max
    mels = torch.linspace(to_mel(config.f_min), to_mel(f_max), config.n_mels + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels / 0.015, 1000 * torch.exp((mels - 15) * log_step))
    bins = torch.linspace(0, config.sample_rate / 2, config.n_fft // 2 + 1, dtype=torch.float64)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(min=0)
    return triangles * (2 / (high - low))


class LogMel(nn.Module):
    """Waveform to log-mel frames.

    Always computes in float32 or float64: halving the precision of a whole model leaves this module in float32, where
    quiet bins keep their value.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, config: MelConfig | None = None) -> None:
        super().__init__()
        self.config = config or MelConfig()
        self.register_buffer("window", None, persistent=False)
        self.register_buffer("filters", None, persistent=False)
        self._tabulate(torch.get_default_dtype(), torch.device("cpu"))

    def _tabulate(self, dtype: torch.dtype, device: torch.device) -> None:
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        window = torch.hann_window(self.config.window, periodic=False, dtype=torch.float64)
        self.window = window.to(device, precision)
        self.filters = slaney_filters(self.config).to(device, precision)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.window.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.window.dtype != before:
            self._tabulate(self.window.dtype, self.window.device)
        return self

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features of whole recordings.

        audio: ``[B, N]`` samples in -1 ... 1, padded with anything. lengths: ``[B]`` int64, samples of each row.
        Returns mel ``[B, N // hop, n_mels]``, zero past a row's end, and the number of frames of each row ``[B]``.
        """
        hop, window = self.config.hop, self.config.window
        frames = audio.shape[1] // hop
        computed = max(frames, _FEWEST_FRAMES)
        first = -window // 2 - 1
        span = (computed - 1) * hop + window + 1
        samples = nn.functional.pad(audio, (-first, max(0, span + first - audio.shape[1])))[:, :span]
        start = torch.full_like(lengths, first)
        mel, lengths = self._features(samples, start, lengths)
        return mel[:, :frames], lengths

    def state_spec(self) -> Specs:
        """``mel.tail``: the samples before the next block. ``mel.position``: the next block's first sample."""
        return {
            "mel.tail": TensorSpec((self.config.history,), self.window.dtype),
            "mel.position": TensorSpec((), torch.int64, -self.config.lead_samples),
        }

    def step(
        self, pcm: Tensor, audio_end: Tensor, state: State, slots: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features of the next block of each session.

        pcm: ``[B, config.block(R)]``; block ``k`` covers samples ``k * block - lead_samples`` and on, and what lies
        before the first or after the last sample may hold anything. R may change from block to block.
        audio_end: ``[B]`` int64, samples of the whole recording, or ``UNKNOWN`` while it goes on.
        state, slots, active: as in ``StreamingModel.step``.
        Returns mel ``[B, 8 (R + 1), n_mels]`` (frames ``8 (R + 1) k - 7`` and on; zero where no such frame exists) and
        the number of frames of the whole recording ``[B]``.
        """
        config = self.config
        unit = config.block(0)
        if pcm.shape[1] == 0 or pcm.shape[1] % unit:
            raise ValueError(f"a mel block must be a multiple of {unit} samples, got {pcm.shape[1]}")
        tail, position = state["mel.tail"][slots], state["mel.position"][slots]
        samples = torch.cat([tail, pcm.to(tail.dtype)], dim=1)
        result = self._features(samples, position - config.history, audio_end)
        state["mel.tail"][slots] = torch.where(active[:, None], samples[:, -config.history :], tail)
        state["mel.position"][slots] = torch.where(active, position + pcm.shape[1], position)
        return result

    def _features(self, samples: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """``samples [B, (T - 1) * hop + window + 1]``, of which the first is number ``start [B]`` of a recording of
        ``end [B]`` samples, to ``T`` frames and the number of frames of the recording."""
        config = self.config
        index = start[:, None] + torch.arange(samples.shape[1], device=samples.device)
        exists = (index >= 0) & (index < end[:, None])
        samples = torch.where(exists, samples.to(self.window.dtype), 0)
        # Two roundings, not a fused multiply-add: the same bits wherever a sample lies in its block.
        emphasised = torch.where(exists[:, 1:], samples[:, 1:] - config.preemphasis * samples[:, :-1], 0)
        windowed = emphasised.unfold(1, config.window, config.hop) * self.window
        spectrum = torch.fft.rfft(windowed, n=config.n_fft)
        power = spectrum.real.square() + spectrum.imag.square()
        with torch.autocast(samples.device.type, enabled=False):
            mel = torch.log(power @ self.filters + config.guard)
        ends = end // config.hop
        first = (start + 1 + config.window // 2) // config.hop
        frame = first[:, None] + torch.arange(mel.shape[1], device=mel.device)
        return torch.where(((frame >= 0) & (frame < ends[:, None]))[:, :, None], mel, 0), ends
