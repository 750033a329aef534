"""Reads the ``llm.pt`` of CosyVoice 2 and 3: names and shapes upstream against ours, strict on every key.

The text head (``lm_head``, tied to the text embedding) is known and left behind: the model speaks and does not write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..files import check_keys, read_pt, reading
from .lm import SpeechLM
from .lm_config import SPECIALS, LMConfig

TEXT_HEAD = "llm.model.lm_head.weight"
ROWS_OF_3 = 200
"""Rows of CosyVoice 3's tables behind the speech tokens; most are not used."""
_BACKBONE = "llm.model.model"
_BLOCK = {
    "norm1": ("input_layernorm",),
    "attention.qkv": tuple(f"self_attn.{part}_proj" for part in "qkv"),
    "attention.out": ("self_attn.o_proj",),
    "norm2": ("post_attention_layernorm",),
    "feedforward.up": ("mlp.gate_proj", "mlp.up_proj"),
    "feedforward.down": ("mlp.down_proj",),
}


def key_names(config: LMConfig) -> dict[str, tuple[str, ...]]:
    """Our weights and the keys of ``llm.pt`` that each is made of, stacked along dimension 0."""
    modules = {
        "embedding": ("speech_embedding", "llm_embedding", f"{_BACKBONE}.embed_tokens"),
        "norm": (f"{_BACKBONE}.norm",),
        "head": ("llm_decoder",),
    }
    for layer in range(config.layers):
        for ours, theirs in _BLOCK.items():
            modules[f"transformer.blocks.{layer}.{ours}"] = tuple(f"{_BACKBONE}.layers.{layer}.{n}" for n in theirs)
    names = {}
    for key in _empty(config).state_dict():
        module, _, parameter = key.rpartition(".")
        names[key] = tuple(f"{theirs}.{parameter}" for theirs in modules[module])
    return names


def from_upstream(weights: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Upstream's weights under our names and in our shapes.

    Raises ValueError naming keys that are missing, left over or of another shape than the configuration says.
    """
    weights = _as_version_2(weights)
    names = key_names(config)
    check_keys(weights, [TEXT_HEAD, *(name for theirs in names.values() for name in theirs)], "the language model")
    sizes = {"speech_embedding.weight": config.classes, f"{_BACKBONE}.embed_tokens.weight": config.text}
    ours: dict[str, Tensor] = {}
    for key, empty in _empty(config).state_dict().items():
        parts = [weights[name] for name in names[key]]
        rows = [sizes.get(name, len(part)) for name, part in zip(names[key], parts, strict=True)]
        fits = all(part.shape[1:] == empty.shape[1:] for part in parts) and rows == [len(part) for part in parts]
        if not fits or sum(rows) != len(empty):
            found = ", ".join(f"{name} {[*weights[name].shape]}" for name in names[key])
            raise ValueError(f"{found}: together they should make {key} {[*empty.shape]}")
        ours[key] = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    return ours


def _as_version_2(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """CosyVoice 3 has what is read first, the task, end and fill in rows behind the speech tokens, and a head without
    bias. Raises ValueError for a table without these rows."""
    tables = ("speech_embedding.weight", "llm_decoder.weight")
    if "llm_embedding.weight" in weights or any(name not in weights for name in tables):
        return weights
    embedding, head = (weights[name] for name in tables)
    speech = len(embedding) - ROWS_OF_3
    if speech < 1 or len(head) != len(embedding):
        raise ValueError(
            f"{tables[0]} {[*embedding.shape]} and {tables[1]} {[*head.shape]}: without llm_embedding.weight both have "
            f"{ROWS_OF_3} rows more than there are speech tokens, as in CosyVoice 3"
        )
    start, end, task, fill = range(speech, speech + 4)
    rows = [*range(speech), end, task, fill]  # the row between end and fill is never drawn
    made = {tables[0]: embedding[rows], "llm_embedding.weight": embedding[[start, task]], tables[1]: head[rows]}
    return {**weights, **made, "llm_decoder.bias": head.new_zeros(len(rows))}


def load(path: Path, config: LMConfig | None = None) -> SpeechLM:
    """The language model of an ``llm.pt``; config: its sizes, by default those of CosyVoice2-0.5B and its successor.

    How many speech tokens there are is the file's to say. It is read with ``weights_only``: nothing in it is run.
    Raises CheckpointError for a file that is missing, damaged, or of another model.
    """
    config = config or LMConfig()
    found = read_pt(path)
    with reading(path):
        weights = _as_version_2(found)
        if "speech_embedding.weight" in weights:
            config = dataclasses.replace(config, speech=len(weights["speech_embedding.weight"]) - SPECIALS)
        lm = _empty(config)
        lm.load_state_dict(from_upstream(weights, config), assign=True)
    return lm.eval()


def _empty(config: LMConfig) -> SpeechLM:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return SpeechLM(config)
