"""``antiphon transcribe`` with a tiny random model that writes while it hears."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from antiphon.apps.cli.dictate import writes
from antiphon.codecs import audio_file, mimi_checkpoint
from antiphon.models.moshi import checkpoint

from . import test_listen
from .test_listen import Antiphon
from .test_serve_converse import saved

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from test_dictate import SPEECH_TO_TEXT
from tiny_duplex import tiny_lm, tiny_mimi, tokenizer_bytes
from tiny_moshi import SETTINGS

RATE = 24000
antiphon = test_listen.antiphon


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    checkpoint.save(folder, tiny_lm(**SPEECH_TO_TEXT), SETTINGS | SPEECH_TO_TEXT)
    mimi_checkpoint.save(folder / "mimi", tiny_mimi())
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    return folder


def test_a_file_is_written_down(antiphon: Antiphon, model: Path, tmp_path: Path) -> None:
    noise = (0.1 * np.random.default_rng(0).standard_normal(2 * RATE)).astype(np.float32)
    for name in ("one.wav", "two.wav"):
        audio_file.write(tmp_path / name, noise, RATE)
    status, text, err = antiphon("transcribe", "--model", model, tmp_path / "one.wav")
    assert (status, bool(text.strip())) == (0, True)
    assert re.fullmatch(r"2\.0 s of audio in \d+\.\d\d s; real-time factor \d+\.\d+\n", err)
    files = (tmp_path / "one.wav", tmp_path / "two.wav")
    status, _, err = antiphon("transcribe", "--model", model, *files, "-f", "json", "-o", tmp_path / "out")
    assert status == 0
    assert err.startswith("4.0 s of audio")
    for name in ("one", "two"):
        made = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert made["seconds"] == 2.0
        assert "\n".join(caption["text"] for caption in made["captions"]) + "\n" == text
        words = [word for caption in made["captions"] for word in caption["words"]]
        assert all(0 <= word["start"] <= word["end"] <= 3 for word in words)


def test_what_it_cannot_do_is_one_line(antiphon: Antiphon, model: Path, tmp_path: Path) -> None:
    audio_file.write(tmp_path / "one.wav", np.zeros(RATE, np.float32), RATE)
    for option in (["--realtime"], ["--decoder", "ctc"]):
        status, _, err = antiphon("transcribe", "--model", model, tmp_path / "one.wav", *option)
        assert (status, err.count("\n")) == (2, 1)
        assert "writes as it hears" in err


def test_which_models_write(model: Path, tmp_path: Path) -> None:
    assert writes(str(model))
    assert writes("kyutai/stt-1b-en_fr")
    assert writes("stt-2.6b-en")
    assert not writes("moshiko")
    assert not writes(None)
    assert not writes(str(saved(tmp_path)))
