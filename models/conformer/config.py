"""Sizes and flags of a streaming FastConformer and of its decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
        """Frames of keys and values a session keeps: the left context and the chunk being written.

        Rounded up to a multiple of 8, with which attention kernels take a bias as it is.
        """
        return -(-(self.left + self.longest) // 8) * 8

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


@dataclass(frozen=True)
class LanguageModelConfig:
    """A language model over the recogniser's pieces."""

    embedding: int = 320
    width: int = 640
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("embedding", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class BeamConfig:
    """Beam search of a transducer.

    width: transcripts kept. symbols: most labels of a frame. settle: frames after which a label of the best transcript
    is final. prune: a transcript this much less likely (log) than the best is not extended. temperature: what the
    transducer's logits are divided by, above 1 for one that is surer than it is right.
    language_model: weight of its log probability. internal: weight of the transducer's own, which is taken off
    (arXiv 2011.01991). bonus: added for each label.
    """

    width: int = 4
    symbols: int = 2
    settle: int = 6
    prune: float = 6.0
    temperature: float = 1.0
    language_model: float = 0.0
    internal: float = 0.0
    bonus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "symbols", "settle"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a beam search must be at least 1, got {getattr(self, name)}")
        for name in ("prune", "language_model", "internal"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} of a beam search must not be negative, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature of a beam search must be positive, got {self.temperature}")


@dataclass(frozen=True)
class PromptConfig:
    """A choice of language, one-hot beside every encoder frame. ``languages``: name -> index below ``count``."""

    languages: Mapping[str, int]
    count: int = 128
    hidden: int = 2048
    default: str = "auto"

    def __post_init__(self) -> None:
        if self.default not in self.languages:
            raise ValueError(f"the default language {self.default!r} is none of {', '.join(self.languages)}")
        for name, index in self.languages.items():
            if not 0 <= index < self.count:
                raise ValueError(f"language {name!r} has index {index}, which is not below {self.count}")


@dataclass(frozen=True)
class ASRConfig:
    """A whole recogniser. ``mel`` holds the features' settings under NeMo's names (its ``preprocessor`` section).

    beam: how its makers meant it to be searched; None for greedy decoding.
    """

    encoder: ConformerConfig
    vocabulary: int
    transducer: TransducerConfig | None = None
    ctc: bool = False
    prompt: PromptConfig | None = None
    beam: BeamConfig | None = None
    language_model: LanguageModelConfig | None = None
    mel: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.transducer is None and not self.ctc:
            raise ValueError("a recogniser needs a transducer or a CTC head")
        if self.beam is not None and self.transducer is None:
            raise ValueError("beam search needs a transducer")
        if self.language_model is not None and self.beam is None:
            raise ValueError("a language model is used by beam search alone: give its settings")
        if self.transducer is not None:
            if self.transducer.vocabulary != self.vocabulary:
                raise ValueError(f"transducer of {self.transducer.vocabulary} labels, tokenizer of {self.vocabulary}")
            if self.transducer.encoder_width != self.encoder.width:
                raise ValueError(f"joint takes {self.transducer.encoder_width} wide frames, not {self.encoder.width}")


def encoder_frames(mel_frames: int) -> int:
    """Encoder frames of an utterance: three stride-2 convolutions that each add one frame of padding."""
    return ((mel_frames // 2 + 1) // 2 + 1) // 2 + 1
