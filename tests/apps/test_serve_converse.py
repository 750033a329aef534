"""``antiphon serve --graph converse`` with a checkpoint from a folder."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from websockets.asyncio.client import connect

from antiphon.codecs import audio_file, mimi_checkpoint
from antiphon.codecs.ogg import OggOpusReader, OggOpusWriter
from antiphon.models.files import CheckpointError
from antiphon.models.moshi import checkpoint
from antiphon.pipelines import duplex
from antiphon.pipelines.served import GRAPHS
from antiphon.pipelines.stages.converse import Converse

from .running import server

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from tiny_duplex import SMALLEST, tiny_lm, tiny_mimi, tokenizer_bytes, write_persona, write_smallest
from tiny_moshi import SETTINGS

FRAME, RATE = 1920, 24000
serve = importlib.import_module("antiphon.apps.cli.serve")  # a function of that name hides it


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_smallest(tmp_path_factory.mktemp("model"))
    with server("--graph", "converse", "--model", folder, "--max-sessions", 2) as port:
        yield f"127.0.0.1:{port}"


def test_it_converses(address: str) -> None:
    async def run() -> None:
        async with connect(f"ws://{address}/api/chat?text_seed=1&audio_seed=1") as ws, asyncio.timeout(60):
            assert await ws.recv() == b"\0"
            writer, reader = OggOpusWriter(RATE), OggOpusReader(RATE, trim=False)
            for frame in (0.1 * np.random.default_rng(0).standard_normal((12, FRAME))).astype(np.float32):
                await ws.send(b"\1" + writer.push(frame))
            heard = np.zeros(0, np.float32)
            while len(heard) < 11 * FRAME:
                message = await ws.recv()
                assert isinstance(message, bytes)
                if message[0] == 1:
                    heard = np.concatenate([heard, *reader.push(message[1:])])
            assert np.abs(heard).max() > 1e-3

    asyncio.run(run())


def test_kyutais_clients_see_that_all_is_well(address: str) -> None:
    for path, told in (("build_info", {"name": "antiphon", "model": "converse"}), ("modules_info", [])):
        with urllib.request.urlopen(f"http://{address}/api/{path}", timeout=10) as answer:
            assert json.load(answer) == told


def test_what_a_dialogue_remembers(tmp_path: Path) -> None:
    folder = str(write_smallest(tmp_path))
    memory = serve.Memory(context=2.0, sinks=3, fp8=True, restart_after=3.0)
    graph = memory.graph(GRAPHS["converse"])({"audio_seed": 1})
    (talk,) = [node for node in graph.nodes if isinstance(node, Converse)]
    assert (talk.restart_after, talk.options["audio_seed"]) == (180.0, 1)
    engine, _, _ = serve._engine(graph, folder, "cpu", None, None, 1, memory)
    plain, _, _ = serve._engine(GRAPHS["converse"]({}), folder, "cpu", None, None, 1, serve.Memory())
    try:
        remembers, usual = engine.model("converse"), plain.model("converse")
        stack = remembers.lm.config.temporal
        assert (stack.window, stack.sinks, stack.kv_dtype) == (25, 3, torch.float8_e4m3fn)
        assert remembers.variants == (1, duplex.PREFILL)
        assert usual.variants == (1,)
        assert usual.lm.config.temporal.window == SMALLEST["context"]
    finally:
        engine.close()
        plain.close()
    assert serve.Memory(sinks=1).graph(GRAPHS["captions"]) is GRAPHS["captions"]
    with pytest.raises(serve.CommandError, match="--restart-after goes with --graph converse"):
        memory.graph(GRAPHS["captions"])
    with pytest.raises(ValueError, match="--kv-fp8 and --voice-prompts go with a dialogue model"):
        serve._engine(GRAPHS["captions"]({}), None, "cpu", None, None, 1, serve.Memory(fp8=True))


def test_a_model_that_takes_prompts_can_read_them(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, tiny_lm(), SETTINGS | {"model_type": "personaplex", "version": "1"})
    mimi_checkpoint.save(tmp_path / "mimi", tiny_mimi())
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    assert duplex.load(tmp_path).variants == (1, duplex.PREFILL)
    assert duplex.load(tmp_path, prefill=1).variants == (1,)


def test_voices_that_calls_may_name(tmp_path: Path) -> None:
    folder, clips = str(write_persona(tmp_path / "model")), tmp_path / "clips"
    clips.mkdir()
    pcm = (0.1 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)
    for name in ("NATF2.wav", "hal.flac"):
        audio_file.write(clips / name, pcm, RATE)
    graph = GRAPHS["converse"]({})
    engine, _, about = serve._engine(graph, folder, "cpu", None, None, 1, serve.Memory(), clips)
    try:
        assert about["voice_prompts"] == ["NATF2", "hal"]
        assert {*engine.model("converse").voices} == {"NATF2", "hal"}
    finally:
        engine.close()
    smallest = str(write_smallest(tmp_path / "other"))
    with pytest.raises(ValueError, match="takes no prompts"):
        serve._engine(graph, smallest, "cpu", None, None, 1, serve.Memory(), clips)
    with pytest.raises(ValueError, match="--voice-prompts go with a dialogue model"):
        serve._engine(GRAPHS["captions"]({}), None, "cpu", None, None, 1, serve.Memory(), clips)


def test_a_folder_is_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    model = duplex.load(write_smallest(tmp_path), prefill=4, sinks=2)
    assert model.variants == (1, 4)
    assert (model.frame, model.rate, model.encoder.config.bins) == (FRAME, RATE, SMALLEST["card"])
    assert model.lm.dtype == torch.float32
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        duplex.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        duplex.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    mimi_checkpoint.save(tmp_path / "mimi", tiny_mimi(bins=16))
    with pytest.raises(CheckpointError, match="codes of 16"):
        duplex.load(tmp_path)
    (tmp_path / "mimi" / "config.json").unlink()
    (tmp_path / "mimi" / "model.safetensors").unlink()
    (tmp_path / "mimi").rmdir()
    with pytest.raises(CheckpointError, match="no codec"):
        duplex.load(tmp_path)
