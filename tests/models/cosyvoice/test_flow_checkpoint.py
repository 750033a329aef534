"""The reader of ``flow.pt``: every key of the published file, and nothing else."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from antiphon.models.cosyvoice.flow_checkpoint import from_upstream, key_names, load
from antiphon.models.cosyvoice.flow_config import FlowConfig
from antiphon.models.files import CheckpointError

TINY = FlowConfig(
    vocabulary=20, mels=8, speaker=6, width=16, heads=2, feedforward=24, layers=2, up_layers=1, channels=8,
    unet_heads=2, unet_head_width=4, stage_blocks=2, middle_stages=1, steps=2,
)  # fmt: skip
PUBLISHED = Path(__file__).with_name("flow_keys.txt")


def published() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of CosyVoice2-0.5B's ``flow.pt``; ``{0..n}`` in the list stands for each of these indices."""
    keys: dict[str, tuple[int, ...]] = {}
    for line in PUBLISHED.read_text().splitlines():
        name, shape = line.split()
        pattern = re.split(r"\{0\.\.(\d+)\}", name)
        choices = [[part] if place % 2 == 0 else map(str, range(int(part) + 1)) for place, part in enumerate(pattern)]
        for chosen in itertools.product(*choices):
            keys["".join(chosen)] = tuple(map(int, shape.split("x")))
    return keys


def upstream(config: FlowConfig = TINY) -> dict[str, Tensor]:
    """Random weights in upstream's layout, shaped after the published ones."""
    sizes = {6561: config.vocabulary, 80: config.mels, 192: config.speaker}
    generator = torch.Generator().manual_seed(0)
    names = {name for theirs in key_names(config).values() for name in theirs}
    weights = {}
    for name, shape in published().items():
        if name not in names:
            continue
        encoder = name.startswith(("encoder", "input"))
        inner = {512: config.width, 2048: config.feedforward} if encoder else {
            256: config.channels, 320: 4 * config.mels, 1024: 4 * config.channels,
            512: 2 * config.channels if "up_blocks.0.0" in name else config.unet_heads * config.unet_head_width,
        }  # fmt: skip
        small = [(sizes | inner).get(size, size) for size in shape]
        if name.endswith(("pos_bias_u", "pos_bias_v")):
            small = [config.heads, config.width // config.heads]
        weights[name] = torch.randn(small, generator=generator)
    assert len(weights) == len(names)
    return weights


def test_the_published_file_is_read_to_the_last_key() -> None:
    keys = published()
    assert len(keys) == 1121
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in keys.items()}
    ours = from_upstream(weights, FlowConfig())
    count = sum(math.prod(shape) for shape in keys.values())
    assert sum(value.numel() for value in ours.values()) == count == 112_549_360
    names = [name for theirs in key_names(FlowConfig()).values() for name in theirs]
    assert sorted(names) == sorted(keys)


def test_a_file_is_loaded(tmp_path: Path) -> None:
    weights = upstream()
    torch.save(weights, tmp_path / "flow.pt")
    flow = load(tmp_path / "flow.pt", TINY)
    assert not flow.training
    assert torch.equal(flow.speaker.weight, weights["spk_embed_affine_layer.weight"])
    conv = flow.estimator.stages[2].residual.conv1
    window = torch.randn(1, 3, conv.inputs)
    theirs = torch.nn.functional.conv1d(
        window.transpose(1, 2),
        weights["decoder.estimator.up_blocks.0.0.block1.block.0.weight"],
        weights["decoder.estimator.up_blocks.0.0.block1.block.0.bias"],
    )
    with torch.no_grad():
        assert torch.allclose(conv.along(window)[0], theirs[0].T, atol=1e-5)
    assert all(parameter.device.type == "cpu" for parameter in flow.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_proj.bias": None}, "lacks encoder_proj.bias"),
        ({"encoder.surplus": torch.zeros(1)}, "has no place for encoder.surplus"),
        ({"encoder_proj.bias": torch.zeros(9)}, r"encoder_proj.bias \[9\]: 8 values of encoder.project.bias \[8\]"),
        ({"encoder_proj.bias": "text"}, "no mapping of names to tensors"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    weights = {name: value for name, value in (upstream() | change).items() if value is not None}
    torch.save(weights, tmp_path / "flow.pt")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "flow.pt", TINY)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"input_embedding.weight": Touch()}, tmp_path / "flow.pt")
    with pytest.raises(CheckpointError, match="more than weights"):
        load(tmp_path / "flow.pt", TINY)
    assert not (tmp_path / "ran").exists()


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"flow\.pt"):
        load(tmp_path / "flow.pt")
    (tmp_path / "flow.pt").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match=r"flow\.pt"):
        load(tmp_path / "flow.pt")
