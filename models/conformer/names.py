"""What weights are called in NeMo and in transformers' ``nemotron_asr_streaming``, and how they differ in shape.

We fuse the query, key and value projections and keep 1x1 convolutions as matrices; all else is renaming.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Name:
    """A module (or a bare parameter) of ours and what others call it; several names are stacked along dimension 0.

    shape: a weight's dimensions after the first, where others keep more of them than we do.
    """

    nemo: tuple[str, ...]
    hf: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()


def _same(name: str, shape: tuple[int, ...] = ()) -> Name:
    return Name((name,), (name,), shape)


_BLOCK = {
    "norm_before": _same("norm_feed_forward1"),
    "before.up": _same("feed_forward1.linear1"),
    "before.down": _same("feed_forward1.linear2"),
    "norm_attention": _same("norm_self_att"),
    "attention.qkv": Name(
        tuple(f"self_attn.linear_{part}" for part in "qkv"), tuple(f"self_attn.{part}_proj" for part in "qkv")
    ),
    "attention.out": Name(("self_attn.linear_out",), ("self_attn.o_proj",)),
    "attention.position": Name(("self_attn.linear_pos",), ("self_attn.relative_k_proj",)),
    "attention.bias_u": Name(("self_attn.pos_bias_u",), ("self_attn.bias_u",)),
    "attention.bias_v": Name(("self_attn.pos_bias_v",), ("self_attn.bias_v",)),
    "norm_conv": _same("norm_conv"),
    "conv.expand": _same("conv.pointwise_conv1", (-1, 1)),
    "conv.depthwise": _same("conv.depthwise_conv"),
    "conv.norm": Name(("conv.batch_norm",), ("conv.norm",)),
    "conv.project": _same("conv.pointwise_conv2", (-1, 1)),
    "norm_after": _same("norm_feed_forward2"),
    "after.up": _same("feed_forward2.linear1"),
    "after.down": _same("feed_forward2.linear2"),
    "norm_out": _same("norm_out"),
}
_REST = {
    "encoder.subsampling.first": Name(("encoder.pre_encode.conv.0",), ("encoder.subsampling.conv_in",), (1, 3, 3)),
    **{
        f"encoder.subsampling.{ours}.{stage}": Name(
            (f"encoder.pre_encode.conv.{2 + 3 * stage + offset}",),
            (f"encoder.subsampling.layers.{stage}.{ours}_conv",),
            shape,
        )
        for stage in range(2)
        for offset, (ours, shape) in enumerate((("depthwise", (1, 3, 3)), ("pointwise", (-1, 1, 1))))
    },
    "encoder.subsampling.linear": Name(("encoder.pre_encode.out",), ("encoder.subsampling.linear",)),
    "transducer.embedding": Name(("decoder.prediction.embed",), ("decoder.embedding",)),
    "transducer.lstm": Name(("decoder.prediction.dec_rnn.lstm",), ("decoder.lstm",)),
    "transducer.from_encoder": Name(("joint.enc",), ("encoder_projector",)),
    "transducer.from_prediction": Name(("joint.pred",), ("decoder.decoder_projector",)),
    "transducer.head": Name(("joint.joint_net.2",), ("joint.head",)),
    "ctc.linear": Name(("ctc_decoder.decoder_layers.0",), (), (-1, 1)),
    "prompt.first": Name(("prompt_kernel.0",), ("prompt_projector.linear_1",)),
    "prompt.second": Name(("prompt_kernel.2",), ("prompt_projector.linear_2",)),
}
_BLOCK_KEY = re.compile(r"encoder\.blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Layout:
    """One of the foreign layouts. ``changes``: prefixes that this checkpoint spells otherwise."""

    column: str  # "nemo" or "hf"
    changes: tuple[tuple[str, str], ...] = ()
    extra: tuple[str, ...] = ()  # prefixes of tensors that are no weights of ours and may be left out

    def names(self, key: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Our key -> their keys, and the shape of their weight after its first dimension (empty: as ours)."""
        block = _BLOCK_KEY.fullmatch(key)
        table, rest, prefix = (_BLOCK, block[2], f"encoder.layers.{block[1]}.") if block else (_REST, key, "")
        module, _, parameter = rest.rpartition(".")
        bare = table.get(rest)
        name = bare or table[module]
        suffix = "" if bare else f".{parameter}"
        theirs = [f"{prefix}{part}{suffix}" for part in getattr(name, self.column)]
        for old, new in self.changes:
            theirs = [new + part.removeprefix(old) if part.startswith(old) else part for part in theirs]
        return tuple(theirs), name.shape if parameter == "weight" else ()


HF = Layout("hf")


def nemo_layout(keys: Iterable[str]) -> Layout:
    """NeMo's layout as a checkpoint with these keys has it.

    The joint's last layer is numbered 1 where it was built without dropout, and a model with CTC alone calls its head
    the decoder.
    """
    keys = tuple(keys)
    changes = []
    if any(key.startswith("joint.joint_net.1.") for key in keys):
        changes.append(("joint.joint_net.2.", "joint.joint_net.1."))
    if any(key.startswith("decoder.decoder_layers.") for key in keys):
        changes.append(("ctc_decoder.", "decoder."))
    return Layout("nemo", tuple(changes), ("preprocessor.", "spec_augmentation.", "loss.", "joint._loss", "wer."))


def from_layout(theirs: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], layout: Layout) -> dict[str, Tensor]:
    """Their weights under our names.

    shapes: ours, of every weight that the configuration calls for.
    Raises ValueError naming weights that are missing, left over or of another shape than configured.
    """
    ours: dict[str, Tensor] = {}
    missing: list[str] = []
    used: set[str] = set()
    for key, shape in shapes.items():
        names, _ = layout.names(key)
        absent = [name for name in names if name not in theirs]
        if absent:
            if key.endswith("num_batches_tracked"):
                ours[key] = torch.zeros((), dtype=torch.int64)
            else:
                missing += absent
            continue
        used.update(names)
        parts = [theirs[name] for name in names]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        if len(shape) == 2 and value.dim() > 2:
            value = value.flatten(1)
        if value.shape != shape:
            raise ValueError(f"{names[0]} is {list(parts[0].shape)} where the configuration says {list(shape)}")
        ours[key] = value
    over = [name for name in theirs if name not in used and not name.startswith(layout.extra)]
    for problem, names_ in (("lacks", missing), ("has no place for", over)):
        if names_:
            more = f" and {len(names_) - 3} more" if len(names_) > 3 else ""
            raise ValueError(f"the configured model {problem} {', '.join(names_[:3])}{more}")
    return ours


def to_layout(ours: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our weights under their names and in their shapes."""
    theirs: dict[str, Tensor] = {}
    for key, value in ours.items():
        names, shape = layout.names(key)
        for name, part in zip(names, value.chunk(len(names)) if len(names) > 1 else (value,), strict=True):
            theirs[name] = part.reshape(len(part), *shape) if shape else part
    return theirs
