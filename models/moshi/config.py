"""Sizes and flags of Moshi (arXiv 2410.00037), read from what publishers write into ``config.json``.

A frame of 80 ms is one position of the temporal transformer. Its input is the sum of the embeddings of all streams:
text, the codebooks that the model speaks, the codebooks that it hears. Its output samples the next text token, and the
depth transformer then samples the spoken codebooks one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..layers.transformer import TransformerConfig
from .sampling import Sampling

FRAME_RATE = 12.5
ZERO = -1  # a token that embeds to zero
UNSET = -2  # a token that is not known yet, or is to be sampled
HELD = -3  # text that is to be sampled, but without beginning a word: what would begin one ends the padding


@dataclass(frozen=True)
class DepthConfig:
    """The depth transformer, which steps through the spoken codebooks of one frame.

    sets: for each step, which of the sets of weights it uses. shared_input: one projection of the temporal output for
    all steps. low_rank: embeddings have this width and are projected up.
    """

    transformer: TransformerConfig
    sets: tuple[int, ...]
    shared_input: bool = False
    low_rank: int | None = None
    sinusoids: bool = False

    def __post_init__(self) -> None:
        if not self.sets or min(self.sets) < 0 or set(self.sets) != set(range(max(self.sets) + 1)):
            raise ValueError(f"the steps' sets of weights must count up from 0 without a gap, got {self.sets}")
        if self.transformer.per_step not in (0, self.count):
            raise ValueError(f"a transformer of {self.transformer.per_step} sets of weights, steps of {self.count}")

    @property
    def count(self) -> int:
        """Sets of weights."""
        return max(self.sets) + 1


@dataclass(frozen=True)
class MoshiConfig:
    """A whole model. Streams are ordered: text, spoken codebooks, heard codebooks.

    codebooks: audio streams, spoken and heard. delays: of every stream, in frames. card, text_card: sizes of the
    vocabularies; one more token of each starts a stream. text_out: text tokens that may come out. heads: numbers of
    extra classifiers of the temporal output and of their classes. Of a model that writes what it hears: lag, seconds
    that text is behind the sound it tells of; lead, seconds of silence that it wants to hear first.
    """

    temporal: TransformerConfig
    depth: DepthConfig | None
    codebooks: int = 16
    delays: tuple[int, ...] = (0, *(0, *(1,) * 7) * 2)
    card: int = 2048
    text_card: int = 32000
    text_out: int = 32000
    padding: int = 3
    end_padding: int = 0
    sinusoids: bool = False
    heads: tuple[int, int] = (0, 0)
    sampling: Sampling = field(default_factory=Sampling)
    lag: float = 0.0
    lead: float = 0.0

    def __post_init__(self) -> None:
        if len(self.delays) != self.streams or min(self.delays) < 0:
            raise ValueError(f"{self.streams} streams need as many delays of at least 0 frames, got {self.delays}")
        if self.spoken > self.codebooks:
            raise ValueError(f"the model speaks {self.spoken} codebooks, but there are {self.codebooks}")
        if self.text_out > self.text_card:
            raise ValueError(f"{self.text_out} text tokens may come out, but only {self.text_card} can go in")

    @property
    def streams(self) -> int:
        """Text, spoken and heard."""
        return 1 + self.codebooks

    @property
    def spoken(self) -> int:
        """Codebooks that the model makes; 0 for one that only writes."""
        return 0 if self.depth is None else len(self.depth.sets)

    @property
    def heard(self) -> int:
        """Codebooks that the user's sound comes in."""
        return self.codebooks - self.spoken

    @property
    def delay(self) -> int:
        """The longest delay: an output frame is complete this many frames after its first token."""
        return max(self.delays)

    def changed(
        self, *, window: int | None = None, sinks: int = 0, prefill: int = 1, kv_dtype: torch.dtype | None = None
    ) -> MoshiConfig:
        """With another context: window in frames (None: as trained), first frames that stay in reach, frames that a
        prefill takes at once, and the dtype of keys and values."""
        temporal = dataclasses.replace(
            self.temporal, window=window or self.temporal.window, sinks=sinks, longest=prefill, kv_dtype=kv_dtype
        )
        return dataclasses.replace(self, temporal=temporal)


