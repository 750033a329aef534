"""Deepgram's live transcription, ``/v1/listen``: raw sound in, JSON results out.

https://developers.deepgram.com/reference/speech-to-text/listen-streaming. ``Finalize`` and ``CloseStream`` end the
graph's input, so all that is inside comes out; after ``Finalize`` a new one takes the sound that follows. The clients'
types want a confidence, and the recogniser has none to give: it is 0.0 everywhere, meaning unknown.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from ...codecs.g711 import decode
from ...pipelines.chunk import Event, Text
from .. import json_text
from ..call import Call
from ..service import ConnectionLost, Full, Service
from ..websocket import ERROR, Socket
from .common import RATES, TOLD, Samples, foreign, from_pcm16, refusal, told, until_one_ends, whole

SILENCE_SECONDS = 10.0  # without sound or KeepAlive, after which Deepgram closes
PAUSE_MS = 1000  # that ends a caption where the client does not say
NEVER_MS = 60_000  # for endpointing=false: the recogniser's longest caption comes first
MILLISECONDS = (0, NEVER_MS)
NOT_SERVED = ("diarize", "multichannel", "redact", "detect_language", "detect_entities", "callback", "translate")
UNKNOWN = 0.0  # confidence


def _g711(law: Any) -> Callable[[bytes], Samples]:
    return lambda data: decode(np.frombuffer(data, np.uint8), law).astype(np.float32) / np.float32(32768)


DECODERS: dict[str, Callable[[bytes], Samples]] = {
    "linear16": from_pcm16,
    "mulaw": _g711("mulaw"),
    "alaw": _g711("alaw"),
}


def routes(service: Service) -> list[BaseRoute]:
    """``/v1/listen``."""

    async def listen(websocket: WebSocket) -> None:
        socket = Socket(websocket)
        try:
            settings = Settings.of(websocket.query_params, service.native)
        except ValueError as error:
            await _deny(websocket, 400, error)
            return
        stream = _Stream(service, socket, settings)
        try:
            await stream.serve()
            await socket.close()
        except ConnectionLost:
            return
        except TOLD as error:
            if not stream.accepted:
                await _deny(websocket, 503 if isinstance(error, Full) else 400, error)
                return
            code, message, close = refusal(error)
            await stream.tell({"type": "Error", "variant": code, "description": message, "message": message})
            await socket.close(close, message)

    return [WebSocketRoute("/v1/listen", listen)]


async def _deny(websocket: WebSocket, status: int, error: Exception) -> None:
    message = told(error)
    body = {"err_code": "Bad Request" if status == 400 else "Service Unavailable", "err_msg": message}
    await websocket.send_denial_response(JSONResponse(body, status, {"dg-error": message.replace("\n", " ")}))


@dataclass(frozen=True)
class Settings:
    """What a client asked for. pause_ms: without a word, that ends a caption."""

    encoding: str
    rate: int
    pause_ms: int
    interim: bool
    utterance_end_ms: int | None
    vad_events: bool
    language: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, query: Mapping[str, str], native: str | None) -> Settings:
        """From the query. Raises ValueError."""
        encoding = query.get("encoding")
        if encoding is None or "sample_rate" not in query:
            raise ValueError(
                f"sound in containers is not decoded here: send it raw, and give encoding ({', '.join(DECODERS)}) and "
                "sample_rate"
            )
        if encoding not in DECODERS:
            raise ValueError(f"encoding={encoding[:40]!r}: there are {', '.join(DECODERS)}")
        for name in NOT_SERVED:
            if query.get(name, "false").lower() not in ("false", ""):
                raise ValueError(f"{name}={query[name][:40]!r} is not served here: leave it out")
        whole("channels", query.get("channels"), 1, (1, 1))
        pause = query.get("endpointing", "true").lower()
        utterance = query.get("utterance_end_ms")
        return cls(
            encoding=encoding,
            rate=whole("sample_rate", query["sample_rate"], 0, RATES),
            pause_ms={"true": PAUSE_MS, "false": NEVER_MS}.get(pause) or whole("endpointing", pause, 0, MILLISECONDS),
            interim=query.get("interim_results", "false").lower() == "true",
            utterance_end_ms=whole("utterance_end_ms", utterance, 0, (1000, 5000)) if utterance else None,
            vad_events=query.get("vad_events", "false").lower() == "true",
            language=foreign(query.get("language"), native),
        )

    @property
    def options(self) -> dict[str, Any]:
        """The graph's."""
        return {"endpoint_ms": max(self.pause_ms, 1), **self.language}


