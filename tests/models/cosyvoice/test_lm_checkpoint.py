"""The readers of ``llm.pt`` and of a whole checkpoint: every key of the published file, clear words for the rest."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from antiphon.models import hub
from antiphon.models.cosyvoice import checkpoint, flow_checkpoint
from antiphon.models.cosyvoice.checkpoint import find
from antiphon.models.cosyvoice.flow import FlowMatching
from antiphon.models.cosyvoice.flow_config import FlowConfig
from antiphon.models.cosyvoice.lm import SpeechLM
from antiphon.models.cosyvoice.lm_checkpoint import TEXT_HEAD, from_upstream, key_names, load
from antiphon.models.cosyvoice.lm_config import LMConfig
from antiphon.models.cosyvoice.tokenizer import END_OF_TEXT
from antiphon.models.files import CheckpointError

TINY = LMConfig(text=300, speech=20, width=16, layers=2, heads=4, kv_heads=2, feedforward=24, capacity=64)
PUBLISHED = Path(__file__).with_name("lm_keys.txt")
SETTINGS = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "use_sliding_window": False,
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}


def published() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of CosyVoice2-0.5B's ``llm.pt``; ``{0..n}`` in the list stands for each of these indices."""
    keys: dict[str, tuple[int, ...]] = {}
    for line in PUBLISHED.read_text().splitlines():
        name, shape = line.split()
        start, found, end = re.fullmatch(r"(.*?)(\{0\.\.\d+\})?((?<=\}).*)?", name).groups("")
        for index in range(int(found[4:-1]) + 1) if found else ("",):
            keys[f"{start}{index}{end}"] = tuple(map(int, shape.split("x")))
    return keys


def upstream(config: LMConfig = TINY) -> dict[str, Tensor]:
    """Random weights in upstream's layout, shaped after the published ones."""
    sizes = {
        151936: config.text, 6564: config.classes, 896: config.width, 4864: config.feedforward,
        128: config.kv_heads * config.width // config.heads,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn([sizes.get(size, size) for size in shape], generator=generator)
        for name, shape in published().items()
        if not (layer := re.search(r"layers\.(\d+)\.", name)) or int(layer[1]) < config.layers
    }


def test_the_published_file_is_read_to_the_last_key() -> None:
    keys = published()
    assert len(keys) == 295
    names = key_names(LMConfig())
    assert sorted([TEXT_HEAD, *itertools.chain(*names.values())]) == sorted(keys)
    with torch.device("meta"):
        lm = SpeechLM()
    assert round(sum(parameter.numel() for parameter in lm.parameters()) / 1e6, 1) == 505.8
    for ours, value in lm.state_dict().items():
        assert sum(math.prod(keys[theirs]) for theirs in names[ours]) == value.numel(), ours


def test_every_weight_goes_where_it_belongs(tmp_path: Path) -> None:
    weights = upstream()
    torch.save(weights, tmp_path / "llm.pt")
    lm = load(tmp_path / "llm.pt", TINY)
    assert not lm.training
    ours = lm.state_dict()
    assert torch.equal(ours["embedding.weight"][: TINY.classes], weights["speech_embedding.weight"])
    assert torch.equal(ours["embedding.weight"][TINY.start], weights["llm_embedding.weight"][0])
    assert torch.equal(ours["embedding.weight"][TINY.task], weights["llm_embedding.weight"][1])
    text = weights["llm.model.model.embed_tokens.weight"]
    assert torch.equal(ours["embedding.weight"][TINY.text_id(0) :], text)
    assert torch.equal(ours["embedding.weight"][TINY.text_id(7)], text[7])
    layer = "llm.model.model.layers.1"
    block = lm.transformer.blocks[1]
    assert torch.equal(block.attention.qkv.bias[16:24], weights[f"{layer}.self_attn.k_proj.bias"])
    assert torch.equal(block.feedforward.up.weight[24:], weights[f"{layer}.mlp.up_proj.weight"])
    assert torch.equal(block.norm2.weight, weights[f"{layer}.post_attention_layernorm.weight"])
    assert torch.equal(lm.head.weight, weights["llm_decoder.weight"])


