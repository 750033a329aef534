"""The benchmark of the flow's window runs, on small random models."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from tiny_speech import tiny_speech, voice, write

from antiphon.apps.bench import speech_window
from antiphon.apps.bench.speech_window import draw, flow_bytes, main, measure
from antiphon.apps.bench.speech_window import write as written
from antiphon.apps.train.tts_eval import Judges
from antiphon.models.cosyvoice.flow_config import FlowLimits
from antiphon.pipelines.synthesizer import Synthesizer

TEXTS = ("It was the best of times, it was the worst of times. We had everything.", "We had everything before us.")


class Fake(Judges):
    """Hears how long sounds are, and how loud."""

    def __init__(self) -> None:
        self.missing = {}

    def wer(self, utterances: Any) -> tuple[float | None, list[str]]:
        return sum(len(one.stream) for one in utterances) / 24000, []

    def plcmos(self, sounds: Any) -> float | None:
        return 1000 * float(abs(sounds[0]).mean())


def test_more_is_nearer_and_all_is_exact(tmp_path: Path) -> None:
    speech = tiny_speech(tmp_path)
    noise = speech.flow.flow.noise.clone()
    ticks: list[str] = []
    numbers = measure(speech, "ada", voice(1), TEXTS, (0.2, 60.0), Fake(), "cpu", ticks.append)
    assert len(ticks) == 2 * 4 * len(TEXTS)
    assert torch.equal(speech.flow.flow.noise, noise)
    for kind in ("spoken", "joined"):
        exact, short, long, other = numbers[kind]["rows"]
        assert [row["window"] for row in numbers[kind]["rows"]] == ["all", "0.2 s", "60 s", "other noise"]
        assert exact["mel_rms"] == long["mel_rms"] == 0 == long["plcmos_change"]
        assert exact["seam_rise"] == long["seam_rise"] == 0 < short["seam_rise"]
        assert short["mel_rms_worst_second"] > short["mel_rms"] > 0.01
        assert other["mel_rms"] > 0.01
        assert short["plcmos_change"] != 0 != short["plcmos_error"]
        assert short["session_mb"] < long["session_mb"] == exact["session_mb"] == other["session_mb"]
        assert exact["wer"] == pytest.approx(numbers[kind]["seconds"], rel=0.05)
    spoken, joined = numbers["spoken"], numbers["joined"]
    assert (spoken["passages"], joined["passages"]) == (3, 2)
    assert spoken["seconds"] == joined["seconds"]
    assert joined["longest_seconds"] > spoken["longest_seconds"]


def test_it_draws_what_is_spoken(tmp_path: Path) -> None:
    speech = tiny_speech(tmp_path)
    ada = voice(1)
    (passages,) = written(speech, "ada", ada, TEXTS[:1])
    ((drawn,), _) = draw(speech, replace(speech.flow.limits, left=3000), ada, [[passages[0].tokens]])
    speech.reader.voices.clear()
    made = speech.with_room_for([ada])
    with Synthesizer(made) as models:
        models.register("ada", ada)
        sound = [piece.samples for piece in models.speak(TEXTS[0], "ada") if piece.passage == 0]
    heard = torch.cat([torch.from_numpy(samples) for samples in sound])
    assert len(heard) == len(drawn.sound)
    torch.testing.assert_close(torch.from_numpy(drawn.sound), heard, atol=1e-4, rtol=0)


def test_bytes_grow_with_the_window(tmp_path: Path) -> None:
    flow = tiny_speech(tmp_path).flow.flow
    one, two, three = (flow_bytes(flow, FlowLimits(left=left)) for left in (50, 100, 150))
    assert three - two == two - one > 0


def test_a_window_has_a_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a window of 0\.01 s is less than a speech token"):
        main(["--model", str(write(tmp_path / "tiny")), "--seconds", "0.01", "--device", "cpu"])


def test_the_command_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech_window, "Judges", lambda whisper, bank: Fake())
    texts = tmp_path / "texts.txt"
    texts.write_text("And so on.\n\n")
    where = ["--model", str(write(tmp_path / "tiny")), "--texts", str(texts), "--out", str(tmp_path)]
    main(["--voice", "ada", "--seconds", "1", "--device", "cpu", *where])
    printed = capsys.readouterr().out
    assert "tiny: what the flow keeps" in printed
    assert "joined: 1 passages" in printed
    result = json.loads((tmp_path / "speech_window.json").read_text())
    assert (result["numbers"]["texts"], len(result["numbers"]["joined"]["rows"])) == (1, 3)
    assert "change of PLCMOS" in (tmp_path / "speech_window.svg").read_text()
