"""What Mimi's weights are called by Kyutai and by transformers, and how theirs differ in shape.

Transformers halves its heads' rotary pairs where Kyutai interleaves them, so rows of its query and key projections are
in another order. Both keep codebooks as sums and usages, of which we keep the quotient, and 1x1 convolutions where we
keep matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from .mimi_config import MimiConfig

Layout = Literal["kyutai", "transformers"]
Names = dict[str, list[str]]

LEAST_USAGE = 1e-5
_BLOCK = {
    "norm1": ("norm1", "input_layernorm"),
    "norm2": ("norm2", "post_attention_layernorm"),
    "attention.out": ("self_attn.out_proj", "self_attn.o_proj"),
    "feedforward.up": ("linear1", "mlp.fc1"),
    "feedforward.down": ("linear2", "mlp.fc2"),
    "scale1": ("layer_scale_1.scale", "self_attn_layer_scale.scale"),
    "scale2": ("layer_scale_2.scale", "mlp_layer_scale.scale"),
}
_BRANCHES = {
    "semantic": ("rvq_first", "semantic_residual_vector_quantizer"),
    "acoustic": ("rvq_rest", "acoustic_residual_vector_quantizer"),
}
_CODEBOOK = {
    "kyutai": ("vq.layers.{}._codebook.embedding_sum", "cluster_usage", "_initialized"),
    "transformers": ("layers.{}.codebook.embed_sum", "cluster_usage", "initialized"),
}
# Other spellings of the same: the moshi package splits attention by depth step, transformers 5.23 regroups modules.
_SPELLINGS = (
    (".self_attn.in_projs.0.weight", ".self_attn.in_proj_weight"),
    (".self_attn.out_projs.0.weight", ".self_attn.out_proj.weight"),
    ("encoder.encoder_seanet.", "encoder."),
    ("decoder.decoder_seanet.", "decoder."),
    ("encoder.encoder_transformer.", "encoder_transformer."),
    ("decoder.decoder_transformer.", "decoder_transformer."),
    ("encoder.downsample.", "downsample."),
    ("decoder.upsample.", "upsample."),
)


def layout_of(weights: Mapping[str, Tensor]) -> Layout | None:
    """Whose names these are; None for neither's."""
    keys = set(map(common, weights))
    if "encoder.model.0.conv.conv.weight" in keys:
        return "kyutai"
    return "transformers" if "encoder.layers.0.conv.weight" in keys else None


def common(name: str) -> str:
    """The spelling of a name that :func:`names` knows."""
    for old, new in _SPELLINGS:
        if name.startswith(old) or (old.startswith(".") and name.endswith(old)):
            return name.replace(old, new)
    return name


def names(config: MimiConfig, keys: Mapping[str, object], layout: Layout) -> Names:
    """Our weights -> the tensors they are made of.

    keys: ours. A codebook is made of three tensors, sums, usages and whether it was ever used; in transformers' layout
    ``attention.qkv`` of queries, keys and values; all else is one for one.
    """
    column = 0 if layout == "kyutai" else 1
    modules = {ours: theirs[column] for ours, *theirs in (*_seanet(config), *_rest(config))}
    found: Names = {}
    for key in keys:
        module, _, parameter = key.rpartition(".")
        if key in modules:
            found[key] = [modules[key]]
        elif module.endswith(".codebooks"):
            branch = modules[module.removesuffix(".codebooks")]
            count = config.semantic if ".semantic." in key else config.codebooks - config.semantic
            sums, *others = _CODEBOOK[layout]
            found[key] = []
            for index in range(count):
                first = f"{branch}.{sums.format(index)}"
                found[key] += [first, *(f"{first.rpartition('.')[0]}.{other}" for other in others)]
        elif module.endswith(".qkv"):
            block = modules[module.removesuffix(".attention.qkv")]
            parts = ["in_proj_weight"] if layout == "kyutai" else [f"{part}_proj.weight" for part in "qkv"]
            found[key] = [f"{block}.self_attn.{part}" for part in parts]
        else:
            found[key] = [f"{modules[module]}.{parameter}"]
    return found


def _seanet(config: MimiConfig) -> Iterator[tuple[str, str, str]]:
    """Their modules are numbered with the activations between them."""
    stages = len(config.ratios)
    unit = config.residuals + 2
    last = stages * unit + 2
    for side, convolution, resample, residual in (
        ("encoder", "conv.conv", config.residuals + 2, 1),
        ("decoder", "convtr.convtr", 2, 3),
    ):
        ours = f"{side}.seanet"
        for name, index in (("first", 0), ("last", last)):
            yield f"{ours}.{name}", f"{side}.model.{index}.conv.conv", f"{side}.layers.{index}.conv"
        for stage in range(stages):
            index = stage * unit + resample
            yield (
                f"{ours}.stages.{stage}.resample",
                f"{side}.model.{index}.{convolution}",
                f"{side}.layers.{index}.conv",
            )
            for number in range(config.residuals):
                index = stage * unit + residual + number
                for name, step in (("narrow", 1), ("widen", 3)):
                    yield (
                        f"{ours}.stages.{stage}.residuals.{number}.{name}",
                        f"{side}.model.{index}.block.{step}.conv.conv",
                        f"{side}.layers.{index}.block.{step}.conv",
                    )


