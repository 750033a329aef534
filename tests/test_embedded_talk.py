"""The embedded dialogue model on a voice that it was not trained on: it answers, and falls silent when interrupted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import antiphon
from antiphon.apps.cli import main
from antiphon.apps.train.duplex_eval import Model, stretches
from antiphon.codecs.audio_file import read
from antiphon.models.moshi import checkpoint
from antiphon.pipelines import duplex

ROOT = Path(antiphon.__file__).parent
CLIP = ROOT / "apps" / "samples" / "questions.flac"
RATE, FRAME = 24000, 1920
SESSIONS = 4
ANSWERS = ("March comes before April.", "Star is spelled S, T, A, R.")
ALPHABET = int(12.6 * RATE)  # from when on it is asked to stop, for 0.84 s
QUESTIONS = (0.6, 5.4, 10.3)  # seconds


@pytest.fixture(scope="module")
def calls() -> tuple[list[str], list[NDArray[np.float32]]]:
    """What is said in some calls with the same questions, each drawn with a seed of its own, and how it sounds."""
    pcm = read(CLIP, RATE)
    partner = Model(duplex.load(checkpoint.embedded()[0]), SESSIONS, "cpu")
    texts, sounds = [""] * SESSIONS, [[np.zeros(FRAME, np.float32)] for _ in range(SESSIONS)]
    try:
        for frame in pcm[: len(pcm) // FRAME * FRAME].reshape(-1, FRAME):
            for number, (sound, piece) in enumerate(partner.step([(session, frame) for session in range(SESSIONS)])):
                texts[number] += piece
                sounds[number].append(sound)
    finally:
        partner.close()
    return texts, [np.concatenate(sound) for sound in sounds]


def test_it_is_the_default_and_ships_small() -> None:
    (name,) = checkpoint.embedded()
    assert duplex.default() == name
    folder = checkpoint.EMBEDDED / name
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 25_000_000
    assert "stops within 300 ms" in (folder / "README.md").read_text()


def test_it_answers_what_it_is_asked(calls: tuple[list[str], list[NDArray[np.float32]]]) -> None:
    texts, sounds = calls
    right = [all(answer in text for answer in ANSWERS) for text in texts]
    assert sum(right) >= SESSIONS - 1, texts
    for sound in sounds:
        begins = [begin / RATE for begin, _ in stretches(sound)]
        assert min(begins) > QUESTIONS[0] + 1.5  # not before it was asked
        for question in QUESTIONS:
            assert any(question + 1.0 < begin < question + 3.6 for begin in begins), begins


def test_it_stops_when_it_is_interrupted(calls: tuple[list[str], list[NDArray[np.float32]]]) -> None:
    texts, _ = calls
    spelled = [text.partition("T, A, R.")[2] for text in texts]
    assert all(" A, B, C, D" in text for text in spelled), texts
    assert sum("Z" not in text and "Okay" in text for text in spelled) >= SESSIONS // 2, texts


def test_talk_needs_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = tmp_path / "both.wav"
    command = ["antiphon", "talk", "--file", str(CLIP), "-o", str(both), "--seconds", "5", "--seed", "0"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert ANSWERS[0] in capsys.readouterr().out
    assert torch.from_numpy(read(both, RATE)).abs().max() > 0.01
