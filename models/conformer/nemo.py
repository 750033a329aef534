"""NeMo's ``.nemo`` archives: a tar of ``model_config.yaml``, ``model_weights.ckpt`` and a SentencePiece model.

Nothing in an archive is run or unpacked by its own name: members are read by what they are for, the weights by torch's
weights-only loader.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from torch import Tensor

from ..files import CheckpointError, reading
from .config import SUBSAMPLING, ASRConfig, ConformerConfig, PromptConfig, TransducerConfig
from .tokenizer import Source, Tokenizer

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
MOST_MEMBERS = 1000
MOST_BYTES = {CONFIG: 16 << 20, WEIGHTS: 64 << 30}
MOST_TOKENIZER_BYTES = 64 << 20
# What the encoder must be, with NeMo's defaults for what a configuration leaves out.
STREAMING = {
    "subsampling": ("striding", "dw_striding"),
    "subsampling_factor": (4, SUBSAMPLING),
    "causal_downsampling": (False, True),
    "self_attention_model": ("rel_pos", "rel_pos"),
    "att_context_style": ("regular", "chunked_limited"),
    "conv_context_size": (None, "causal"),
    "untie_biases": (True, True),
    "reduction": (None, None),
    "global_tokens": (0, 0),
}


def read(path: Path) -> tuple[ASRConfig, Tokenizer, dict[str, Tensor]]:
    """Configuration, tokenizer and weights under NeMo's names. Raises CheckpointError."""
    with reading(path), tarfile.open(path, "r:*") as archive:
        members = _members(archive, path)
        settings = yaml.safe_load(_bytes(archive, members, CONFIG, MOST_BYTES[CONFIG]))
        if not isinstance(settings, dict):
            raise CheckpointError(f"{path}: {CONFIG} holds no settings")
        weights = _weights(archive, members)
        model_file = str((settings.get("tokenizer") or {}).get("model_path") or "").removeprefix("nemo:")
        if not model_file:
            raise CheckpointError(f"{path}: names no SentencePiece model in tokenizer.model_path")
        content = _bytes(archive, members, model_file, MOST_TOKENIZER_BYTES)
        tokenizer = Tokenizer(Source("tokenizer.model", content))
        return config_from(settings, weights), tokenizer, weights


def _members(archive: tarfile.TarFile, path: Path) -> dict[str, tarfile.TarInfo]:
    """Regular files by name without a leading ``./``. Raises CheckpointError for names or kinds that could escape."""
    members: dict[str, tarfile.TarInfo] = {}
    for count, member in enumerate(archive):
        name = PurePosixPath(member.name)
        if count >= MOST_MEMBERS:
            raise CheckpointError(f"{path}: has more than {MOST_MEMBERS} members")
        if name.is_absolute() or ".." in name.parts or not (member.isreg() or member.isdir()):
            raise CheckpointError(f"{path}: member {member.name!r} points outside the archive; it was not read")
        if member.isreg():
            members[str(name)] = member
    return members


def _member(members: Mapping[str, tarfile.TarInfo], name: str, most: int) -> tarfile.TarInfo:
    if name not in members:
        raise ValueError(f"the archive has no {name}; it holds {', '.join(sorted(members)[:8]) or 'nothing'}")
    if members[name].size > most:
        raise ValueError(f"{name} says it has {members[name].size} bytes, more than {most}")
    return members[name]


def _bytes(archive: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], name: str, most: int) -> bytes:
    stream = archive.extractfile(_member(members, name, most))
    assert stream is not None  # a regular file
    return stream.read()


