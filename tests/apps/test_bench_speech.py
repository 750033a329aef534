"""``antiphon bench speech`` at a tiny shape, and what it rests on."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antiphon.apps.bench import speech
from antiphon.apps.bench.speech_load import Load, Said, open_places, run_load, say, schedule, text_of
from antiphon.apps.bench.speech_models import NAME, SHAPES, Random, Settings
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.speech import PARTS, Speech

SETTINGS = Settings((5, 10, 20), 40, None, (4, 12), (8, 32), (40, 20, 10), {"lm": 8, "flow": 4, "vocoder": 4})


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def random() -> Random:
    return Random(SHAPES["tiny"], SETTINGS, torch.device("cpu"), torch.float32)


def run(folder: Path, kinds: list[str], dtype: str) -> dict[str, Any]:
    """The numbers of a run on the CPU."""
    sizes = ["--hops", "5", "10", "20", "--left", "40", "--bursts", "4", "12", "--prefill", "8", "32"]
    rows = ["--frames", "40", "20", "10", "--flow-rows", "2", "--vocoder-rows", "2", "--batches", "1", "2", "4"]
    load = ["--sessions", "2", "--rounds", "2", "--seconds", "1.5", "--warm", "0.5", "--limit", "5000"]
    rest = ["--device", "cpu", "--dtype", dtype, "--reference-rounds", "1", "--results", str(folder)]
    speech.main(["--kinds", *kinds, *sizes, *rows, *load, *rest])
    numbers: dict[str, Any] = json.loads((folder / "speech_cpu.json").read_text())["numbers"]
    assert (folder / "speech_cpu.svg").stat().st_size > 1000
    return numbers


def test_first_audio_load_and_stages_are_measured_and_written(tmp_path: Path) -> None:
    numbers = run(tmp_path, [kind for kind in speech.KINDS if kind != "requests"], "float32")
    here = importlib.util.find_spec("cosyvoice") is not None
    assert len(numbers["failures"]) == (not here), numbers["failures"]
    (shape,) = numbers["shapes"]
    assert [row["name"] for row in shape["first"]] == ["antiphon", *["cosyvoice2-eu"] * here]
    for row in shape["first"]:
        assert 0 < row["ms"] <= row["p99_ms"] < row["utterance_ms"] * 1.5
        assert row["seconds"] == pytest.approx(1.8)  # nine words of five tokens
    parts = shape["first"][0]["median_ms_until"]
    assert 0 < parts["lm"] < parts["flow"] < parts["vocoder"] == shape["first"][0]["ms"]
    runs = shape["load"]["runs"]
    assert shape["load"]["held"] == max((run["sessions"] for run in runs if run["held"]), default=0)
    assert (runs[0]["sessions"], shape["load"]["most"]) == (2, 2)
    assert all(run["utterances"] >= 1 for run in runs)
    assert set(shape["state_bytes"]) == set(PARTS)
    kept = shape["flow_bytes_by_frames_kept"]
    # One block, two Euler steps and two branches of keys and values of 16, one token and one frame block beside it.
    assert kept["1500"] - kept["500"] == 1000 * 4 * (3 * 2 * 2 * 2 * 16 + 2 * 32 // 2 + 2 * 32)
    stages = {row["stage"] for row in shape["stages"]}
    assert stages == {row["stage"] for row in shape["floors"]}
    assert len(stages) == 2 + 2 + 3 + 3
    assert all(row["device_ms"] > 0 for row in shape["stages"])
    floors = {(row["stage"], row["rows"]): row for row in shape["floors"]}
    assert 2.9 < floors["draw 12 tokens", 1]["launches"] / floors["draw 4 tokens", 1]["launches"] <= 3
    assert floors["flow, 20 tokens", 1]["flop"] > 1.5 * floors["flow, 10 tokens", 1]["flop"] > 0


def test_requests_sound_alike_in_a_row_and_at_once_in_short_floats(tmp_path: Path) -> None:
    numbers = run(tmp_path, ["requests"], "bfloat16")
    assert not numbers["failures"]
    requests = numbers["shapes"][0]["requests"]
    assert (requests["same_sound_in_a_row"], requests["same_sound_at_once"]) == (3, speech.AT_ONCE)
    assert len(requests["first_samples"]) == 1
    assert requests["loud"]
    for name, count in (("in_a_row", 3), ("at_once", speech.AT_ONCE)):
        assert [requests["compared"][name][part]["same"] for part in PARTS] == [count] * 3


def test_where_requests_begin_to_differ_is_told() -> None:
    one, other = np.arange(12.0).reshape(6, 2), np.arange(12.0).reshape(6, 2)
    other[4, 1] += 0.25
    assert speech.compare("flow", [(one, one), (one, other)]) == {
        "same": 1, "first": 4, "largest": 0.25, "of": 2, "what": "frames"
    }  # fmt: skip
    shorter = speech.compare("lm", [(one[:3, 0], one[:, 0])])
    assert (shorter["same"], shorter["first"], shorter["largest"]) == (0, 3, 0.0)
    assert speech.compare("vocoder", [(one[:0], one[:0])])["same"] == 0


def test_an_utterance_is_as_long_as_it_is_said_to_be_and_begins_with_the_first_hop(random: Random) -> None:
    async def both(engine: Engine) -> tuple[Said, Said]:
        made = Speech.of(engine, NAME)
        places = await open_places(engine, NAME, 2)
        texts = [text_of(random.shape.words, seed) for seed in (1, 2)]
        one, two = await asyncio.gather(
            *(say(made, place, text, seed, keep=True) for place, text, seed in zip(places, texts, (1, 2), strict=True))
        )
        return one, two

    with Engine("cpu") as engine:
        random.install(engine, 2)
        one, two = asyncio.run(both(engine))
    assert one.made == two.made == 24000 * random.seconds == len(one.sound())
    assert not np.array_equal(one.sound(), two.sound())
    assert list(one.done) == ["lm", "flow", "vocoder"]
    assert one.due < one.done["lm"] <= one.done["flow"] <= one.done["vocoder"] < one.end
    first = next(len(samples) for samples in one.samples if len(samples))
    # Five tokens, with the clip's whole last chunk in front, less what the vocoder runs behind.
    assert first == 10 * 480 - random.vocoder.delay > 0


def test_clips_that_begin_later_are_heard_earlier() -> None:
    settings = replace(
        SETTINGS, hops=(3, 5, 10, 20), early=True, patient=(), priorities={"lm": 2, "flow": 0, "vocoder": 1}
    )
    early = Random(SHAPES["tiny"], settings, torch.device("cpu"), torch.float32)

    async def one(engine: Engine) -> Said:
        (places,) = await open_places(engine, NAME, 1)
        return await say(Speech.of(engine, NAME), places, text_of(early.shape.words, 1), 1, keep=True)

    with Engine("cpu") as engine:
        speech = early.install(engine, 1)
        said = asyncio.run(one(engine))
    # Of the clip's 15 tokens 12 are left, one chunk of them shared: seven and three end with a chunk.
    assert len(speech.reader.voices["voice 0"].flow.rest) == 7
    assert said.made == 24000 * early.seconds
    assert len(said.drawn[0]) == 2 * (7 + 3)
    assert (said.written[0].shape, sum(token >= 0 for token in said.written[1])) == ((1,), 5)  # with the lookahead, six


def test_playback_that_waits_is_an_underrun() -> None:
    said = Said(due=1.0, rate=100, done={"lm": 1.05, "flow": 1.1})
    assert said.spare(1.0) == 0
    said.take(np.zeros(0, np.float32), 1.1, True)
    said.take(np.zeros(50, np.float32), 1.2, True)
    assert said.first == pytest.approx(0.2)
    assert said.spare(1.3) == pytest.approx(0.4)
    said.take(np.zeros(50, np.float32), 1.7, True)
    assert said.late == pytest.approx(0.0)
    said.take(np.zeros(50, np.float32), 2.5, True)
    assert said.late == pytest.approx(0.3)
    assert said.spare(4.0) == 0
    load = Load(1, 0.5, [said])
    assert load.summary()["underruns"] == 1
    assert not load.summary()["held"]
    said.late = 0.0
    assert load.summary()["held"]
    assert not Load(1, 0.1, [said]).summary()["held"]
    assert not Load(1, 0.5, [said], unfinished=1).summary()["held"]
    assert not Load(1, 0.5).summary()["held"]


def test_utterances_are_due_one_after_the_other() -> None:
    plan = schedule(6, 8.0, 40.0, seed=1, jitter=0.5)
    assert len(plan) == 6
    for row in plan:
        assert len(row) in (4, 5)
        phase = row[0]
        assert 0 <= phase < 8.5
        assert all(abs(due - phase - 8 * turn) <= 0.5 for turn, due in enumerate(row))
    assert plan == schedule(6, 8.0, 40.0, seed=1, jitter=0.5) != schedule(6, 8.0, 40.0, seed=2, jitter=0.5)


def test_a_run_stops_when_it_is_hopeless_and_gives_its_places_back(random: Random) -> None:
    with Engine("cpu") as engine:
        random.install(engine, 2)
        load = asyncio.run(
            run_load(
                engine,
                NAME,
                2,
                random.seconds,
                random.shape.words,
                seconds=60,
                warm=0.0,
                limit=1e-6,
                enough=lambda load: len(load.said) >= 2,
            )
        )
        assert len(load.said) == 2
        assert not load.summary()["held"]
        assert all(load.said[0].done[part] > load.said[0].due for part in PARTS)
        again = [engine.open_sync(f"{NAME}.{part}") for part in PARTS for _ in range(2)]
    assert len(again) == 6
