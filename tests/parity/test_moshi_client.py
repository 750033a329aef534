"""Kyutai's own client, unmodified, at ``antiphon serve``: ``moshi.client.Connection`` with a sound card of threads."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "apps"))
sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from running import server
from tiny_duplex import write_smallest

pytestmark = pytest.mark.parity
aiohttp = pytest.importorskip("aiohttp", reason="needs the parity extra: aiohttp")
BLOCKS = 39  # of 80 ms that each client says: 3 s
ENOUGH = 36  # non-silent ones that each hears
PATIENCE = 60.0


class Card:
    """What the client needs of ``sounddevice``: streams that call back once a block, in threads of their own."""

    def __init__(self) -> None:
        self.said = 0
        self.heard: list[float] = []
        self.enough = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def streams(self) -> types.SimpleNamespace:
        """In place of the module, for the connection made next."""
        return types.SimpleNamespace(
            InputStream=lambda **options: Stream(self._say, **options),
            OutputStream=lambda **options: Stream(self._hear, **options),
        )

    def _say(self, callback: Callable[..., None], count: int) -> None:
        if self.said < BLOCKS:
            phase = (np.arange(count) + self.said * count) * (2 * np.pi * 220 / 24000)
            callback((0.2 * np.sin(phase)).astype(np.float32)[:, None], count, None, None)
            self.said += 1

    def _hear(self, callback: Callable[..., None], count: int) -> None:
        block = np.zeros((count, 1), np.float32)
        callback(block, count, None, None)
        self.heard.append(float(np.abs(block).max()))
        if self.non_silent >= ENOUGH:
            self.loop.call_soon_threadsafe(self.enough.set)

    @property
    def non_silent(self) -> int:
        """Blocks with something to hear."""
        return sum(loud > 1e-4 for loud in self.heard)


class Stream:
    """Half a sound card. It keeps the time that a card keeps."""

    def __init__(
        self, work: Callable[..., None], *, samplerate: int, channels: int, blocksize: int, callback: Any
    ) -> None:
        assert channels == 1
        self._work, self._callback, self._size = work, callback, blocksize
        self._period = blocksize / samplerate
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopping.is_set():
            self._work(self._callback, self._size)
            due += self._period
            self._stopping.wait(max(0.0, due - time.monotonic()))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_smallest(tmp_path_factory.mktemp("model"))
    with server("--graph", "converse", "--model", folder, "--max-sessions", 8) as port:
        yield f"http://127.0.0.1:{port}/api/chat?text_seed=1&audio_seed=2"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``moshi.client``."""
    pytest.importorskip("sphn", reason="needs sphn, with moshi==0.2.13 installed with --no-deps")
    monkeypatch.setitem(sys.modules, "sounddevice", types.ModuleType("sounddevice"))
    return pytest.importorskip("moshi.client", reason="needs moshi==0.2.13, installed with --no-deps")


async def converse_with(client: Any, url: str, card: Card) -> str:
    """One client, until it has heard enough. What it printed."""
    from moshi.client_utils import RawPrinter

    out = io.StringIO()
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as ws:
        client.sd = card.streams()
        connection = client.Connection(RawPrinter(out, io.StringIO()), ws, event_loop=asyncio.get_running_loop())
        running = asyncio.create_task(connection.run())
        with suppress(TimeoutError):
            await asyncio.wait_for(card.enough.wait(), PATIENCE)
        await ws.close()
        await asyncio.wait_for(running, 10)
    return out.getvalue()


@pytest.mark.parametrize("clients", [1, 8])
def test_kyutais_client_converses(client: Any, url: str, clients: int) -> None:
    async def run() -> tuple[list[Card], list[str]]:
        cards = [Card() for _ in range(clients)]
        return cards, await asyncio.gather(*(converse_with(client, url, card) for card in cards))

    cards, printed = asyncio.run(run())
    assert [card.non_silent >= ENOUGH for card in cards] == [True] * clients, [card.non_silent for card in cards]
    assert all(ENOUGH < card.said <= BLOCKS for card in cards)
    assert any(printed)
