"""The Hugging Face layout of ``nemotron_asr_streaming`` and ``nemotron3_5_asr``: configurations, safetensors and
``tokenizer.json`` in a folder.

Settings that a configuration leaves out are the defaults of transformers' configuration classes, except biases, which
are read off the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import read_json, read_safetensors, reading
from .config import SUBSAMPLING, ASRConfig, ConformerConfig, PromptConfig, TransducerConfig
from .tokenizer import Source, Tokenizer

MODEL_TYPES = ("nemotron_asr_streaming", "nemotron3_5_asr")
LOOKAHEADS = (13, 6, 1, 0)
FIXED = {
    "hidden_act": "silu",
    "subsampling_factor": SUBSAMPLING,
    "subsampling_conv_kernel_size": 3,
    "subsampling_conv_stride": 2,
}


def read(folder: Path) -> tuple[ASRConfig, Tokenizer, dict[str, Tensor]]:
    """Configuration, tokenizer and weights under transformers' names. Raises CheckpointError."""
    settings = read_json(folder / "config.json")
    processor: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            processor |= read_json(folder / name)
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    weights = read_safetensors(folder)
    with reading(folder / "config.json"):
        config = config_from(settings, processor, generation, weights)
    with reading(folder / "tokenizer.json"):
        tokenizer = Tokenizer(Source("tokenizer.json", (folder / "tokenizer.json").read_bytes()))
    return config, tokenizer, weights


def config_from(
    settings: Mapping[str, Any],
    processor: Mapping[str, Any],
    generation: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> ASRConfig:
    """From ``config.json``, ``processor_config.json`` and ``generation_config.json``."""
    if settings.get("model_type") not in MODEL_TYPES:
        raise ValueError(f"model_type is {settings.get('model_type')!r}; known are {', '.join(MODEL_TYPES)}")
    encoder = _encoder_config(settings.get("encoder_config") or {}, processor, weights)
    labels = int(settings.get("vocab_size", weights["joint.head.weight"].shape[0])) - 1
    blank = int(settings.get("blank_token_id", labels))
    if blank != labels:
        raise ValueError(f"blank_token_id is {blank}; only the last of the {labels + 1} labels can be the blank")
    width = int(settings.get("decoder_hidden_size", 640))
    transducer = TransducerConfig(
        vocabulary=labels,
        encoder_width=encoder.width,
        width=width,
        layers=int(settings.get("num_decoder_layers", 2)),
        joint_width=width,
        max_symbols=int(settings.get("max_symbols_per_step") or generation.get("max_symbols_per_step") or 10),
    )
    return ASRConfig(
        encoder=encoder,
        vocabulary=labels,
        transducer=transducer,
        prompt=_prompt_config(settings, processor, weights),
        mel=_mel_settings(processor.get("feature_extractor") or processor, encoder.mels),
    )


def _encoder_config(
    settings: Mapping[str, Any], processor: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> ConformerConfig:
    for name, needed in FIXED.items():
        if settings.get(name, needed) != needed:
            raise ValueError(f"encoder_config.{name} is {settings[name]!r}; only {needed!r} is known")
    supported = processor.get("supported_num_lookahead_tokens") or settings.get("supported_num_lookahead_tokens")
    default = processor.get("default_num_lookahead_tokens") or settings.get("default_num_lookahead_tokens")
    lookaheads = [int(frames) for frames in supported or LOOKAHEADS]
    if default in lookaheads:
        lookaheads = [default, *lookaheads]
    layer = "encoder.layers.0."
    return ConformerConfig(
        mels=int(settings.get("num_mel_bins", 80)),
        width=int(settings.get("hidden_size", 1024)),
        layers=int(settings.get("num_hidden_layers", 24)),
        heads=int(settings.get("num_attention_heads", 8)),
        feedforward=int(settings.get("intermediate_size", 4096)),
        kernel=int(settings.get("conv_kernel_size", 9)),
        channels=int(settings.get("subsampling_conv_channels", 256)),
        left=int(settings.get("sliding_window", 71)) - 1,
        lookaheads=tuple(dict.fromkeys(lookaheads)),
        scale_input=bool(settings.get("scale_input", True)),
        bias=f"{layer}self_attn.q_proj.bias" in weights,
        conv_bias=f"{layer}conv.pointwise_conv1.bias" in weights,
        dropout=float(settings.get("dropout", 0.1)),
        attention_dropout=float(settings.get("attention_dropout", 0.1)),
    )


def _prompt_config(
    settings: Mapping[str, Any], processor: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> PromptConfig | None:
    first = weights.get("prompt_projector.linear_1.weight")
    if first is None:
        return None
    languages = {str(name): int(index) for name, index in (processor.get("prompt_dictionary") or {}).items()}
    default = int(settings.get("default_prompt_id", 101))
    name = next((name for name, index in languages.items() if index == default), None)
    if name is None:
        raise ValueError(f"prompt_dictionary of processor_config.json names no language of index {default}")
    return PromptConfig(languages, int(settings.get("num_prompts", 128)), first.shape[0], name)


def _mel_settings(extractor: Mapping[str, Any], mels: int) -> dict[str, Any]:
    """A feature extractor's settings under NeMo's names."""
    if int(extractor.get("feature_size", mels)) != mels:
        raise ValueError(f"feature_size is {extractor['feature_size']}, encoder_config.num_mel_bins is {mels}")
    if extractor.get("mel_filters_dtype", "float32") != "float32":
        raise ValueError(f"mel_filters_dtype is {extractor['mel_filters_dtype']!r}; only 'float32' is known")
    return {
        "sample_rate": int(extractor.get("sampling_rate", 16000)),
        "features": mels,
        "n_fft": int(extractor.get("n_fft", 512)),
        "n_window_size": int(extractor.get("win_length", 400)),
        "n_window_stride": int(extractor.get("hop_length", 160)),
        "preemph": float(extractor.get("preemphasis", 0.97)),
        "normalize": "NA",
    }
