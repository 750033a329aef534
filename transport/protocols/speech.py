"""OpenAI's ``POST /v1/audio/speech``: text to speech, sent while it is made.

https://platform.openai.com/docs/api-reference/audio/createSpeech. Bytes leave as they are encoded, or with
``stream_format: "sse"`` as events ``speech.audio.delta`` and ``speech.audio.done``. ``seed`` is ours; ``speed`` other
than 1 and ``instructions`` are refused rather than ignored. A request counts as a call of the service.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Message, Receive, Scope, Send

from ...codecs.audio_file import AudioError
from ...codecs.audio_stream import MEDIA_TYPES, AudioStream
from ...models.cosyvoice.flow_config import TOKEN_SECONDS
from ...pipelines.chunk import Audio
from ...pipelines.served import speaking
from ...pipelines.speech import Speech
from ...pipelines.stage import StageError
from ..call import Call, CallError
from ..service import Full, Service
from .common import told

PATH = "/v1/audio/speech"
LONGEST = 4096  # characters
SPEEDS = (0.25, 4.0)
OPENAI_VOICES = frozenset(
    ("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse")
)
"""OpenAI's own, which many clients name unasked: here the model's first voice, unless it has one of that name."""
STALLED_SECONDS = 60.0  # in which a client takes nothing, after which it gets no more


class _Voice(BaseModel):
    id: str


class _Asked(BaseModel):
    """A request, as OpenAI defines it."""

    model_config = ConfigDict(extra="ignore")

    input: Annotated[str, Field(min_length=1, max_length=LONGEST)]
    model: str
    voice: str | _Voice
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "mp3"
    speed: Annotated[float, Field(ge=SPEEDS[0], le=SPEEDS[1])] = 1.0
    instructions: str | None = None
    stream_format: Literal["audio", "sse"] = "audio"
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None


def routes(service: Service) -> list[BaseRoute]:
    """``/v1/audio/speech``."""
    return [Route(PATH, _Speech(service), methods=["POST"])]


class _Refused(Exception):
    """A request that cannot be met. status: HTTP's."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers: dict[str, str] = {}

    @property
    def response(self) -> Response:
        """As OpenAI words it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)


class _Speech:
    """The route, as an ASGI application: the call lives as long as its response."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""

        async def send_soon(message: Message) -> None:
            async with asyncio.timeout(STALLED_SECONDS):
                await send(message)

        try:
            asked, options = await self._read(Request(scope, receive))
            async with self.service.connect(options, graph=speaking) as call:
                sound = await _begin(call, asked)
                media = "text/event-stream" if asked.stream_format == "sse" else MEDIA_TYPES[asked.response_format]
                await StreamingResponse(sound, media_type=media)(scope, receive, send_soon)
        except _Refused as error:
            await error.response(scope, receive, send)
        except Full as error:
            refused = _Refused(503, str(error), "at_capacity")
            refused.headers["retry-after"] = str(max(1, round(error.wait)))
            await refused.response(scope, receive, send)

    async def _read(self, request: Request) -> tuple[_Asked, dict[str, Any]]:
        """The request and the graph's options. Raises _Refused."""
        try:
            asked = _Asked.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise _Refused(400, f"{where}: {first['msg']}" if where else first["msg"], None, where or None) from None
        if asked.speed != 1.0:
            raise _Refused(400, f"speed={asked.speed:g}: this server speaks at the voice's own pace, 1", None, "speed")
        if asked.instructions:
            raise _Refused(400, "instructions are not followed here: leave them out", None, "instructions")
        voice = asked.voice if isinstance(asked.voice, str) else asked.voice.id
        if self.service.engine is not None:
            try:
                speech = Speech.of(self.service.engine)
            except (ValueError, TypeError):
                message = "no speech model is served here: start the server with --voice NAME or --speech-model"
                raise _Refused(404, message, "model_not_found", "model") from None
            if voice in OPENAI_VOICES and voice not in speech.reader.voices:
                voice = "default"
            if voice != "default":
                try:
                    speech.reader.voice(voice)
                except ValueError as error:
                    raise _Refused(400, str(error), "voice_not_found", "voice") from None
        options: dict[str, Any] = {} if voice == "default" else {"voice": voice}
        return asked, options | ({} if asked.seed is None else {"seed": asked.seed})


async def _begin(call: Call, asked: _Asked) -> AsyncIterator[bytes]:
    """The bytes to send, once there is sound. Raises _Refused."""
    await call.write(asked.input)
    call.finish()
    sound = _sound(call)
    try:
        first = await anext(sound, None)
        if first is None or not first.duration:
            raise _Refused(400, "input: there is nothing in it that can be spoken", None, "input")
        encoder = AudioStream(asked.response_format, first.rate)
    except (AudioError, CallError) as error:
        raise _Refused(500, str(error)) from error
    except StageError as error:
        raise _Refused(500, told(error)) from error
    return _encoded(first, sound, encoder, None if asked.stream_format == "audio" else _tokens(call, asked.input))


async def _sound(call: Call) -> AsyncIterator[Audio]:
    async for item in call.items():
        if isinstance(item.chunk, Audio):
            yield item.chunk


def _tokens(call: Call, text: str) -> int:
    """Text tokens of a request."""
    return len(Speech.of(call.session.engine).reader.tokenizer.encode(text))


async def _encoded(
    first: Audio, rest: AsyncIterator[Audio], encoder: AudioStream, tokens: int | None
) -> AsyncIterator[bytes]:
    """tokens: of the text, for a response in events; None for bytes alone."""
    plain, end = tokens is None, first.end_seconds
    if data := encoder.push(first.samples):
        yield data if plain else _event(data)
    async for chunk in rest:
        end = chunk.end_seconds
        if data := encoder.push(chunk.samples):
            yield data if plain else _event(data)
    if data := encoder.finish():
        yield data if plain else _event(data)
    if tokens is not None:
        made = round(end / TOKEN_SECONDS)
        usage = {"input_tokens": tokens, "output_tokens": made, "total_tokens": tokens + made}
        yield f"data: {json.dumps({'type': 'speech.audio.done', 'usage': usage})}\n\n".encode()


def _event(data: bytes) -> bytes:
    audio = base64.b64encode(data).decode()
    return f"data: {json.dumps({'type': 'speech.audio.delta', 'audio': audio})}\n\n".encode()
