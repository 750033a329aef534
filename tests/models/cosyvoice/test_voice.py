"""Voices: cut to fit, kept whole in one file, and refused when anything is off."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from antiphon.models.cosyvoice.voice import FORMAT, VERSION, Voice
from antiphon.models.files import CheckpointError


def parts(tokens: int = 5, frames: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.arange(tokens) * 1000,
        torch.randn(frames, 80, generator=generator),
        torch.randn(192, generator=generator),
    )


def test_a_voice_comes_back_as_it_was(tmp_path: Path) -> None:
    voice = Voice.of(*parts(), prompt_text="Die Grüße der 東京", name="ada")
    voice.save(tmp_path / "ada.safetensors")
    read = Voice.load(tmp_path / "ada.safetensors")
    assert (read.name, read.prompt_text) == ("ada", "Die Grüße der 東京")
    for key in ("prompt_tokens", "prompt_mel", "embedding"):
        assert torch.equal(getattr(read, key), getattr(voice, key))
        assert getattr(read, key).dtype == getattr(voice, key).dtype


def test_an_embedding_alone_is_a_voice(tmp_path: Path) -> None:
    voice = Voice(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 80), torch.ones(192), "<ada>", "ada")
    voice.save(tmp_path / "ada.safetensors")
    read = Voice.load(tmp_path / "ada.safetensors")
    assert (read.prompt_tokens.shape, read.prompt_mel.shape) == ((0,), (0, 80))
    assert torch.equal(read.embedding, voice.embedding)
    with pytest.raises(ValueError, match="embedding must have 1 dimensions"):
        Voice(voice.prompt_tokens, voice.prompt_mel, torch.zeros(0))


@pytest.mark.parametrize(("tokens", "frames", "kept"), [(5, 10, 5), (6, 11, 5), (5, 14, 5), (4, 9, 4), (1, 2, 1)])
def test_tokens_and_frames_are_cut_to_fit(tokens: int, frames: int, kept: int) -> None:
    given = parts(tokens, frames)
    voice = Voice.of(given[0].int(), given[1].double(), given[2])
    assert torch.equal(voice.prompt_tokens, given[0][:kept])
    assert torch.equal(voice.prompt_mel, given[1][: 2 * kept])


def test_a_voice_does_not_change_with_the_clip_it_was_made_of() -> None:
    tokens, mel, embedding = parts()
    voice = Voice.of(tokens, mel, embedding)
    before = voice.prompt_mel.clone()
    mel.zero_()
    assert torch.equal(voice.prompt_mel, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": torch.zeros(5)}, r"prompt_tokens must be \[n\] int64, got \[5\] torch.float32"),
        ({"prompt_tokens": torch.tensor([1, 2, -7, 3, 4])}, "not be negative, got -7"),
        ({"prompt_tokens": torch.zeros(4, dtype=torch.int64)}, "4 tokens has 8 mel frames, got 10"),
        ({"prompt_mel": torch.zeros(10, 80, dtype=torch.float16)}, "prompt_mel must have 2 dimensions in float32"),
        ({"prompt_mel": torch.full((10, 80), torch.nan)}, "prompt_mel holds values that are no numbers"),
        ({"embedding": torch.zeros(1, 192)}, "embedding must have 1 dimensions"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    given = dict(zip(("prompt_tokens", "prompt_mel", "embedding"), parts(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        Voice(**given)
    path = tmp_path / "bad.safetensors"
    safetensors.torch.save_file(given, path, metadata={"format": FORMAT, "version": VERSION})
    with pytest.raises(CheckpointError, match=message) as caught:
        Voice.load(path)
    assert str(path) in str(caught.value)


def test_a_clip_too_short_for_a_voice_is_told() -> None:
    with pytest.raises(ValueError, match="1 mel frames is too short"):
        Voice.of(*parts(3, 1))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    tensors = dict(zip(("prompt_tokens", "prompt_mel", "embedding"), parts(), strict=True))
    header = {"format": FORMAT, "version": VERSION}
    for content, metadata, message in (
        (tensors, None, "no voice"),
        (tensors, {"format": "pt"}, "'pt'"),
        (tensors, header | {"version": "2"}, "version '2'; this release reads '1'"),
        (tensors | {"more": torch.zeros(1)}, header, "'more'"),
        ({"prompt_mel": tensors["prompt_mel"]}, header, "a voice holds"),
    ):
        safetensors.torch.save_file(content, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            Voice.load(path)
    Voice.of(*parts()).save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="damaged"):
        Voice.load(path)
    with pytest.raises(CheckpointError, match="absent"):
        Voice.load(tmp_path / "absent.safetensors")