# What a repository without config.json holds, and what sizes a config.json leaves out are taken from.
MOSHI_7B: dict[str, Any] = {
    "dim": 4096,
    "text_card": 32000,
    "existing_text_padding_id": 3,
    "n_q": 16,
    "dep_q": 8,
    "card": 2048,
    "num_heads": 32,
    "num_layers": 32,
    "hidden_scale": 4.125,
    "context": 3000,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 1024,
    "depformer_dim_feedforward": 4224,
    "depformer_num_heads": 16,
    "depformer_num_layers": 6,
    "depformer_multi_linear": True,
    "depformer_context": 8,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": [0, *[0, *[1] * 7] * 2],
}
# Of config.json, what describes the repository rather than the network.
ABOUT = (
    "moshi_name",
    "mimi_name",
    "mimi_config_name",
    "tokenizer_name",
    "model_type",
    "version",
    "lm_gen_config",
    "tts_config",
    "stt_config",
    "model_id",
)
# Settings that change nothing here, with what they may be: other values ask for a network that is not built.
_FIXED: dict[str, tuple[Any, ...]] = {
    "causal": (True,),
    "layer_scale": (None,),
    "depformer_causal": (True,),
    "depformer_layer_scale": (None,),
    "cross_attention": (False,),
    "demux_second_stream": (False,),
    "demux_second_text_stream": (False,),
    "norm_emb": (False,),
    "bias_proj": (False,),
    "depformer_norm": (None,),
    "conditioners": (None, {}),
    "fuser": (None,),
    "lora": (False,),
    "lora_name": (None,),
    "positional_scale": (1, 1.0),
}
_NORMS = {"rms_norm_f32": ("rms", 1e-8), "rms_norm": ("rms", 1e-5), "layer_norm": ("layer", 1e-5)}
_NORMS["layer_norm_f32"] = ("layer", 1e-8)
_ROPE = {"rope": "interleaved", "rope_concat": "half", "sin": None, "none": None}
_IGNORED = (
    "same_initial",
    "gradient_checkpointing",
    "quantize",
    "lora_rank",
    "lora_scaling",
    "betas",
    "depformer_context",
)


def read_config(settings: Mapping[str, Any]) -> MoshiConfig:
    """From the contents of a ``config.json`` of Kyutai's: the language model's settings and those in ``ABOUT``.

    Settings that are absent are Kyutai's defaults; where the network is not described at all, it is Moshi 7B.
    Raises ValueError or TypeError for what cannot be built.
    """
    lm = {key: value for key, value in settings.items() if key not in ABOUT}
    if not any((lm.get("fuser") or {}).get(method) for method in ("sum", "cross", "prepend")):
        lm.pop("fuser", None)  # it joins no conditions to anything
    if "dim" not in lm:
        lm = MOSHI_7B | lm
    for name, allowed in _FIXED.items():
        if name in lm and lm.pop(name) not in allowed:
            raise ValueError(f"{name} is {settings[name]!r}; only {allowed[0]!r} is supported")
    take = _Settings(lm)
    shared = {name: take(name, default) for name, default in (("num_layers", 4), ("gating", "none"), ("kv_repeat", 1))}
    period, norm = take("max_period", 10000), take("norm", "layer_norm")
    width, scale, position = take("dim", 128), take("hidden_scale", 4), take("positional_embedding", "sin")
    context = take("context", None)
    if context is None:
        raise ValueError("context is missing: the model must say how far it looks back")
    stack = {"width": width, "heads": take("num_heads", 8), "norm": norm, "window": context}
    temporal = _transformer(stack | shared | {"period": period, "position": position, "hidden": int(scale * width)})
    depth = _depth(take, shared, norm, period, scale)
    card, text_card = take("card", 1024), take("text_card", 32000)
    writing = settings.get("stt_config") or {}
    config = MoshiConfig(
        temporal=temporal,
        depth=depth,
        codebooks=take("n_q", 8),
        delays=tuple(take("delays", [0])),
        card=card,
        text_card=text_card,
        text_out=take("text_card_out", None) or text_card,
        padding=take("existing_text_padding_id", 3),
        end_padding=take("existing_text_end_padding_id", 0),
        sinusoids=position == "sin",
        heads=(take("extra_heads_num_heads", 0), take("extra_heads_dim", 6)),
        sampling=_sampling(settings.get("lm_gen_config") or {}),
        lag=float(writing.get("audio_delay_seconds", 0.0)),
        lead=float(writing.get("audio_silence_prefix_seconds", 0.0)),
    )
    if unknown := sorted(take.left - set(_IGNORED)):
        raise ValueError(f"settings {', '.join(unknown)} are not known")
    return config


