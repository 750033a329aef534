"""The plain protocol: 16-bit PCM in, JSON events out, over one websocket. docs/protocols.md describes it.

A client that loses its connection comes back with its token and the number of the last event it saw. It is told how
many samples have arrived, continues there, and gets the events that it missed: nothing is lost, nothing comes twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from ...pipelines.chunk import Audio, Event, Text
from .. import json_text
from ..call import Call, Item, NoInlet, TakenOver
from ..service import ConnectionLost, Service
from ..websocket import Socket
from .common import RATES, TOLD, from_pcm16, refusal, to_pcm16, until_one_ends, whole

TIMES = ("lookahead_ms", "endpoint_ms")
MILLISECONDS = (0, 60_000)
ITEM_NUMBERS = (0, 999_999_999)


def routes(service: Service) -> list[BaseRoute]:
    """``/v1/stream``."""
    plain = _Plain(service)
    return [WebSocketRoute("/v1/stream", plain.serve)]


def to_message(item: Item, replies: frozenset[str] = frozenset()) -> dict[str, Any]:
    """An item as the JSON message that tells of it; times are seconds of media.

    Text: type ``partial`` or ``final``, id, reply (whether it is the graph's own, one of ``replies`` by its source),
    text, words, start, end. Event: type is its name, id, start, end, data.
    Audio: type ``audio``, id, rate, epoch, start, final, and the bytes of 16-bit PCM that belong to it.
    """
    chunk = item.chunk
    start, end = round(chunk.start_seconds, 4), round(chunk.end_seconds, 4)
    if isinstance(chunk, Text):
        words = [{"text": word.text, "start": word.start, "end": word.end} for word in chunk.words]
        kind = "final" if chunk.final else "partial"
        said = {"reply": item.source in replies, "text": chunk.text, "words": words}
        return {"type": kind, "id": item.id, **said, "start": start, "end": end}
    if isinstance(chunk, Event):
        return {"type": chunk.name, "id": item.id, "start": start, "end": end, "data": dict(chunk.data)}
    if isinstance(chunk, Audio):
        return {
            "type": "audio",
            "id": item.id,
            "rate": chunk.rate,
            "epoch": chunk.epoch,
            "start": start,
            "final": chunk.final,
            "bytes": 2 * chunk.duration,
        }
    raise TypeError(f"the graph served here puts out {chunk}: a client gets text, events and sound")


def to_error(code: str, message: str) -> dict[str, Any]:
    """An error as a JSON message."""
    return {"type": "error", "code": code, "message": message}


def options_of(query: Mapping[str, str]) -> dict[str, Any]:
    """The graph's options from a query: language, lookahead_ms, endpoint_ms. Raises ValueError."""
    options: dict[str, Any] = {name: whole(name, query[name], 0, MILLISECONDS) for name in TIMES if name in query}
    if "language" in query:
        options["language"] = query["language"][:40]
    return options


class _Plain:
    """The protocol's connections. speaking: which task reads a call's sound; one at a time does."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.speaking: dict[str, asyncio.Task[None]] = {}

    async def serve(self, websocket: WebSocket) -> None:
        """One connection, to its end."""
        socket = Socket(websocket)
        await socket.accept()
        try:
            await self._converse(socket, websocket.query_params)
        except ConnectionLost:
            return
        except TOLD as error:
            code, message, close = refusal(error)
            await self._part(socket, to_error(code, message), close)
        else:
            await socket.close()

    async def _part(self, socket: Socket, message: dict[str, Any], close: int) -> None:
        try:
            await socket.send_json(message)
        except ConnectionLost:
            return
        await socket.close(close, message["message"])

    async def _converse(self, socket: Socket, query: Mapping[str, str]) -> None:
        rate = whole("rate", query.get("rate"), 16000, RATES)
        after = whole("after", query["after"], 0, ITEM_NUMBERS) if "after" in query else None
        token = query.get("resume")
        async with self.service.connect(options_of(query), resume=token) as call:
            try:
                await self._silence_others(call)
                greeting = {"call": call.id, "resume": self.service.resume_token(call), "model": self.service.name}
                if token is None:
                    await socket.send_json({"type": "session", **greeting, "rate": rate})
                else:
                    await socket.send_json({"type": "resumed", **greeting, "received": call.received, "rate": rate})
                await until_one_ends(self._listen(socket, call, rate), _answer(socket, call, after))
            except TakenOver as error:
                code, message, close = refusal(error)
                await self._part(socket, to_error(code, message), close)
                raise ConnectionLost(str(error)) from None

    async def _silence_others(self, call: Call) -> None:
        """Sound still arriving on an older connection of the call would come twice: its client sends it again."""
        older = self.speaking.pop(call.id, None)
        if older is not None:
            older.cancel()
            await asyncio.wait([older])

    async def _listen(self, socket: Socket, call: Call, rate: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.speaking[call.id] = task
        try:
            while (message := await socket.receive()) is not None:
                try:
                    if isinstance(message, bytes):
                        await call.hear(from_pcm16(message), rate)
                    else:
                        await obey(call, message)
                except (ValueError, NoInlet) as error:
                    await socket.send_json(to_error(*refusal(error)[:2]))
        except asyncio.CancelledError:
            if self.speaking.get(call.id) is task:
                raise
            raise TakenOver(f"call {call.id} was taken over by another connection") from None
        finally:
            if self.speaking.get(call.id) is task:
                del self.speaking[call.id]


async def obey(call: Call, text: str) -> None:
    """A client's JSON message. Raises ValueError and NoInlet."""
    try:
        message = json_text.parse(text)
    except ValueError:
        raise ValueError("not JSON: a text message is an object with a type") from None
    kind = message.get("type") if isinstance(message, dict) else None
    if kind == "control":
        name, data = message.get("name"), message.get("data") or {}
        if not isinstance(name, str) or not isinstance(data, dict):
            raise ValueError("a control message has a name (text) and data (an object)")
        await call.tell(name, data)
    elif kind == "interrupt":
        call.interrupt()
    elif kind == "played":
        epoch, seconds = message.get("epoch"), message.get("seconds")
        if type(epoch) is not int or type(seconds) not in (int, float) or not 0 <= seconds < 1e9:
            raise ValueError("a played message has the epoch (a whole number) and the seconds played of it")
        call.played(epoch, seconds)
    elif kind == "finish":
        call.finish()
    else:
        raise ValueError(f"type={str(kind)[:40]!r}: known are control, interrupt, played and finish")


async def _answer(socket: Socket, call: Call, after: int | None) -> None:
    async for item in call.items(after):
        await socket.send_json(to_message(item, call.replies))
        if isinstance(item.chunk, Audio):
            await socket.send_bytes(to_pcm16(item.chunk.samples))
