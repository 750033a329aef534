"""Moshi checkpoints by hub name or path: Kyutai's own layout, with its older spellings and 8 bits, and transformers'.

What we write is Kyutai's layout, which the ``moshi`` package reads too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .. import hub
from ..files import CheckpointError, read_json, read_safetensors, reading
from .config import MoshiConfig, read_config
from .lm import MoshiLM
from .names import from_theirs, halves_to_pairs, kyutai, modernise, to_theirs, transformers

WEIGHTS, WEIGHTS_8_BIT = "model.safetensors", "model.q8.safetensors"
MIMI = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER = "tokenizer_spm_32k_3.model"
CODEC = "mimi"  # folder of a codec in a layout of its own
HF_CODEC = "audio_encoder"  # a codec among the weights in transformers' layout: their prefix, and that of its settings
EMBEDDED = hub.EMBEDDED
MODEL_TYPE = "moshi"  # of a dialogue model in Kyutai's config.json; the embedded ones say so
PERSONAPLEX = "personaplex"  # of one that takes prompts
SHORT = {  # what people call them
    "moshiko": "kyutai/moshiko-pytorch-bf16",
    "moshika": "kyutai/moshika-pytorch-bf16",
    "moshiko-q8": "kyutai/moshiko-pytorch-q8",
    "moshika-q8": "kyutai/moshika-pytorch-q8",
    "personaplex": "nvidia/personaplex-7b-v1",
    "stt-1b-en_fr": "kyutai/stt-1b-en_fr",
    "stt-1b-en_fr-candle": "kyutai/stt-1b-en_fr-candle",  # the same, and the classifiers for pauses
    "stt-2.6b-en": "kyutai/stt-2.6b-en",
}


@dataclass(frozen=True)
class Files:
    """A checkpoint's folder and what is where. mimi: a file or a folder; None where it is among the model's weights."""

    folder: Path
    settings: Mapping[str, Any]
    weights: Path | None
    mimi: Path | None
    tokenizer: Path | None

    @property
    def transformers(self) -> bool:
        """Whether this is transformers' layout."""
        return self.settings.get("model_type") == "moshi" and "depth_decoder_config" in self.settings


def embedded() -> list[str]:
    """Names of the dialogue models that come with the package."""
    return hub.embedded(EMBEDDED, "model_type", MODEL_TYPE)


def find(name: str | PathLike[str]) -> Files:
    """The files of a checkpoint, fetched from the hub where needed.

    name: a folder, a hub name, or one of ``SHORT`` or ``embedded()``.
    Raises CheckpointError for what is nowhere or lacks its parts.
    """
    folder = EMBEDDED / name if name in embedded() else Path(name)
    if not folder.exists():
        known = SHORT.get(str(name), str(name))
        if known.count("/") != 1 or known.startswith(("/", ".", "~")):
            raise CheckpointError(f"no folder or checkpoint {name!r}; known are {', '.join((*embedded(), *SHORT))}")
        here = hub.cached(known)
        folder = here if here is not None and _complete(here) else hub.fetch(known, _choose)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a folder with {WEIGHTS} is wanted, this is a file")
    return _files(folder)


def _complete(folder: Path) -> bool:
    return any(folder.glob("model*.safetensors")) and any(
        path.suffix == ".model" or path.name == "tokenizer.json" for path in folder.glob("tokenizer*")
    )


def _choose(names: Sequence[str]) -> Sequence[str]:
    if not any(name.startswith("model") and name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"this repository holds no {WEIGHTS}: candle and MLX weights are not read")
    return ("*.json", "*.safetensors", "*.model")


def _files(folder: Path) -> Files:
    path = folder / "config.json"
    # Repositories from before there was a config.json hold Moshi 7B.
    settings = read_json(path) if path.is_file() else {}
    hf = "depth_decoder_config" in settings
    weights = None if hf else _named(folder, settings, "moshi_name", (WEIGHTS, WEIGHTS_8_BIT))
    mimi = None if hf else _named(folder, settings, "mimi_name", (MIMI,))
    if mimi is None and (folder / CODEC).is_dir():
        mimi = folder / CODEC
    tokenizer = _named(folder, settings, "tokenizer_name", (TOKENIZER, "tokenizer.model", "tokenizer.json"))
    return Files(folder, settings, weights, mimi, tokenizer)


