"""What weights are called by Kyutai's ``moshi`` package and by transformers, and how they differ in shape.

We keep one table for all streams' embeddings, stack what is per depth step, and project to all depth steps at once.
Kyutai's layout has older and newer spellings, and an 8-bit form; transformers' turns queries and keys by halves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import MoshiConfig


@dataclass(frozen=True)
class Weight:
    """One of our weights and what others call it or its parts.

    stacked: theirs are the entries of our first dimension; otherwise they follow each other along the last but one.
    sizes: lengths of theirs along it where they differ. shape: of theirs where it is not as in ours.
    """

    ours: str
    theirs: tuple[str, ...]
    stacked: bool = False
    sizes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    def join(self, parts: list[Tensor]) -> Tensor:
        """Ours from theirs, but for its shape."""
        if self.stacked:
            return torch.stack(parts)
        return torch.cat(parts, -2) if len(parts) > 1 else parts[0]

    def split(self, value: Tensor) -> list[Tensor]:
        """Theirs from ours."""
        if self.stacked:
            return list(value.unbind(0))
        if self.shape is not None:
            return [value.reshape(self.shape)]
        return list(value.split(self.sizes or value.shape[0] // len(self.theirs)))


def kyutai(config: MoshiConfig) -> Iterator[Weight]:
    """Every weight in the layout that the ``moshi`` package 0.2 writes."""
    streams = ("text_emb", *(f"emb.{index}" for index in range(config.codebooks)))
    yield Weight("embedding.weight", tuple(f"{name}.weight" for name in streams), sizes=_tables(config))
    yield from _norm("norm", "out_norm", config)
    yield Weight("text_head.weight", ("text_linear.weight",))
    if config.heads[0]:
        yield Weight("heads.weight", tuple(f"extra_heads.{index}.weight" for index in range(config.heads[0])))
    yield from _blocks("temporal", "transformer", config.temporal.layers, 0, config.temporal.gate, config)
    if (depth := config.depth) is None:
        return
    entries = 1 if depth.shared_input else depth.count
    yield Weight("depth.enter.weight", tuple(f"depformer_in.{index}.weight" for index in range(entries)))
    yield Weight("depth.heads.weight", tuple(f"linears.{index}.weight" for index in range(config.spoken)), True)
    tables = {"text": "depformer_text_emb"} | {
        f"audio.{index}": f"depformer_emb.{index}" for index in range(config.spoken - 1)
    }
    for ours, theirs in tables.items():
        yield Weight(f"depth.{ours}.weight", (f"{theirs}.weight",))
        if depth.low_rank is not None:
            yield Weight(f"depth.{ours}.project.weight", (f"{theirs}.low_rank.weight",))
    stack = depth.transformer
    yield from _blocks("depth.transformer", "depformer", stack.layers, stack.per_step, stack.gate, config)


def _blocks(ours: str, theirs: str, layers: int, sets: int, gate: bool, config: MoshiConfig) -> Iterator[Weight]:
    parts = {"attention.qkv": "self_attn.in_projs.{}", "attention.out": "self_attn.out_projs.{}"}
    many = ".{}" if sets else ""
    parts |= {
        f"feedforward.{name}": f"gating{many}.linear_{side}" if gate else f"linear{number}"
        for number, (name, side) in enumerate((("up", "in"), ("down", "out")), 1)
    }
    for layer in range(layers):
        for name, spelled in parts.items():
            names = tuple(f"{theirs}.layers.{layer}.{spelled.format(index)}.weight" for index in range(sets or 1))
            yield Weight(f"{ours}.blocks.{layer}.{name}.weight", names, bool(sets))
        for name in ("norm1", "norm2"):
            yield from _norm(f"{ours}.blocks.{layer}.{name}", f"{theirs}.layers.{layer}.{name}", config)


def _norm(ours: str, theirs: str, config: MoshiConfig) -> Iterator[Weight]:
    if config.temporal.norm == "rms":
        yield Weight(f"{ours}.weight", (f"{theirs}.alpha",), shape=(1, 1, -1))
    else:
        for name in ("weight", "bias"):
            yield Weight(f"{ours}.{name}", (f"{theirs}.{name}",))


def transformers(config: MoshiConfig) -> Iterator[Weight]:
    """Every weight in the layout of transformers' Moshi, whose queries and keys turn by halves."""
    streams = ("decoder.model.embed_tokens", *(f"embed_tokens.{index}" for index in range(config.codebooks)))
    yield Weight("embedding.weight", tuple(f"{name}.weight" for name in streams), sizes=_tables(config))
    yield Weight("norm.weight", ("decoder.model.norm.weight",))
    yield Weight("text_head.weight", ("decoder.lm_head.weight",))
    yield from _hf_blocks("temporal", "decoder.model", config.temporal.layers, ".linear")
    if config.depth is None:
        return
    yield Weight("depth.enter.weight", ("depth_decoder.input_projections.weight",))
    yield Weight("depth.heads.weight", ("depth_decoder.lm_heads.weight",))
    yield Weight("depth.text.weight", ("depth_decoder.text_embed_tokens.weight",))
    for index in range(config.spoken - 1):
        yield Weight(f"depth.audio.{index}.weight", (f"depth_decoder.embed_tokens.{index}.weight",))
    yield from _hf_blocks("depth.transformer", "depth_decoder", config.depth.transformer.layers, ".linear")


