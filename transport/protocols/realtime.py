"""OpenAI's Realtime API, GA, as a server: over a websocket here, over WebRTC's channel ``oai-events`` elsewhere.

``Realtime`` is the protocol alone. Client events go into ``handle``, what the call puts out into ``item``; each changes
the state at once and queues the server events that follow, so both may run in tasks of their own and events still leave
in one order. Source: the API reference's client and server events; docs/protocols-realtime.md says which are covered.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import copy
import json
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from ...codecs import g711
from ...codecs.resample import Resampler
from ...pipelines.chunk import Audio, Event, Text, Word
from ...pipelines.stage import StageError
from ...pipelines.turn_taking import TurnSettings
from ..call import Call, CallError, Item
from ..service import ConnectionLost, Full, Service
from ..websocket import ERROR, NORMAL, POLICY, TRY_LATER, Socket
from . import realtime_events as wire
from .common import from_pcm16, to_pcm16

PIECE_SECONDS = 0.1  # of sound given to the graph at once
LEAST_COMMIT_MS = 100  # of sound in a buffer that is committed
KEPT_ITEMS = 1024  # of the conversation
TRANSCRIPT_SECONDS = 5.0  # of sound after a turn's end within which its last words come
SETTLED_SECONDS = 0.5  # of a turn's end that a final caption may leave to silence
_LAWS: dict[str, g711.Law] = {"audio/pcmu": "mulaw", "audio/pcma": "alaw"}

Samples = NDArray[np.float32]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class BadEvent(ValueError):
    """A client event that is refused. code, param: for the client."""

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


@dataclass(slots=True)
class _Turn:
    """What the user said in one turn, or is saying. start, end: seconds of media (end: None while it is open).

    announced: the client has heard of its id, so that transcript may go out. final_to: end of its last final caption.
    """

    id: str
    start: float
    end: float | None = None
    announced: bool = False
    final_to: float = 0.0
    done: str = ""  # words of captions that are final
    sent: str = ""  # transcript that has gone out as deltas


@dataclass(slots=True)
class _Response:
    """A reply being made."""

    id: str
    epoch: int
    metadata: Any = None
    message: dict[str, Any] | None = None  # its conversation item
    modality: str = "audio"
    output: list[dict[str, Any]] = field(default_factory=list)
    resampler: Resampler | None = None
    start: float = 0.0  # media time of its first sound, seconds
    heard_to: float = 0.0  # media time that its sound reaches to
    text: str = ""
    text_sent: str = ""
    text_open: bool = False
    text_done: bool = False
    sound_done: bool = False


class Realtime:
    """The protocol for one call.

    send: takes each server event. audio_in_band: whether sound travels in events (websocket), or the transport plays it
    and reports to ``Call.played`` (WebRTC), and then to ``played`` here.
    """

    def __init__(self, call: Call, send: Send, *, audio_in_band: bool, model: str = "", type: str = "realtime") -> None:
        self.call, self._send, self.audio_in_band = call, send, audio_in_band
        self.session = wire.Session.model_validate({"type": type, "model": model or None})
        self._outbox: deque[dict[str, Any]] = deque()
        self._sending = asyncio.Lock()
        self._items: dict[str, dict[str, Any]] = {}
        self._spoken: dict[str, tuple[int, float, float]] = {}  # assistant items: epoch, and where their sound lies
        self._response: _Response | None = None
        self._epoch = 0
        self._turn: _Turn | None = None  # open
        self._turns: deque[_Turn] = deque()  # committed, their transcripts not complete
        self._committed = 0.0  # media time of the last turn's end
        self._transcribed = 0.0  # media time that completed transcripts reach to
        self._caption_open = False  # the recogniser's last caption may still grow
        self._buffered = 0.0  # seconds in the input buffer
        self._playing: _Response | None = None  # whose sound the transport plays
        self._plays_until = 0.0  # loop time at which a client that plays what it gets has played it
        self._sent_to: tuple[int, float] | None = None  # epoch and media time that the sound sent reaches to

    # ---------------------------------------------------------------- its life

    async def start(self) -> None:
        """Say what the session is, and set the graph's turn taking to it."""
        self._say("session.created", session=self._shown())
        await self._tell_turns(self.session)
        await self._flush()

    async def finish(self) -> None:
        """The call has ended: what is open is closed."""
        while self._turns:
            self._complete(self._turns.popleft())
        self._end_response("incomplete")
        await self._flush()

    # ---------------------------------------------------------------- from the client

    async def handle(self, text: str) -> None:
        """One client event, as JSON. What is wrong with it is answered by an event ``error``."""
        event_id = None
        try:
            try:
                message = json.loads(text)
                if "\\u" in text:
                    json.dumps(message, ensure_ascii=False).encode()  # half a surrogate pair could not be sent back
            except (ValueError, RecursionError):
                raise BadEvent("the event is not JSON: send one JSON object a message", "invalid_json") from None
            if not isinstance(message, dict):
                raise BadEvent('the event is no JSON object: send {"type": ...}', "invalid_json")
            event_id = message.get("event_id") if isinstance(message.get("event_id"), str) else None
            try:
                event = wire.CLIENT_EVENT.validate_python(message)
            except ValidationError as error:
                raise _bad(error, message) from None
            await _HANDLERS[type(event)](self, event)
        except BadEvent as error:
            self._error(str(error), error.code, error.param, event_id)
        except (CallError, ValueError) as error:
            self._error(str(error), "not_possible", None, event_id)
        await self._flush()

    async def _update(self, event: wire.SessionUpdate) -> None:
        asked = event.session
        old = self.session.model_dump()
        try:
            new = wire.Session.model_validate(_merged(old, asked))
        except ValidationError as error:
            raise _bad(error, asked, "session.") from None
        if new.type != self.session.type and self.call.heard_seconds:
            raise BadEvent("the session's type is fixed once sound has come", param="session.type")
        if self.call.rate not in (None, _rate(new.audio.input.format)):
            raise BadEvent(
                f"the call hears sound at {self.call.rate} Hz: its input rate is fixed",
                param="session.audio.input.format",
            )
        await self._tell_turns(new)
        told: dict[str, Any] = {
            name: asked[name] for name in ("instructions", "tools", "tool_choice", "output_modalities") if name in asked
        }
        if new.audio.output.voice is not None:
            told["voice"] = new.audio.output.voice
        if told:
            await self.call.tell("session", told)
        self.session = new
        self._say("session.updated", session=self._shown())

    async def _append(self, event: wire.Append) -> None:
        try:
            data = base64.b64decode(event.audio, validate=True)
        except (binascii.Error, ValueError):
            raise BadEvent("audio is not base64", "invalid_audio", "audio") from None
        format = self.session.audio.input.format
        rate = _rate(format)
        law = _LAWS.get(format.type)
        samples = (
            from_pcm16(data)
            if law is None
            else from_pcm16(g711.decode(np.frombuffer(data, np.uint8), law).astype("<i2").tobytes())
        )
        self._report_played()
        step = int(rate * PIECE_SECONDS)
        for at in range(0, len(samples), step):
            await self.call.hear(samples[at : at + step], rate)
        self._buffered += len(samples) / rate
        while self._turns and self.call.heard_seconds > (self._turns[0].end or 0.0) + TRANSCRIPT_SECONDS:
            self._complete(self._turns.popleft())

    async def _commit(self, event: wire.Commit) -> None:
        if self._buffered * 1000 < LEAST_COMMIT_MS:
            raise BadEvent(
                f"the input buffer holds {self._buffered * 1000:.0f} ms: append {LEAST_COMMIT_MS} ms or more first",
                "input_audio_buffer_commit_empty",
            )
        await self.call.tell("commit")
        self._buffered = 0.0

    async def _clear(self, event: wire.Clear) -> None:
        await self.call.tell("clear")
        self._buffered, self._turn = 0.0, None
        self._say("input_audio_buffer.cleared")

    async def _clear_output(self, event: wire.ClearOutput) -> None:
        if self.audio_in_band:
            raise BadEvent("sound travels in events here: stop playing it, and send response.cancel", "invalid_event")
        self._stop("client_cancelled")

    async def _create_item(self, event: wire.CreateItem) -> None:
        item = event.item.model_dump(exclude_none=True)
        item.setdefault("id", _new("item"))
        if item["id"] in self._items:
            raise BadEvent(f"there is an item {item['id']!r} already", "item_exists", "item.id")
        previous = event.previous_item_id
        if previous not in (None, "root"):
            self._known(previous or "")
        await self.call.tell("item", item)
        self._add(item, previous)
        self._say("conversation.item.done", item=item, previous_item_id=self._before(item["id"]))

    async def _delete_item(self, event: wire.DeleteItem) -> None:
        self._known(event.item_id)
        del self._items[event.item_id]
        self._spoken.pop(event.item_id, None)
        self._say("conversation.item.deleted", item_id=event.item_id)

    async def _retrieve_item(self, event: wire.RetrieveItem) -> None:
        self._say("conversation.item.retrieved", item=self._known(event.item_id))

    async def _truncate_item(self, event: wire.TruncateItem) -> None:
        self._known(event.item_id)
        if event.item_id not in self._spoken:
            raise BadEvent(f"item {event.item_id!r} holds no reply's sound", param="item_id")
        epoch, start, end = self._spoken[event.item_id]
        if event.audio_end_ms > round((end - start) * 1000):
            raise BadEvent(
                f"audio_end_ms={event.audio_end_ms}: the item has {(end - start) * 1000:.0f} ms", param="audio_end_ms"
            )
        if self._sent_to is not None and self._sent_to[0] == epoch and self._sent_to[1] <= end:
            self._sent_to = None  # the client knows better than the estimate
        self.call.played(epoch, start + event.audio_end_ms / 1000)
        self._truncated(event.item_id, event.audio_end_ms)

    async def _create_response(self, event: wire.CreateResponse) -> None:
        if self.session.type == "transcription" or not self.call.replies:
            raise BadEvent("nothing replies in this session: it transcribes", "invalid_event")
        if self._response is not None:
            raise BadEvent(
                f"response {self._response.id} is being made: cancel it or wait for its response.done",
                "conversation_already_has_active_response",
            )
        asked: dict[str, Any] = {
            name: event.response[name] for name in ("instructions", "tools", "tool_choice") if name in event.response
        }
        await self.call.tell("respond", asked)
        self._begin_response(self._epoch, event.response.get("metadata"))

    async def _cancel_response(self, event: wire.CancelResponse) -> None:
        open_one = self._response
        if open_one is None or event.response_id not in (None, open_one.id):
            raise BadEvent("there is no such response to cancel", "response_cancel_not_active")
        self._stop("client_cancelled")

    # ---------------------------------------------------------------- from the graph

    async def item(self, item: Item) -> None:
        """Something that the call has put out."""
        chunk = item.chunk
        answers = isinstance(chunk, Audio) or item.source in self.call.replies
        if isinstance(chunk, Event):
            self._event(chunk)
        elif answers and chunk.epoch < self._epoch:
            pass  # it was overtaken by an interruption
        elif self.session.type == "transcription" and answers:
            if isinstance(chunk, Audio):
                self.call.played(chunk.epoch, chunk.end_seconds)
        elif isinstance(chunk, Audio):
            self._sound(chunk)
        elif isinstance(chunk, Text) and answers:
            self._words(chunk)
        elif isinstance(chunk, Text):
            self._caption(chunk)
        await self._flush()

    async def played(self) -> None:
        """The transport has played, and told the call how far (sound out of band)."""
        heard, playing = self.call.session.heard, self._playing
        if playing is None or heard is None or heard.epoch != playing.epoch or not playing.sound_done:
            return
        if heard.seconds >= playing.heard_to - 0.02:
            self._playing = None
            self._say("output_audio_buffer.stopped", response_id=playing.id)
            await self._flush()

    def _event(self, event: Event) -> None:
        if event.name == "speech_start":
            if self._turn is None or not self._turn.announced:
                self._turn = self._turn or _Turn(_new("item"), 0.0)
                self._turn.start, self._turn.announced = self._padded(event.start_seconds), True
                start = round(self._turn.start * 1000)
                self._say("input_audio_buffer.speech_started", audio_start_ms=start, item_id=self._turn.id)
        elif event.name == "turn_end":
            self._turn_ended(event)
        elif event.name == "interrupted":
            self._interrupted(event.data)
        elif event.name == "function_call" and event.epoch >= self._epoch:
            self._function_call(event.data)
        elif event.name in ("error", "limit"):
            message = event.data.get("message", f"the call has had its {event.data.get('seconds')} s of sound")
            self._error(str(message), event.name, None, None)

    def _turn_ended(self, event: Event) -> None:
        ended = event.start_seconds
        turn, self._turn = self._turn or _Turn(_new("item"), self._committed), None
        if event.data.get("reason") == "idle":
            began = max(0.0, ended - float(event.data.get("waited_ms", 0)) / 1000)
            span = {"audio_start_ms": round(began * 1000), "audio_end_ms": round(ended * 1000)}
            self._say("input_audio_buffer.timeout_triggered", item_id=turn.id, **span)
        elif turn.announced and self.session.audio.input.turn_detection is not None:
            self._say("input_audio_buffer.speech_stopped", audio_end_ms=round(ended * 1000), item_id=turn.id)
        turn.end, turn.announced, self._committed = ended, True, ended
        self._buffered = max(0.0, self.call.heard_seconds - ended) if event.data.get("reason") != "manual" else 0.0
        previous = next(reversed(self._items), None)
        self._say("input_audio_buffer.committed", item_id=turn.id, previous_item_id=previous)
        content = [{"type": "input_audio", "transcript": None}]
        item = {
            "id": turn.id, "object": "realtime.item", "type": "message", "role": "user", "status": "completed",
            "content": content,
        }  # fmt: skip
        self._add(item, None)
        self._say("conversation.item.done", item=item, previous_item_id=previous)
        self._grow(turn, turn.done)
        if turn.done and not self._caption_open and ended - turn.final_to <= SETTLED_SECONDS:
            self._complete(turn)
        else:
            self._turns.append(turn)

    def _interrupted(self, data: Mapping[str, Any]) -> None:
        epoch = int(data["epoch"])
        cut, playing = self._response, self._playing
        self._epoch = max(self._epoch, epoch)
        self._sent_to = None
        if cut is not None and cut.epoch < epoch:
            self._end_response("cancelled", "turn_detected")
        if playing is not None and playing.epoch < epoch:
            self._playing = None
            self._say("output_audio_buffer.cleared", response_id=playing.id)
            if playing.message is not None and data.get("heard_epoch") == playing.epoch:
                heard = min(float(data["heard_seconds"]), playing.heard_to) - playing.start
                self._truncated(playing.message["id"], max(0, round(heard * 1000)))

    def _stop(self, reason: str) -> None:
        """Drop the reply, at the client's wish."""
        playing, self._playing = self._playing, None
        self._epoch = self.call.interrupt()
        self._sent_to = None
        self._end_response("cancelled", reason)
        if playing is not None:
            self._say("output_audio_buffer.cleared", response_id=playing.id)

    # ---------------------------------------------------------------- transcripts of what the user says

    def _caption(self, caption: Text) -> None:
        """A caption's words go to the turns they were said in; a word that may still grow is kept back."""
        if not self._turns and self._turn is None:
            self._turn = _Turn(_new("item"), self._committed)
        words = caption.words or (Word(caption.text, caption.start_seconds, caption.end_seconds),)
        said = words if caption.final else words[:-1]
        self._caption_open = not caption.final
        turns = [*self._turns, *([self._turn] if self._turn is not None else [])]
        for at, turn in enumerate(turns):
            first = turn.start if at else self._transcribed
            until = turns[at + 1].start if at + 1 < len(turns) else float("inf")
            own = " ".join(word.text for word in said if first <= word.start < until)
            whole = f"{turn.done} {own}".strip()
            self._grow(turn, whole)
            passed = any(word.start >= until for word in words)
            if caption.final or passed:
                turn.done, turn.final_to = whole, min(caption.end_seconds, until)
            if turn.end is not None and (passed or (caption.final and whole)):
                self._turns.remove(turn)
                self._complete(turn)
        if caption.final:
            self._transcribed = max(self._transcribed, caption.end_seconds)

    def _grow(self, turn: _Turn, whole: str) -> None:
        """Send what the transcript has gained."""
        if turn.announced and whole.startswith(turn.sent) and len(whole) > len(turn.sent):
            self._say(
                "conversation.item.input_audio_transcription.delta",
                item_id=turn.id, content_index=0, delta=whole[len(turn.sent) :],
            )  # fmt: skip
            turn.sent = whole

    def _complete(self, turn: _Turn) -> None:
        transcript = turn.done or turn.sent
        self._transcribed = max(self._transcribed, turn.final_to)
        if turn.id in self._items:
            self._items[turn.id]["content"][0]["transcript"] = transcript
        self._say(
            "conversation.item.input_audio_transcription.completed",
            item_id=turn.id, content_index=0, transcript=transcript,
            usage={"type": "duration", "seconds": round(max(0.0, (turn.end or turn.start) - turn.start), 3)},
        )  # fmt: skip

    # ---------------------------------------------------------------- responses

    def _begin_response(self, epoch: int, metadata: Any = None) -> _Response:
        modality = self.session.output_modalities[0]
        response = self._response = _Response(_new("resp"), epoch, metadata, modality=modality)
        self._say("response.created", response=self._response_shown(response, "in_progress"))
        return response

    def _message(self, chunk: Audio | Text) -> _Response:
        """The open response, with a message that the chunk is part of."""
        response = self._response or self._begin_response(chunk.epoch)
        if response.message is None:
            response.epoch, response.start = chunk.epoch, chunk.start_seconds
            kind = "output_audio" if response.modality == "audio" else "output_text"
            item = response.message = {
                "id": _new("item"), "object": "realtime.item", "type": "message", "role": "assistant",
                "status": "in_progress", "content": [],
            }  # fmt: skip
            self._say("response.output_item.added", response_id=response.id, output_index=0, item=item)
            self._add(item, None)
            item["content"].append(
                {"type": kind, "transcript": ""} if kind == "output_audio" else {"type": kind, "text": ""}
            )
            self._part("response.content_part.added", response, part=_part(response))
        return response

    def _sound(self, chunk: Audio) -> None:
        response = self._message(chunk)
        if not response.heard_to:
            response.start = chunk.start_seconds
        response.heard_to = chunk.end_seconds
        if response.message is not None and response.modality == "audio":
            self._spoken[response.message["id"]] = (chunk.epoch, response.start, response.heard_to)
            if self.audio_in_band:
                self._send_sound(response, chunk)
            elif self._playing is not response:
                self._playing = response
                self._say("output_audio_buffer.started", response_id=response.id)
        elif self.audio_in_band:
            self.call.played(chunk.epoch, chunk.end_seconds)
        response.sound_done = chunk.final
        self._maybe_done(response)

    def _send_sound(self, response: _Response, chunk: Audio) -> None:
        format = self.session.audio.output.format
        if response.resampler is None:
            response.resampler = Resampler(chunk.rate, _rate(format))
        samples = response.resampler.push(chunk.samples)
        if chunk.final:
            samples = np.concatenate((samples, response.resampler.flush()))
        now = asyncio.get_running_loop().time()
        self._plays_until = max(now, self._plays_until if self._sent_to else now) + chunk.seconds
        self._sent_to = (chunk.epoch, chunk.end_seconds)
        if len(samples):
            data = to_pcm16(samples)
            if format.type in _LAWS:
                data = g711.encode(np.frombuffer(data, "<i2").astype(np.int16), _LAWS[format.type]).tobytes()
            self._part("response.output_audio.delta", response, delta=base64.b64encode(data).decode())

    def _words(self, chunk: Text) -> None:
        response = self._message(chunk)
        whole = chunk.text
        response.text, response.text_open, response.text_done = whole, not chunk.final, chunk.final
        if whole.startswith(response.text_sent) and len(whole) > len(response.text_sent):
            name = "output_audio_transcript" if response.modality == "audio" else "output_text"
            self._part(f"response.{name}.delta", response, delta=whole[len(response.text_sent) :])
            response.text_sent = whole
        self._maybe_done(response)

    def _maybe_done(self, response: _Response) -> None:
        """A reply is whole with its last sound, and its last word where words have begun."""
        alone = response.modality == "text" or len(self.call.replies) == 1
        if (response.sound_done and not response.text_open) or (response.text_done and alone):
            self._end_response("completed")

    def _function_call(self, data: Mapping[str, Any]) -> None:
        response = self._response or self._begin_response(self._epoch)
        item = {
            "id": _new("item"), "object": "realtime.item", "type": "function_call", "status": "in_progress",
            "name": str(data["name"]), "call_id": str(data["call_id"]), "arguments": "",
        }  # fmt: skip
        index = len(response.output) + (response.message is not None)
        about = {"response_id": response.id, "output_index": index}
        self._say("response.output_item.added", item=item, **about)
        self._add(item, None)
        item.update(arguments=str(data["arguments"]), status="completed")
        calling = {**about, "item_id": item["id"], "call_id": item["call_id"]}
        self._say("response.function_call_arguments.delta", delta=item["arguments"], **calling)
        done = {"arguments": item["arguments"], "name": item["name"]}
        self._say("response.function_call_arguments.done", **calling, **done)
        self._say("response.output_item.done", item=item, **about)
        self._say("conversation.item.done", item=item, previous_item_id=self._before(item["id"]))
        response.output.append(item)
        if response.message is None:
            self._end_response("completed")

    def _end_response(self, status: str, reason: str | None = None) -> None:
        response, self._response = self._response, None
        if response is None:
            return
        item = response.message
        if item is not None:
            item["status"] = "completed" if status == "completed" else "incomplete"
            content = item["content"][0]
            if response.modality == "audio":
                content["transcript"] = response.text
                self._part("response.output_audio.done", response)
                self._part("response.output_audio_transcript.done", response, transcript=response.text)
            else:
                content["text"] = response.text
                self._part("response.output_text.done", response, text=response.text)
            self._part("response.content_part.done", response, part=_part(response))
            self._say("response.output_item.done", response_id=response.id, output_index=0, item=item)
            self._say("conversation.item.done", item=item, previous_item_id=self._before(item["id"]))
            response.output.insert(0, item)
        shown = self._response_shown(response, status)
        if status != "completed":
            shown["status_details"] = {"type": status, **({"reason": reason} if reason else {})}
        self._say("response.done", response=shown)

    def _response_shown(self, response: _Response, status: str) -> dict[str, Any]:
        return {
            "id": response.id, "object": "realtime.response", "status": status, "status_details": None,
            "output": list(response.output), "output_modalities": [response.modality], "metadata": response.metadata,
        }  # fmt: skip

    def _part(self, type: str, response: _Response, **fields: Any) -> None:
        item = response.message or {}
        self._say(
            type, response_id=response.id, item_id=item["id"], output_index=0, content_index=0, **fields
        )  # fmt: skip

    # ---------------------------------------------------------------- the conversation, the session, and sending

    def _add(self, item: dict[str, Any], previous: str | None) -> None:
        """Put an item after ``previous`` (None: at the end, "root": at the beginning)."""
        order = list(self._items)
        at = len(order) if previous is None else 0 if previous == "root" else order.index(previous) + 1
        kept = [*order[:at], item["id"], *order[at:]]
        self._items = {id: item if id == item["id"] else self._items[id] for id in kept[-KEPT_ITEMS:]}
        self._say("conversation.item.added", item=item, previous_item_id=self._before(item["id"]))

    def _before(self, id: str) -> str | None:
        previous = None
        for one in self._items:
            if one == id:
                return previous
            previous = one
        return None

    def _known(self, id: str) -> dict[str, Any]:
        if id not in self._items:
            raise BadEvent(f"there is no item {id!r} in the conversation", "item_not_found", "item_id")
        return self._items[id]

    def _truncated(self, id: str, milliseconds: int) -> None:
        if id in self._items and self._items[id]["content"]:
            self._items[id]["content"][0]["transcript"] = None
        self._say("conversation.item.truncated", item_id=id, content_index=0, audio_end_ms=milliseconds)

    def _padded(self, start: float) -> float:
        detection = self.session.audio.input.turn_detection
        prefix = detection.prefix_padding_ms if isinstance(detection, wire.ServerVad) else TurnSettings().prefix_ms
        return max(0.0, start - prefix / 1000)

    def _report_played(self) -> None:
        """Sound in band: the client is taken to play it as it comes, until it says otherwise by a truncation."""
        if self._sent_to is not None:
            epoch, end = self._sent_to
            self.call.played(epoch, end - max(0.0, self._plays_until - asyncio.get_running_loop().time()))

    async def _tell_turns(self, session: wire.Session) -> None:
        settings = _turns(session)
        TurnSettings().changed(settings)
        if self.call.takes("control"):
            await self.call.tell("turns", settings)

    def _shown(self) -> dict[str, Any]:
        shown = self.session.model_dump()
        if self.session.type == "transcription":
            shown = {"type": "transcription", "audio": {"input": shown["audio"]["input"]}}
        return {"id": f"sess_{self.call.id}", "object": "realtime.session", **shown}

    def _error(self, message: str, code: str, param: str | None, event_id: str | None) -> None:
        error = {
            "type": "invalid_request_error",
            "code": code,
            "message": message,
            "param": param,
            "event_id": event_id,
        }
        self._say("error", error=error)

    def _say(self, type: str, **fields: Any) -> None:
        self._outbox.append(copy.deepcopy({"type": type, "event_id": _new("event"), **fields}))

    async def _flush(self) -> None:
        async with self._sending:
            while self._outbox:
                await self._send(self._outbox.popleft())


