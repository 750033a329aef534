"""Twilio Media Streams: a telephone call as mu-law at 8 kHz in JSON over a websocket, both ways.

https://www.twilio.com/docs/voice/media-streams/websocket-messages. Twilio is the client. It plays what it is sent in
order and echoes each ``mark`` when it gets there; ``clear`` drops what has not been played, and then too its marks come
back, so marks that are older than the last ``clear`` count for nothing.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from starlette.datastructures import Headers
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.types import Scope
from starlette.websockets import WebSocket

from ...codecs.g711 import RATE, decode, encode
from ...codecs.resample import Resampler
from ...pipelines.chunk import Audio, Event
from .. import json_text
from ..call import Call
from ..service import ConnectionLost, Service
from ..websocket import UNSUPPORTED, Socket
from .common import TOLD, foreign, refusal, to_pcm16, until_one_ends

PATH = "/twilio/media"
START_SECONDS = 10.0  # for the message ``start`` to come
MARK_EVERY = 0.1  # seconds of reply between marks: how finely it is known what was heard
OPTIONS = ("lookahead_ms", "endpoint_ms")
FORMAT = {"encoding": "audio/x-mulaw", "sampleRate": RATE, "channels": 1}


def signature(token: str, url: str) -> str:
    """What Twilio sends as ``X-Twilio-Signature`` with a request to ``url``, signed with an account's auth token.

    https://www.twilio.com/docs/usage/security#validating-requests; a websocket's handshake has no parameters to add.
    """
    return base64.b64encode(hmac.new(token.encode(), url.encode(), hashlib.sha1).digest()).decode()


def signed_with(token: str) -> Callable[[Scope], bool]:
    """What checks that a handshake, by its scope, is Twilio's: it is made to ``wss`` at the name in ``Host``, which a
    proxy in front passes on, with the port or without.
    """

    def check(scope: Scope) -> bool:
        headers = Headers(scope=scope)
        name, query = headers.get("host", ""), scope.get("query_string", b"").decode("latin-1")
        path = scope["path"] + (f"?{query}" if query else "")
        given = headers.get("x-twilio-signature", "").encode()
        urls = {f"wss://{host}{path}" for host in (name, name.removesuffix(":443"), f"{name}:443")}
        return any(hmac.compare_digest(signature(token, url).encode(), given) for url in urls)

    return check


class BadMessage(ValueError):
    """Not what Twilio sends."""


def routes(service: Service) -> list[BaseRoute]:
    """``/twilio/media``. A stream's custom parameters are its call's options: language, lookahead_ms, endpoint_ms."""

    async def media(websocket: WebSocket) -> None:
        socket = Socket(websocket)
        await socket.accept()
        try:
            async with asyncio.timeout(START_SECONDS):
                start = await _started(socket)
            if start is not None:
                await _converse(service, socket, start)
            await socket.close()
        except ConnectionLost:
            return
        except TimeoutError:
            await socket.close(UNSUPPORTED, f"no start message in {START_SECONDS:g} s")
        except BadMessage as error:
            await socket.close(UNSUPPORTED, str(error))
        except TOLD as error:
            _, message, close = refusal(error)
            await socket.close(close, message)

    return [WebSocketRoute(PATH, media)]


async def _receive(socket: Socket) -> tuple[str, dict[str, Any]] | None:
    """The next message's event, and what it holds. Raises BadMessage."""
    message = await socket.receive()
    if message is None:
        return None
    try:
        parsed = json_text.parse(message)
    except ValueError:
        raise BadMessage("a message is not JSON") from None
    event = parsed.get("event") if isinstance(parsed, dict) else None
    if not isinstance(event, str):
        raise BadMessage("a message has no event")
    held = parsed.get(event)
    return event, held if isinstance(held, dict) else {}


async def _started(socket: Socket) -> dict[str, Any] | None:
    while (message := await _receive(socket)) is not None:
        event, held = message
        if event == "start":
            if held.get("mediaFormat") != FORMAT or not isinstance(held.get("streamSid"), str):
                raise BadMessage(f"the stream's format is {FORMAT}, and it has a streamSid")
            return held
        if event != "connected":
            raise BadMessage(f"the event {event[:40]!r} came before start")
    return None


async def _converse(service: Service, socket: Socket, start: Mapping[str, Any]) -> None:
    given = start.get("customParameters") or {}
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise BadMessage("customParameters is an object of texts")
    options = {name: given[name] for name in OPTIONS if name in given}
    options |= foreign(given.get("language"), service.native)
    async with service.connect(options) as call:
        try:
            player = _Player(socket, call, start["streamSid"])
            await until_one_ends(_listen(socket, call, player), player.play())
        except ConnectionLost:
            return  # Twilio does not come back to a stream: the call ends


async def _listen(socket: Socket, call: Call, player: _Player) -> None:
    while (message := await _receive(socket)) is not None:
        event, held = message
        if event == "media" and held.get("track", "inbound") == "inbound":
            try:
                codes = base64.b64decode(held["payload"], validate=True)
            except (KeyError, TypeError, binascii.Error):
                raise BadMessage("media has no payload in base64") from None
            pcm = decode(np.frombuffer(codes, np.uint8), "mulaw")
            await call.hear(pcm.astype(np.float32) / np.float32(32768), RATE)
        elif event == "mark":
            player.reached(held.get("name"))
        elif event == "dtmf" and call.takes("control"):
            await call.tell("dtmf", {"digit": str(held.get("digit"))[:8]})
        elif event == "stop":
            return


class _Player:
    """Replies on their way to the telephone, and how far it has played them."""

    def __init__(self, socket: Socket, call: Call, stream: str) -> None:
        self._socket, self._call, self._stream = socket, call, stream
        self._resampler: Resampler | None = None
        self._epoch = 0
        self._unmarked = 0.0  # seconds sent since the last mark
        self._marks: dict[str, tuple[int, float]] = {}  # on their way: the epoch, and the media time they stand for
        self._number = 0

    async def play(self) -> None:
        """Send the call's sound until the call ends."""
        async for item in self._call.items():
            chunk = item.chunk
            if isinstance(chunk, Audio):
                await self._say(chunk)
            elif isinstance(chunk, Event) and chunk.name == "interrupted":
                self._marks.clear()
                self._resampler = None
                await self._send({"event": "clear"})

    def reached(self, mark: Any) -> None:
        """The telephone has played up to a mark."""
        place = self._marks.pop(mark, None) if isinstance(mark, str) else None
        if place is not None:
            self._call.played(*place)

    async def _say(self, chunk: Audio) -> None:
        if self._resampler is None or chunk.epoch != self._epoch:
            self._resampler, self._epoch, self._unmarked = Resampler(chunk.rate, RATE), chunk.epoch, 0.0
        samples = self._resampler.push(chunk.samples)
        if chunk.final:
            samples = np.concatenate((samples, self._resampler.flush()))
            self._resampler = None
        if samples.size:
            codes = encode(np.frombuffer(to_pcm16(samples), "<i2"), "mulaw")
            payload = base64.b64encode(codes.tobytes()).decode()
            await self._send({"event": "media", "media": {"payload": payload}})
        self._unmarked += chunk.seconds
        if chunk.final or self._unmarked >= MARK_EVERY:
            self._unmarked = 0.0
            self._number += 1
            name = f"antiphon-{self._number}"
            self._marks[name] = (chunk.epoch, chunk.end_seconds)
            await self._send({"event": "mark", "mark": {"name": name}})

    async def _send(self, message: dict[str, Any]) -> None:
        await self._socket.send_json({**message, "streamSid": self._stream})