def _hf_blocks(ours: str, theirs: str, layers: int, suffix: str) -> Iterator[Weight]:
    names = {
        "attention.qkv": tuple(f"self_attn.{part}_proj{suffix}" for part in "qkv"),
        "attention.out": (f"self_attn.o_proj{suffix}",),
        "feedforward.up": ("mlp.fc1",),
        "feedforward.down": ("mlp.fc2",),
        "norm1": ("input_layernorm",),
        "norm2": ("post_attention_layernorm",),
    }
    for layer in range(layers):
        for name, parts in names.items():
            spelled = tuple(f"{theirs}.layers.{layer}.{part}.weight" for part in parts)
            yield Weight(f"{ours}.blocks.{layer}.{name}.weight", spelled)


def _tables(config: MoshiConfig) -> tuple[int, ...]:
    return (config.text_card + 1, *(config.card + 1,) * config.codebooks)


def from_theirs(
    theirs: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], weights: Iterable[Weight], *, extra: str = ""
) -> dict[str, Tensor]:
    """Their weights under our names.

    shapes: ours, of every weight. extra: prefix of tensors that belong to another model.
    Raises ValueError naming weights that are missing, left over or of another shape than configured.
    """
    ours: dict[str, Tensor] = {}
    missing: list[str] = []
    used: set[str] = set()
    for weight in weights:
        absent = [name for name in weight.theirs if name not in theirs]
        missing += absent
        if absent:
            continue
        used.update(weight.theirs)
        parts = [theirs[name] for name in weight.theirs]
        shape = shapes[weight.ours]
        if len({(len(part.shape), part.shape[-1]) for part in parts}) > 1:
            raise ValueError(f"{weight.theirs[0]} and those like it differ in width")
        value = weight.join(parts)
        if value.numel() != shape.numel() or value.shape[-1] != shape[-1]:
            raise ValueError(f"{weight.theirs[0]} is {list(parts[0].shape)}, which does not make up {list(shape)}")
        ours[weight.ours] = value.reshape(shape)
    over = [name for name in theirs if name not in used and not (extra and name.startswith(extra))]
    for problem, names in (("lacks", missing), ("has no place for", over)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"the configured model {problem} {', '.join(names[:3])}{more}")
    return ours


def to_theirs(ours: Mapping[str, Tensor], weights: Iterable[Weight]) -> dict[str, Tensor]:
    """Our weights under their names and in their shapes."""
    return {
        name: part.contiguous()
        for weight in weights
        for name, part in zip(weight.theirs, weight.split(ours[weight.ours]), strict=True)
    }


_PROJECTION = re.compile(r"(depformer|transformer)(.*\.self_attn)\.(in|out)_proj(?:_weight|\.weight)(_scb)?")
_STEP = re.compile(r"(depformer_in|depformer_emb|linears|depformer\..*\.(?:in_projs|out_projs|gating))\.(\d+)\..+")


def modernise(theirs: Mapping[str, Tensor], config: MoshiConfig) -> dict[str, Tensor]:
    """Any of Kyutai's spellings as the newest, in floating point.

    Projections of all depth steps in one tensor are split. 8-bit weights (``weight`` int8 with a row's largest
    magnitude in ``weight_scb``, as bitsandbytes has it) are scaled. A model that predicts the user's codebooks as well
    (PersonaPlex) loses the depth steps for those: what the user says is heard, not sampled, and they come last.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in theirs.items():
        if found := _PROJECTION.fullmatch(name):
            stack, middle, side, scale = found.groups(default="")
            rows = _rows(stack, side, config)
            for index, part in enumerate(value.split(rows)):
                tensors[f"{stack}{middle}.{side}_projs.{index}.weight{scale}"] = part
        else:
            tensors[name] = value
    for name in [name for name in tensors if name.endswith(".weight_scb")]:
        base, largest = name.removesuffix("_scb"), tensors.pop(name)
        if base not in tensors or tensors[base].dtype != torch.int8 or len(largest) != len(tensors[base]):
            raise ValueError(f"{name} is the scale of no 8-bit weight")
        tensors[base] = tensors[base].float() * (largest.float() / 127)[:, None]
    if f"linears.{config.codebooks - 1}.weight" in tensors and config.spoken < config.codebooks:
        tensors = {name: value for name, value in tensors.items() if not _heard(name, config.spoken)}
    return tensors


def _rows(stack: str, side: str, config: MoshiConfig) -> int:
    """Rows of one set of an attention projection."""
    if stack == "depformer" and config.depth is not None:
        transformer = config.depth.transformer
    else:
        transformer = config.temporal
    inner = transformer.heads * transformer.head
    return transformer.width if side == "out" else inner + 2 * transformer.kv * transformer.head


def _heard(name: str, spoken: int) -> bool:
    """Whether a weight serves only depth steps from ``spoken`` on."""
    step = _STEP.fullmatch(name)
    return step is not None and int(step[2]) >= spoken - (step[1] == "depformer_emb")


def halves_to_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection (``[heads * D, in]``) turned by halves, reordered to turn in pairs."""
    pairs: Tensor = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2)
    return pairs.reshape(weight.shape)