@pytest.mark.parametrize("key", ["llm_decoder.bias", "llm.model.model.layers.1.mlp.up_proj.weight", TEXT_HEAD])
def test_a_missing_key_is_named(key: str) -> None:
    weights = upstream()
    del weights[key]
    with pytest.raises(ValueError, match=f"the language model lacks {re.escape(key)}"):
        from_upstream(weights, TINY)


def load_from(weights: dict[str, torch.Tensor], folder: Path) -> SpeechLM:
    torch.save(weights, folder / "llm.pt")
    return load(folder / "llm.pt", TINY)


def test_other_models_are_refused() -> None:
    weights = upstream()
    with pytest.raises(ValueError, match=r"has no place for llm\.model\.model\.layers\.2\.input_layernorm\.weight"):
        from_upstream(weights | {"llm.model.model.layers.2.input_layernorm.weight": torch.zeros(16)}, TINY)
    # As many rows in all, but shared out otherwise.
    moved = weights | {"speech_embedding.weight": torch.zeros(22, 16), "llm_embedding.weight": torch.zeros(3, 16)}
    with pytest.raises(ValueError, match=r"speech_embedding\.weight \[22, 16\]"):
        from_upstream(moved, TINY)
    del weights["llm_embedding.weight"]
    with pytest.raises(ValueError, match=r"both have 200 rows more .* as in CosyVoice 3"):
        from_upstream(weights, TINY)


def test_the_third_version_differs_in_where_its_special_tokens_are(tmp_path: Path) -> None:
    weights, speech = upstream(), TINY.speech
    second = load_from(weights, tmp_path)
    generator = torch.Generator().manual_seed(1)
    table, head = (torch.randn(speech + 200, TINY.width, generator=generator) for _ in range(2))
    for rows, name in ((table, "speech_embedding.weight"), (head, "llm_decoder.weight")):
        rows[:speech] = weights[name][:speech]
        rows[speech + 1], rows[speech + 3] = weights[name][speech], weights[name][speech + 2]  # end, fill
    table[speech], table[speech + 2] = weights["llm_embedding.weight"]
    third = {name: value for name, value in weights.items() if name not in ("llm_embedding.weight", "llm_decoder.bias")}
    made = load_from(third | {"speech_embedding.weight": table, "llm_decoder.weight": head}, tmp_path)
    assert made.config == second.config
    tokens = torch.tensor([[TINY.start, TINY.text_id(5), TINY.text_id(2), TINY.task, 3, 7, 1]])
    with torch.no_grad():
        expected = second(tokens) - second.head.bias
        drawn = [*range(speech), TINY.end, TINY.fill]
        torch.testing.assert_close(made(tokens)[..., drawn], expected[..., drawn])


def test_bad_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "llm.pt"
    with pytest.raises(CheckpointError, match=r"llm\.pt: "):
        load(path, TINY)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds no mapping of names to tensors"):
        load(path, TINY)
    torch.save({"weight": Path("x")}, path)
    with pytest.raises(CheckpointError, match="holds more than weights"):
        load(path, TINY)


# ---------------------------------------------------------------- a whole checkpoint

BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]


def write(folder: Path) -> Path:
    """A tiny checkpoint; its vocoder and ONNX files are empty: nothing here reads them."""
    (folder / "CosyVoice-BlankEN").mkdir(parents=True)
    torch.save(upstream(), folder / "llm.pt")
    for name in ("hift.pt", "speech_tokenizer_v2.onnx", "campplus.onnx", "flow.pt"):
        (folder / name).write_bytes(b"")
    # The 256 bytes as byte-level BPE spells them, one pair, and the end of text.
    others = [chr(256 + index) for index in range(256 - len(BYTES))]
    vocabulary = [*map(chr, BYTES), *others, "th", END_OF_TEXT]
    numbered = {token: index for index, token in enumerate(vocabulary)}
    (folder / "CosyVoice-BlankEN/vocab.json").write_text(json.dumps(numbered), encoding="utf-8")
    (folder / "CosyVoice-BlankEN/merges.txt").write_text("#version: 0.2\nt h\n", encoding="utf-8")
    (folder / "CosyVoice-BlankEN/config.json").write_text(json.dumps(SETTINGS))
    return folder


