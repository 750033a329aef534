"""Reads CosyVoice 2's ``flow.pt``: names and shapes upstream against ours, strict on every key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..files import check_keys, read_pt, reading
from .flow import FlowMatching
from .flow_config import FlowConfig
from .flow_layers import CausalConv

_ENCODER_BLOCK = {
    "norm1": "norm_mha",
    "attention.out": "self_attn.linear_out",
    "norm2": "norm_ff",
    "up": "feed_forward.w_1",
    "down": "feed_forward.w_2",
}
_RESIDUAL = {
    "conv1": "block1.block.0",
    "norm1": "block1.block.2",
    "time": "mlp.1",
    "conv2": "block2.block.0",
    "norm2": "block2.block.2",
    "skip": "res_conv",
}
_UNET_BLOCK = {"norm1": "norm1", "out": "attn1.to_out.0", "norm2": "norm3", "up": "ff.net.0.proj", "down": "ff.net.2"}
_REST = {
    "speaker": "spk_embed_affine_layer",
    "encoder.embedding": "input_embedding",
    "encoder.entrance.linear": "encoder.embed.out.0",
    "encoder.entrance.norm": "encoder.embed.out.1",
    "encoder.ahead": "encoder.pre_lookahead_layer.conv1",
    "encoder.behind": "encoder.pre_lookahead_layer.conv2",
    "encoder.upsample": "encoder.up_layer.conv",
    "encoder.up_entrance.linear": "encoder.up_embed.out.0",
    "encoder.up_entrance.norm": "encoder.up_embed.out.1",
    "encoder.norm": "encoder.after_norm",
    "encoder.project": "encoder_proj",
    "estimator.time1": "decoder.estimator.time_mlp.linear_1",
    "estimator.time2": "decoder.estimator.time_mlp.linear_2",
    "estimator.after_first": "decoder.estimator.down_blocks.0.2",
    "estimator.after_last": "decoder.estimator.up_blocks.0.2",
    "estimator.final": "decoder.estimator.final_block.block.0",
    "estimator.norm": "decoder.estimator.final_block.block.2",
    "estimator.project": "decoder.estimator.final_proj",
}


def module_names(config: FlowConfig) -> dict[str, tuple[str, ...]]:
    """Our modules (and bare parameters) and upstream's; several of theirs are stacked along dimension 0."""
    names: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _REST.items()}
    for prefix, layers in (("", config.layers), ("up_", config.up_layers)):
        for layer in range(layers):
            ours, theirs = f"encoder.{prefix}blocks.{layer}", f"encoder.{prefix}encoders.{layer}"
            names |= {f"{ours}.{part}": (f"{theirs}.{other}",) for part, other in _ENCODER_BLOCK.items()}
            names[f"{ours}.attention.qkv"] = tuple(f"{theirs}.self_attn.linear_{part}" for part in "qkv")
            names[f"{ours}.attention.position"] = (f"{theirs}.self_attn.linear_pos.weight",)
            for bias in "uv":
                names[f"{ours}.attention.bias_{bias}"] = (f"{theirs}.self_attn.pos_bias_{bias}",)
    middle = [f"mid_blocks.{index}" for index in range(config.middle_stages)]
    for index, stage in enumerate(["down_blocks.0", *middle, "up_blocks.0"]):
        ours, theirs = f"estimator.stages.{index}", f"decoder.estimator.{stage}"
        names |= {f"{ours}.residual.{part}": (f"{theirs}.0.{other}",) for part, other in _RESIDUAL.items()}
        for block in range(config.stage_blocks):
            mine, other = f"{ours}.blocks.{block}", f"{theirs}.1.{block}"
            names |= {f"{mine}.{part}": (f"{other}.{name}",) for part, name in _UNET_BLOCK.items()}
            names[f"{mine}.qkv"] = tuple(f"{other}.attn1.to_{part}" for part in "qkv")
    return names


def key_names(config: FlowConfig) -> dict[str, tuple[str, ...]]:
    """Our weights and the keys of ``flow.pt`` that each is made of."""
    modules = module_names(config)
    names = {}
    for key in _empty(config).state_dict():
        module, _, parameter = key.rpartition(".")
        bare = modules.get(key)
        names[key] = bare or tuple(f"{theirs}.{parameter}" for theirs in modules[module])
    return names


def from_upstream(weights: Mapping[str, Tensor], config: FlowConfig) -> dict[str, Tensor]:
    """Upstream's weights under our names and in our shapes.

    Raises ValueError naming keys that are missing, left over or of another shape than the configuration says.
    """
    network = _empty(config)
    names = key_names(config)
    wanted = {name for theirs in names.values() for name in theirs}
    check_keys(weights.keys(), wanted, "the configured flow")
    kernels = {
        f"{name}.weight": module.kernel for name, module in network.named_modules() if isinstance(module, CausalConv)
    }
    ours: dict[str, Tensor] = {}
    for key, empty in network.state_dict().items():
        parts = [weights[name] for name in names[key]]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        kernel = kernels.get(key, 1)
        if value.dim() == 3 and value.shape[2] == kernel:
            value = value.transpose(1, 2).flatten(1)
        elif key.endswith(".position") and value.dim() == 2:
            value = value.unflatten(0, (config.heads, -1))
        if value.shape != empty.shape:
            found = " and ".join(f"{name} {[*weights[name].shape]}" for name in names[key])
            raise ValueError(f"{found}: {math.prod(empty.shape)} values of {key} {[*empty.shape]} are expected")
        ours[key] = value.contiguous()
    return ours


def load(path: Path, config: FlowConfig | None = None) -> FlowMatching:
    """The flow of a ``flow.pt``; config: its sizes, by default those of CosyVoice2-0.5B.

    The file is read with ``weights_only``: nothing in it is run. Raises CheckpointError for a file that is missing,
    damaged, or of another model.
    """
    config = config or FlowConfig()
    weights = read_pt(path)
    flow = _empty(config)
    with reading(path):
        flow.load_state_dict(from_upstream(weights, config), assign=True)
    return flow.eval()


def _empty(config: FlowConfig) -> FlowMatching:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return FlowMatching(config)
