"""Kokoro-82M (StyleTTS 2 prosody and text encoders, iSTFTNet vocoder) for many utterances at once.

Follows the published network (Apache-2.0; package ``kokoro`` 0.9.4: model.py, modules.py, istftnet.py; StyleTTS 2,
arXiv:2306.07691; iSTFTNet, arXiv:2203.02395), weight norms folded. The published code speaks one utterance at a time;
here rows are padded and every operation that mixes time (convolutions, instance norms, recurrences, the windows at the
signal's ends) sees only a row's own frames, so a row sounds as it would alone.

Rates: a duration unit is one frame of 600 samples at 24 kHz; pitch and energy have two values a frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

SYMBOLS = 178
STYLE = 128
HIDDEN = 512
FRAME = 600  # samples
PITCH_HOP = 300  # samples between two pitch values
MAX_TOKENS = 510  # phonemes of one utterance, without the two end marks

_N_FFT, _HOP = 20, 5
_HARMONICS = 9
_SINE, _VOICED_NOISE = 0.1, 0.003  # amplitudes of the source
_VOICED_ABOVE = 10.0  # Hz
_RATE = 24_000


def frame_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """[B] -> [B, size] bool, true inside each row."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


@dataclass(frozen=True)
class Span:
    """The valid frames of a padded batch: their numbers [B] and a float mask [B, 1, T]."""

    lengths: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, lengths: torch.Tensor, size: int) -> Span:
        return cls(lengths, frame_mask(lengths, size)[:, None].float())


class Recurrence(nn.Module):
    """A bidirectional LSTM layer that runs each row over its own length."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(size, HIDDEN // 2, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """x [B, T, size], lengths [B] -> [B, T, 512], zeros outside."""
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        return out


class Albert(nn.Module):
    """The phoneme encoder: ALBERT base, one layer's weights applied twelve times."""

    layers, heads, size = 12, 12, 768

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(SYMBOLS, STYLE)
        self.position = nn.Embedding(512, STYLE)
        self.kind = nn.Embedding(2, STYLE)
        self.norm = nn.LayerNorm(STYLE, eps=1e-12)
        self.widen = nn.Linear(STYLE, self.size)
        self.query, self.key, self.value, self.dense = (nn.Linear(self.size, self.size) for _ in range(4))
        self.attention_norm = nn.LayerNorm(self.size, eps=1e-12)
        self.ffn = nn.Linear(self.size, 2048)
        self.ffn_output = nn.Linear(2048, self.size)
        self.layer_norm = nn.LayerNorm(self.size, eps=1e-12)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """tokens [B, L] -> [B, L, 768]."""
        count = tokens.shape[1]
        keys = frame_mask(lengths, count)[:, None, None]
        symbols = self.word(tokens) + self.position.weight[:count] + self.kind.weight[0]
        x: torch.Tensor = self.widen(self.norm(symbols))
        for _ in range(self.layers):
            query, key, value = (
                part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
            )
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=keys)
            x = self.attention_norm(x + self.dense(mixed.transpose(1, 2).flatten(2)))
            x = self.layer_norm(x + self.ffn_output(F.gelu(self.ffn(x), approximate="tanh")))
        return x


class TextEncoder(nn.Module):
    """Phonemes as the vocoder sees them: three convolutions and a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, HIDDEN)
        self.cnn = nn.ModuleList(nn.Conv1d(HIDDEN, HIDDEN, 5, padding=2) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(3))
        self.recurrence = Recurrence(HIDDEN)

    def forward(self, tokens: torch.Tensor, span: Span) -> torch.Tensor:
        """tokens [B, L] -> [B, L, 512]."""
        x = self.embedding(tokens).transpose(1, 2) * span.mask
        for conv, norm in zip(self.cnn, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x).transpose(1, 2)), 0.2).transpose(1, 2) * span.mask
        out: torch.Tensor = self.recurrence(x.transpose(1, 2), span.lengths)
        return out


class AdaLayerNorm(nn.Module):
    """Layer norm whose gain and shift come from the style."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(STYLE, 2 * HIDDEN)

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        gamma, beta = self.fc(style)[:, None].chunk(2, -1)
        return torch.addcmul(beta, F.layer_norm(x, (HIDDEN,)), 1 + gamma)


