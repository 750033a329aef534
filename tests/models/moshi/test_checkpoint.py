"""Reading Moshi's files: what the network is, and what is said of files that are not one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_moshi import SETTINGS, Live, tiny_lm, user_codes

from antiphon.models.files import CheckpointError
from antiphon.models.moshi import checkpoint
from antiphon.models.moshi.config import read_config
from antiphon.models.moshi.lm import MoshiLM


def test_without_a_config_it_is_moshi_7b() -> None:
    config = read_config({})
    assert (config.temporal.feedforward, config.temporal.window, config.spoken, config.heard) == (11264, 3000, 8, 8)
    assert config.depth is not None
    assert config.depth.transformer.feedforward == 2816
    assert config.delays == (0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1)
    with torch.device("meta"):
        lm = MoshiLM(config)
    assert sum(parameter.numel() for parameter in lm.parameters()) == 7_687_729_152
    # 3000 steps of keys and values in bfloat16, and a few tokens.
    spec = lm.to(torch.bfloat16).state_spec()
    assert sum(one.bytes for one in spec.values()) == pytest.approx(3000 * 524_288, rel=1e-4)


def test_kyutais_speech_to_text_is_known() -> None:
    settings = {
        "dim": 2048,
        "text_card": 8000,
        "n_q": 32,
        "dep_q": 0,
        "card": 2048,
        "num_heads": 16,
        "num_layers": 16,
        "hidden_scale": 4.125,
        "context": 750,
        "max_period": 100000,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "depformer_dim": 1024,
        "depformer_num_heads": 16,
        "fuser": None,
        "delays": [0] * 33,
        "extra_heads_num_heads": 4,
        "model_type": "stt",
        "mimi_name": "mimi.safetensors",
        "stt_config": {"audio_delay_seconds": 0.5},
        "lm_gen_config": {"temp": 0.0, "temp_text": 0.0, "top_k": 250, "top_k_text": 50},
    }
    config = read_config(settings)
    assert config.depth is None
    assert (config.heard, config.delay, config.heads) == (32, 0, (4, 6))
    assert (config.sampling.text_temperature, config.sampling.text_top_k) == (0.0, 50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fuser": {"sum": ["description"]}}, "fuser"),
        ({"demux_second_stream": True}, "demux_second_stream"),
        ({"gating": "tanh"}, "gating 'tanh'"),
        ({"delays": [0, 1]}, "17 streams"),
        ({"widht": 3}, "widht"),
        ({"depformer_weights_per_step_schedule": [0, 1]}, "schedule"),
        ({"context": None}, "context"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(SETTINGS | changes)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    lm, codes = tiny_lm(), user_codes(2, 5)
    checkpoint.save(tmp_path, lm, SETTINGS, dtype=torch.float32)
    again = checkpoint.load(tmp_path)
    left, right = Live(lm, 2), Live(again, 2)
    for frame in range(5):
        assert torch.equal(left.step(codes[..., frame])["sampled"], right.step(codes[..., frame])["sampled"])
    with pytest.raises(ValueError, match="settings make"):
        checkpoint.save(tmp_path, lm, SETTINGS | {"context": 9})
    chosen = checkpoint.load(tmp_path, window=6, sinks=2, prefill=3, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn)
    assert chosen.state_spec()["temporal.rings"].shape[-2] == 6 + 2 + 2
    assert chosen.state_spec()["temporal.rings"].dtype == torch.float8_e4m3fn
    assert Live(chosen, 2).step(codes[..., 0])["sampled"].shape == (2, 9)


def test_heads_are_found_and_idle_fusers_passed_over(tmp_path: Path) -> None:
    writes = {"n_q": 8, "dep_q": 0, "delays": [0] * 9}
    heads = {"extra_heads_num_heads": 4, "extra_heads_dim": 6}
    checkpoint.save(tmp_path, tiny_lm(**writes, **heads), SETTINGS | writes | heads)
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | writes | {"fuser": {"sum": [], "cross": []}}))
    assert checkpoint.load(tmp_path).config.heads == (4, 6)


def damage_missing(tensors: dict[str, Any]) -> None:
    del tensors["out_norm.alpha"]


def damage_extra(tensors: dict[str, Any]) -> None:
    tensors["transformer.layers.7.norm1.alpha"] = torch.ones(1, 1, 32)


def damage_shape(tensors: dict[str, Any]) -> None:
    tensors["text_linear.weight"] = torch.ones(36, 32)


def damage_width(tensors: dict[str, Any]) -> None:
    tensors["emb.3.weight"] = torch.ones(30, 31)


def damage_scale(tensors: dict[str, Any]) -> None:
    tensors["text_linear.weight_scb"] = torch.ones(37)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "lacks out_norm.alpha"),
        (damage_extra, "no place for transformer.layers.7"),
        (damage_shape, "text_linear.weight is"),
        (damage_width, "differ in width"),
        (damage_scale, "scale of no 8-bit weight"),
    ],
)
def test_wrong_weights_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    checkpoint.save(tmp_path, tiny_lm(), SETTINGS)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    damage(tensors)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"moshi_name": "../secret.safetensors"}))
    with pytest.raises(CheckpointError, match="not a file of its folder"):
        checkpoint.find(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        checkpoint.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="moshiko"):
        checkpoint.find("moshi")


def test_embedded_models_are_known_by_name_and_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EMBEDDED", tmp_path)
    assert checkpoint.embedded() == []
    for name, kind in (("a-recogniser", {"format": "antiphon-conformer-1"}), ("tiny-talk", {"model_type": "moshi"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(kind))
    assert checkpoint.embedded() == ["tiny-talk"]
    assert checkpoint.find("tiny-talk").folder == tmp_path / "tiny-talk"
    with pytest.raises(CheckpointError, match="known are tiny-talk, moshiko"):
        checkpoint.find("a-recogniser")
