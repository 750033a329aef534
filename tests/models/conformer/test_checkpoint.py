"""Checkpoints load from every layout; damaged and malicious ones are refused by name, and nothing in them runs."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from antiphon.models import hub as remote
from antiphon.models.conformer import hub
from antiphon.models.conformer.checkpoint import CheckpointError, load, save
from antiphon.models.conformer.config import ASRConfig, PromptConfig, TransducerConfig
from antiphon.models.conformer.model import ConformerASR
from antiphon.models.conformer.names import HF, nemo_layout, to_layout

MEL = {"sample_rate": 16000, "features": 20, "n_window_size": 400, "n_window_stride": 160, "normalize": "NA"}


@pytest.fixture
def config(kit, tokenizer):
    return ASRConfig(kit.config(), len(tokenizer), TransducerConfig(len(tokenizer), 32, 24, 2, 24), ctc=True, mel=MEL)


@pytest.fixture
def asr(config, tokenizer):
    return ConformerASR(config, tokenizer)


def same_weights(a: ConformerASR, b: ConformerASR, tolerance: float = 0.0) -> bool:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    return all(torch.allclose(left[key], right[key], rtol=tolerance, atol=tolerance) for key in left)


# Ours


def test_our_layout(asr, config, tokenizer, tmp_path):
    folder = tmp_path / "tiny"
    save(folder, config, asr.state_dict() | {"distil.weight": torch.zeros(3)}, tokenizer, "# Tiny\n")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.model",
    ]
    again = load(folder)
    assert again.config == config
    assert same_weights(again, asr, 1e-3)
    assert again.vocabulary.pieces == tokenizer.pieces
    assert again.dtype == torch.float32
    assert load(folder, dtype=torch.float64).dtype == torch.float64
    assert all(
        tensor.dtype == torch.float16 for tensor in safetensors.torch.load_file(folder / "model.safetensors").values()
    )


def test_what_cannot_be_saved(asr, config, tokenizer, tmp_path):
    weights = asr.state_dict()
    for key, value, match in (
        ("ctc.linear.bias", torch.zeros(2), r"ctc\.linear\.bias should be .* is \[2\]"),
        ("ctc.linear.bias", torch.full_like(weights["ctc.linear.bias"], 1e6), "float16"),
    ):
        with pytest.raises(ValueError, match=match):
            save(tmp_path, config, weights | {key: value}, tokenizer)
    del weights["ctc.linear.bias"]
    with pytest.raises(ValueError, match="missing"):
        save(tmp_path, config, weights, tokenizer)


def test_a_prompt_survives(kit, tokenizer, tmp_path):
    prompt = PromptConfig({"auto": 5, "en-US": 0, "de": 2}, 6, 12)
    config = ASRConfig(kit.config(), len(tokenizer), ctc=True, prompt=prompt)
    asr = ConformerASR(config, tokenizer)
    save(tmp_path, config, asr.state_dict(), tokenizer)
    again = load(tmp_path)
    assert again.prompt.index(None) == 5
    assert again.prompt.index("de") == 2
    with pytest.raises(ValueError, match="'en-us'; did you mean en-US"):
        again.prompt.index("en-us")
    frames = torch.randn(2, 3, 32)
    with torch.no_grad():
        mixed = again.prompt(frames, torch.tensor([0, 2]))
        choice = torch.nn.functional.one_hot(torch.tensor([0, 2]), 6)[:, None].expand(-1, 3, -1).float()
        hidden = torch.relu(again.prompt.first(torch.cat((frames, choice), 2)))
        assert torch.equal(mixed, again.prompt.second(hidden))


# NeMo


def nemo_settings(config: ASRConfig) -> dict:
    encoder, transducer = config.encoder, config.transducer
    return {
        "preprocessor": dict(config.mel),
        "encoder": {
            "feat_in": encoder.mels,
            "n_layers": encoder.layers,
            "d_model": encoder.width,
            "subsampling": "dw_striding",
            "subsampling_factor": 8,
            "subsampling_conv_channels": encoder.channels,
            "causal_downsampling": True,
            "ff_expansion_factor": encoder.feedforward / encoder.width,
            "n_heads": encoder.heads,
            "att_context_size": [[encoder.left, lookahead] for lookahead in encoder.lookaheads],
            "att_context_style": "chunked_limited",
            "xscaling": False,
            "conv_kernel_size": encoder.kernel,
            "conv_norm_type": "layer_norm",
            "conv_context_size": "causal",
            "dropout_att": 0.1,
        },
        "decoder": {
            "vocab_size": config.vocabulary,
            "prednet": {"pred_hidden": transducer.width, "pred_rnn_layers": transducer.layers},
        },
        "joint": {"jointnet": {"joint_hidden": transducer.joint_width, "activation": "relu", "dropout": 0.2}},
        "tokenizer": {"model_path": "nemo:abc_tokenizer.model"},
    }


def pack(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def torch_bytes(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.fixture
def archive_files(asr, config, tokenizer):
    """Of a good archive; tests spoil one of them."""
    weights = to_layout(asr.state_dict(), nemo_layout([]))
    return {
        "./model_config.yaml": yaml.safe_dump(nemo_settings(config)).encode(),
        "./model_weights.ckpt": torch_bytes(weights),
        "./abc_tokenizer.model": tokenizer.source.content,
    }


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_nemo_archive(asr, config, archive_files, tmp_path, mode):
    loaded = load(pack(tmp_path / "tiny.nemo", archive_files, mode))
    assert loaded.config == config
    assert same_weights(loaded, asr)
    assert load(tmp_path).config == config  # the folder with nothing else in it


def spoil(settings: dict, section: str, **changes: object) -> bytes:
    return yaml.safe_dump(settings | {section: settings[section] | changes}).encode()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"att_context_style": "regular"}, "att_context_style is 'regular'"),
        ({"causal_downsampling": False}, "causal_downsampling"),
        ({"conv_context_size": None}, "conv_context_size"),
        ({"att_context_size": [-1, -1]}, "att_context_size"),
        ({"d_model": 64}, "configuration says"),
        ({"n_layers": 4}, r"lacks encoder\.layers\.3"),
        ({"n_layers": 2}, r"no place for encoder\.layers\.2"),
        ({"use_bias": False}, "no place for"),
        ({"conv_norm_type": "batch_norm"}, "lacks"),
        ({"feat_in": 80}, "preprocessor.features is 20"),
    ],
)
def test_settings_that_do_not_fit(config, archive_files, tmp_path, changes, match):
    archive_files["./model_config.yaml"] = spoil(nemo_settings(config), "encoder", **changes)
    path = pack(tmp_path / "tiny.nemo", archive_files)
    with pytest.raises(CheckpointError, match=match) as error:
        load(path)
    assert "tiny.nemo" in str(error.value)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_executes_is_not_executed(archive_files, tmp_path):
    trace = tmp_path / "executed"
    for content in (torch_bytes({"weight": Bomb(trace)}), pickle.dumps(Bomb(trace))):
        archive_files["./model_weights.ckpt"] = content
        with pytest.raises(CheckpointError, match=r"bomb\.nemo.*nothing in it was run"):
            load(pack(tmp_path / "bomb.nemo", archive_files))
    archive_files["./model_config.yaml"] = b"!!python/object/apply:os.mkdir [" + str(trace).encode() + b"]"
    with pytest.raises(CheckpointError, match=r"bomb\.nemo"):
        load(pack(tmp_path / "bomb.nemo", archive_files))
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()  # or this test would show nothing


@pytest.mark.parametrize("name", ["../escape", "/tmp/escape", "a/../../escape"])
def test_an_archive_that_points_outside(archive_files, tmp_path, name):
    with pytest.raises(CheckpointError, match=r"escape.*outside the archive"):
        load(pack(tmp_path / "evil.nemo", {name: b"x", **archive_files}))
    assert [path.name for path in tmp_path.iterdir()] == ["evil.nemo"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_an_archive_with_links(archive_files, tmp_path, kind):
    path = pack(tmp_path / "evil.nemo", archive_files)
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("abc_tokenizer.model")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(CheckpointError, match="outside the archive"):
        load(path)


def test_an_archive_with_too_much(archive_files, tmp_path, monkeypatch):
    many = {f"{index}": b"" for index in range(1001)}
    with pytest.raises(CheckpointError, match="more than 1000 members"):
        load(pack(tmp_path / "many.nemo", many))
    monkeypatch.setattr("antiphon.models.conformer.nemo.MOST_TOKENIZER_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than 100"):
        load(pack(tmp_path / "large.nemo", archive_files))


@pytest.mark.parametrize("missing", ["model_config.yaml", "model_weights.ckpt", "abc_tokenizer.model"])
def test_an_archive_that_lacks_a_file(archive_files, tmp_path, missing):
    del archive_files["./" + missing]
    with pytest.raises(CheckpointError, match=rf"tiny\.nemo: the archive has no {missing}"):
        load(pack(tmp_path / "tiny.nemo", archive_files))


def test_damaged_archives(archive_files, tmp_path):
    path = tmp_path / "bad.nemo"
    whole = pack(path, archive_files).read_bytes()
    archive_files_bad = archive_files | {"./abc_tokenizer.model": b"not a model"}
    contents = [b"", b"no tar at all", whole[:700], whole[: len(whole) // 2]]
    contents.append(pack(path, archive_files_bad).read_bytes())
    contents.append(pack(path, archive_files | {"./model_weights.ckpt": b"\x80\x02."}).read_bytes())
    contents.append(pack(path, archive_files | {"./model_config.yaml": b"a: [b"}).read_bytes())
    contents.append(pack(path, archive_files | {"./model_config.yaml": b"- 1"}).read_bytes())
    contents.append(pack(path, archive_files | {"./model_config.yaml": b"encoder: {}"}).read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad\.nemo"):
            load(path)


# Hugging Face


@pytest.fixture
def hf_folder(kit, json_tokenizer, tmp_path):
    """A folder in transformers' layout, with the model it holds."""
    config = ASRConfig(
        kit.config(), len(json_tokenizer), TransducerConfig(len(json_tokenizer), 32, 24, 2, 24, 4), mel=MEL
    )
    asr = ConformerASR(config, json_tokenizer)
    encoder = config.encoder
    settings = {
        "model_type": "nemotron_asr_streaming",
        "vocab_size": config.vocabulary + 1,
        "blank_token_id": config.vocabulary,
        "decoder_hidden_size": 24,
        "max_symbols_per_step": 4,
        "encoder_config": {
            "hidden_size": encoder.width,
            "num_hidden_layers": encoder.layers,
            "num_attention_heads": encoder.heads,
            "intermediate_size": encoder.feedforward,
            "num_mel_bins": encoder.mels,
            "subsampling_conv_channels": encoder.channels,
            "sliding_window": encoder.left + 1,
            "scale_input": False,
        },
    }
    processor = {"feature_extractor": {"feature_size": 20}, "supported_num_lookahead_tokens": [3, 1, 0]}
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "tokenizer.json").write_bytes(json_tokenizer.source.content)
    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in to_layout(asr.state_dict(), HF).items()},
        folder / "model.safetensors",
    )
    return folder, asr


