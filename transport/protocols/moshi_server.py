"""The messages of Kyutai's Rust server: streaming speech to text and text to speech as their clients speak them.

https://github.com/kyutai-labs/moshi, ``rust/moshi-server``; its clients are those of delayed-streams-modeling and
Unmute. Messages are MessagePack maps, told apart by ``type``; sound is 24 kHz, as float32 or Ogg/Opus. The speech to
text is the served graph's own, the text to speech that of ``--speech-model``. A full server, or anything wrong, is
told in a message ``Error`` before the connection closes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from ...codecs.ogg import OggOpusReader, OggOpusWriter
from ...codecs.resample import Resampler
from ...pipelines.chunk import Audio, Event, Text, Word
from ...pipelines.graph import Graph
from ...pipelines.served import listening, speaking
from ...pipelines.speech import Speech
from ..call import Call
from ..service import ConnectionLost, Service
from ..websocket import Socket
from .common import TOLD, Samples, refusal, until_one_ends, whole

ASR, TTS = "/api/asr-streaming", "/api/tts_streaming"
RATE, FRAME = 24000, 1920
HORIZONS = 4  # pauses of 0.5, 1, 2 and 3 s: clients look at the third
IDLE_SECONDS = 120.0  # without a message, after which a client is let go
FORMATS = ("Pcm", "PcmMessagePack", "OggOpus", "OggOpusMessagePack")
SEEDS = (0, 999_999_999)
Message = dict[str, Any]
Kinds = Mapping[str, Mapping[str, type]]
HEARD: Kinds = {"Init": {}, "Audio": {"pcm": list}, "OggOpus": {"data": object}, "Marker": {"id": int}}
SPOKEN: Kinds = {"Text": {"text": str}, "Eos": {}, "Voice": {}}
"""Of clients' messages: what kinds there are, and their fields."""

_BREAK = re.compile(r'<break\s+time="[0-9.]+s"\s*/>')


def routes(service: Service) -> list[BaseRoute]:
    """The two websockets, and ``/api/build_info`` and ``/api/modules_info``, by which clients see that all is well."""

    async def transcribe(websocket: WebSocket) -> None:
        await _serve(_Transcript(service, Socket(websocket)))

    async def speak(websocket: WebSocket) -> None:
        await _serve(_Speaker(service, Socket(websocket), websocket.query_params))

    async def build_info(request: Request) -> Response:
        return JSONResponse({"name": "antiphon", "model": service.name})

    async def modules_info(request: Request) -> Response:
        slots = {"used_slots": str(len(service.calls)), "total_slots": str(service.max_calls)}
        modules = [{"type": "batched_asr", "path": ASR, **slots}] if _hears(service) else []
        if service.engine is not None and _speaks(service):
            modules.append({"type": "py", "path": TTS, **slots})
        return JSONResponse(modules)

    return [
        WebSocketRoute(ASR, transcribe),
        WebSocketRoute(TTS, speak),
        Route("/api/build_info", build_info),
        Route("/api/modules_info", modules_info),
    ]


def pack(kind: str, **fields: Any) -> bytes:
    """A message."""
    data: bytes = msgpack.packb({"type": kind, **fields}, use_single_float="pcm" in fields)
    return data


def unpack(data: bytes, kinds: Kinds) -> Message:
    """A client's message of one of these kinds, with its fields. Raises ValueError."""
    try:
        message: Message = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException, msgpack.StackError) as error:
        raise ValueError(f"a message is one MessagePack map: {str(error)[:80]}") from None
    kind = message.get("type") if isinstance(message, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"a message is a map with type {', '.join(kinds)}; got {str(kind)[:40]!r}")
    for name, type_ in kinds[kind].items():
        if name not in message or not isinstance(message[name], type_):
            raise ValueError(f"a message {kind} has {name}, of type {type_.__name__}")
    return message


async def _serve(side: _Transcript | _Speaker) -> None:
    await side.socket.accept()
    try:
        await side.serve()
        await side.socket.close()
    except ConnectionLost:
        return
    except TOLD as error:
        _, message, close = refusal(error)
        try:
            await side.fail(message)
        except ConnectionLost:
            return
        await side.socket.close(close, message)


async def _next(socket: Socket) -> str | bytes | None:
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            return await socket.receive()
    except TimeoutError:
        raise ValueError(f"no message for {IDLE_SECONDS:g} s") from None


