"""Reads the speech tokenizer's weights, strict on every key.

They come in the layout of the pip package ``s3tokenizer``, or in the publisher's ONNX file, which names them by the
operations that use them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..models.files import CheckpointError, check_keys, reading
from .speech_tokenizer import SpeechTokenizer, SpeechTokenizerConfig

_QUANTIZER = ("quantizer", "project_in", "onnx::MatMul_2536")  # what its operations and weights are called
_OURS, _THEIRS = "project_down.", "quantizer._codebook.project_down."


def from_upstream(weights: Mapping[str, Tensor], tokenizer: SpeechTokenizer) -> dict[str, Tensor]:
    """Their weights under our names.

    Raises ValueError naming keys that are missing, left over or of another shape than the configuration says.
    """
    wanted = {
        (_THEIRS + key.removeprefix(_OURS) if key.startswith(_OURS) else key): key for key in tokenizer.state_dict()
    }
    check_keys(weights.keys(), wanted, "the configured speech tokenizer")
    made = {ours: weights[theirs] for theirs, ours in wanted.items()}
    for key, value in tokenizer.state_dict().items():
        if made[key].shape != value.shape:
            raise ValueError(f"{key} is {[*made[key].shape]}, the configuration says {[*value.shape]}")
    return made


def from_onnx(path: Path) -> dict[str, Tensor]:
    """The weights of an ONNX file of the tokenizer, under the names of ``s3tokenizer``.

    Raises ImportError that says what to install, OSError, and ValueError for a file that is no ONNX model.
    """
    try:
        import onnx

        decode_error = importlib.import_module("google.protobuf.message").DecodeError
    except ImportError as error:
        raise ImportError("an .onnx file's weights are read by the package onnx: pip install onnx") from error
    try:
        graph = onnx.load(path).graph
    except decode_error as error:
        raise ValueError(f"no ONNX model ({error})") from error
    constants = {constant.name: constant for constant in graph.initializer}
    weights: dict[str, Tensor] = {}
    entrances = iter(("encoder.conv1", "encoder.conv2"))
    for node in graph.node:
        values = [
            torch.from_numpy(onnx.numpy_helper.to_array(constants[name]).copy())
            for name in node.input
            if name in constants
        ]
        if not values or not all(value.is_floating_point() for value in values):
            continue
        layer = ".".join(node.name.strip("/").split("/")[:-1])
        if any(mark in name for name in (layer, *node.input) for mark in _QUANTIZER):
            layer = _THEIRS.rstrip(".")
        elif layer.startswith("blocks."):
            layer = "encoder." + re.sub(r"\.mlp\.mlp\.", ".mlp.", layer)
        elif node.op_type == "Conv":
            layer = next(entrances, f"a third convolution, {node.name}")
        else:
            raise ValueError(f"the operation {node.name!r} has weights that a speech tokenizer has no place for")
        if node.op_type == "MatMul":
            weights[f"{layer}.weight"] = values[0].t().contiguous()
        elif node.op_type == "Add":
            weights[f"{layer}.bias"] = values[0]
        else:
            weights |= {f"{layer}.{name}": value for name, value in zip(("weight", "bias"), values, strict=False)}
    return weights


def load(path: Path, config: SpeechTokenizerConfig | None = None) -> SpeechTokenizer:
    """The network of a ``.safetensors``, ``.pt`` or ``.onnx`` file; config: its sizes, by default the published ones.

    A ``.pt`` is read with ``weights_only``: nothing in it is run. An ``.onnx`` needs the package onnx. Raises
    CheckpointError for a file that is missing, damaged, or of another model, and ImportError.
    """
    with reading(path):
        if path.suffix == ".onnx":
            weights = from_onnx(path)
        elif path.suffix == ".safetensors":
            weights = safetensors.torch.load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise CheckpointError(f"{path}: holds no mapping of names to tensors")
        tokenizer = SpeechTokenizer(config)
        tokenizer.load_state_dict(from_upstream(weights, tokenizer))
    return tokenizer.eval()