def test_a_checkpoint_is_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "voice")
    with torch.device("meta"):
        flow = FlowMatching(FlowConfig(vocabulary=20, width=16, heads=2, channels=8)).to_empty(device="cpu")
    asked = []
    monkeypatch.setattr(flow_checkpoint, "load", lambda path: asked.append(path) or flow)
    made = checkpoint.load(folder, capacity=128, kept=torch.bfloat16)
    assert asked == [folder / "flow.pt"]
    assert made.files.hift == folder / "hift.pt"
    assert (made.lm.config.text, made.lm.config.layers, made.lm.config.theta) == (300, 2, 1e6)
    assert made.lm.config.capacity == 128
    assert made.lm.state_spec()["lm.rings"].dtype == torch.bfloat16
    assert made.lm.head.weight.dtype == torch.float32
    assert made.tokenizer.end_of_prompt == made.tokenizer.encode("<|endofprompt|>")[0] == 260
    half = checkpoint.load(folder, dtype=torch.bfloat16)
    assert half.lm.head.weight.dtype == half.flow.dtype == torch.bfloat16
    flow.config = FlowConfig()
    with pytest.raises(CheckpointError, match="20 speech tokens, the flow reads 6561"):
        checkpoint.load(folder)


def test_what_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "voice")
    (folder / "campplus.onnx").unlink()
    (folder / "CosyVoice-BlankEN/merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"lacks campplus\.onnx, CosyVoice-BlankEN/merges\.txt"):
        find(folder)
    with pytest.raises(CheckpointError, match=r"a folder with llm\.pt"):
        find(folder / "llm.pt")
    with pytest.raises(CheckpointError, match="no folder or checkpoint 'nowhere'"):
        find("nowhere")


def test_cosyvoice_3_is_known_and_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "voice")
    (folder / "cosyvoice3.yaml").write_text("")
    with pytest.raises(CheckpointError, match=r"holds cosyvoice3\.yaml; of CosyVoice 3 only .* not its flow"):
        find(folder)


def test_the_hub_is_asked_for_what_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "voice")
    wanted = [str(path.relative_to(folder)) for path in folder.rglob("*.*")]
    names = [*wanted, "llm.rl.pt", "CosyVoice-BlankEN/model.safetensors"]
    chosen: list[str] = []

    def fetch(name: str, choose: Callable[[list[str]], list[str]]) -> Path:
        assert name == checkpoint.DEFAULT
        chosen.extend(choose(names))
        return folder

    monkeypatch.setattr(hub, "cached", lambda name: None)
    monkeypatch.setattr(hub, "fetch", fetch)
    assert find().lm == folder / "llm.pt"
    assert set(chosen) == set(wanted)
    for held, message in ((["cosyvoice3.yaml"], "use FunAudioLLM/CosyVoice2-0.5B"), (["llm.pt"], r"holds no flow\.pt")):
        names[:] = held
        with pytest.raises(CheckpointError, match=message):
            find()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, 'model_type is "llama"'),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"hidden_size": 15}, "width 15"),
        ({"rms_norm_eps": None}, r"config\.json"),
    ],
)
def test_another_backbone_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = write(tmp_path / "voice")
    (folder / "CosyVoice-BlankEN/config.json").write_text(json.dumps(SETTINGS | change))
    with pytest.raises(CheckpointError, match=message):
        find(folder).lm_config()


def test_more_tokens_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "voice")
    (folder / "CosyVoice-BlankEN/config.json").write_text(json.dumps(SETTINGS | {"vocab_size": 270}))
    with pytest.raises(CheckpointError, match="277 tokens, but the language model reads 270"):
        checkpoint.load(folder)
