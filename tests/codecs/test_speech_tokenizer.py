"""The speech tokenizer, as a network and from an ONNX file, and speaker embeddings from one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from antiphon.codecs import speech_tokenizer_checkpoint as checkpoint
from antiphon.codecs.kaldi_fbank import KaldiFbank
from antiphon.codecs.prompt_mel import PromptMel
from antiphon.codecs.speaker import SpeakerEmbedding
from antiphon.codecs.speech_tokenizer import OnnxSpeechTokenizer, SpeechTokenizer, SpeechTokenizerConfig
from antiphon.codecs.voice_clip import voice_from_clip
from antiphon.codecs.whisper_mel import WhisperMel
from antiphon.models.files import CheckpointError

TINY = SpeechTokenizerConfig(mels=20, width=32, heads=2, layers=2, memory=5)


@pytest.fixture
def network() -> SpeechTokenizer:
    torch.manual_seed(0)
    made = SpeechTokenizer(TINY).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * (0.1 if weight.dim() < 2 else 1 / weight[0].numel() ** 0.5))
    return made


def clip(samples: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, generator=generator) * 0.1 * (1 + torch.sin(torch.arange(samples) / 900))


@pytest.mark.parametrize("samples", [400, 640, 1281, 16_000, 40_123])
def test_there_is_a_token_every_40_ms(network: SpeechTokenizer, samples: int) -> None:
    tokens = network.tokenize(clip(samples))
    assert len(tokens) == -(-(samples // 160) // 4)
    assert tokens.dtype == torch.int64
    assert 0 <= tokens.min() <= tokens.max() < TINY.vocabulary == 6561
    if samples > 10_000:
        assert len(set(tokens.tolist())) > 5


def test_rows_of_a_batch_do_not_see_each_other_or_their_padding(network: SpeechTokenizer) -> None:
    lengths = [120, 37, 4, 1]
    mels = [torch.randn(20, length) for length in lengths]
    batch = torch.full((4, 20, 120), 1e3)
    for row, mel in zip(batch, mels, strict=True):
        row[:, : mel.shape[1]] = mel
    tokens, counts = network(batch, torch.tensor(lengths))
    assert counts.tolist() == [30, 10, 1, 1]
    for row, mel, count in zip(tokens, mels, counts, strict=True):
        alone, _ = network(mel[None], torch.tensor([mel.shape[1]]))
        assert row[:count].tolist() == alone[0].tolist()
        assert not row[count:].any()


def test_digits_are_counted_in_base_three(network: SpeechTokenizer) -> None:
    with torch.no_grad():
        network.project_down.weight.zero_()
        for bias, token in ((-9.0, 0), (0.0, 3280), (9.0, 6560)):
            network.project_down.bias.fill_(bias)
            assert set(network.tokenize(clip(4000)).tolist()) == {token}
        network.project_down.bias.copy_(torch.tensor([9.0, -9.0, 0.0, -9.0, -9.0, -9.0, -9.0, 9.0]))
    assert set(network.tokenize(clip(4000)).tolist()) == {2 + 1 * 9 + 2 * 3**7}


@pytest.mark.parametrize("frames", [3000, 3001, 3400, 3401, 5600, 5601])
def test_a_long_sound_is_cut_into_windows(network: SpeechTokenizer, frames: int) -> None:
    pcm = clip(160 * frames + 3)
    tokens = network.tokenize(pcm)
    assert len(tokens) == -(-frames // 4)
    mel = WhisperMel(20, normalize=False)(pcm[None])
    first, _ = network(mel[:, :, :3000], torch.tensor([min(frames, 3000)]))
    kept = 750 if frames == 3000 else 700
    assert tokens[:kept].tolist() == first[0, :kept].tolist()
    if frames > 3000:
        second, _ = network(mel[:, :, 2600:5600], torch.tensor([min(frames - 2600, 3000)]))
        assert tokens[700:800].tolist() == second[0, 50:150].tolist()


def test_sounds_without_a_frame_are_refused(network: SpeechTokenizer) -> None:
    for pcm in (clip(399), torch.zeros(2, 16_000)):
        with pytest.raises(ValueError, match="400 samples or more"):
            network.tokenize(pcm)


def upstream(network: SpeechTokenizer) -> dict[str, torch.Tensor]:
    return {
        key.replace("project_down.", "quantizer._codebook.project_down."): value
        for key, value in network.state_dict().items()
    }


def test_checkpoints(network: SpeechTokenizer, tmp_path: Path) -> None:
    weights, path = upstream(network), tmp_path / "tokenizer.pt"
    torch.save(weights, path)
    assert checkpoint.load(path, TINY).tokenize(clip(9000)).tolist() == network.tokenize(clip(9000)).tolist()
    name = "encoder.conv1.weight"
    for message, content in {
        f"lacks {name}": {key: value for key, value in weights.items() if key != name},
        "no place for more": weights | {"more": torch.zeros(1)},
        name: weights | {name: weights[name][1:]},
        "no mapping": [1, 2],
        "holds more than weights": {name: Path("/")},
    }.items():
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(path, TINY)
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(CheckpointError, match="no ONNX model"):
        checkpoint.load(tmp_path / "text.onnx", TINY)
    with pytest.raises(CheckpointError, match="that a speech tokenizer has no place for"):
        checkpoint.load(tokenizer_file(tmp_path / "other.onnx"), TINY)
    with pytest.raises(CheckpointError, match="absent"):
        checkpoint.load(tmp_path / "absent.pt", TINY)


def test_sizes_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="positive"):
        SpeechTokenizerConfig(layers=0)
    with pytest.raises(ValueError, match="multiple of twice the 3 heads"):
        SpeechTokenizerConfig(width=32, heads=3)


Shape = Sequence[int | str]


def save_onnx(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int, Shape]],
    outputs: dict[str, tuple[int, Shape]],
    constants: dict[str, np.ndarray] | None = None,
) -> Path:
    def declared(values: dict[str, tuple[int, Shape]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in values.items()]

    initializers = [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "tiny", declared(inputs), declared(outputs), initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def tokenizer_file(path: Path, mels: int | str = 128) -> Path:
    """Takes what the published file takes. Its tokens are each fourth frame's lowest band, rounded, plus how many
    frames it was told."""
    nodes = [
        helper.make_node("Slice", ["feats", "starts", "ends", "axes", "steps"], ["every"]),
        helper.make_node("Mul", ["every", "hundred"], ["loud"]),
        helper.make_node("Round", ["loud"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["digits"], to=TensorProto.INT32),
        helper.make_node("Add", ["digits", "feats_length"], ["told"]),
        helper.make_node("Squeeze", ["told", "axis"], ["indices"]),
    ]
    constants = {
        "starts": np.array([0, 0], np.int64),
        "ends": np.array([1, 2**31], np.int64),
        "axes": np.array([1, 2], np.int64),
        "steps": np.array([1, 4], np.int64),
        "hundred": np.array(100, np.float32),
        "axis": np.array([1], np.int64),
    }
    inputs = {
        "feats": (TensorProto.FLOAT, ["one", mels, "T"]),
        "feats_length": (TensorProto.INT32, ["one"]),
    }
    return save_onnx(path, nodes, inputs, {"indices": (TensorProto.INT32, ["one", "n"])}, constants)


@pytest.mark.parametrize(("declared", "mels"), [(128, 128), (80, 80), ("mels", 128)])
def test_the_publishers_file_gets_what_it_takes(tmp_path: Path, declared: int | str, mels: int) -> None:
    tokenizer = OnnxSpeechTokenizer(tokenizer_file(tmp_path / "tokenizer.onnx", declared))
    pcm = clip(16_160)
    tokens = tokenizer.tokenize(pcm.numpy())
    mel = WhisperMel(mels, normalize=False)(pcm[None])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == ((mel[0, 0, ::4] * 100).round().int() + 101).tolist()
    with pytest.raises(ValueError, match="400 samples or more"):
        tokenizer.tokenize(clip(100))


def speaker_file(path: Path, mels: int | str = 80) -> Path:
    """The loudest value of each band over the clip."""
    nodes = [helper.make_node("ReduceMax", ["fbank"], ["embedding"], axes=[1], keepdims=0)]
    inputs = {"fbank": (TensorProto.FLOAT, ["B", "T", mels])}
    return save_onnx(path, nodes, inputs, {"embedding": (TensorProto.FLOAT, ["B", mels])})


@pytest.mark.parametrize("declared", [80, "mels"])
def test_a_speaker_model_gets_banks_without_their_mean(tmp_path: Path, declared: int | str) -> None:
    model = SpeakerEmbedding(speaker_file(tmp_path / "campplus.onnx", declared))
    pcm = clip(20_000)
    made = model(pcm.numpy())
    banks = KaldiFbank()(pcm[None])[0]
    assert made.shape == (80,)
    torch.testing.assert_close(made, (banks - banks.mean(0)).amax(0))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"feats .*a speaker model takes"):
        SpeakerEmbedding(tokenizer_file(tmp_path / "tokenizer.onnx"))
    with pytest.raises(CheckpointError, match=r"fbank .*a speech tokenizer takes"):
        OnnxSpeechTokenizer(speaker_file(tmp_path / "campplus.onnx"))
    for kind in (SpeakerEmbedding, OnnxSpeechTokenizer):
        with pytest.raises(FileNotFoundError, match=r"absent\.onnx"):
            kind(tmp_path / "absent.onnx")


def test_filter_banks() -> None:
    """A frame for each window that lies in the sound; a tone is in its band; an offset does not matter."""
    fbank = KaldiFbank()
    tone = 0.3 * torch.sin(2 * torch.pi * 1000 / 16000 * torch.arange(16_000))[None]
    banks = fbank(tone)
    assert banks.shape == (1, 98, 80)
    mel = 1127 * np.log1p(np.array([20, 1000, 8000]) / 700)
    band = (mel[1] - mel[0]) / (mel[2] - mel[0]) * 81 - 1
    assert set(banks.argmax(2).flatten().tolist()) <= {int(band), int(band) + 1}
    torch.testing.assert_close(fbank(tone + 0.2), banks, atol=0.05, rtol=0)
    assert fbank(torch.zeros(1, 400)).unique().tolist() == pytest.approx([np.log(np.finfo(np.float32).eps)])
    with pytest.raises(ValueError, match="399 samples"):
        fbank(tone[:, :399])


def test_prompt_frames() -> None:
    """50 a second; a tone is in its band; silence is the floor; f_max moves the bands."""
    tone = 0.3 * torch.sin(2 * torch.pi * 1000 / 24000 * torch.arange(24_000))[None]
    frames = PromptMel()(tone)
    assert frames.shape == (1, 50, 80)
    assert frames.dtype == torch.float32
    assert len(frames[:, 2:-2].argmax(2).unique()) == 1
    wide = PromptMel(f_max=None)(tone)
    assert wide.argmax(2)[0, 25] < frames.argmax(2)[0, 25]
    assert PromptMel()(torch.zeros(1, 960)).unique().tolist() == pytest.approx([np.log(1e-5)])
    with pytest.raises(ValueError, match="720"):
        PromptMel()(tone[:, :720])


@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100])
def test_a_voice_is_made_of_a_clip(network: SpeechTokenizer, tmp_path: Path, rate: int) -> None:
    pcm = (0.3 * np.sin(2 * np.pi * 300 / rate * np.arange(2 * rate + 77))).astype(np.float32)
    speaker = SpeakerEmbedding(speaker_file(tmp_path / "campplus.onnx"))
    voice = voice_from_clip(pcm, rate, tokenizer=network, speaker=speaker, prompt_text="la", name="tone")
    assert (voice.name, voice.prompt_text) == ("tone", "la")
    assert voice.prompt_tokens.shape == (50,)
    assert voice.prompt_mel.shape == (100, 80)
    assert len(voice.prompt_mel[5:95].argmax(1).unique()) == 1
    assert voice.embedding.shape == (80,)
    with pytest.raises(ValueError, match=r"31\.0 s"):
        voice_from_clip(np.zeros(31 * rate, np.float32), rate, tokenizer=network, speaker=speaker)