_HANDLERS: dict[type, Callable[[Realtime, Any], Awaitable[None]]] = {
    wire.SessionUpdate: Realtime._update,
    wire.Append: Realtime._append,
    wire.Commit: Realtime._commit,
    wire.Clear: Realtime._clear,
    wire.ClearOutput: Realtime._clear_output,
    wire.CreateItem: Realtime._create_item,
    wire.DeleteItem: Realtime._delete_item,
    wire.RetrieveItem: Realtime._retrieve_item,
    wire.TruncateItem: Realtime._truncate_item,
    wire.CreateResponse: Realtime._create_response,
    wire.CancelResponse: Realtime._cancel_response,
}


def routes(service: Service) -> list[BaseRoute]:
    """``/v1/realtime?model=``, subprotocol ``realtime``; ``intent=transcription`` for a session that only listens."""

    async def serve(websocket: WebSocket) -> None:
        socket = Socket(websocket)
        offered = websocket.scope.get("subprotocols", [])
        await socket.accept("realtime" if "realtime" in offered else None)
        query = websocket.query_params
        type = "transcription" if query.get("intent") == "transcription" else "realtime"
        code, reason = NORMAL, ""
        try:
            async with service.connect() as call:
                realtime = Realtime(
                    call, socket.send_json, audio_in_band=True, model=service.name or query.get("model", ""), type=type
                )
                with suppress(ConnectionLost):  # the protocol has no way back into a call: it ends
                    await realtime.start()
                    code, reason = await _converse(socket, call, realtime)
        except Full as error:
            await _refuse(socket, "rate_limit_exceeded", error)
            code, reason = TRY_LATER, str(error)
        except StageError as error:
            await _refuse(socket, "server_error", error)
            code, reason = ERROR, "a stage failed"
        await socket.close(code, reason)

    return [WebSocketRoute("/v1/realtime", serve)]


