"""What the graph says, in OpenAI's Realtime protocol: responses from ``response.created`` to ``response.done``, how
much of them the client has heard, and their end by an interruption.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...codecs.resample import Resampler
from ...pipelines.chunk import Audio, Text
from ..call import Call
from .realtime_conversation import Conversation
from .realtime_events import SERVER_ERROR, BadEvent, encoded, new_id, rate_of


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
    cut_at: float | None = None  # media time beyond which the client has said that it plays none of it

    def shown(self, status: str) -> dict[str, Any]:
        """As clients see it."""
        return {
            "id": self.id, "object": "realtime.response", "status": status, "status_details": None,
            "output": list(self.output), "output_modalities": [self.modality], "metadata": self.metadata,
        }  # fmt: skip

    @property
    def part(self) -> dict[str, Any]:
        """The content of its message."""
        if self.modality == "audio":
            return {"type": "audio", "transcript": self.text}
        return {"type": "text", "text": self.text}


class Replies:
    """The responses of one call, one at a time.

    audio_in_band: see ``Realtime``. epoch: what is older was overtaken by an interruption.
    """

    def __init__(self, call: Call, conversation: Conversation, *, audio_in_band: bool) -> None:
        self.call, self.conversation, self.audio_in_band = call, conversation, audio_in_band
        self.epoch = 0
        self._response: _Response | None = None
        self._spoken: dict[str, tuple[int, float, float]] = {}  # items: epoch, and where their sound lies
        self._playing: _Response | None = None  # whose sound the transport plays
        self._plays_until = 0.0  # loop time at which a client that plays what it gets has played it
        self._sent_to: tuple[int, float] | None = None  # epoch and media time that the sound sent reaches to

    # ---------------------------------------------------------------- the client's doing

    async def create(self, asked: Mapping[str, Any]) -> None:
        """Ask the graph for a reply. Raises BadEvent while another is being made."""
        if self._response is not None:
            raise BadEvent(
                f"response {self._response.id} is being made: cancel it or wait for its response.done",
                "conversation_already_has_active_response",
            )
        told = {name: asked[name] for name in ("instructions", "tools", "tool_choice") if name in asked}
        await self.call.tell("respond", told)
        self._begin(self.epoch, asked.get("metadata"))

    def cancel(self, id: str | None) -> None:
        """Stop the response. Raises BadEvent where there is none (of that id)."""
        if self._response is None or id not in (None, self._response.id):
            raise BadEvent("there is no such response to cancel", "response_cancel_not_active")
        self.stop()

    def stop(self) -> None:
        """Drop the reply."""
        playing, self._playing = self._playing, None
        self.epoch = self.call.interrupt()
        self._sent_to = None
        self._end("cancelled", "client_cancelled")
        if playing is not None:
            self.conversation.say("output_audio_buffer.cleared", response_id=playing.id)

    def truncate(self, id: str, milliseconds: int) -> None:
        """The client has heard only so much of an item. Raises BadEvent."""
        self.conversation.item(id)
        if id not in self._spoken:
            raise BadEvent(f"item {id!r} holds no reply's sound", param="item_id")
        epoch, start, end = self._spoken[id]
        if milliseconds > round((end - start) * 1000):
            raise BadEvent(
                f"audio_end_ms={milliseconds}: the item has {(end - start) * 1000:.0f} ms", param="audio_end_ms"
            )
        if self._sent_to is not None and self._sent_to[0] == epoch and self._sent_to[1] <= end:
            self._sent_to = None  # the client knows better than the estimate
        heard, response = start + milliseconds / 1000, self._response
        if response is not None and response.message is not None and response.message["id"] == id:
            response.cut_at = heard
        self.call.played(epoch, heard, end)
        self.conversation.truncated(id, milliseconds)

    def forget(self, id: str) -> None:
        """The item was deleted."""
        self._spoken.pop(id, None)

    def finish(self, status: str = "incomplete") -> None:
        """The call has ended: a reply that is open stays as it is. status: it gets, ``failed`` where a stage has."""
        self._end(status)

    # ---------------------------------------------------------------- what of it is heard

    def report_played(self) -> None:
        """Sound in band: the client is taken to play it as it comes, until it says otherwise by a truncation."""
        if self._sent_to is not None:
            epoch, end = self._sent_to
            self.call.played(epoch, end - max(0.0, self._plays_until - asyncio.get_running_loop().time()))

    def played(self) -> None:
        """Sound out of band: the transport has played, and told the call how far."""
        heard, playing = self.call.session.heard, self._playing
        if playing is None or heard is None or heard.epoch != playing.epoch or not playing.sound_done:
            return
        if heard.seconds >= playing.heard_to - 0.02:
            self._playing = None
            self.conversation.say("output_audio_buffer.stopped", response_id=playing.id)

    def interrupted(self, data: Mapping[str, Any]) -> None:
        """The graph has dropped the reply, and knows how much of it was heard."""
        epoch = int(data["epoch"])
        cut, playing = self._response, self._playing
        self.epoch = max(self.epoch, epoch)
        self._sent_to = None
        if cut is not None and cut.epoch < epoch:
            self._end("cancelled", "turn_detected")
        if playing is not None and playing.epoch < epoch:
            self._playing = None
            self.conversation.say("output_audio_buffer.cleared", response_id=playing.id)
            if playing.message is not None and data.get("heard_epoch") == playing.epoch:
                heard = min(float(data["heard_seconds"]), playing.heard_to) - playing.start
                self.conversation.truncated(playing.message["id"], max(0, round(heard * 1000)))

    # ---------------------------------------------------------------- what the graph says

    def sound(self, chunk: Audio) -> None:
        """Sound of the reply; the last of it is ``final``."""
        response = self._speaking(chunk)
        if not response.heard_to:
            response.start = chunk.start_seconds
        response.heard_to = chunk.end_seconds
        if response.message is not None and response.modality == "audio":
            self._spoken[response.message["id"]] = (chunk.epoch, response.start, response.heard_to)
            if self.audio_in_band:
                self._send_sound(response, chunk)
            elif self._playing is not response and chunk.duration:
                self._playing = response
                self.conversation.say("output_audio_buffer.started", response_id=response.id)
        elif self.audio_in_band:
            self.call.played(chunk.epoch, chunk.end_seconds)
        response.sound_done = chunk.final
        self._maybe_done(response)

    def words(self, chunk: Text) -> None:
        """The reply's text so far; deltas go out while it only grows."""
        response = self._speaking(chunk)
        whole = chunk.text
        response.text, response.text_open, response.text_done = whole, not chunk.final, chunk.final
        if whole.startswith(response.text_sent) and len(whole) > len(response.text_sent):
            name = "output_audio_transcript" if response.modality == "audio" else "output_text"
            self._say_part(f"response.{name}.delta", response, delta=whole[len(response.text_sent) :])
            response.text_sent = whole
        self._maybe_done(response)

    def function_call(self, data: Mapping[str, Any]) -> None:
        """The graph wants a function called: ``name``, ``call_id``, ``arguments``."""
        say, response = self.conversation.say, self._response or self._begin(self.epoch)
        item = {
            "id": new_id("item"), "object": "realtime.item", "type": "function_call", "status": "in_progress",
            "name": str(data["name"]), "call_id": str(data["call_id"]), "arguments": "",
        }  # fmt: skip
        index = len(response.output) + (response.message is not None)
        about = {"response_id": response.id, "output_index": index}
        say("response.output_item.added", item=item, **about)
        self.conversation.add(item)
        item.update(arguments=str(data["arguments"]), status="completed")
        calling = {**about, "item_id": item["id"], "call_id": item["call_id"]}
        say("response.function_call_arguments.delta", delta=item["arguments"], **calling)
        done = {"arguments": item["arguments"], "name": item["name"]}
        say("response.function_call_arguments.done", **calling, **done)
        say("response.output_item.done", item=item, **about)
        self.conversation.done(item)
        response.output.append(item)
        if response.message is None:
            self._end("completed")

    def _send_sound(self, response: _Response, chunk: Audio) -> None:
        format = self.conversation.session.audio.output.format
        if response.resampler is None:
            response.resampler = Resampler(chunk.rate, rate_of(format))
        samples = response.resampler.push(chunk.samples)
        if chunk.final:
            samples = np.concatenate((samples, response.resampler.flush()))
        now = asyncio.get_running_loop().time()
        if response.cut_at is not None:
            self.call.played(chunk.epoch, response.cut_at, chunk.end_seconds)
        else:
            self._plays_until = max(now, self._plays_until if self._sent_to else now) + chunk.seconds
            self._sent_to = (chunk.epoch, chunk.end_seconds)
        if len(samples):
            self._say_part("response.output_audio.delta", response, delta=encoded(samples, format))

    # ---------------------------------------------------------------- a response's life

    def _begin(self, epoch: int, metadata: Any = None) -> _Response:
        modality = self.conversation.session.output_modalities[0]
        response = self._response = _Response(new_id("resp"), epoch, metadata, modality=modality)
        self.conversation.say("response.created", response=response.shown("in_progress"))
        return response

    def _speaking(self, chunk: Audio | Text) -> _Response:
        """The open response, with a message that the chunk is part of."""
        response = self._response or self._begin(chunk.epoch)
        if response.message is None:
            response.epoch, response.start = chunk.epoch, chunk.start_seconds
            kind = "output_audio" if response.modality == "audio" else "output_text"
            item = response.message = {
                "id": new_id("item"), "object": "realtime.item", "type": "message", "role": "assistant",
                "status": "in_progress", "content": [],
            }  # fmt: skip
            self.conversation.say("response.output_item.added", response_id=response.id, output_index=0, item=item)
            self.conversation.add(item)
            item["content"].append(
                {"type": kind, "transcript": ""} if kind == "output_audio" else {"type": kind, "text": ""}
            )
            self._say_part("response.content_part.added", response, part=response.part)
        return response

    def _maybe_done(self, response: _Response) -> None:
        """A reply is whole with its last sound, and its last word where words have begun."""
        alone = response.modality == "text" or len(self.call.replies) == 1
        if (response.sound_done and not response.text_open) or (response.text_done and alone):
            self._end("completed")

    def _end(self, status: str, reason: str | None = None) -> None:
        response, self._response = self._response, None
        if response is None:
            return
        item = response.message
        if item is not None:
            item["status"] = "completed" if status == "completed" else "incomplete"
            content = item["content"][0]
            if response.modality == "audio":
                content["transcript"] = response.text
                self._say_part("response.output_audio.done", response)
                self._say_part("response.output_audio_transcript.done", response, transcript=response.text)
            else:
                content["text"] = response.text
                self._say_part("response.output_text.done", response, text=response.text)
            self._say_part("response.content_part.done", response, part=response.part)
            self.conversation.say("response.output_item.done", response_id=response.id, output_index=0, item=item)
            self.conversation.done(item)
            response.output.insert(0, item)
        shown = response.shown(status)
        if status != "completed":
            shown["status_details"] = {"type": status, **({"reason": reason} if reason else {})}
        if status == "failed":
            shown["status_details"]["error"] = {"type": SERVER_ERROR, "code": SERVER_ERROR}
        self.conversation.say("response.done", response=shown)

    def _say_part(self, type: str, response: _Response, **fields: Any) -> None:
        item = response.message or {}
        about = {"response_id": response.id, "item_id": item["id"], "output_index": 0, "content_index": 0}
        self.conversation.say(type, **about, **fields)
