"""``antiphon serve --graph converse`` with a checkpoint from a folder."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from websockets.asyncio.client import connect

from antiphon.codecs import mimi_checkpoint
from antiphon.codecs.ogg import OggOpusReader, OggOpusWriter
from antiphon.models.files import CheckpointError
from antiphon.pipelines import duplex

from .running import server

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from tiny_duplex import SMALLEST, tiny_mimi, tokenizer_bytes, write_smallest

FRAME, RATE = 1920, 24000


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
