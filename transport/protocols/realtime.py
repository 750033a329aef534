"""OpenAI's Realtime API, GA, as a server: over a websocket here, over WebRTC's channel ``oai-events`` elsewhere.

``Realtime`` is the protocol alone. Client events go into ``handle``, what the call puts out into ``item``; each changes
the state at once and queues the server events that follow, so both may run in tasks of their own and events still leave
in one order. Source: the API reference's client and server events; docs/protocols-realtime.md says which are covered.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from ...pipelines.chunk import Audio, Event, Text
from ...pipelines.stage import StageError
from ...pipelines.turn_taking import TurnSettings
from .. import json_text
from ..call import Call, CallError, Item
from ..service import ConnectionLost, Full, Service
from ..websocket import ERROR, NORMAL, POLICY, TRY_LATER, Socket
from . import realtime_events as wire
from .common import told
from .realtime_conversation import Conversation, Send
from .realtime_events import BadEvent
from .realtime_input import InputBuffer
from .realtime_replies import Replies

PIECE_SECONDS = 0.1  # of sound given to the graph at once


class Realtime:
    """The protocol for one call.

    send: takes each server event. audio_in_band: whether sound travels in events (websocket), or the transport plays it
    and reports to ``Call.played`` (WebRTC), and then to ``played`` here.
    """

    def __init__(self, call: Call, send: Send, *, audio_in_band: bool, model: str = "", type: str = "realtime") -> None:
        self.call, self.audio_in_band = call, audio_in_band
        session = wire.Session.model_validate({"type": type, "model": model or None})
        self.conversation = Conversation(send, session)
        self.input = InputBuffer(call, self.conversation)
        self.replies = Replies(call, self.conversation, audio_in_band=audio_in_band)

    @property
    def session(self) -> wire.Session:
        """The session in effect."""
        return self.conversation.session

    # ---------------------------------------------------------------- its life

    async def start(self) -> None:
        """Say what the session is, and set the graph's turn taking to it."""
        self.conversation.say("session.created", session=self._shown())
        await self._tell_turns(self.session)
        await self.conversation.flush()

    async def finish(self) -> None:
        """The call has ended: what is open is closed."""
        self.input.finish()
        self.replies.finish()
        await self.conversation.flush()

    async def fail(self, error: StageError) -> None:
        """A stage has failed, and the call has ended with it: what is open is closed, and the client told why."""
        self.input.finish()
        self.replies.finish("failed")
        self.conversation.error(told(error), wire.SERVER_ERROR)
        await self.conversation.flush()

    # ---------------------------------------------------------------- from the client

    async def handle(self, text: str) -> None:
        """One client event, as JSON. What is wrong with it is answered by an event ``error``."""
        event_id = None
        try:
            try:
                message = json_text.parse(text)
                if "\\u" in text:
                    json.dumps(message, ensure_ascii=False).encode()  # half a surrogate pair could not be sent back
            except ValueError:
                raise BadEvent("the event is not JSON: send one JSON object a message", "invalid_json") from None
            if not isinstance(message, dict):
                raise BadEvent('the event is no JSON object: send {"type": ...}', "invalid_json")
            event_id = message.get("event_id") if isinstance(message.get("event_id"), str) else None
            try:
                event = wire.CLIENT_EVENT.validate_python(message)
            except ValidationError as error:
                raise wire.refused(error, message) from None
            await _HANDLERS[type(event)](self, event)
        except BadEvent as error:
            self.conversation.error(str(error), error.code, error.param, event_id)
        except (CallError, ValueError) as error:
            self.conversation.error(str(error), "not_possible", None, event_id)
        await self.conversation.flush()

    async def _update(self, event: wire.SessionUpdate) -> None:
        asked = event.session
        old = self.session.model_dump()
        try:
            new = wire.Session.model_validate(_merged(old, asked))
        except ValidationError as error:
            raise wire.refused(error, asked, "session.") from None
        if new.type != self.session.type and self.call.heard_seconds:
            raise BadEvent("the session's type is fixed once sound has come", param="session.type")
        if self.audio_in_band and self.call.rate not in (None, wire.rate_of(new.audio.input.format)):
            raise BadEvent(
                f"the call hears sound at {self.call.rate} Hz: its input rate is fixed",
                param="session.audio.input.format",
            )
        await self._tell_turns(new)
        for_graph: dict[str, Any] = {
            name: asked[name] for name in ("instructions", "tools", "tool_choice", "output_modalities") if name in asked
        }
        if new.audio.output.voice is not None:
            for_graph["voice"] = new.audio.output.voice
        if for_graph:
            await self.call.tell("session", for_graph)
        self.conversation.session = new
        self.conversation.say("session.updated", session=self._shown())

    async def _append(self, event: wire.Append) -> None:
        if not self.audio_in_band:
            raise BadEvent("sound comes by RTP here: add a track", "invalid_event")
        format = self.session.audio.input.format
        rate, samples = wire.rate_of(format), wire.decoded(event.audio, format)
        self.replies.report_played()
        step = int(rate * PIECE_SECONDS)
        for at in range(0, len(samples), step):
            await self.call.hear(samples[at : at + step], rate)
        self.input.expire()

    async def _commit(self, event: wire.Commit) -> None:
        await self.input.commit()

    async def _clear(self, event: wire.Clear) -> None:
        await self.input.clear()

    async def _clear_output(self, event: wire.ClearOutput) -> None:
        if self.audio_in_band:
            raise BadEvent("sound travels in events here: stop playing it, and send response.cancel", "invalid_event")
        self.replies.stop()

    async def _create_item(self, event: wire.CreateItem) -> None:
        item = event.item.model_dump(exclude_none=True)
        item.setdefault("id", wire.new_id("item"))
        if item["id"] in self.conversation:
            raise BadEvent(f"there is an item {item['id']!r} already", "item_exists", "item.id")
        previous = event.previous_item_id
        if previous not in (None, "root"):
            self.conversation.item(previous or "")
        await self.call.tell("item", item)
        self.conversation.add(item, previous)
        self.conversation.done(item)

    async def _delete_item(self, event: wire.DeleteItem) -> None:
        self.conversation.delete(event.item_id)
        self.replies.forget(event.item_id)

    async def _retrieve_item(self, event: wire.RetrieveItem) -> None:
        self.conversation.say("conversation.item.retrieved", item=self.conversation.item(event.item_id))

    async def _truncate_item(self, event: wire.TruncateItem) -> None:
        self.replies.truncate(event.item_id, event.audio_end_ms)

    async def _create_response(self, event: wire.CreateResponse) -> None:
        if self.session.type == "transcription" or not self.call.replies:
            raise BadEvent("nothing replies in this session: it transcribes", "invalid_event")
        await self.replies.create(event.response)

    async def _cancel_response(self, event: wire.CancelResponse) -> None:
        self.replies.cancel(event.response_id)

    # ---------------------------------------------------------------- from the graph

    async def item(self, item: Item) -> None:
        """Something that the call has put out."""
        self.input.expire()
        chunk = item.chunk
        answers = isinstance(chunk, Audio) or item.source in self.call.replies
        if isinstance(chunk, Event):
            self._event(chunk)
        elif answers and chunk.epoch < self.replies.epoch:
            pass  # it was overtaken by an interruption
        elif self.session.type == "transcription" and answers:
            if isinstance(chunk, Audio):
                self.call.played(chunk.epoch, chunk.end_seconds)
        elif isinstance(chunk, Audio):
            self.replies.sound(chunk)
        elif isinstance(chunk, Text) and answers:
            self.replies.words(chunk)
        elif isinstance(chunk, Text):
            self.input.caption(chunk)
        await self.conversation.flush()

    async def played(self) -> None:
        """The transport has played, and told the call how far (sound out of band)."""
        self.replies.played()
        await self.conversation.flush()

    def _event(self, event: Event) -> None:
        if event.name == "speech_start":
            self.input.speech_start(event)
        elif event.name == "turn_end":
            self.input.turn_end(event)
        elif event.name == "interrupted":
            self.replies.interrupted(event.data)
        elif event.name == "function_call" and event.epoch >= self.replies.epoch:
            self.replies.function_call(event.data)
        elif event.name in ("error", "limit"):
            message = event.data.get("message", f"the call has had its {event.data.get('seconds')} s of sound")
            self.conversation.error(str(message), event.name)

    # ---------------------------------------------------------------- the session

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
            await _refuse(socket, wire.SERVER_ERROR, error)
            code, reason = ERROR, told(error)
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
        try:
            async for item in call.items():
                await realtime.item(item)
        except StageError as error:
            await realtime.fail(error)
            return ERROR, told(error)
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
    with suppress(ConnectionLost):
        await socket.send_json(wire.error_event(told(error), code))


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