def test_the_hugging_face_layout(hf_folder):
    folder, asr = hf_folder
    loaded = load(folder)
    assert same_weights(loaded, asr)
    assert loaded.config.encoder == asr.config.encoder
    assert loaded.config.transducer.max_symbols == 4
    assert loaded.lookaheads == (3, 1, 0)
    assert loaded.mel["n_window_stride"] == 160


def test_shards(hf_folder):
    folder, asr = hf_folder
    whole = folder / "model.safetensors"
    weights = safetensors.torch.load_file(whole)
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, keys in shards.items():
        safetensors.torch.save_file({key: weights[key] for key in keys}, folder / shard)
    whole.unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}))
    assert same_weights(load(folder), asr)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load(folder)


def test_damaged_folders(hf_folder):
    folder, _ = hf_folder
    good = {path: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(good[folder / "config.json"])
    bad = {
        "config.json": [
            b"{",
            b"[]",
            b"\xff",
            json.dumps(config | {"model_type": "whisper"}).encode(),
            json.dumps(config | {"blank_token_id": 3}).encode(),
            json.dumps(config | {"decoder_hidden_size": 25}).encode(),
        ],
        "model.safetensors": [b"", good[folder / "model.safetensors"][:1000], b"\x00" * 64],
        "tokenizer.json": [b"{}", b"", b"null"],
    }
    for name, contents in bad.items():
        for content in contents:
            (folder / name).write_bytes(content)
            with pytest.raises(CheckpointError, match="hf"):
                load(folder)
        (folder / name).write_bytes(good[folder / name])
    load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load(folder)


# Names


class NoNetwork:
    def model_info(self, *args: object, **kwargs: object) -> None:
        raise remote.NETWORK_ERRORS[-1]("no route")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(remote, "HfApi", NoNetwork)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("nvidia/nemotron-speech-streaming-en-0.6b", "not on this computer.*hf download nvidia/nemotron-speech"),
        ("nemotron-speech-streaming-en-0.6b", "not on this computer.*hf download nvidia/nemotron-speech"),
        ("nvidia/nemotron-speech-streaming-en-0.6", "did you mean 'nvidia/nemotron-speech-streaming-en-0.6b'"),
        ("parakeet_realtime_eou", "did you mean 'nvidia/parakeet_realtime_eou_120m-v1'"),
        ("zzz", "known are"),
        ("a b/c", "a b/c"),
        ("../none/such", "no file, folder or checkpoint"),
        ("missing.nemo", "no file, folder or checkpoint"),
    ],
)
def test_names_that_cannot_be_had(offline, name, match):
    with pytest.raises(CheckpointError, match=match):
        load(name)


