"""What the protocol tests share: the embedded recogniser on an engine, a server on a free port, and a clip."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import uvicorn
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.routing import BaseRoute

import antiphon
from antiphon.codecs.audio_file import read
from antiphon.models.conformer.checkpoint import load
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.graph import Graph
from antiphon.pipelines.recognizer import Recognizer
from antiphon.pipelines.stage import Inlet
from antiphon.pipelines.stages.transcribe import Transcribe

RATE = 16000


@contextmanager
def recognising(slots: int = 4) -> Iterator[Engine]:
    """An engine with the embedded recogniser as ``asr``."""
    with Engine("cpu") as engine:
        recognizer = Recognizer(load(None, device="cpu"))
        engine.add("asr", recognizer, slots=slots, variants=[recognizer.variant(None)])
        yield engine


def transcribing(endpoint_ms: float = 1000, language: str | None = None) -> Graph:
    """Captions, and nothing else."""
    return Inlet().named("audio") >> Transcribe(endpoint=endpoint_ms / 1000, language=language)


@asynccontextmanager
async def serving(routes: Sequence[BaseRoute]) -> AsyncIterator[str]:
    """``host:port`` of a server with these routes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        app = Starlette(routes=list(routes))
        config = uvicorn.Config(
            app, log_config=None, lifespan="off", ws_max_size=1 << 18, ws_per_message_deflate=False,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(10):
                while not server.started:
                    await asyncio.sleep(0.01)
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await running


@cache
def clip(seconds: float) -> NDArray[np.int16]:
    """The start of a reading, at 16 kHz."""
    samples = read(Path(antiphon.__file__).parent / "apps" / "samples" / "two_cities.flac", RATE)
    return np.rint(samples[: round(seconds * RATE)] * 32767).astype(np.int16)
