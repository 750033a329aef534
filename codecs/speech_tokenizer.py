"""CosyVoice's speech tokenizer, version 2: 25 tokens a second of 6561 that tell what is said and hardly who says it.

The encoder of a recogniser cut in half (two convolutions of stride 2 and six transformer blocks with rotary positions,
each with a memory of 31 frames beside its attention) and finite scalar quantisation: eight numbers rounded to three
levels each (CosyVoice 2, arXiv 2412.10117, section 2.1.2; FSQ, arXiv 2309.15505; the network of the pip package
``s3tokenizer``). It sees up to 30 s at once; longer sounds are cut into such windows, as that package does it.

:class:`SpeechTokenizer` is the network; :class:`OnnxSpeechTokenizer` runs the publisher's ``speech_tokenizer_v2.onnx``.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.files import CheckpointError
from ..models.layers.rope import Rotation, rotate, rotation
from ..models.ort import CPU, open_session
from .whisper_mel import WhisperMel

SAMPLE_RATE = 16000
_SHORTEST = 400  # samples
_WINDOW, _OVERLAP = 3000, 400  # mel frames seen at once, and shared with the window before
_RATE = 4  # mel frames a token
_LEVELS = 3
_EDGE = 0.9990000128746033  # how near a number may come to a level's end, as published


@dataclass(frozen=True)
class SpeechTokenizerConfig:
    """Sizes. The defaults are the published ones. memory: frames of the memory beside attention. digits: numbers that
    are quantised, of ``3 ** digits`` tokens."""

    mels: int = 128
    width: int = 1280
    heads: int = 20
    layers: int = 6
    memory: int = 31
    digits: int = 8
    theta: float = 10000.0

    def __post_init__(self) -> None:
        for name in ("mels", "width", "heads", "layers", "memory", "digits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of twice the {self.heads} heads")

    @property
    def vocabulary(self) -> int:
        """Tokens there are (6561)."""
        return int(_LEVELS**self.digits)


class Tokenizes(ABC):
    """What both tokenizers do with a clip."""

    mels: int

    @abstractmethod
    def _encode(self, mel: Tensor) -> Tensor:
        """``[1, mels, frames] -> [n]``."""

    def tokenize(self, pcm: NDArray[np.float32] | Tensor) -> Tensor:
        """``[n]`` samples at 16 kHz, at least 400 -> int64 tokens, one for each 640 samples begun.

        Where windows overlap, each gives the tokens of its half. Raises ValueError for a sound that is too short.
        """
        samples = torch.as_tensor(pcm)
        if samples.dim() != 1 or len(samples) < _SHORTEST:
            raise ValueError(f"speech tokens need [n] of {_SHORTEST} samples or more at 16 kHz, got {[*samples.shape]}")
        mel = _features(self.mels)(samples[None])
        firsts = range(0, max(1, mel.shape[2] - _OVERLAP), _WINDOW - _OVERLAP)
        half, parts = _OVERLAP // _RATE // 2, []
        for first in firsts:
            tokens = self._encode(mel[:, :, first : first + _WINDOW])
            parts.append(tokens[half if first else 0 : len(tokens) - (half if first != firsts[-1] else 0)])
        return torch.cat(parts)


class Attention(nn.Module):
    """Attention over the clip, plus a depthwise convolution of the values."""

    def __init__(self, config: SpeechTokenizerConfig) -> None:
        super().__init__()
        self.heads, self.width = config.heads, config.width
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width, bias=False)
        self.value = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.width)
        self.fsmn_block = nn.Conv1d(config.width, config.width, config.memory, groups=config.width, bias=False)
        self.pads = (config.memory - 1) // 2, config.memory - 1 - (config.memory - 1) // 2

    def forward(self, x: Tensor, turn: Rotation, real: Tensor) -> Tensor:
        """``[B, n, d] -> [B, n, d]``; real ``[B, n]`` bool: frames of the clip."""
        query, key = (rotate(layer(x).unflatten(2, (self.heads, -1)), turn, "half") for layer in (self.query, self.key))
        value = self.value(x)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.unflatten(2, (self.heads, -1)).transpose(1, 2),
            attn_mask=real[:, None, None],
        )
        value = value * real[..., None]
        memory: Tensor = self.fsmn_block(F.pad(value.transpose(1, 2), self.pads)).transpose(1, 2) + value
        mixed: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return mixed + memory * real[..., None]


class Block(nn.Module):
    """Attention and a feed-forward layer on normalised residual branches."""

    def __init__(self, config: SpeechTokenizerConfig) -> None:
        super().__init__()
        self.attn_ln = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.mlp_ln = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: Tensor, turn: Rotation, real: Tensor) -> Tensor:
        """``[B, n, d] -> [B, n, d]``."""
        x = x + self.attn(self.attn_ln(x), turn, real)
        result: Tensor = x + self.mlp(self.mlp_ln(x))
        return result


class Encoder(nn.Module):
    """Mel frames to frames of 40 ms."""

    def __init__(self, config: SpeechTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.mels, config.width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, mels, T]`` of ``frames [B]`` each -> ``[B, ceil(T / 4), d]`` and how many of each row are its own."""
        x = mel
        for conv in (self.conv1, self.conv2):
            x = F.gelu(conv(x * _within(frames, x.shape[2])[:, None]))
            frames = (frames + 1) // 2
        x = x.transpose(1, 2)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        turn = rotation(positions, self.config.width // self.config.heads, self.config.theta, x.dtype, "half")
        real = _within(frames, x.shape[1])
        for block in self.blocks:
            x = block(x, turn, real)
        return x, frames


class SpeechTokenizer(nn.Module, Tokenizes):
    """The network."""

    def __init__(self, config: SpeechTokenizerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SpeechTokenizerConfig()
        self.encoder = Encoder(config)
        self.project_down = nn.Linear(config.width, config.digits)
        self.mels = config.mels

    @torch.no_grad()
    def forward(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, mels, T]`` of ``frames [B]`` each -> tokens ``[B, ceil(T / 4)]`` int64 and how many of each row are its
        own, ``[B]``; the others are 0."""
        x, count = self.encoder(mel, frames)
        return self.number(self.bounded(x).round()) * _within(count, x.shape[1]), count

    def bounded(self, x: Tensor) -> Tensor:
        """Frames of the encoder ``[B, n, d]`` as the numbers that are rounded: ``[B, n, digits]``, between -1 and 1."""
        bounded: Tensor = self.project_down(x).float().tanh() * _EDGE
        return bounded

    def number(self, rounded: Tensor) -> Tensor:
        """``[B, n, digits]`` of -1, 0 and 1 -> tokens ``[B, n]`` int64."""
        weights = _LEVELS ** torch.arange(self.config.digits, device=rounded.device)
        return ((rounded.long() + 1) * weights).sum(2)

    def _encode(self, mel: Tensor) -> Tensor:
        weight = self.project_down.weight
        mel = mel.to(weight.device, weight.dtype)
        tokens: Tensor = self(mel, torch.tensor([mel.shape[2]], device=mel.device))[0]
        return tokens[0].cpu()


class OnnxSpeechTokenizer(Tokenizes):
    """path: the publisher's ONNX file. providers: see ``ort.open_session``.

    Raises ImportError naming the package that is missing, FileNotFoundError, and CheckpointError for a model that does
    not take mel frames and their number.
    """

    def __init__(self, path: str | PathLike[str], *, providers: Sequence[str] = CPU) -> None:
        self._session = open_session(path, providers)
        inputs = self._session.get_inputs()
        shapes = [value.shape for value in inputs]
        if [len(shape) for shape in shapes] != [3, 1]:
            told = ", ".join(f"{value.name} {value.shape}" for value in inputs)
            raise CheckpointError(f"{path}: takes {told}; a speech tokenizer takes [clips, mels, frames] and [clips]")
        self._names = [value.name for value in inputs]
        self._output = self._session.get_outputs()[0].name
        self.mels = shapes[0][1] if isinstance(shapes[0][1], int) else SpeechTokenizerConfig.mels

    def _encode(self, mel: Tensor) -> Tensor:
        feed = dict(zip(self._names, (mel.numpy(), np.array([mel.shape[2]], np.int32)), strict=True))
        (tokens,) = self._session.run((self._output,), feed)
        return torch.from_numpy(np.asarray(tokens, np.int64)).flatten()


@functools.cache
def _features(mels: int) -> WhisperMel:
    return WhisperMel(mels, normalize=False)


def _within(count: Tensor, length: int) -> Tensor:
    """``[B, length]`` bool: the first ``count [B]``."""
    return torch.arange(length, device=count.device) < count[:, None]
