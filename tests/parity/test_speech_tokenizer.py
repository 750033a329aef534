"""Our speech tokenizer and speaker features against the packages ``s3tokenizer`` (``--no-deps``) and
``kaldi-native-fbank``."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from antiphon.codecs import speech_tokenizer_checkpoint as checkpoint
from antiphon.codecs.kaldi_fbank import KaldiFbank
from antiphon.codecs.speech_tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from antiphon.codecs.whisper_mel import WhisperMel

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
for package in ("s3tokenizer", "einops", "onnx", "kaldi_native_fbank"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: see CONTRIBUTING", allow_module_level=True)

TINY = SpeechTokenizerConfig(width=128, heads=2, layers=3)


@pytest.fixture(scope="module")
def s3tokenizer() -> Iterator[types.ModuleType]:
    """The package, which imports torchaudio for reading files alone."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchaudio") is None:
            stand_in = types.ModuleType("torchaudio")
            stand_in.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
            patch.setitem(sys.modules, "torchaudio", stand_in)
        import s3tokenizer

        yield s3tokenizer


@pytest.fixture(scope="module")
def theirs(s3tokenizer: types.ModuleType) -> torch.nn.Module:
    from s3tokenizer.model_v2 import ModelConfig, S3TokenizerV2

    torch.manual_seed(0)
    config = ModelConfig(n_audio_state=TINY.width, n_audio_head=TINY.heads, n_audio_layer=TINY.layers)
    made = S3TokenizerV2("speech_tokenizer_v2_25hz", config).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            centre = 1.0 if "_ln.weight" in name else 0.0
            weight.copy_(
                centre + torch.randn_like(weight) * (0.3 if weight.dim() < 2 else 2 / weight[0].numel() ** 0.5)
            )
        made.quantizer._codebook.project_down.weight.mul_(0.2)
    return made


