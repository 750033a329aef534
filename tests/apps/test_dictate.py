"""``antiphon transcribe`` with a tiny random model that writes while it hears."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from antiphon.apps.cli.dictate import writes
from antiphon.codecs import audio_file, mimi_checkpoint
from antiphon.models.moshi import checkpoint
from antiphon.pipelines import duplex
from antiphon.pipelines.chunk import Audio, Event, Text
from antiphon.pipelines.served import GRAPHS

from . import test_listen
from .test_listen import Antiphon

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from test_dictate import SPEECH_TO_TEXT
from tiny_duplex import tiny_lm, tiny_mimi, tokenizer_bytes, write_smallest
from tiny_moshi import SETTINGS

RATE = 24000
serve = importlib.import_module("antiphon.apps.cli.serve")  # a function of that name hides it
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


def test_the_server_writes_the_same(antiphon: Antiphon, model: Path, tmp_path: Path) -> None:
    noise = (0.1 * np.random.default_rng(0).standard_normal(2 * RATE)).astype(np.float32)
    audio_file.write(tmp_path / "one.wav", noise, RATE)
    graph = GRAPHS["dictate"]({})
    engine, _, about = serve._engine(graph, str(model), "cpu", None, None, 2, serve.Memory())
    assert about["model"] == str(model)

    async def heard() -> list[str]:
        async with graph.session(engine=engine) as session, asyncio.timeout(60):

            async def send() -> None:
                for start in range(0, len(noise), 2400):
                    await session.send(Audio(samples=noise[start : start + 2400], rate=RATE, start=start), "audio")
                session.finish()

            sending = asyncio.create_task(send())
            said = [text async for text in session.outputs()]
            await sending
        return [text.text for text in said if isinstance(text, Text) and text.final]

    try:
        told = asyncio.run(heard())
    finally:
        engine.close()
    _, text, _ = antiphon("transcribe", "--model", model, tmp_path / "one.wav")
    # The file went through 16 bits.
    assert difflib.SequenceMatcher(None, "\n".join(told), text.strip()).ratio() > 0.8
    assert len(text.strip()) > 10


def test_any_graph_of_captions_takes_it(model: Path) -> None:
    """A turn that the client ends, over the graph ``captions``: its transcript comes at once."""
    make = serve._heard_by(str(model), "captions", GRAPHS["captions"])
    graph = make({"turns": {"mode": "manual"}, "language": "en"})
    engine, native, _ = serve._engine(graph, str(model), "cpu", None, None, 2, serve.Memory())
    assert native is None

    async def heard() -> list[Text | Event]:
        noise = (0.1 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)
        said: list[Text | Event] = []
        async with graph.session(engine=engine) as session, asyncio.timeout(60):

            async def read() -> None:
                async for chunk in session.outputs():
                    assert isinstance(chunk, Text | Event)
                    said.append(chunk)

            reading = asyncio.create_task(read())
            await session.send(Audio(samples=noise, rate=RATE), "audio")
            await session.send(Event(name="commit", rate=RATE, start=RATE), "control")
            while not {"turn_end", "final"} <= {kind(chunk) for chunk in said}:
                await asyncio.sleep(0.01)
            session.finish()
            await reading
        return said

    try:
        said = asyncio.run(heard())
    finally:
        engine.close()
    (end,) = [chunk for chunk in said if kind(chunk) == "turn_end"]
    final = next(chunk for chunk in said if kind(chunk) == "final")
    assert isinstance(final, Text)
    assert final.text
    assert final.end_seconds >= 1.0
    assert end.start_seconds == pytest.approx(1.0, abs=0.01)
    assert serve._heard_by("moshiko", "captions", GRAPHS["captions"]) is GRAPHS["captions"]
    assert serve._heard_by(str(model), "dictate", GRAPHS["dictate"]) is GRAPHS["dictate"]


def kind(chunk: Text | Event) -> str:
    return chunk.name if isinstance(chunk, Event) else "final" if chunk.final else "text"


def test_what_it_cannot_do_is_one_line(antiphon: Antiphon, model: Path, tmp_path: Path) -> None:
    audio_file.write(tmp_path / "one.wav", np.zeros(RATE, np.float32), RATE)
    for option in (["--realtime"], ["--decoder", "ctc"]):
        status, _, err = antiphon("transcribe", "--model", model, tmp_path / "one.wav", *option)
        assert (status, err.count("\n")) == (2, 1)
        assert "writes as it hears" in err


def test_which_models_write(model: Path, tmp_path: Path) -> None:
    assert writes(str(model))
    assert writes("kyutai/stt-1b-en_fr")
    assert writes(duplex.PUBLISHED_WRITER)
    assert writes("stt-2.6b-en")
    assert not writes("moshiko")
    assert not writes(None)
    assert not writes(str(write_smallest(tmp_path)))
