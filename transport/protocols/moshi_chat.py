"""Moshi's ``/api/chat``: Ogg/Opus at 24 kHz both ways in binary messages, and text, as Kyutai's clients speak it.

https://github.com/kyutai-labs/moshi, ``client/src/protocol/encoder.ts`` and ``moshi/client.py``. The first byte of a
message is its kind. Kyutai's server holds one conversation at a time and ignores the query; this one holds as many as
the engine admits, each with the sampling that its client asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from ...codecs.ogg import OggError, OggOpusReader, OggOpusWriter
from ...codecs.resample import Resampler
from ...pipelines.chunk import Audio, Text
from ..call import Call
from ..service import ConnectionLost, Service
from ..websocket import TOO_BIG, UNSUPPORTED, Socket
from .common import TOLD, refusal, until_one_ends

RATE = 24000
HANDSHAKE, SOUND, TEXT, CONTROL, METADATA, ERROR, PING, COLOURED, IMAGE, CODES = range(10)
CONTROLS = (
    "start",
    "commit",
    "pause",
    "restart",
)  # Kyutai's start, endTurn, pause and restart, as events for the graph
LONGEST_MESSAGE = 1 << 18  # bytes: two minutes of sound at once
PING_SECONDS = 5.0  # of silence from here; Kyutai's page hangs up after 10
OPTIONS: Mapping[str, tuple[str, type]] = {
    "text_temperature": ("text_temperature", float),
    "text_topk": ("text_top_k", int),
    "audio_temperature": ("audio_temperature", float),
    "audio_topk": ("audio_top_k", int),
    "pad_mult": ("padding_bonus", float),
    "text_seed": ("text_seed", int),
    "audio_seed": ("audio_seed", int),
    "repetition_penalty": ("penalty", float),
    "repetition_penalty_context": ("penalty_context", int),
    "text_prompt": ("prompt", str),
    "voice_prompt": ("voice", str),
}


class BadMessage(ValueError):
    """Not what a client of Moshi sends."""


def routes(service: Service) -> list[BaseRoute]:
    """``/api/chat``. The query parameters of ``OPTIONS`` are the call's options; others are ignored."""

    async def chat(websocket: WebSocket) -> None:
        socket = Socket(websocket)
        await socket.accept()
        try:
            await _converse(service, socket, options_of(websocket.query_params))
            await socket.close()
        except ConnectionLost:
            return
        except (BadMessage, OggError) as error:
            await _part(socket, str(error), TOO_BIG if "at most" in str(error) else UNSUPPORTED)
        except TOLD as error:
            _, message, close = refusal(error)
            await _part(socket, message, close)

    return [WebSocketRoute("/api/chat", chat)]


def options_of(query: Mapping[str, str]) -> dict[str, Any]:
    """A graph's options from Kyutai's query parameters. Raises ValueError, naming the parameter."""
    options: dict[str, Any] = {}
    for theirs, (ours, kind) in OPTIONS.items():
        if theirs in query:
            try:
                options[ours] = query[theirs] if kind is str else kind(query[theirs][:40])
            except ValueError:
                raise ValueError(f"{theirs}={query[theirs][:40]!r}: give a number") from None
    return options


async def _part(socket: Socket, message: str, close: int) -> None:
    try:
        await socket.send_bytes(bytes([ERROR]) + message.encode())
    except ConnectionLost:
        return
    await socket.close(close, message)


async def _converse(service: Service, socket: Socket, options: Mapping[str, Any]) -> None:
    async with service.connect(options) as call:
        try:
            await socket.send_bytes(bytes([HANDSHAKE]))
            mouth = _Mouth(socket, call)
            await until_one_ends(_listen(socket, call), mouth.speak(), mouth.keep_alive())
        except ConnectionLost:
            return  # these clients do not come back to a call


async def _listen(socket: Socket, call: Call) -> None:
    reader = OggOpusReader(RATE, trim=False)
    while (message := await socket.receive()) is not None:
        if isinstance(message, str) or not message:
            raise BadMessage("a message is binary, and its first byte its kind")
        if len(message) > LONGEST_MESSAGE:
            raise BadMessage(f"a message has at most {LONGEST_MESSAGE} bytes, got {len(message)}")
        kind = message[0]
        if kind == SOUND:
            for pcm in reader.push(message[1:]):
                await call.hear(pcm, RATE)
        elif kind == CONTROL:
            if len(message) != 2 or message[1] >= len(CONTROLS):
                raise BadMessage(f"a control message is one byte below {len(CONTROLS)}, got {message[1:5].hex()!r}")
            if call.takes("control"):
                await call.tell(CONTROLS[message[1]])
        elif kind > CODES:
            raise BadMessage(f"a message of kind {kind} is not known")


class _Mouth:
    """What the call says, on its way to the client."""

    def __init__(self, socket: Socket, call: Call) -> None:
        self._socket, self._call = socket, call
        self._writer = OggOpusWriter(RATE)
        self._resampler: Resampler | None = None
        self._told = ""  # of the utterance that is being said
        self._sent = asyncio.Event()

    async def speak(self) -> None:
        """Send the call's sound and words until the call ends."""
        async for item in self._call.items():
            if isinstance(item.chunk, Audio):
                await self._say(item.chunk)
            elif isinstance(item.chunk, Text) and item.source in self._call.replies:
                await self._tell(item.chunk)

    async def keep_alive(self) -> None:
        """Send a ping wherever nothing has been sent for a while."""
        while True:
            try:
                async with asyncio.timeout(PING_SECONDS):
                    await self._sent.wait()
                self._sent.clear()
            except TimeoutError:
                await self._send(PING, b"")

    async def _say(self, chunk: Audio) -> None:
        samples = chunk.samples
        if chunk.rate != RATE:
            if self._resampler is None or self._resampler.source_rate != chunk.rate:
                self._resampler = Resampler(chunk.rate, RATE)
            samples = self._resampler.push(samples)
        if pages := self._writer.push(samples):
            await self._send(SOUND, pages)

    async def _tell(self, chunk: Text) -> None:
        """Only what is new: Kyutai's clients put the pieces together."""
        known = self._told if chunk.text.startswith(self._told) else ""
        self._told = "" if chunk.final else chunk.text
        if fresh := chunk.text[len(known) :]:
            await self._send(TEXT, fresh.encode())

    async def _send(self, kind: int, data: bytes) -> None:
        await self._socket.send_bytes(bytes([kind]) + data)
        self._sent.set()