async def _converse(socket: Socket, call: Call, realtime: Realtime) -> tuple[int, str]:
    """Both directions, until the client closes or the call ends; the code and reason to close with."""

    async def hear() -> tuple[int, str]:
        while (message := await socket.receive()) is not None:
            if isinstance(message, bytes):
                return POLICY, "events are text messages"
            await realtime.handle(message)
        return NORMAL, ""

    async def speak() -> tuple[int, str]:
        async for item in call.items():
            await realtime.item(item)
        await realtime.finish()
        return NORMAL, "the call has ended"

    tasks = [asyncio.create_task(hear()), asyncio.create_task(speak())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _refuse(socket: Socket, code: str, error: Exception) -> None:
    kind = "server_error" if code == "server_error" else "invalid_request_error"
    told = {"type": kind, "code": code, "message": str(error), "param": None, "event_id": None}
    try:
        await socket.send_json({"type": "error", "event_id": _new("event"), "error": told})
    except ConnectionLost:
        return


def _turns(session: wire.Session) -> dict[str, Any]:
    """A session's turn detection as the graph's control event ``turns``."""
    detection = session.audio.input.turn_detection
    if detection is None:
        return {"mode": "manual", "respond": None}
    replies = session.type == "realtime"
    common = {"interrupt": replies and detection.interrupt_response, "respond": replies and detection.create_response}
    if isinstance(detection, wire.SemanticVad):
        return {"mode": "semantic", "eagerness": detection.eagerness, "idle_ms": None, **common}
    return {
        "mode": "vad", "threshold": detection.threshold, "prefix_ms": detection.prefix_padding_ms,
        "silence_ms": detection.silence_duration_ms, "idle_ms": detection.idle_timeout_ms, **common,
    }  # fmt: skip


def _merged(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``new`` over ``old``; objects with a ``type`` are replaced as wholes, others merged."""
    merged = dict(old)
    for name, value in new.items():
        before = old.get(name)
        whole = name in ("format", "turn_detection", "tool_choice")
        merged[name] = (
            _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) and not whole else value
        )
    return merged


def _bad(error: ValidationError, message: Mapping[str, Any], prefix: str = "") -> BadEvent:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] in ("union_tag_invalid", "union_tag_not_found") and not first["loc"]:
        return BadEvent(f"unknown event type {str(message.get('type'))[:64]!r}", "unknown_event", "type")
    param = prefix + ".".join(str(part) for part in first["loc"] if part != message.get("type"))
    code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
    return BadEvent(f"{param}: {first['msg']}", code, param)


def _part(response: _Response) -> dict[str, Any]:
    if response.modality == "audio":
        return {"type": "audio", "transcript": response.text}
    return {"type": "text", "text": response.text}


def _rate(format: wire.Pcm | wire.Pcmu | wire.Pcma) -> int:
    return format.rate if isinstance(format, wire.Pcm) else g711.RATE


def _new(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"