def _weights(archive: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo]) -> dict[str, Tensor]:
    """Through a temporary file, so that a compressed archive can be read in any order and memory is not taken twice."""
    stream = archive.extractfile(_member(members, WEIGHTS, MOST_BYTES[WEIGHTS]))
    assert stream is not None
    with tempfile.NamedTemporaryFile(suffix=".ckpt") as copy:
        shutil.copyfileobj(stream, copy, 1 << 20)
        copy.flush()
        loaded = torch.load(copy.name, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{WEIGHTS} is no table of tensors")
    return dict(loaded)


def config_from(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ASRConfig:
    """From ``model_config.yaml``; what it leaves out is read off the weights or is NeMo's default.

    Raises ValueError naming settings under which a model cannot stream.
    """
    joint = settings.get("joint")
    head = next((name for name in ("ctc_decoder", "decoder") if f"{name}.decoder_layers.0.weight" in weights), None)
    if head is not None:
        vocabulary = weights[f"{head}.decoder_layers.0.weight"].shape[0] - 1
    elif joint is not None:
        vocabulary = int(settings["decoder"]["vocab_size"])
    else:
        raise ValueError("neither a transducer (joint) nor a CTC head is configured")
    encoder = encoder_config_from(settings["encoder"], weights)
    mel = dict(settings.get("preprocessor") or {})
    if int(mel.get("features", encoder.mels)) != encoder.mels:
        raise ValueError(f"preprocessor.features is {mel['features']}, encoder.feat_in is {encoder.mels}")
    return ASRConfig(
        encoder=encoder,
        vocabulary=vocabulary,
        transducer=None if joint is None else _transducer_config(settings, encoder.width),
        ctc=head is not None,
        prompt=_prompt_config(settings, weights),
        mel=mel,
    )


def encoder_config_from(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ConformerConfig:
    """From the ``encoder`` section."""
    for name, (default, needed) in STREAMING.items():
        value = settings.get(name, default)
        if value != needed:
            raise ValueError(
                f"encoder.{name} is {value!r}: this model cannot stream frame by frame, which needs {needed!r}"
            )
    contexts = settings.get("att_context_size") or [-1, -1]
    if not isinstance(contexts[0], list):
        contexts = [contexts]
    left = {int(pair[0]) for pair in contexts}
    if len(left) != 1 or min(left) < 1:
        raise ValueError(f"encoder.att_context_size is {contexts}: streaming needs one finite left context")
    width = int(settings["d_model"])
    layer = "encoder.layers.0."
    uses_bias = settings.get("use_bias", f"{layer}self_attn.linear_q.bias" in weights)
    return ConformerConfig(
        mels=int(settings["feat_in"]),
        width=width,
        layers=int(settings["n_layers"]),
        heads=int(settings.get("n_heads", 4)),
        feedforward=int(width * settings.get("ff_expansion_factor", 4)),
        kernel=int(settings.get("conv_kernel_size", 31)),
        channels=_positive(settings.get("subsampling_conv_channels", -1), width),
        left=left.pop(),
        lookaheads=tuple(dict.fromkeys(int(pair[1]) for pair in contexts)),
        scale_input=bool(settings.get("xscaling", True)),
        bias=bool(uses_bias),
        conv_bias=bool(uses_bias),
        conv_norm=settings.get("conv_norm_type", "batch_norm"),
        dropout=float(settings.get("dropout", 0.1)),
        attention_dropout=float(settings.get("dropout_att", 0.0)),
    )


def _positive(value: int, otherwise: int) -> int:
    return int(value) if int(value) > 0 else otherwise


def _transducer_config(settings: Mapping[str, Any], encoder_width: int) -> TransducerConfig:
    network, joint = settings["decoder"]["prednet"], settings["joint"]["jointnet"]
    if joint.get("activation", "relu") != "relu":
        raise ValueError(f"joint.jointnet.activation is {joint['activation']!r}; only 'relu' is known")
    greedy = (settings.get("decoding") or {}).get("greedy") or {}
    return TransducerConfig(
        vocabulary=int(settings["decoder"]["vocab_size"]),
        encoder_width=encoder_width,
        width=int(network["pred_hidden"]),
        layers=int(network["pred_rnn_layers"]),
        joint_width=int(joint["joint_hidden"]),
        max_symbols=int(greedy.get("max_symbols") or greedy.get("max_symbols_per_step") or 10),
        dropout=float(joint.get("dropout") or 0.0),
    )


def _prompt_config(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> PromptConfig | None:
    first = weights.get("prompt_kernel.0.weight")
    if first is None:
        return None
    defaults = settings.get("model_defaults") or {}
    languages = {str(name): int(index) for name, index in (defaults.get("prompt_dictionary") or {}).items()}
    if not languages:
        raise ValueError("model_defaults.prompt_dictionary names no languages, yet the weights hold a prompt")
    return PromptConfig(
        languages=languages,
        count=int(settings.get("num_prompts") or defaults.get("num_prompts") or 128),
        hidden=first.shape[0],
        default="auto" if "auto" in languages else next(iter(languages)),
    )
