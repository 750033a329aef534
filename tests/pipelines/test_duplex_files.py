"""A dialogue model in transformers' layout, which holds its codec among its own weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from tiny_duplex import MIMI, tiny_lm, tiny_mimi, tokenizer_bytes
from tiny_moshi import CARD, TEXT, WINDOW

from antiphon.codecs.mimi import Whole
from antiphon.codecs.mimi_names import to_layout
from antiphon.models.files import CheckpointError
from antiphon.models.moshi.names import transformers
from antiphon.pipelines import duplex

SETTINGS = {
    "model_type": "moshi",
    "vocab_size": TEXT,
    "audio_vocab_size": CARD,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 2 * 88,
    "sliding_window": WINDOW,
    "depth_decoder_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 2 * 44},
    "audio_encoder_config": {
        "num_filters": MIMI["channels"],
        "hidden_size": MIMI["width"],
        "num_hidden_layers": MIMI["layers"],
        "num_attention_heads": MIMI["heads"],
        "num_key_value_heads": MIMI["heads"],
        "intermediate_size": MIMI["feedforward"],
        "sliding_window": MIMI["window"],
        "num_quantizers": MIMI["codebooks"],
        "codebook_size": MIMI["bins"],
        "codebook_dim": MIMI["code_width"],
        "vector_quantization_hidden_dimension": MIMI["code_width"],
        "upsample_groups": MIMI["width"],
    },
}


def halves(weight: Tensor, heads: int = 4) -> Tensor:
    """A projection that turns in pairs, for turning by halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lm, mimi = tiny_lm(), tiny_mimi()
    ours, weights = lm.state_dict(), {}
    for weight in transformers(lm.config):
        value = ours[weight.ours]
        parts = value.split(weight.sizes or value.shape[-2] // len(weight.theirs), -2) if value.dim() > 1 else [value]
        weights |= zip(weight.theirs, parts, strict=True)
    steps = "depth_decoder.input_projections.weight"
    weights[steps] = weights[steps].unflatten(0, (8, -1))
    for name in weights:
        if name.startswith("decoder.model.layers.") and name.endswith(("q_proj.linear.weight", "k_proj.linear.weight")):
            weights[name] = halves(weights[name])
    codec = to_layout(mimi.state_dict(), mimi.config, "transformers")
    weights |= {f"audio_encoder.{name}": value for name, value in codec.items()}
    files = {"1.safetensors": {}, "2.safetensors": {}}
    for index, (name, value) in enumerate(sorted(weights.items())):
        files[f"{1 + index % 2}.safetensors"][name] = value.clone(memory_format=torch.contiguous_format)
    for name, tensors in files.items():
        safetensors.torch.save_file(tensors, tmp_path / name)
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    return tmp_path


def test_codec_and_language_model_come_back(folder: Path) -> None:
    model = duplex.load(folder)
    assert model.decoder is not None
    for ours, made in ((model.lm, tiny_lm()), (model.encoder.network, tiny_mimi().encoder)):
        again = ours.state_dict()
        for name, value in made.state_dict().items():
            assert torch.equal(again[name], value), name
    assert model.encoder.config == tiny_mimi().config
    pcm = 0.1 * torch.randn(1, 5 * model.frame, generator=torch.Generator().manual_seed(0))
    codes = tiny_mimi().encode(pcm)
    assert torch.equal(model.encoder.quantizer.encode(tiny_mimi().encoder(pcm, Whole()), 8), codes)
    assert torch.equal(model.decoder.quantizer.decode(codes), tiny_mimi().quantizer.decode(codes))


def test_a_codec_that_is_not_there_or_not_whole(folder: Path) -> None:
    path = folder / "1.safetensors"
    whole = safetensors.torch.load_file(path)
    lost = next(name for name in whole if name.startswith("audio_encoder."))
    safetensors.torch.save_file({name: value for name, value in whole.items() if name != lost}, path)
    with pytest.raises(CheckpointError, match=f"lacks {lost.removeprefix('audio_encoder.')}"):
        duplex.load(folder)
    for file in ("1.safetensors", "2.safetensors"):
        rest = safetensors.torch.load_file(folder / file)
        rest = {name: value for name, value in rest.items() if not name.startswith("audio_encoder.")}
        safetensors.torch.save_file(rest, folder / file)
    with pytest.raises(CheckpointError, match="holds no codec: no weight's name begins with audio_encoder"):
        duplex.load(folder)
