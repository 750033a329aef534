"""What the tests of OpenAI's protocol share: a scripted call, and the protocol over it, checked by the SDK's types."""

from __future__ import annotations

import base64
import json
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from antiphon.pipelines.chunk import Audio, Chunk, Event, Text, Word
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.session import Session
from antiphon.transport.call import Item
from antiphon.transport.protocols.realtime import Realtime

pytest.importorskip("openai")
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter

SERVER_EVENT: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)
RATE = 24000


class ScriptedCall:
    """What ``Realtime`` needs of a call, with nothing behind it."""

    replies = frozenset({"parrot.audio", "parrot.said"})

    def __init__(self) -> None:
        self.id, self.rate, self.heard_seconds = "scripted", None, 0.0
        self.session = SimpleNamespace(heard=None)
        self.told: list[tuple[str, Any]] = []
        self.heard: list[np.ndarray] = []
        self.epoch = 0

    def takes(self, inlet: str) -> bool:
        return inlet in ("audio", "control")

    async def hear(self, samples: np.ndarray, rate: int) -> None:
        self.rate = rate
        self.heard.append(samples)
        self.heard_seconds += len(samples) / rate

    async def tell(self, name: str, data: Any = None) -> None:
        self.told.append((name, data))

    def interrupt(self) -> int:
        self.epoch += 1
        return self.epoch

    def played(self, epoch: int, seconds: float, until: float | None = None) -> None:
        Session.report_heard(self.session, "client", epoch, seconds, until)  # type: ignore[arg-type]


class Talk:
    """A protocol over a scripted call, and everything it said, each event parsed by the SDK's types."""

    def __init__(self, *, audio_in_band: bool = True, type: str = "realtime") -> None:
        self.call = ScriptedCall()
        self.said: list[dict[str, Any]] = []
        self.realtime = Realtime(self.call, self._take, audio_in_band=audio_in_band, type=type)  # type: ignore[arg-type]
        self._items = 0

    async def _take(self, message: dict[str, Any]) -> None:
        parsed = SERVER_EVENT.validate_python(json.loads(json.dumps(message)))
        assert parsed.type == message["type"]
        self.said.append(message)

    async def client(self, type: str, **fields: Any) -> list[dict[str, Any]]:
        """Send an event; what came of it."""
        before = len(self.said)
        await self.realtime.handle(json.dumps({"type": type, **fields}))
        return self.said[before:]

    async def graph(self, chunk: Chunk, source: str = "") -> list[dict[str, Any]]:
        """The call puts something out; what came of it."""
        before, self._items = len(self.said), self._items + 1
        await self.realtime.item(Item(self._items, chunk, 0.0, source))
        return self.said[before:]

    async def event(self, name: str, seconds: float = 0.0, /, **data: Any) -> list[dict[str, Any]]:
        chunk = Event(name=name, data=data, rate=16000, start=round(seconds * 16000), epoch=self.call.epoch)
        return await self.graph(chunk, "turns.events")

    async def sound(self, start: float, seconds: float, *, final: bool = False) -> list[dict[str, Any]]:
        samples = np.full(round(seconds * RATE), 0.25, np.float32)
        audio = Audio(samples=samples, rate=RATE, start=round(start * RATE), epoch=self.call.epoch, final=final)
        return await self.graph(audio, "parrot.audio")

    async def caption(self, text: str, *, final: bool = False, start: float = 0.0) -> list[dict[str, Any]]:
        words = tuple(Word(word, start + at / 4, start + (at + 1) / 4) for at, word in enumerate(text.split()))
        chunk = Text(text=text, words=words, rate=16000, start=round(start * 16000), duration=4000 * len(words),
                     final=final, epoch=0)  # fmt: skip
        return await self.graph(chunk, "captions")


def types(messages: list[dict[str, Any]]) -> list[str]:
    return [message["type"] for message in messages]


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return run_virtual(main)


def error_of(messages: list[dict[str, Any]]) -> dict[str, Any]:
    (message,) = messages
    assert message["type"] == "error"
    return message["error"]


def pcm(seconds: float) -> str:
    return base64.b64encode(bytes(2 * round(seconds * RATE))).decode()