class _Stream:
    """One connection: a call, and another one after each ``Finalize``."""

    def __init__(self, service: Service, socket: Socket, settings: Settings) -> None:
        self._service, self._socket, self._settings = service, socket, settings
        self._request = str(uuid.uuid4())
        self._created = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._digest = hashlib.sha256()
        self._before = 0.0  # seconds of sound in the calls before this one
        self._ending = ""  # the message that ended this call's input
        self._flushed = False  # a result has come out since
        self._word_end: float | None = None  # of an utterance whose end was not told yet; None while words are open
        self.accepted = False

    async def serve(self) -> None:
        """To the end of the stream."""
        while True:
            async with self._service.connect(self._settings.options) as call:
                if not self.accepted:
                    await self._socket.accept()
                    self.accepted = True
                self._ending, self._flushed = "", False
                answering = asyncio.create_task(self._answer(call))
                try:
                    await until_one_ends(self._listen(call), _failed(answering))
                    if not self._ending:
                        return
                    call.finish()
                    await answering
                except ConnectionLost:
                    return  # the protocol has no way to come back: the call ends
                finally:
                    answering.cancel()
                self._before += call.heard_seconds
            if self._ending == "CloseStream":
                await self.tell(self._metadata())
                return
            if not self._flushed:
                await self.tell(self._result((), self._before, self._before, final=True, finalized=True))

    async def tell(self, message: dict[str, Any]) -> None:
        """Send a message."""
        await self._socket.send_json(message)

    async def _listen(self, call: Call) -> None:
        """Until the client ends this call's input, or closes."""
        decode = DECODERS[self._settings.encoding]
        while True:
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    message = await self._socket.receive()
            except TimeoutError:
                await self._socket.close(ERROR, f"NET-0001: no sound and no KeepAlive for {SILENCE_SECONDS:g} s")
                return
            if message is None:
                return
            if isinstance(message, bytes) and message:
                self._digest.update(message)
                await call.hear(decode(message), self._settings.rate)
                await self._end_utterance(call)
                continue
            kind = _type(message) if isinstance(message, str) else "CloseStream"  # an empty frame closes too
            if kind in ("Finalize", "CloseStream"):
                self._ending = kind
                return
            if kind != "KeepAlive":
                raise ValueError(f"type={kind[:40]!r}: known are KeepAlive, Finalize and CloseStream")

    async def _end_utterance(self, call: Call) -> None:
        wait, end = self._settings.utterance_end_ms, self._word_end
        if wait is not None and end is not None and self._before + call.heard_seconds >= end + wait / 1000:
            self._word_end = None
            await self.tell({"type": "UtteranceEnd", "channel": [0, 1], "last_word_end": round(end, 3)})

    async def _answer(self, call: Call) -> None:
        async for item in call.items():
            chunk = item.chunk
            if isinstance(chunk, Text):
                start, end = self._before + chunk.start_seconds, self._before + chunk.end_seconds
                self._word_end = end if chunk.final else None
                if chunk.final or self._settings.interim:
                    paused = call.heard_seconds - chunk.end_seconds >= self._settings.pause_ms / 1000
                    await self.tell(
                        self._result(
                            chunk.words,
                            start,
                            end,
                            final=chunk.final,
                            paused=chunk.final and paused and self._settings.pause_ms < NEVER_MS,
                            finalized=chunk.final and self._ending == "Finalize",
                        )
                    )
                    self._flushed = self._flushed or (chunk.final and self._ending == "Finalize")
            elif isinstance(chunk, Event) and chunk.name == "speech_start" and self._settings.vad_events:
                at = round(self._before + chunk.start_seconds, 3)
                await self.tell({"type": "SpeechStarted", "channel": [0], "timestamp": at})

    def _result(
        self, words: Any, start: float, end: float, *, final: bool, paused: bool = False, finalized: bool = False
    ) -> dict[str, Any]:
        spoken = [
            {
                "word": word.text.lower().strip(".,;:!?\"'"),
                "punctuated_word": word.text,
                "start": round(self._before + word.start, 3),
                "end": round(self._before + word.end, 3),
                "confidence": UNKNOWN,
            }
            for word in words
        ]
        text = " ".join(word.text for word in words)
        name = self._service.name
        return {
            "type": "Results",
            "channel_index": [0, 1],
            "start": round(start, 3),
            "duration": round(end - start, 3),
            "is_final": final,
            "speech_final": paused,
            "from_finalize": finalized,
            "channel": {"alternatives": [{"transcript": text, "confidence": UNKNOWN, "words": spoken}]},
            "metadata": {
                "request_id": self._request,
                "model_info": {"name": name, "version": "", "arch": ""},
                "model_uuid": str(uuid.uuid5(uuid.NAMESPACE_DNS, name)),
            },
        }

    def _metadata(self) -> dict[str, Any]:
        return {
            "type": "Metadata",
            "transaction_key": "deprecated",
            "request_id": self._request,
            "sha256": self._digest.hexdigest(),
            "created": self._created,
            "duration": round(self._before, 6),
            "channels": 1,
        }


def _type(text: str) -> str:
    try:
        message = json_text.parse(text)
    except ValueError:
        raise ValueError("not JSON: a text message is an object with a type") from None
    return str(message.get("type")) if isinstance(message, dict) else ""


async def _failed(answering: asyncio.Task[None]) -> None:
    """Ends when the answer does, raising what it raised."""
    await asyncio.wait([answering])
    answering.result()