def clip(samples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(samples)
    level = 0.1 * (1 + torch.sin(torch.arange(samples) / 2000))
    return torch.randn(samples, generator=generator) * level


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_tokens(s3tokenizer: types.ModuleType, theirs: torch.nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tokenizer.{suffix}"
    if suffix == "pt":
        torch.save(theirs.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(theirs.state_dict(), path)
    ours = checkpoint.load(path, TINY)
    for samples in (400, 16_001, 47_360, 100_000):
        mel = s3tokenizer.log_mel_spectrogram(clip(samples))
        expected, count = theirs.quantize(mel[None], torch.tensor([mel.shape[1]]))
        made = ours.tokenize(clip(samples))
        assert len(made) == int(count)
        assert made.tolist() == expected[0].tolist()
    assert len(set(made.tolist())) > len(made) // 2


def test_tokens_of_a_long_sound(s3tokenizer: types.ModuleType, theirs: torch.nn.Module) -> None:
    ours = SpeechTokenizer(TINY)
    ours.load_state_dict(checkpoint.from_upstream(theirs.state_dict(), ours))
    pcm = clip(16_000 * 45)
    mel = s3tokenizer.log_mel_spectrogram(pcm)
    expected, count = theirs.quantize(mel[None], torch.tensor([mel.shape[1]]))
    made = ours.tokenize(pcm)
    assert len(made) == int(count) == 1125
    # A rounding apart where a number lies between two levels.
    assert (made == expected[0]).double().mean() > 0.995


def test_hidden_frames_of_a_padded_batch(theirs: torch.nn.Module) -> None:
    ours = SpeechTokenizer(TINY)
    ours.load_state_dict(checkpoint.from_upstream(theirs.state_dict(), ours))
    mel = torch.randn(3, 128, 203, generator=torch.Generator().manual_seed(1))
    frames = torch.tensor([203, 90, 7])
    expected, counts = theirs.encoder(mel, frames)
    with torch.no_grad():
        made, ours_counts = ours.encoder(mel, frames)
    assert counts.tolist() == ours_counts.tolist() == [51, 23, 2]
    for row, count in enumerate(counts):
        torch.testing.assert_close(made[row, :count], expected[row, :count], atol=1e-4, rtol=0)
    tokens, _ = ours(mel, frames)
    hidden, _ = theirs.quantize(mel, frames)
    for row, count in enumerate(counts):
        assert tokens[row, :count].tolist() == hidden[row, :count].tolist()
        assert not tokens[row, count:].any()


def test_every_key_and_size_of_the_published_model(s3tokenizer: types.ModuleType) -> None:
    from s3tokenizer.model_v2 import S3TokenizerV2

    with torch.device("meta"):
        published = S3TokenizerV2("speech_tokenizer_v2_25hz").state_dict()
        ours = SpeechTokenizer()
    made = checkpoint.from_upstream(published, ours)
    assert {key: value.shape for key, value in made.items()} == {
        key: value.shape for key, value in ours.state_dict().items()
    }


def test_whisper_features(s3tokenizer: types.ModuleType) -> None:
    for samples in (16_000, 52_345):
        expected = s3tokenizer.log_mel_spectrogram(clip(samples))
        made = WhisperMel(128, normalize=False)(clip(samples)[None])[0]
        torch.testing.assert_close(made, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("mels", [80, 23])
def test_kaldi_features(mels: int) -> None:
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = mels
    options.energy_floor = 0.0
    pcm = clip(30_007)
    pcm[5000:8000] = 0
    computer = kaldi_native_fbank.OnlineFbank(options)
    computer.accept_waveform(16000, pcm.tolist())
    computer.input_finished()
    expected = torch.from_numpy(np.stack([computer.get_frame(i) for i in range(computer.num_frames_ready)]))
    made = KaldiFbank(mels)(pcm[None])[0]
    assert made.shape == expected.shape
    torch.testing.assert_close(made, expected, atol=2e-3, rtol=0)
    assert (made - expected).abs().mean() < 1e-5


def onnx_file(weights: dict[str, torch.Tensor], path: Path) -> None:
    """The weights as the operations of the published file hold them: named as there, and not to be run."""
    from onnx import TensorProto, helper, numpy_helper, save

    nodes, constants = [], []

    def operation(kind: str, name: str, *values: torch.Tensor, names: tuple[str, ...] = ()) -> None:
        names = names or tuple(f"onnx::{kind}_{len(constants) + index}" for index in range(len(values)))
        constants.extend(
            numpy_helper.from_array(value.numpy(), label) for value, label in zip(values, names, strict=True)
        )
        nodes.append(helper.make_node(kind, [f"before{len(nodes)}", *names], [f"after{len(nodes)}"], name=name))

    for index, first in ((1, 2216), (2, 2218)):
        pair = weights[f"encoder.conv{index}.weight"], weights[f"encoder.conv{index}.bias"]
        operation("Conv", f"/conv{index}/Conv", *pair, names=(f"onnx::Conv_{first}", f"onnx::Conv_{first + 1}"))
    for block in range(TINY.layers):
        ours, theirs = f"encoder.blocks.{block}", f"/blocks.{block}"
        for norm in ("attn_ln", "mlp_ln"):
            pair = weights[f"{ours}.{norm}.weight"], weights[f"{ours}.{norm}.bias"]
            operation("LayerNormalization", f"{theirs}/{norm}/LayerNormalization", *pair)
        for layer in ("query", "key", "value", "out"):
            operation("MatMul", f"{theirs}/attn/{layer}/MatMul", weights[f"{ours}.attn.{layer}.weight"].t())
            if layer != "key":
                operation("Add", f"{theirs}/attn/{layer}/Add", weights[f"{ours}.attn.{layer}.bias"])
        operation("Conv", f"{theirs}/attn/fsmn_block/Conv", weights[f"{ours}.attn.fsmn_block.weight"])
        for layer in (0, 2):
            operation("MatMul", f"{theirs}/mlp/mlp.{layer}/MatMul", weights[f"{ours}.mlp.{layer}.weight"].t())
            operation("Add", f"{theirs}/mlp/mlp.{layer}/Add", weights[f"{ours}.mlp.{layer}.bias"])
    down = "quantizer._codebook.project_down"
    operation("MatMul", "/quantizer/project_in/MatMul", weights[f"{down}.weight"].t(), names=("onnx::MatMul_2536",))
    operation("Add", "/quantizer/project_in/Add", weights[f"{down}.bias"], names=("quantizer.project_in.bias",))
    value = helper.make_tensor_value_info("before0", TensorProto.FLOAT, [1])
    save(helper.make_model(helper.make_graph(nodes, "tokenizer", [value], [], constants)), path)


def test_the_publishers_file_has_the_same_weights(
    s3tokenizer: types.ModuleType, theirs: torch.nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "speech_tokenizer_v2.onnx"
    onnx_file(theirs.state_dict(), path)
    made = checkpoint.from_onnx(path)
    for read in (s3tokenizer.onnx2torch(str(path)), theirs.state_dict()):
        assert read.keys() == made.keys()
        for key, value in read.items():
            assert torch.equal(value, made[key]), key
    assert checkpoint.load(path, TINY).tokenize(clip(5000)).shape == (8,)