# ------------------------------------------------------------------------------------------------ speech to text


def _hears(service: Service) -> bool:
    try:
        listening(service.graph({}))
    except ValueError:
        return False
    return True


class _Transcript:
    """Speech to text over one connection.

    A recogniser that tells of its steps has a ``Step`` for each. Of another one, a mark goes through with every frame,
    and comes out as the ``Step`` after which no word of that frame is missing; a pause is then what follows a caption.
    """

    def __init__(self, service: Service, socket: Socket) -> None:
        self.service, self.socket = service, socket
        self._steps = 0  # marks sent
        self._marks = True  # whether steps are told by marks
        self._told = 0  # words of the caption under way
        self._quiet = True

    async def serve(self) -> None:
        """To the end of the call."""

        def graph(_: Mapping[str, Any]) -> Graph:
            made = listening(self.service.graph({}))
            self._marks = not any(getattr(node, "steps", False) for node in made.nodes)
            return made

        async with self.service.connect(graph=graph) as call:
            try:
                await self.socket.send_bytes(pack("Ready"))
                await until_one_ends(self._listen(call), self._write(call))
            except ConnectionLost:
                return  # these clients do not come back to a call

    async def fail(self, message: str) -> None:
        """Tell what went wrong."""
        await self.socket.send_bytes(pack("Error", message=message))

    async def _listen(self, call: Call) -> None:
        reader = OggOpusReader(RATE, trim=False)
        while (data := await _next(self.socket)) is not None:
            if isinstance(data, str):
                raise ValueError("a message is binary: one MessagePack map")
            message = unpack(data, HEARD)
            for pcm in sound(message, reader):
                await self._hear(call, pcm)
            if message["type"] == "Marker":
                await call.tell("mark", {"id": message["id"]})

    async def _hear(self, call: Call, pcm: Samples) -> None:
        while len(pcm):
            count = FRAME - call.received % FRAME
            await call.hear(pcm[:count], RATE)
            pcm = pcm[count:]
            if self._marks and call.received % FRAME == 0:
                self._steps += 1
                await call.tell("mark", {"step": self._steps})

    async def _write(self, call: Call) -> None:
        async for item in call.items():
            chunk = item.chunk
            if isinstance(chunk, Text):
                await self._words(chunk)
            elif isinstance(chunk, Event) and "step" in chunk.data:
                pauses = chunk.data.get("pauses") or [float(self._quiet)] * HORIZONS
                waiting = max(0, call.received - round(chunk.start_seconds * RATE))
                await self._send("Step", step_idx=chunk.data["step"], prs=pauses, buffered_pcm=waiting)
            elif isinstance(chunk, Event) and chunk.name == "mark":
                await self._send("Marker", id=chunk.data["id"])

    async def _words(self, text: Text) -> None:
        self._quiet = text.final
        words = text.settled_words
        for word in words[self._told :]:
            if word.text:
                await self._send("Word", text=word.text, start_time=word.start)
                await self._send("EndWord", stop_time=word.end)
        self._told = 0 if text.final else len(words)

    async def _send(self, kind: str, **fields: Any) -> None:
        await self.socket.send_bytes(pack(kind, **fields))


def sound(message: Message, reader: OggOpusReader) -> Iterator[Samples]:
    """What a client's message has to be heard. reader: of its Ogg stream. Raises ValueError."""
    if message["type"] == "Audio":
        try:
            samples = np.asarray(message["pcm"], np.float32)
        except (TypeError, ValueError):
            samples = np.full(1, np.nan, np.float32)
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise ValueError("pcm is a list of numbers from -1 to 1, at 24 kHz")
        yield samples.clip(-1.0, 1.0)
    elif message["type"] == "OggOpus":
        data = message["data"]  # bytes, which Rust writes as a list of numbers
        try:
            data = bytes(data) if isinstance(data, list | bytes) else None
        except (TypeError, ValueError):
            data = None
        if data is None:
            raise ValueError("data is bytes, or a list of numbers from 0 to 255")
        yield from reader.push(data)


# ------------------------------------------------------------------------------------------------ text to speech


def _speaks(service: Service) -> bool:
    try:
        Speech.of(service.engine)
    except (ValueError, TypeError):
        return False
    return True


