"""Sizes and flags of a streaming FastConformer and of its decoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SUBSAMPLING = 8  # mel frames per encoder frame


@dataclass(frozen=True)
class ConformerConfig:
    """The encoder. Contexts count encoder frames (80 ms).

    A frame sees its own chunk of ``lookahead + 1`` frames and the ``left // (lookahead + 1)`` whole chunks before it
    (NeMo's ``chunked_limited``), so the lookahead does not grow with depth. ``lookaheads`` are those the weights were
    trained for, the default first.
    """

    mels: int = 80
    width: int = 512
    layers: int = 17
    heads: int = 8
    feedforward: int = 2048
    kernel: int = 9
    channels: int = 256
    left: int = 70
    lookaheads: tuple[int, ...] = (13, 6, 1, 0)
    scale_input: bool = False
    bias: bool = True
    conv_bias: bool = True
    conv_norm: Literal["layer_norm", "batch_norm"] = "layer_norm"
    dropout: float = 0.1
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        sizes = ("mels", "width", "layers", "heads", "feedforward", "kernel", "channels", "left")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of twice the {self.heads} heads")
        if not self.lookaheads or min(self.lookaheads) < 0 or len(set(self.lookaheads)) != len(self.lookaheads):
            raise ValueError(f"lookaheads must be distinct frame counts of at least 0, got {self.lookaheads}")
        if self.left < max(self.lookaheads) + 1:
            raise ValueError(f"left context {self.left} is shorter than a chunk of {max(self.lookaheads) + 1} frames")
        if self.conv_norm not in ("layer_norm", "batch_norm"):
            raise ValueError(f"conv_norm must be layer_norm or batch_norm, got {self.conv_norm!r}")

    @property
    def longest(self) -> int:
        """Frames of the longest chunk."""
        return max(self.lookaheads) + 1

    @property
    def ring(self) -> int:
        """Frames of keys and values a session keeps: the left context and the chunk being written."""
        return self.left + self.longest

    def window(self, lookahead: int) -> int:
        """Frames before its chunk that a frame sees."""
        return self.left // (lookahead + 1) * (lookahead + 1)


@dataclass(frozen=True)
class TransducerConfig:
    """The RNN-T decoder: ``vocabulary`` labels and the blank after them, prediction LSTM and joint."""

    vocabulary: int = 1024
    encoder_width: int = 512
    width: int = 640
    layers: int = 1
    joint_width: int = 640
    max_symbols: int = 10
    dropout: float = 0.2

    def __post_init__(self) -> None:
        for name in ("vocabulary", "encoder_width", "width", "layers", "joint_width", "max_symbols"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def blank(self) -> int:
        """The blank's index: the last."""
        return self.vocabulary


def encoder_frames(mel_frames: int) -> int:
    """Encoder frames of an utterance: three stride-2 convolutions that each add one frame of padding."""
    return ((mel_frames // 2 + 1) // 2 + 1) // 2 + 1