def _rest(config: MimiConfig) -> Iterator[tuple[str, str, str]]:
    yield "encoder.downsample", "downsample.conv.conv.conv", "downsample.conv"
    yield "decoder.upsample", "upsample.convtr.convtr.convtr", "upsample.conv"
    for side in ("encoder", "decoder"):
        for layer in range(config.layers):
            block = f"{side}.transformer.blocks.{layer}"
            kyutai = f"{side}_transformer.transformer.layers.{layer}"
            hf = f"{side}_transformer.layers.{layer}"
            yield block, kyutai, hf
            for name, (theirs, others) in _BLOCK.items():
                yield f"{block}.{name}", f"{kyutai}.{theirs}", f"{hf}.{others}"
    for branch, both in _BRANCHES.items():
        kyutai, hf = (f"quantizer.{name}" for name in both)
        yield f"quantizer.{branch}", kyutai, hf
        yield f"quantizer.{branch}.into", f"{kyutai}.input_proj", f"{hf}.input_proj"
        yield f"quantizer.{branch}.back", f"{kyutai}.output_proj", f"{hf}.output_proj"


def from_layout(
    theirs: Mapping[str, Tensor], config: MimiConfig, shapes: Mapping[str, torch.Size], layout: Layout
) -> dict[str, Tensor]:
    """Their weights under our names.

    shapes: ours, of every weight that the configuration calls for.
    Raises ValueError naming weights that are missing, left over or of another shape than configured.
    """
    left = {common(name): value for name, value in theirs.items()}
    ours: dict[str, Tensor] = {}
    missing: list[str] = []
    for key, parts in names(config, shapes, layout).items():
        absent = [name for name in parts if name not in left]
        missing += absent
        if not absent:
            values = [left.pop(name) for name in parts]
            ours[key] = _join(key, values, config, layout)
            if ours[key].shape != shapes[key]:
                got = list(values[0].shape)
                raise ValueError(f"{parts[0]} is {got} where the configuration makes {key} {list(shapes[key])}")
    for problem, which in (("lacks", missing), ("has no place for", list(left))):
        if which:
            more = f" and {len(which) - 3} more" if len(which) > 3 else ""
            raise ValueError(f"the configured codec {problem} {', '.join(which[:3])}{more}")
    return ours


def to_layout(ours: Mapping[str, Tensor], config: MimiConfig, layout: Layout) -> dict[str, Tensor]:
    """Our weights under their names and in their shapes, in their older spelling. Usages are one."""
    theirs: dict[str, Tensor] = {}
    for key, parts in names(config, ours, layout).items():
        theirs |= zip(parts, _split(key, ours[key], config, layout), strict=True)
    return theirs


def _join(key: str, parts: list[Tensor], config: MimiConfig, layout: Layout) -> Tensor:
    if key.endswith(".codebooks.embedding"):
        pairs = zip(parts[::3], parts[1::3], strict=True)
        return torch.stack([sums / usage.clamp(min=LEAST_USAGE)[:, None] for sums, usage in pairs])
    if layout == "transformers" and key.endswith(".qkv.weight"):
        query, key_, value = parts
        return torch.cat((*(_reorder(rows, config.heads, True) for rows in (query, key_)), value))
    return parts[0].flatten(1) if key.endswith((".into.weight", ".back.weight")) else parts[0]


def _split(key: str, value: Tensor, config: MimiConfig, layout: Layout) -> list[Tensor]:
    if key.endswith(".codebooks.embedding"):
        return [part for sums in value for part in (sums, sums.new_ones(len(sums)), sums.new_ones(1))]
    if layout == "transformers" and key.endswith(".qkv.weight"):
        query, key_, value = value.chunk(3)
        return [*(_reorder(rows, config.heads, False) for rows in (query, key_)), value]
    return [value[..., None] if key.endswith((".into.weight", ".back.weight")) else value]


def _reorder(rows: Tensor, heads: int, interleave: bool) -> Tensor:
    """Rows of a projection to rotary pairs side by side, or to the halves of a head."""
    shape = (heads, 2, -1, rows.shape[1]) if interleave else (heads, -1, 2, rows.shape[1])
    return rows.view(shape).transpose(1, 2).reshape(rows.shape)