class AdaIN(nn.Module):
    """Instance norm over a row's valid frames; gain and shift come from the style."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(STYLE, 2 * channels)

    def forward(self, x: torch.Tensor, style: torch.Tensor, span: Span) -> torch.Tensor:
        """x [B, C, T], zeros outside the span -> normalised, anything outside."""
        gamma, beta = self.fc(style)[..., None].chunk(2, 1)
        count = span.lengths[:, None, None].to(x.dtype)
        mean = x.sum(-1, keepdim=True) / count
        power = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / count
        gain = (1 + gamma) * torch.rsqrt((power - mean.square()).clamp_min(0) + 1e-5)
        return torch.addcmul(beta - mean * gain, x, gain)


class AdaINBlock(nn.Module):
    """Two convolutions with AdaIN before each and a shortcut around them; optionally doubles the frame rate."""

    def __init__(self, size_in: int, size_out: int, double: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = AdaIN(size_in), AdaIN(size_out)
        self.pool = nn.ConvTranspose1d(size_in, size_in, 3, 2, 1, 1, groups=size_in) if double else None
        self.conv1 = nn.Conv1d(size_in, size_out, 3, padding=1)
        self.conv2 = nn.Conv1d(size_out, size_out, 3, padding=1)
        self.conv1x1 = nn.Conv1d(size_in, size_out, 1, bias=False) if size_in != size_out else None

    def forward(self, x: torch.Tensor, style: torch.Tensor, span: Span, after: Span) -> torch.Tensor:
        """x [B, C, T] over ``span`` -> [B, C', T'] over ``after``: the same span, or the doubled one."""
        y = F.leaky_relu(self.norm1(x, style, span), 0.2) * span.mask
        if self.pool is not None:
            y = self.pool(y) * after.mask
            x = x.repeat_interleave(2, -1)
        y = self.conv1(y) * after.mask
        y = self.conv2(F.leaky_relu(self.norm2(y, style, after), 0.2) * after.mask)
        x = self.conv1x1(x) if self.conv1x1 is not None else x
        return torch.add(x, y) * (after.mask * math.sqrt(0.5))


class SnakeBlock(nn.Module):
    """Three pairs of convolutions, AdaIN and snake activations (x + sin(ax)^2 / a), each pair around a shortcut."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, width, padding=(width - 1) * gap // 2, dilation=gap) for gap in (1, 3, 5)
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, width, padding=(width - 1) // 2) for _ in range(3))
        self.adain1 = nn.ModuleList(AdaIN(channels) for _ in range(3))
        self.adain2 = nn.ModuleList(AdaIN(channels) for _ in range(3))
        self.alpha1 = nn.ParameterList(torch.ones(1, channels, 1) for _ in range(3))
        self.alpha2 = nn.ParameterList(torch.ones(1, channels, 1) for _ in range(3))

    def forward(self, x: torch.Tensor, style: torch.Tensor, span: Span) -> torch.Tensor:
        """x [B, C, T], zeros outside -> the same."""
        for index in range(3):
            y = _snake(self.adain1[index](x, style, span), self.alpha1[index]) * span.mask
            y = self.convs1[index](y) * span.mask
            y = _snake(self.adain2[index](y, style, span), self.alpha2[index]) * span.mask
            x = torch.addcmul(x, self.convs2[index](y), span.mask)
        return x


def _snake(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x, torch.sin(alpha * x).square_(), 1 / alpha)


