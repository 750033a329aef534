"""``antiphon serve --graph converse`` with a checkpoint from a folder."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from websockets.asyncio.client import connect

from antiphon.codecs import mimi_checkpoint
from antiphon.codecs.ogg import OggOpusReader, OggOpusWriter
from antiphon.models.files import CheckpointError
from antiphon.models.moshi import checkpoint
from antiphon.pipelines import duplex

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from tiny_duplex import SMALLEST, SMALLEST_MIMI, tiny_lm, tiny_mimi, tokenizer_bytes
from tiny_moshi import SETTINGS

FRAME, RATE = 1920, 24000


def saved(folder: Path) -> Path:
    """A tiny random dialogue model as files."""
    checkpoint.save(folder, tiny_lm(**SMALLEST), SETTINGS | SMALLEST)
    mimi_checkpoint.save(folder / "mimi", tiny_mimi(ratios=(32, 30), **SMALLEST_MIMI))
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = saved(tmp_path_factory.mktemp("model"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from antiphon.apps.cli import main; main()", "serve", "--port", str(port)]
    command += ["--graph", "converse", "--model", str(folder), "--device", "cpu", "--max-sessions", "2"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 90
        while not ready(port):
            assert process.poll() is None, "the server ended before it was ready"
            assert time.monotonic() < until, "the server did not become ready"
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except urllib.error.URLError:
        return False


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
    model = duplex.load(saved(tmp_path), prefill=4, sinks=2)
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