def test_embedded_checkpoints_come_first(asr, config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "EMBEDDED", tmp_path)
    with pytest.raises(CheckpointError, match="embeds no checkpoint"):
        load()
    save(tmp_path / "tiny", config, asr.state_dict(), tokenizer)
    (tmp_path / "another kind").mkdir()
    (tmp_path / "another kind" / "config.json").write_text('{"model_type": "moshi"}')
    assert hub.embedded() == ["tiny"]
    assert load().config == config
    assert load("tiny").config == config
    with pytest.raises(CheckpointError, match="did you mean 'tiny'"):
        load("tinny")


def test_a_cached_checkpoint_needs_no_network(offline, archive_files, tmp_path, monkeypatch):
    pack(tmp_path / "model.nemo", archive_files)
    monkeypatch.setattr(remote, "snapshot_download", lambda name, **options: str(tmp_path))
    assert hub.cached("nvidia/some") == tmp_path
    assert load("nvidia/some").lookaheads == (3, 1, 0)


def test_only_needed_files_are_fetched(tmp_path, monkeypatch):
    asked = {}

    class Api:
        def model_info(self, name: str, **options: object) -> object:
            return type("Info", (), {"siblings": [type("File", (), {"rfilename": file}) for file in files]})

    def download(name: str, **options: object) -> str:
        if options.get("local_files_only"):
            raise FileNotFoundError
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(remote, "HfApi", Api)
    monkeypatch.setattr(remote, "snapshot_download", download)
    files = ["config.json", "model.safetensors", "x.nemo"]
    assert hub.resolve("nvidia/some") == tmp_path
    assert asked["allow_patterns"] == ["*.json", "*.safetensors"]
    files = ["x.nemo", "README.md"]
    hub.resolve("nvidia/some")
    assert asked["allow_patterns"] == ["*.nemo"]
    files = ["pytorch_model.bin"]
    with pytest.raises(CheckpointError, match="neither safetensors"):
        hub.resolve("nvidia/some")