class Source(nn.Module):
    """The vocoder's excitation: nine harmonics of the pitch where voiced, and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(_HARMONICS, 1)

    def forward(self, pitch: torch.Tensor, lengths: torch.Tensor, seeds: Sequence[int] | None) -> torch.Tensor:
        """pitch [B, K] in Hz, zeros outside the rows' lengths [B] -> [B, 300 K] at 24 kHz. Without seeds: no noise."""
        weight = self.linear.weight[0]
        # The phase runs straight between the middles of the pitch intervals and stands still before the first and after
        # the last, so each half of an interval has one slope. Cycles are summed in float64 and reduced before use.
        offset = (torch.arange(PITCH_HOP, device=pitch.device, dtype=pitch.dtype) + 0.5) / PITCH_HOP - 0.5
        first, second = offset[: PITCH_HOP // 2], offset[PITCH_HOP // 2 :]
        tone = pitch.new_zeros(*pitch.shape, PITCH_HOP)
        for harmonic in range(_HARMONICS):
            cycles = torch.remainder(pitch * (harmonic + 1) / _RATE, 1.0)
            steps = cycles * PITCH_HOP
            start = (torch.cumsum(cycles.double(), 1) * PITCH_HOP).frac().to(pitch.dtype)[..., None]
            before = F.pad(steps[:, 1:], (1, 0))[..., None]
            after = F.pad(steps[:, 1:], (0, 1))[..., None]
            phase = torch.cat([start + first * before, start + second * after], -1)
            tone.addcmul_(torch.sin(phase.mul_(2 * math.pi)), weight[harmonic])
        voiced = (pitch > _VOICED_ABOVE).to(pitch.dtype)[..., None]
        tone = _SINE * tone * voiced
        if seeds is not None:
            spread = torch.linalg.vector_norm(weight) * (voiced * _VOICED_NOISE + (1 - voiced) * (_SINE / 3))
            tone = torch.addcmul(tone, spread, _row_noise(tone, lengths, seeds))
        return torch.tanh(tone + self.linear.bias).flatten(1)


def _row_noise(like: torch.Tensor, lengths: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """White noise [B, K, H]; a row's depends on its own seed and length, not on its neighbours."""
    noise = torch.zeros_like(like)
    generator = torch.Generator(like.device)
    for row, length, seed in zip(noise, lengths.tolist(), seeds, strict=True):
        row[:length].normal_(generator=generator.manual_seed(seed))
    return noise


class Generator(nn.Module):
    """iSTFTNet: features at 80 Hz and the source's spectrum -> a 20-point spectrum every 5 samples -> samples."""

    window: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        bins = _N_FFT + 2
        self.source = Source()
        self.noise_convs = nn.ModuleList([nn.Conv1d(bins, 256, 12, 6, padding=3), nn.Conv1d(bins, 128, 1)])
        self.noise_res = nn.ModuleList([SnakeBlock(256, 7), SnakeBlock(128, 11)])
        self.ups = nn.ModuleList([nn.ConvTranspose1d(512, 256, 20, 10, 5), nn.ConvTranspose1d(256, 128, 12, 6, 3)])
        self.resblocks = nn.ModuleList(SnakeBlock(channels, width) for channels in (256, 128) for width in (3, 7, 11))
        self.conv_post = nn.Conv1d(128, bins, 7, padding=3)
        self.register_buffer("window", torch.hann_window(_N_FFT), persistent=False)

    def forward(
        self, x: torch.Tensor, style: torch.Tensor, pitch: torch.Tensor, span: Span, seeds: Sequence[int] | None
    ) -> torch.Tensor:
        """x [B, 512, K], pitch [B, K] over ``span`` -> samples [B, 300 K], zeros outside."""
        size = x.shape[-1]
        middle = Span.of(span.lengths * 10, size * 10)
        fine = Span.of(span.lengths * 60 + 1, size * 60 + 1)
        spectrum = self.analyse(self.source(pitch, span.lengths, seeds), span.lengths * PITCH_HOP) * fine.mask
        for index, here in enumerate((middle, fine)):
            excitation = self.noise_res[index](self.noise_convs[index](spectrum) * here.mask, style, here)
            x = self.ups[index](F.leaky_relu(x, 0.1))
            if index:
                x = F.pad(x, (1, 0), mode="reflect")
            x = x * here.mask + excitation
            blocks = self.resblocks[3 * index : 3 * index + 3]
            total = blocks[0](x, style, here)
            for block in blocks[1:]:
                total += block(x, style, here)
            x = total / 3
        return self.synthesise(self.conv_post(F.leaky_relu(x, 0.01)), fine)

    def analyse(self, samples: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Magnitudes and phases [B, 22, N / 5 + 1] of samples [B, N], each row mirrored at its own ends."""
        half = _N_FFT // 2
        at = torch.arange(-half, samples.shape[1] + half, device=samples.device).abs().expand(len(samples), -1)
        last = lengths[:, None] - 1
        at = torch.where(at > last, 2 * last - at, at).clamp_min(0)
        frames = samples.gather(1, at).unfold(1, _N_FFT, _HOP) * self.window
        bins = torch.fft.rfft(frames)
        # A zero imaginary part (the lowest and highest bins) must be +0: at -0 the angle of a negative number flips.
        return torch.cat([bins.abs(), torch.atan2(bins.imag + 0.0, bins.real)], -1).transpose(1, 2)

    def synthesise(self, x: torch.Tensor, span: Span) -> torch.Tensor:
        """Log magnitudes and phase sines [B, 22, T] -> overlap-added samples [B, 5 (T - 1)]."""
        half = _N_FFT // 2
        magnitude, phase = x[:, : half + 1].exp() * span.mask, x[:, half + 1 :].sin()
        frames = torch.fft.irfft(torch.polar(magnitude, phase).transpose(1, 2), _N_FFT) * self.window
        weight = self.window.square() * span.mask.transpose(1, 2)
        total, norm = _overlap_add(frames), _overlap_add(weight)
        samples = torch.where(norm > 1e-11, total / norm.clamp_min(1e-11), 0.0)[:, half:-half]
        return samples * frame_mask((span.lengths - 1) * _HOP, samples.shape[1])


def _overlap_add(frames: torch.Tensor) -> torch.Tensor:
    """[B, T, 20] frames, 5 samples apart -> [B, 5 (T + 3)]."""
    batch, count, _ = frames.shape
    parts = frames.view(batch, count, _N_FFT // _HOP, _HOP)
    out = frames.new_zeros(batch, count + _N_FFT // _HOP - 1, _HOP)
    for shift in range(_N_FFT // _HOP):
        out[:, shift : shift + count] += parts[:, :, shift]
    return out.flatten(1)


@dataclass(frozen=True)
class Prosody:
    """What is spoken before it is voiced: per phoneme, features for the two decoders and a duration in frames.

    prosodic [B, L, 640], phonetic [B, L, 512], durations [B, L] int64 (0 outside a row).
    """

    prosodic: torch.Tensor
    phonetic: torch.Tensor
    durations: torch.Tensor

    @property
    def frames(self) -> torch.Tensor:
        """[B]: the utterances' lengths in frames."""
        return self.durations.sum(1)


class Kokoro(nn.Module):
    """The whole synthesiser. ``prosody`` first, then ``voice`` (in batches chosen by the lengths that came out)."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = Albert()
        self.bert_encoder = nn.Linear(Albert.size, HIDDEN)
        self.duration_lstms = nn.ModuleList(Recurrence(HIDDEN + STYLE) for _ in range(3))
        self.duration_norms = nn.ModuleList(AdaLayerNorm() for _ in range(3))
        self.duration_lstm = Recurrence(HIDDEN + STYLE)
        self.duration_proj = nn.Linear(HIDDEN, 50)
        self.text_encoder = TextEncoder()
        self.shared = Recurrence(HIDDEN + STYLE)
        self.pitch, self.energy = (
            nn.ModuleList([AdaINBlock(512, 512), AdaINBlock(512, 256, double=True), AdaINBlock(256, 256)])
            for _ in range(2)
        )
        self.pitch_proj, self.energy_proj = nn.Conv1d(256, 1, 1), nn.Conv1d(256, 1, 1)
        self.pitch_conv, self.energy_conv = (nn.Conv1d(1, 1, 3, 2, padding=1) for _ in range(2))
        self.residue = nn.Conv1d(HIDDEN, 64, 1)
        self.encode = AdaINBlock(HIDDEN + 2, 1024)
        self.decode = nn.ModuleList(
            [*(AdaINBlock(1024 + 66, 1024) for _ in range(3)), AdaINBlock(1024 + 66, 512, double=True)]
        )
        self.generator = Generator()

    def prosody(self, tokens: torch.Tensor, lengths: torch.Tensor, style: torch.Tensor, speed: torch.Tensor) -> Prosody:
        """tokens [B, L] with end marks, lengths [B], style [B, 256], speed [B]."""
        span = Span.of(lengths, tokens.shape[1])
        inside = span.mask.transpose(1, 2)
        manner = style[:, None, STYLE:].expand(-1, tokens.shape[1], -1)
        x = torch.cat([self.bert_encoder(self.bert(tokens, lengths)), manner], -1) * inside
        for lstm, norm in zip(self.duration_lstms, self.duration_norms, strict=True):
            x = torch.cat([norm(lstm(x, lengths), style[:, STYLE:]), manner], -1) * inside
        length = torch.sigmoid(self.duration_proj(self.duration_lstm(x, lengths))).sum(-1) / speed[:, None]
        durations = length.round().clamp_min(1).long() * inside[..., 0].long()
        return Prosody(x, self.text_encoder(tokens, span), durations)

    def voice(self, prosody: Prosody, style: torch.Tensor, seeds: Sequence[int] | None = None) -> torch.Tensor:
        """-> samples [B, 600 F] at 24 kHz, zeros after a row's end. seeds: the rows' source noise; None: no noise."""
        frames = prosody.frames
        size = int(frames.max())
        span, double = Span.of(frames, size), Span.of(2 * frames, 2 * size)
        at = torch.arange(size, device=frames.device).expand(len(frames), -1).contiguous()
        last = prosody.durations.shape[1] - 1
        token = torch.searchsorted(prosody.durations.cumsum(1), at, right=True).clamp_max(last)
        inside = span.mask.transpose(1, 2)
        manner, timbre = style[:, STYLE:], style[:, :STYLE]

        x = _pick(prosody.prosodic, token) * inside
        x = self.shared(x, frames).transpose(1, 2)
        pitch, energy = x, x
        for index, after in enumerate((span, double, double)):
            before = span if index < 2 else double
            pitch = self.pitch[index](pitch, manner, before, after)
            energy = self.energy[index](energy, manner, before, after)
        pitch = self.pitch_proj(pitch) * double.mask
        energy = self.energy_proj(energy) * double.mask

        sounds = (_pick(prosody.phonetic, token) * inside).transpose(1, 2)
        curves = torch.cat([self.pitch_conv(pitch), self.energy_conv(energy)], 1) * span.mask
        residue = self.residue(sounds) * span.mask
        x = self.encode(torch.cat([sounds, curves], 1), timbre, span, span)
        for index, block in enumerate(self.decode):
            after = double if index == 3 else span
            x = block(torch.cat([x, residue, curves], 1), timbre, span, after)
        samples: torch.Tensor = self.generator(x, timbre, pitch[:, 0], double, seeds)
        return samples


def _pick(features: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """features [B, L, C] at token [B, F] -> [B, F, C]."""
    return features.gather(1, token[..., None].expand(-1, -1, features.shape[-1]))
