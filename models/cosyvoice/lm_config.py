"""Sizes of CosyVoice 2's text-speech language model, and the one numbering of everything it reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from ..layers.transformer import TransformerConfig

TOKEN_SECONDS = 0.04
SPECIALS = 3  # rows beyond the speech tokens: end, one that is not used, fill
STARTS = 2  # start of sequence, start of speech
BURSTS = (32,)  # for a GPU: one brings the first hop of 25 tokens and its lookahead; all sessions draw together


@dataclass(frozen=True)
class Burst:
    """A variant: a step that reads the token drawn last and draws up to ``tokens``, reading each before the next. Each
    draw is a turn, which sessions take together: one burst of a length suffices."""

    tokens: int


@dataclass(frozen=True)
class LMConfig:
    """The network; the defaults are those of CosyVoice2-0.5B, a Qwen2-0.5B with a table and a head for speech.

    What the model reads is numbered: speech tokens as they are, then ``end`` and ``fill`` (which are only drawn),
    ``start`` and ``task``, then text tokens, whose numbers of the tokenizer ``text_id`` turns into these.

    capacity: positions that a session can hold: prompt, text and speech. prefill: lengths of the steps that read
    more than one token. kept: dtype of cached keys and values, None for the weights'. mix: tokens of text and of speech
    in a block, where text arrives while it is spoken. extent: fewest and most speech tokens for a token of text.
    passage: text tokens that are spoken at a time, at most. bursts: lengths of the steps that draw more than one token,
    which spare a device's host most of its work.
    """

    text: int = 151936
    speech: int = 6561
    width: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    feedforward: int = 4864
    theta: float = 1e6
    eps: float = 1e-6
    capacity: int = 2048
    prefill: tuple[int, ...] = (8, 32, 64)
    kept: torch.dtype | None = None
    mix: tuple[int, int] = (5, 15)
    extent: tuple[float, float] = (2.0, 20.0)
    passage: int = 100
    bursts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "text",
            "speech",
            "width",
            "layers",
            "heads",
            "kv_heads",
            "feedforward",
            "theta",
            "eps",
            "passage",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if min(self.mix) < 1 or not 0 <= self.extent[0] <= self.extent[1]:
            raise ValueError(
                f"a mix has text and speech, got {self.mix}; an extent is a rising pair, got {self.extent}"
            )
        if list(self.prefill) != sorted(set(self.prefill)) or (self.prefill and self.prefill[0] < 2):
            raise ValueError(f"prefill must be rising lengths of at least 2, got {self.prefill}")
        if list(self.bursts) != sorted(set(self.bursts)) or (self.bursts and self.bursts[0] < 2):
            raise ValueError(f"bursts must be rising lengths of at least 2, got {self.bursts}")
        if self.capacity < max(self.lengths):
            raise ValueError(f"capacity {self.capacity} is below the longest step, of {max(self.lengths)} tokens")
        _ = self.transformer

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that a step reads: the variants that draw one."""
        return (1, *self.prefill)

    @property
    def variants(self) -> tuple[int | Burst, ...]:
        """All steps there are."""
        return (*self.lengths, *map(Burst, self.bursts))

    @property
    def classes(self) -> int:
        """What the head tells apart: speech tokens, end and fill."""
        return self.speech + SPECIALS

    @property
    def end(self) -> int:
        """Drawn when all is said."""
        return self.speech

    @property
    def fill(self) -> int:
        """Drawn when more text is needed; never read."""
        return self.speech + 2

    @property
    def start(self) -> int:
        """Read first."""
        return self.classes

    @property
    def task(self) -> int:
        """Read between the last text and the speech."""
        return self.classes + 1

    @property
    def vocabulary(self) -> int:
        """Everything that can be read."""
        return self.classes + STARTS + self.text

    def text_id(self, token: int) -> int:
        """A token of the tokenizer in the model's numbering. Raises ValueError for one that it does not know."""
        if not 0 <= token < self.text:
            raise ValueError(f"text token {token} is not among the {self.text} that the model reads")
        return self.classes + STARTS + token

    @property
    def transformer(self) -> TransformerConfig:
        """The backbone's blocks."""
        return TransformerConfig(
            self.width,
            self.layers,
            self.heads,
            self.feedforward,
            kv_heads=self.kv_heads,
            window=self.capacity,
            longest=max(self.lengths),
            eps=self.eps,
            rope="half",
            theta=self.theta,
            qkv_bias=True,
            kv_dtype=self.kept,
        )

    @classmethod
    def of_qwen2(cls, settings: Mapping[str, Any], **more: Any) -> Self:
        """From the ``config.json`` of a Qwen2; more: other fields.

        Raises ValueError for another architecture and KeyError for a setting that is missing.
        """
        wanted = {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False}
        for name, value in wanted.items():
            if settings.get(name, value) != value:
                raise ValueError(f"{name} is {json.dumps(settings[name])}; this reader knows {json.dumps(value)} only")
        theta = settings.get("rope_theta") or (settings.get("rope_parameters") or {}).get("rope_theta", 1e6)
        return cls(
            text=settings["vocab_size"],
            width=settings["hidden_size"],
            layers=settings["num_hidden_layers"],
            heads=settings["num_attention_heads"],
            kv_heads=settings["num_key_value_heads"],
            feedforward=settings["intermediate_size"],
            theta=theta,
            eps=settings["rms_norm_eps"],
            **more,
        )
