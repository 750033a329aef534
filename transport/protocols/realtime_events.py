"""OpenAI's Realtime API, GA: what clients send, as validated messages, and sound as events carry it.

Shapes follow the client events of the public API reference and of the ``openai`` package (``types/realtime``). What the
API knows and this server cannot act on is taken and left out of the session that clients are shown; what the API does
not know is refused.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ...codecs import g711
from .common import from_pcm16, to_pcm16

Samples = NDArray[np.float32]

_LAWS: dict[str, g711.Law] = {"audio/pcmu": "mulaw", "audio/pcma": "alaw"}


class BadEvent(ValueError):
    """A client event that is refused. code, param: for the client."""

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Pcm(_Strict):
    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24000] = 24000


class Pcmu(_Strict):
    type: Literal["audio/pcmu"]


class Pcma(_Strict):
    type: Literal["audio/pcma"]


Format = Annotated[Pcm | Pcmu | Pcma, Field(discriminator="type")]


class ServerVad(_Strict):
    type: Literal["server_vad"] = "server_vad"
    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500
    idle_timeout_ms: int | None = None
    create_response: bool = True
    interrupt_response: bool = True


class SemanticVad(_Strict):
    type: Literal["semantic_vad"]
    eagerness: Literal["low", "medium", "high", "auto"] = "auto"
    create_response: bool = True
    interrupt_response: bool = True


TurnDetection = Annotated[ServerVad | SemanticVad, Field(discriminator="type")]


class AudioInput(_Strict):
    format: Format = Pcm()
    turn_detection: TurnDetection | None = ServerVad()
    transcription: Any = Field(default=None, exclude=True)
    noise_reduction: Any = Field(default=None, exclude=True)


class AudioOutput(_Strict):
    format: Format = Pcm()
    voice: str | dict[str, Any] | None = None
    speed: Any = Field(default=None, exclude=True)


class AudioConfig(_Strict):
    input: AudioInput = AudioInput()
    output: AudioOutput = AudioOutput()


class Session(_Strict):
    """A session as the client asks for it; what is dumped of it is what it gets."""

    type: Literal["realtime", "transcription"] = "realtime"
    audio: AudioConfig = AudioConfig()
    instructions: str = ""
    output_modalities: list[Literal["text", "audio"]] = Field(["audio"], min_length=1, max_length=1)
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    model: str | None = None
    include: Any = Field(default=None, exclude=True)
    max_output_tokens: Any = Field(default=None, exclude=True)
    parallel_tool_calls: Any = Field(default=None, exclude=True)
    prompt: Any = Field(default=None, exclude=True)
    reasoning: Any = Field(default=None, exclude=True)
    tracing: Any = Field(default=None, exclude=True)
    truncation: Any = Field(default=None, exclude=True)


class _Content(_Strict):
    type: Literal["input_text", "output_text"]
    text: str


class Message(_Strict):
    type: Literal["message"]
    role: Literal["user", "system", "assistant"]
    content: list[_Content]
    id: str | None = Field(None, max_length=64)
    object: Literal["realtime.item"] = "realtime.item"
    status: Literal["completed", "incomplete", "in_progress"] = "completed"


class FunctionCall(_Strict):
    type: Literal["function_call"]
    name: str
    arguments: str
    call_id: str | None = None
    id: str | None = Field(None, max_length=64)
    object: Literal["realtime.item"] = "realtime.item"
    status: Literal["completed", "incomplete", "in_progress"] = "completed"


class FunctionCallOutput(_Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str | None = Field(None, max_length=64)
    object: Literal["realtime.item"] = "realtime.item"
    status: Literal["completed", "incomplete", "in_progress"] = "completed"


ConversationItem = Annotated[Message | FunctionCall | FunctionCallOutput, Field(discriminator="type")]


class _Event(_Strict):
    event_id: str | None = Field(None, max_length=512)


class SessionUpdate(_Event):
    type: Literal["session.update"]
    session: dict[str, Any]


class Append(_Event):
    type: Literal["input_audio_buffer.append"]
    audio: str


class Commit(_Event):
    type: Literal["input_audio_buffer.commit"]


class Clear(_Event):
    type: Literal["input_audio_buffer.clear"]


class ClearOutput(_Event):
    type: Literal["output_audio_buffer.clear"]


class CreateItem(_Event):
    type: Literal["conversation.item.create"]
    item: ConversationItem
    previous_item_id: str | None = None


class DeleteItem(_Event):
    type: Literal["conversation.item.delete"]
    item_id: str


class RetrieveItem(_Event):
    type: Literal["conversation.item.retrieve"]
    item_id: str


class TruncateItem(_Event):
    type: Literal["conversation.item.truncate"]
    item_id: str
    content_index: Literal[0]
    audio_end_ms: int = Field(ge=0)


class CreateResponse(_Event):
    type: Literal["response.create"]
    response: dict[str, Any] = {}


class CancelResponse(_Event):
    type: Literal["response.cancel"]
    response_id: str | None = None


ClientEvent = Annotated[
    SessionUpdate | Append | Commit | Clear | ClearOutput | CreateItem | DeleteItem | RetrieveItem | TruncateItem
    | CreateResponse | CancelResponse,
    Field(discriminator="type"),
]  # fmt: skip

CLIENT_EVENT: TypeAdapter[Any] = TypeAdapter(ClientEvent)


def new_id(kind: str) -> str:
    """A fresh id, ``kind`` before it."""
    return f"{kind}_{secrets.token_hex(10)}"


def refused(error: ValidationError, message: Mapping[str, Any], prefix: str = "") -> BadEvent:
    """What the client is told of a ``message`` (or what lies at ``prefix`` in one) that is not valid."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] in ("union_tag_invalid", "union_tag_not_found") and not first["loc"]:
        return BadEvent(f"unknown event type {str(message.get('type'))[:64]!r}", "unknown_event", "type")
    param = prefix + ".".join(str(part) for part in first["loc"] if part != message.get("type"))
    code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
    return BadEvent(f"{param}: {first['msg']}", code, param)


SERVER_ERROR = "server_error"
"""The type and code of errors that are none of the client's."""


def error_event(message: str, code: str, param: str | None = None, event_id: str | None = None) -> dict[str, Any]:
    """The server's event ``error``. event_id: the client's, of what was wrong."""
    kind = SERVER_ERROR if code == SERVER_ERROR else "invalid_request_error"
    error = {"type": kind, "code": code, "message": message, "param": param, "event_id": event_id}
    return {"type": "error", "event_id": new_id("event"), "error": error}


def rate_of(format: Pcm | Pcmu | Pcma) -> int:
    """Hertz."""
    return format.rate if isinstance(format, Pcm) else g711.RATE


def decoded(audio: str, format: Pcm | Pcmu | Pcma) -> Samples:
    """The sound of an event. Raises BadEvent, and ValueError for half a sample."""
    try:
        data = base64.b64decode(audio, validate=True)
    except (binascii.Error, ValueError):
        raise BadEvent("audio is not base64", "invalid_audio", "audio") from None
    law = _LAWS.get(format.type)
    return from_pcm16(data if law is None else g711.decode(np.frombuffer(data, np.uint8), law).astype("<i2").tobytes())


def encoded(samples: Samples, format: Pcm | Pcmu | Pcma) -> str:
    """Sound for an event."""
    data, law = to_pcm16(samples), _LAWS.get(format.type)
    if law is not None:
        data = g711.encode(np.frombuffer(data, "<i2").astype(np.int16), law).tobytes()
    return base64.b64encode(data).decode()
