"""The benchmark of the flow's window runs, on small random models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from tiny_speech import tiny_speech, voice, write

from antiphon.apps.bench import window
from antiphon.apps.bench.window import main

TEXTS = ("It was the best of times, it was the worst.", "We had everything before us.")


def test_more_is_nearer_and_all_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "_plcmos", lambda: lambda pcm, rate: float(len(pcm)))
    numbers = window.measure(tiny_speech(tmp_path), "ada", voice(1), TEXTS, (0.2, 60.0))
    exact, short, long = numbers["rows"]
    assert [row["seconds"] for row in numbers["rows"]] == [None, 0.2, 60.0]
    assert exact["mel_error_percent"] == long["mel_error_percent"] == 0
    assert exact["worst_seam"] == long["worst_seam"] > 0
    assert short["mel_error_p99_percent"] > short["mel_error_percent"] > 0.5
    assert short["session_mb"] < long["session_mb"] == exact["session_mb"]
    assert numbers["longest_seconds"] > 1.5
    saved = (long["session_mb"] - short["session_mb"]) / (numbers["longest_seconds"] - 0.2)
    assert numbers["mb_a_second_kept"] == pytest.approx(saved, abs=0.02)
    assert exact["plcmos"] == short["plcmos"] == pytest.approx(numbers["seconds"] * 24000 / 2, rel=0.02)


def test_a_window_has_a_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a window of 0\.01 s is less than a speech token"):
        main(["--model", str(write(tmp_path / "tiny")), "--seconds", "0.01", "--device", "cpu"])


def test_the_command_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "_plcmos", lambda: None)
    texts = tmp_path / "texts.txt"
    texts.write_text("And so on.\n\n")
    where = ["--model", str(write(tmp_path / "tiny")), "--texts", str(texts), "--out", str(tmp_path)]
    main(["--voice", "ada", "--seconds", "1", "--device", "cpu", *where])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny, ada: ")
    assert [line.split()[0] for line in lines[2:4]] == ["all", "1"]
    result = json.loads((tmp_path / "window.json").read_text())
    assert (result["numbers"]["passages"], len(result["numbers"]["rows"])) == (1, 2)