def _named(folder: Path, settings: Mapping[str, Any], key: str, defaults: Sequence[str]) -> Path | None:
    """The file that a setting names, or else the first of the usual ones that is there."""
    names = [str(settings[key])] if settings.get(key) else defaults
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{folder / 'config.json'}: {key} is {names[0]!r}, not a file of its folder")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def load(
    name: str | PathLike[str] | Files,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    window: int | None = None,
    sinks: int = 0,
    prefill: int = 1,
    kv_dtype: torch.dtype | None = None,
) -> MoshiLM:
    """A language model, ready to stream.

    dtype: of the weights; None for bfloat16 on a GPU and float32 elsewhere. For the rest see ``MoshiConfig.changed``.
    Raises CheckpointError for files that are missing, damaged or of another kind.
    """
    files = name if isinstance(name, Files) else find(name)
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    if files.weights is None and not files.transformers:
        raise CheckpointError(f"{files.folder}: holds no {WEIGHTS}")
    theirs = _read(files)
    with reading(files.folder / "config.json"):
        config = (
            _hf_config(files.settings) if files.transformers else _with_heads(_kyutai_config(files.settings), theirs)
        )
    config = config.changed(window=window, sinks=sinks, prefill=prefill, kv_dtype=kv_dtype)
    with torch.device("meta"):
        lm = MoshiLM(config)
    shapes = {key: value.shape for key, value in lm.state_dict().items()}
    with reading(files.weights or files.folder):
        if files.transformers:
            ours = from_theirs(_turned(theirs, config), shapes, transformers(config), extra=f"{HF_CODEC}.")
        else:
            ours = from_theirs(modernise(theirs, config), shapes, kyutai(config))
    lm.load_state_dict({key: value.to(device=device, dtype=dtype) for key, value in ours.items()}, assign=True)
    lm.to(device).prepare()
    return lm


def save(folder: Path, lm: MoshiLM, settings: Mapping[str, Any], *, dtype: torch.dtype = torch.float16) -> None:
    """Write a model in Kyutai's layout.

    settings: of its ``config.json``. Raises ValueError where they do not describe this model.
    """
    if (config := _kyutai_config(settings)) != lm.config.changed():
        raise ValueError(f"these settings make {config}, the model is {lm.config}")
    folder.mkdir(parents=True, exist_ok=True)
    weights = to_theirs({key: value.detach().cpu().to(dtype) for key, value in lm.state_dict().items()}, kyutai(config))
    safetensors.torch.save_file({key: value.clone() for key, value in weights.items()}, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _read(files: Files) -> dict[str, Tensor]:
    if files.weights is None:
        return read_safetensors(files.folder)
    with reading(files.weights):
        return safetensors.torch.load_file(files.weights)


def _with_heads(config: MoshiConfig, theirs: Mapping[str, Tensor]) -> MoshiConfig:
    """With the classifiers that the weights have: some repositories' settings do not tell of them."""
    heads = [value for name, value in theirs.items() if name.startswith("extra_heads.") and name.endswith(".weight")]
    return dataclasses.replace(config, heads=(len(heads), len(heads[0]))) if heads else config


def _kyutai_config(settings: Mapping[str, Any]) -> MoshiConfig:
    if settings.get("model_type") == PERSONAPLEX:  # it predicts both sides of a conversation and speaks one
        settings = {**settings, "dep_q": 8}
    return read_config(settings)


def _hf_config(settings: Mapping[str, Any]) -> MoshiConfig:
    """From transformers' ``MoshiConfig``: it has Moshi 7B's delays and streams."""
    depth: Mapping[str, Any] = settings["depth_decoder_config"]
    books = int(settings.get("num_codebooks", 8))
    codec = settings.get(f"{HF_CODEC}_config") or {}
    lm = {
        "dim": settings.get("hidden_size", 4096),
        "text_card": settings.get("vocab_size", 32000),
        "n_q": 2 * books,
        "dep_q": books,
        "card": settings.get("audio_vocab_size") or codec.get("codebook_size", 2048),
        "num_heads": settings.get("num_attention_heads", 32),
        "num_layers": settings.get("num_hidden_layers", 32),
        "context": settings.get("sliding_window", 3000),
        "max_period": (settings.get("rope_parameters") or settings).get("rope_theta", 10000),
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "depformer_dim": depth.get("hidden_size", 1024),
        "depformer_num_heads": depth.get("num_attention_heads", 16),
        "depformer_num_layers": depth.get("num_hidden_layers", 6),
        "depformer_multi_linear": True,
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
        "delays": [0, *[0, *[1] * (books - 1)] * 2],
    }
    config = read_config(lm)
    for name, part in (("hidden_act", settings), ("hidden_act", depth)):
        if part.get(name, "silu") != "silu":
            raise ValueError(f"{name} is {part[name]!r}; only 'silu' is supported")
    assert config.depth is not None
    return dataclasses.replace(
        config,
        temporal=dataclasses.replace(config.temporal, feedforward=int(settings.get("ffn_dim", 22528)) // 2),
        depth=dataclasses.replace(
            config.depth,
            transformer=dataclasses.replace(config.depth.transformer, feedforward=int(depth.get("ffn_dim", 5632)) // 2),
        ),
    )


def _turned(theirs: Mapping[str, Tensor], config: MoshiConfig) -> dict[str, Tensor]:
    """Queries and keys of the temporal transformer, which transformers turns by halves, for turning in pairs."""
    heads = {"q_proj": config.temporal.heads, "k_proj": config.temporal.kv}
    turned = dict(theirs)
    for layer in range(config.temporal.layers):
        for part, count in heads.items():
            name = f"decoder.model.layers.{layer}.self_attn.{part}.linear.weight"
            if name in turned:
                turned[name] = halves_to_pairs(turned[name], count)
    return turned