class _Speaker:
    """Text to speech over one connection.

    The text is spoken as it arrives, a few words behind. ``voice`` names one of the server's; any other is the first
    of them, as with Kyutai's server, whose clients name voices that only it has.
    """

    def __init__(self, service: Service, socket: Socket, query: Mapping[str, str]) -> None:
        self.service, self.socket, self._query = service, socket, query
        self._format = "OggOpus"
        self._writer = OggOpusWriter(RATE)
        self._pending = np.zeros(0, np.float32)
        self._words: tuple[Word, ...] = ()
        self._told = 0  # of them

    async def serve(self) -> None:
        """To the end of the text's sound."""
        given = self._query.get("format", "OggOpus")
        if given not in FORMATS:
            raise ValueError(f"format={given[:40]!r}: one of {', '.join(FORMATS)}")
        self._format = given
        async with self.service.connect(self._options(), graph=speaking) as call:
            try:
                await self._send("Ready")
                await until_one_ends(self._listen(call), self._speak(call))
            except ConnectionLost:
                return

    async def fail(self, message: str) -> None:
        """Tell what went wrong."""
        await self._send("Error", message=message)

    def _options(self) -> dict[str, Any]:
        if self.service.engine is None:
            return {}  # the service says that it is starting
        if not _speaks(self.service):
            raise ValueError("no speech model is served here: antiphon serve --speech-model")
        options: dict[str, Any] = {"arriving": True}
        voice = self._query.get("voice")
        if voice in Speech.of(self.service.engine).reader.voices:
            options["voice"] = voice
        if (seed := self._query.get("seed")) is not None:
            options["seed"] = whole("seed", seed, 0, SEEDS)
        return options

    async def _listen(self, call: Call) -> None:
        """Until the client closes."""
        ended = False
        while (data := await (self.socket.receive() if ended else _next(self.socket))) is not None:
            if data == b"\0":
                message: Message = {"type": "Eos"}
            else:
                message = {"type": "Text", "text": data} if isinstance(data, str) else unpack(data, SPOKEN)
            if message["type"] == "Voice":
                raise ValueError("a voice cannot be sent here: name one of the server's in the query")
            if message["type"] == "Eos":
                ended = True
                call.finish()
            elif ended:
                raise ValueError("there was an end of the text: open another connection for more")
            elif text := _BREAK.sub(" ", message["text"]).strip():
                await call.write(f"{text} ", final=False)

    async def _speak(self, call: Call) -> None:
        resampler: Resampler | None = None
        async for item in call.items():
            chunk = item.chunk
            if isinstance(chunk, Text):
                self._words = chunk.words
            elif isinstance(chunk, Audio):
                if resampler is None:
                    resampler = Resampler(chunk.rate, RATE)
                await self._sound(resampler.push(chunk.samples))
                await self._tell(chunk.end_seconds)
        if resampler is not None:
            await self._sound(resampler.flush())
        # To the end of a frame, and with Opus, whose coder holds some back, of another one.
        left = -len(self._pending) % FRAME + FRAME * self._format.startswith("Ogg")
        await self._sound(np.zeros(left, np.float32))
        await self._tell(float("inf"))

    async def _tell(self, seconds: float) -> None:
        """The words that were said before this time."""
        while self._told < len(self._words) and self._words[self._told].end <= seconds:
            word = self._words[self._told]
            self._told += 1
            await self._send("Text", text=word.text, start_s=word.start, stop_s=word.end)

    async def _sound(self, samples: Samples) -> None:
        """In frames: some clients play a message as it is."""
        joined = np.concatenate((self._pending, samples))
        count = len(joined) // FRAME * FRAME
        self._pending = joined[count:]
        for frame in _frames(joined[:count]):
            if self._format == "Pcm":
                await self.socket.send_bytes(frame.astype("<f4").tobytes())
            elif self._format == "PcmMessagePack":
                await self._send("Audio", pcm=frame.tolist())
            elif self._format == "OggOpus":
                await self.socket.send_bytes(self._writer.push(frame))
            else:
                await self._send("OggOpus", data=list(self._writer.push(frame)))

    async def _send(self, kind: str, **fields: Any) -> None:
        """A message, where the format has any."""
        if self._format.endswith("MessagePack"):
            await self.socket.send_bytes(pack(kind, **fields))


def _frames(samples: Samples) -> Iterator[Samples]:
    yield from samples.reshape(-1, FRAME)
