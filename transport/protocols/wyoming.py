"""Wyoming, the protocol of Home Assistant's voice services: JSON lines and sound over TCP, for speech recognition.

https://github.com/OHF-Voice/wyoming. An event is a line of JSON (``type``, ``data``, ``data_length``,
``payload_length``), then so many bytes of more data and of payload. Wyoming knows no passwords: serve it to a network
that you trust.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from ...pipelines.chunk import Text
from .. import json_text
from ..call import Call
from ..service import Service
from .common import RATES, TOLD, foreign, from_pcm16, refusal, until_one_ends, whole

LINE_BYTES = 1 << 14
DATA_BYTES = 1 << 16
PAYLOAD_BYTES = 1 << 19
IDLE_SECONDS = 300.0  # between a client's events
SEND_SECONDS = 2.0
CONNECTIONS = 64  # at a time: most of them only wait for something to be said


class BadEvent(ValueError):
    """Not an event of the protocol, or a bigger one than is taken."""


@dataclass(frozen=True, slots=True)
class WyomingEvent:
    """An event: its ``type``, ``data`` and ``payload``."""

    type: str
    data: dict[str, Any] = field(default_factory=dict)
    payload: bytes = b""


async def serve(
    service: Service, host: str = "127.0.0.1", port: int = 10300, *, most: int = CONNECTIONS
) -> asyncio.Server:
    """A listening server; close it to stop. Raises OSError where the port is taken.

    most: connections at a time; another one is told so by an ``error`` and closed.
    """
    open_ones = 0

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_ones
        connection = _Connection(service, reader, writer)
        open_ones += 1
        try:
            if open_ones > most:
                await connection.refuse(f"{most} connections are open, which is the most: try again later")
            else:
                await connection.serve()
        except (OSError, EOFError, TimeoutError):
            return  # the client is gone
        finally:
            open_ones -= 1
            writer.close()

    return await asyncio.start_server(serve_one, host, port, limit=LINE_BYTES)


class _Connection:
    """One client."""

    def __init__(self, service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._service, self._reader, self._writer = service, reader, writer

    async def serve(self) -> None:
        """Answer until the client closes, or sends what cannot be taken: then an ``error`` ends the connection."""
        options: dict[str, Any] = {}
        try:
            while (event := await self._receive()) is not None:
                if event.type == "describe":
                    await self._send("info", self._info())
                elif event.type == "ping":
                    await self._send("pong", {"text": event.data.get("text")})
                elif event.type == "transcribe":
                    language = event.data.get("language")
                    options = foreign(language if isinstance(language, str) else None, self._service.native)
                elif event.type == "audio-start":
                    await self._transcribe(event, options)
        except TOLD as error:
            code, message, _ = refusal(error)
            await self._send("error", {"text": message, "code": code})

    async def refuse(self, reason: str) -> None:
        """Say why the client is not served."""
        self._service.counts["refused"] += 1
        await self._send("error", {"text": reason, "code": "full"})

    async def _transcribe(self, start: WyomingEvent, options: dict[str, Any]) -> None:
        rate = _rate(start)
        async with self._service.connect(options) as call:
            await self._send("transcript-start", options)
            answering = asyncio.create_task(self._answer(call))
            try:
                await until_one_ends(self._listen(call, rate), _failed(answering))
                text = await answering
            finally:
                answering.cancel()
        await self._send("transcript", {"text": text, **options})
        await self._send("transcript-stop")

    async def _listen(self, call: Call, rate: int) -> None:
        """The sound, up to ``audio-stop``."""
        while (event := await self._receive()) is not None:
            if event.type == "audio-chunk":
                if _rate(event) != rate:
                    raise BadEvent(f"an audio-chunk at {event.data['rate']} Hz in a stream at {rate} Hz")
                await call.hear(from_pcm16(event.payload), rate)
            elif event.type == "audio-stop":
                call.finish()
                return
            elif event.type == "ping":
                await self._send("pong", {"text": event.data.get("text")})
        raise EOFError("the client closed within its audio")

    async def _answer(self, call: Call) -> str:
        """Send words as soon as they are settled, all but a caption's last; the whole text at the end."""
        text, sent = "", 0  # words of the open caption that were sent
        async for item in call.items():
            chunk = item.chunk
            if isinstance(chunk, Text):
                settled = chunk.settled_words
                for word in settled[sent:]:
                    piece = f" {word.text}" if text else word.text
                    text += piece
                    await self._send("transcript-chunk", {"text": piece})
                sent = 0 if chunk.final else max(sent, len(settled))
        return text

    def _info(self) -> dict[str, Any]:
        artifact = {
            "name": self._service.name or "antiphon",
            "attribution": {"name": "Antiphon", "url": ""},
            "installed": True,
            "description": "Streaming speech recognition",
            "version": None,
        }
        languages = [self._service.native] if self._service.native else []
        program = {
            **artifact,
            "name": "antiphon",
            "models": [{**artifact, "languages": languages}],
            "supports_transcript_streaming": True,
        }
        return {"asr": [program], "tts": [], "handle": [], "intent": [], "wake": [], "mic": [], "snd": []}

    async def _receive(self) -> WyomingEvent | None:
        """The next event; None at the end. Raises BadEvent, EOFError within an event, and TimeoutError."""
        async with asyncio.timeout(IDLE_SECONDS):
            try:
                line = await self._reader.readline()
            except ValueError:
                raise BadEvent(f"a line is longer than {LINE_BYTES} bytes") from None
            if not line:
                return None
            head = _object(line)
            data = head.get("data") or {}
            more = await self._reader.readexactly(_size(head, "data_length", DATA_BYTES))
            payload = await self._reader.readexactly(_size(head, "payload_length", PAYLOAD_BYTES))
        if not isinstance(head.get("type"), str) or not isinstance(data, dict):
            raise BadEvent("an event has a type (text) and data (an object)")
        return WyomingEvent(head["type"], {**data, **(_object(more) if more else {})}, payload)

    async def _send(self, type: str, data: dict[str, Any] | None = None) -> None:
        """Raises OSError and TimeoutError where the client is gone."""
        self._writer.write(json.dumps({"type": type, "data": data or {}}).encode() + b"\n")
        async with asyncio.timeout(SEND_SECONDS):
            await self._writer.drain()


async def _failed(answering: asyncio.Task[str]) -> None:
    """Ends only by raising what ended the answer too soon."""
    await asyncio.wait([answering])
    answering.result()
    await asyncio.Event().wait()


def _rate(event: WyomingEvent) -> int:
    """Of an event that has a sound's format. Raises BadEvent, ValueError."""
    width, channels = event.data.get("width"), event.data.get("channels")
    if (width, channels) != (2, 1):
        raise BadEvent(f"width={width}, channels={channels}: send 16-bit mono (width 2, channels 1)")
    return whole("rate", str(event.data.get("rate")), 0, RATES)


def _object(line: bytes) -> dict[str, Any]:
    try:
        parsed = json_text.parse(line)
    except ValueError:
        raise BadEvent("an event is not JSON") from None
    if not isinstance(parsed, dict):
        raise BadEvent("an event is not a JSON object")
    return parsed


def _size(head: dict[str, Any], name: str, most: int) -> int:
    size = head.get(name) or 0
    if type(size) is not int or not 0 <= size <= most:
        raise BadEvent(f"{name}={str(size)[:20]}: at most {most} bytes")
    return size
