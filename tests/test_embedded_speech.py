"""The embedded voice on sentences that it was not trained on: what it says is heard, and no join is."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from antiphon import Final
from antiphon.apps.cli import main
from antiphon.apps.train.tts_eval import LIMITS, Utterance, difference, seams, speak_all
from antiphon.codecs.audio_file import read, write
from antiphon.models.hub import EMBEDDED
from antiphon.pipelines import speech_checkpoint
from antiphon.pipelines.synthesis import Synthesis
from antiphon.pipelines.synthesizer import Synthesizer
from antiphon.pipelines.transcription import Transcriber

RATE = 24000
TEXTS = (
    "The old man opened the door and looked out into the dark street.",
    "Please leave your message after the tone, and I will call you back tomorrow.",
    "We walked along the river until the sun went down behind the hills.",
)
VOICES = ("heart", "michael", "emma")
Sound = NDArray[np.float32]


@pytest.fixture(scope="module")
def models() -> Synthesizer:
    loaded = speech_checkpoint.load(dtype=torch.float32, limits=LIMITS)
    models = Synthesizer(loaded.speech, device="cpu", sessions=4)
    for name, voice in loaded.voices.items():
        models.register(name, voice)
    return models


@pytest.fixture(scope="module")
def said(models: Synthesizer) -> dict[str, list[Utterance]]:
    return {voice: speak_all(models, voice, TEXTS, 1, lambda: None) for voice in VOICES}


def missed(texts: Sequence[str], sounds: Sequence[Sound], folder: Path) -> float:
    """The share of words that the embedded recogniser, which is a small one, does not hear."""
    heard = []
    transcriber = Transcriber(decoder="rnnt")
    for number, sound in enumerate(sounds):
        path = folder / f"{number}.wav"
        write(path, sound, RATE)
        heard.append(" ".join(one.text for one in transcriber.transcribe(path) if isinstance(one, Final)))
    plain = [re.sub("[^a-z ]", "", text.lower()) for text in texts]
    return jiwer.wer(plain, heard)


def test_it_is_the_default_and_ships_small() -> None:
    (name,) = speech_checkpoint.embedded()
    loaded = speech_checkpoint.load()
    assert loaded.name == name
    assert tuple(sorted(loaded.voices)) == tuple(sorted(VOICES))
    folder = EMBEDDED / name
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 40_000_000
    assert "word error rate" in (folder / "README.md").read_text()


@pytest.mark.parametrize("voice", VOICES)
def test_what_it_says_is_heard(said: dict[str, list[Utterance]], voice: str, tmp_path: Path) -> None:
    assert missed(TEXTS, [one.stream for one in said[voice]], tmp_path) < 0.35


def test_no_join_is_heard_and_the_stream_is_the_whole(said: dict[str, list[Utterance]]) -> None:
    made = [one for some in said.values() for one in some]
    found = seams(made)
    assert found["joins"] >= 2 * len(made)
    assert found["worst"] <= max(2.0, found["whole worst"] + 0.02)  # what bends more is the speech itself, not a join
    assert (apart := difference(made)) is not None
    assert apart < 1e-3


def test_voices_differ_and_seeds_repeat(models: Synthesizer, said: dict[str, list[Utterance]]) -> None:
    again = speak_all(models, VOICES[0], TEXTS[:1], 1, lambda: None)[0]
    first = said[VOICES[0]][0]
    assert len(again.stream) == len(first.stream)
    assert np.abs(again.stream - first.stream).max() < 1e-3
    assert not np.array_equal(first.stream[:RATE], said[VOICES[1]][0].stream[:RATE])


def test_text_that_arrives_is_heard_too(models: Synthesizer, tmp_path: Path) -> None:
    sounds = []
    for number, text in enumerate(TEXTS):
        synthesis = Synthesis(models.speech, VOICES[0], number, arriving=True)
        for word in text.split():
            synthesis.push(f"{word} ")
        synthesis.finish()
        (sound,) = models.speak_many([synthesis])
        sounds.append(sound)
    assert missed(TEXTS, sounds, tmp_path) < 0.35


def test_speak_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.wav"
    monkeypatch.setattr(sys, "argv", ["antiphon", "speak", TEXTS[0], "-o", str(out), "--seed", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert 2.0 < len(read(out, RATE)) / RATE < 8.0