def _depth(take: _Settings, shared: dict[str, Any], norm: str, period: float, scale: float) -> DepthConfig | None:
    # What the depth transformer does not set itself, it has from the temporal one.
    own = {name: take(f"depformer_{name}", default) for name, default in shared.items()}
    width, hidden = take("depformer_dim", 256), take("depformer_dim_feedforward", None)
    heads, position = take("depformer_num_heads", 8), take("depformer_pos_emb", "sin")
    per_step, schedule = take("depformer_weights_per_step", False), take("depformer_weights_per_step_schedule", None)
    many, low_rank = take("depformer_multi_linear", False), take("depformer_low_rank_embeddings", None)
    steps, period = take("dep_q", 8), take("depformer_max_period", period)
    if not steps:
        return None
    if isinstance(hidden, list):
        if len(set(hidden)) != 1:
            raise ValueError(f"depformer_dim_feedforward is {hidden}: steps of different widths are not supported")
        hidden = hidden[0]
    sets = tuple(schedule or range(steps))
    if len(sets) != steps:
        raise ValueError(f"depformer_weights_per_step_schedule has {len(sets)} steps, dep_q is {steps}")
    stack = {"width": width, "heads": heads, "norm": norm, "window": steps, "period": period, "position": position}
    stack |= {"hidden": int(scale * width) if hidden is None else hidden, "per_step": max(sets) + 1 if per_step else 0}
    return DepthConfig(_transformer(stack | own), sets, not many, low_rank, position == "sin")


def _transformer(stack: Mapping[str, Any]) -> TransformerConfig:
    gate, width, hidden = stack["gating"], stack["width"], stack["hidden"]
    for name, known in (("norm", _NORMS), ("position", _ROPE), ("gating", ("silu", "none"))):
        if stack[name] not in known:
            raise ValueError(f"{name} {stack[name]!r} is not known; known are {', '.join(known)}")
    if gate == "silu":  # a gated layer has three matrices in place of two
        hidden = 21 * width // 8 if hidden == 4 * width else 2 * hidden // 3
    norm, eps = _NORMS[stack["norm"]]
    return TransformerConfig(
        width=width,
        layers=stack["num_layers"],
        heads=stack["heads"],
        kv_heads=stack["heads"] // stack["kv_repeat"],
        feedforward=hidden,
        window=stack["window"],
        norm=norm,  # type: ignore[arg-type]
        eps=eps,
        gate=gate == "silu",
        rope=_ROPE[stack["position"]],  # type: ignore[arg-type]
        theta=float(stack["period"]),
        per_step=stack.get("per_step", 0),
    )


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    text, audio = (
        {"text_temperature": "temp_text", "text_top_k": "top_k_text"},
        {"audio_temperature": "temp", "audio_top_k": "top_k"},
    )
    return Sampling(**{ours: settings[theirs] for ours, theirs in (text | audio).items() if theirs in settings})


class _Settings:
    """Settings by name; ``left``: those that nobody asked for."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self.left = set(settings)

    def __call__(self, name: str, default: Any) -> Any:
        self.left.discard(name)
        return self._settings.get(name, default)
