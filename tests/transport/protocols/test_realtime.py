"""OpenAI's Realtime API: the protocol by itself under any order of events, and the ``openai`` package with a server."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from websockets.exceptions import ConnectionClosed

from antiphon.codecs import g711
from antiphon.codecs.resample import resample
from antiphon.models.silero import SileroVAD
from antiphon.pipelines import served
from antiphon.pipelines.chunk import Audio, Chunk, Event, Text, Word
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.session import Session
from antiphon.pipelines.stage import Context, Inlet, Input, StageError, stage
from antiphon.transport.call import Item
from antiphon.transport.protocols.realtime import Realtime, routes
from antiphon.transport.service import Service

from .serving import clip, recognising, serving

openai = pytest.importorskip("openai")
from openai.types.realtime import RealtimeServerEvent  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402

SERVER_EVENT: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)
RATE = 24000


class ScriptedCall:
    """What ``Realtime`` needs of a call, with nothing behind it."""

    replies = frozenset({"parrot.audio", "parrot.said"})

    def __init__(self) -> None:
        self.id, self.rate, self.heard_seconds = "scripted", None, 0.0
        self.session = SimpleNamespace(heard=None)
        self.told: list[tuple[str, Any]] = []
        self.heard: list[np.ndarray] = []
        self.epoch = 0

    def takes(self, inlet: str) -> bool:
        return inlet in ("audio", "control")

    async def hear(self, samples: np.ndarray, rate: int) -> None:
        self.rate = rate
        self.heard.append(samples)
        self.heard_seconds += len(samples) / rate

    async def tell(self, name: str, data: Any = None) -> None:
        self.told.append((name, data))

    def interrupt(self) -> int:
        self.epoch += 1
        return self.epoch

    def played(self, epoch: int, seconds: float, until: float | None = None) -> None:
        Session.report_heard(self.session, "client", epoch, seconds, until)  # type: ignore[arg-type]


class Talk:
    """A protocol over a scripted call, and everything it said, each event parsed by the SDK's types."""

    def __init__(self, *, audio_in_band: bool = True, type: str = "realtime") -> None:
        self.call = ScriptedCall()
        self.said: list[dict[str, Any]] = []
        self.realtime = Realtime(self.call, self._take, audio_in_band=audio_in_band, type=type)  # type: ignore[arg-type]
        self._items = 0

    async def _take(self, message: dict[str, Any]) -> None:
        parsed = SERVER_EVENT.validate_python(json.loads(json.dumps(message)))
        assert parsed.type == message["type"]
        self.said.append(message)

    async def client(self, type: str, **fields: Any) -> list[dict[str, Any]]:
        """Send an event; what came of it."""
        before = len(self.said)
        await self.realtime.handle(json.dumps({"type": type, **fields}))
        return self.said[before:]

    async def graph(self, chunk: Chunk, source: str = "") -> list[dict[str, Any]]:
        """The call puts something out; what came of it."""
        before, self._items = len(self.said), self._items + 1
        await self.realtime.item(Item(self._items, chunk, 0.0, source))
        return self.said[before:]

    async def event(self, name: str, seconds: float = 0.0, /, **data: Any) -> list[dict[str, Any]]:
        chunk = Event(name=name, data=data, rate=16000, start=round(seconds * 16000), epoch=self.call.epoch)
        return await self.graph(chunk, "turns.events")

    async def sound(self, start: float, seconds: float, *, final: bool = False) -> list[dict[str, Any]]:
        samples = np.full(round(seconds * RATE), 0.25, np.float32)
        audio = Audio(samples=samples, rate=RATE, start=round(start * RATE), epoch=self.call.epoch, final=final)
        return await self.graph(audio, "parrot.audio")

    async def caption(self, text: str, *, final: bool = False, start: float = 0.0) -> list[dict[str, Any]]:
        words = tuple(Word(word, start + at / 4, start + (at + 1) / 4) for at, word in enumerate(text.split()))
        chunk = Text(text=text, words=words, rate=16000, start=round(start * 16000), duration=4000 * len(words),
                     final=final, epoch=0)  # fmt: skip
        return await self.graph(chunk, "captions")


def types(messages: list[dict[str, Any]]) -> list[str]:
    return [message["type"] for message in messages]


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return run_virtual(main)


def error_of(messages: list[dict[str, Any]]) -> dict[str, Any]:
    (message,) = messages
    assert message["type"] == "error"
    return message["error"]


def pcm(seconds: float) -> str:
    return base64.b64encode(bytes(2 * round(seconds * RATE))).decode()


# ---------------------------------------------------------------- the session


@pytest.mark.parametrize(
    ("detection", "told"),
    [
        (None, {"mode": "manual", "respond": None}),
        (
            {"type": "semantic_vad", "eagerness": "high", "create_response": False},
            {"mode": "semantic", "eagerness": "high", "idle_ms": None, "interrupt": True, "respond": False},
        ),
        (
            {"type": "server_vad", "threshold": 0.7, "silence_duration_ms": 200, "idle_timeout_ms": 6000},
            {"mode": "vad", "threshold": 0.7, "prefix_ms": 300, "silence_ms": 200, "idle_ms": 6000,
             "interrupt": True, "respond": True},
        ),
    ],
)  # fmt: skip
def test_turn_detection_becomes_the_graphs_turn_taking(detection: Any, told: Any) -> None:
    async def main() -> None:
        talk = Talk()
        await talk.realtime.start()
        (updated,) = await talk.client(
            "session.update", session={"type": "realtime", "audio": {"input": {"turn_detection": detection}}}
        )
        assert talk.call.told[-1] == ("turns", told)
        shown = updated["session"]["audio"]["input"]["turn_detection"]
        assert shown == (detection and {**shown, **detection})

    run(main())


def test_the_first_event_shows_the_session_and_what_is_not_done_is_not_shown() -> None:
    async def main() -> None:
        talk = Talk()
        await talk.realtime.start()
        assert types(talk.said) == ["session.created"]
        (updated,) = await talk.client(
            "session.update", session={"type": "realtime", "tracing": "auto", "instructions": "Say it back."}
        )
        assert updated["session"]["instructions"] == "Say it back."
        assert "tracing" not in updated["session"]
        assert talk.call.told[-1] == ("session", {"instructions": "Say it back."})

    run(main())


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ("{", "invalid_json"),
        ("[]", "invalid_json"),
        ({"type": "no.such"}, "unknown_event"),
        ({"type": "input_audio_buffer.append", "audio": "*"}, "invalid_audio"),
        ({"type": "input_audio_buffer.append", "audio": "AAAA"}, "not_possible"),
        ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty"),
        ({"type": "session.update", "session": {"typo": 1}}, "unknown_parameter"),
        (
            {"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/mp3"}}}}},
            "invalid_value",
        ),
        (
            {
                "type": "session.update",
                "session": {"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 7}}}},
            },
            "not_possible",
        ),
        ({"type": "conversation.item.delete", "item_id": "none"}, "item_not_found"),
        ({"type": "response.cancel"}, "response_cancel_not_active"),
        ({"type": "output_audio_buffer.clear"}, "invalid_event"),
    ],
)
def test_a_bad_event_is_answered_by_an_error_that_names_it_and_the_session_goes_on(event: Any, code: str) -> None:
    async def main() -> None:
        talk = Talk()
        text = event if isinstance(event, str) else json.dumps({**event, "event_id": "mine"})
        await talk.realtime.handle(text)
        error = error_of(talk.said)
        assert error["code"] == code
        assert error["event_id"] == (None if isinstance(event, str) else "mine")
        assert types(await talk.client("input_audio_buffer.clear")) == ["input_audio_buffer.cleared"]

    run(main())


@pytest.mark.parametrize(("format", "law"), [("audio/pcmu", "mulaw"), ("audio/pcma", "alaw")])
def test_telephone_sound_in_and_out(format: str, law: Any) -> None:
    async def main() -> None:
        talk = Talk()
        audio = {"input": {"format": {"type": format}}, "output": {"format": {"type": format}}}
        await talk.client("session.update", session={"audio": audio})
        codes = np.arange(256, dtype=np.uint8)
        await talk.client("input_audio_buffer.append", audio=base64.b64encode(codes.tobytes()).decode())
        assert talk.call.rate == 8000
        np.testing.assert_array_equal(np.concatenate(talk.call.heard) * 32768, g711.decode(codes, law))
        said = await talk.sound(0.0, 1.0) + await talk.sound(1.0, 0.0, final=True)
        data = b"".join(base64.b64decode(one["delta"]) for one in said if one["type"] == "response.output_audio.delta")
        assert abs(len(data) - 8000) <= 2
        middle = g711.decode(np.frombuffer(data, np.uint8), law)[100:-100] / 32768
        assert np.all(np.abs(middle - 0.25) < 0.01)
        fixed = error_of(
            await talk.client("session.update", session={"audio": {"input": {"format": {"type": "audio/pcm"}}}})
        )
        assert fixed["param"] == "session.audio.input.format"
        talk = Talk(audio_in_band=False)
        assert error_of(await talk.client("input_audio_buffer.append", audio=pcm(0.1)))["code"] == "invalid_event"
        talk.call.rate = 16000  # of what RTP brings: a format is of no account there
        (updated,) = await talk.client("session.update", session={"audio": audio})
        assert updated["session"]["audio"]["input"]["format"] == {"type": format}

    run(main())


# ---------------------------------------------------------------- what the user says


def test_a_turn_is_announced_committed_and_transcribed_once() -> None:
    async def main() -> None:
        talk = Talk()
        (started,) = await talk.event("speech_start", 1.0)
        assert started["audio_start_ms"] == 700
        assert await talk.event("speech_stop", 2.0) == []
        (delta,) = await talk.caption("hello big", start=1.0)
        assert delta["delta"] == "hello"
        ended = await talk.event("turn_end", 2.0, reason="silence", waited_ms=500)
        assert types(ended) == [
            "input_audio_buffer.speech_stopped", "input_audio_buffer.committed", "conversation.item.added",
            "conversation.item.done",
        ]  # fmt: skip
        delta, completed = await talk.caption("hello big world", final=True, start=1.0)
        assert (delta["delta"], completed["transcript"]) == (" big world", "hello big world")
        assert {started["item_id"], ended[1]["item_id"], ended[2]["item"]["id"], completed["item_id"]} == {
            started["item_id"]
        }
        (shown,) = await talk.client("conversation.item.retrieve", item_id=started["item_id"])
        assert shown["item"]["content"][0]["transcript"] == "hello big world"

    run(main())


def test_a_caption_over_two_turns_is_shared_out_by_when_it_was_said() -> None:
    async def main() -> None:
        talk = Talk()
        (first,) = await talk.event("speech_start", 0.0)
        await talk.event("turn_end", 0.5, reason="silence", waited_ms=200)
        (second,) = await talk.event("speech_start", 0.8)
        await talk.event("turn_end", 1.0, reason="silence", waited_ms=200)
        said = await talk.caption("one two three four", final=True)
        done = {one["item_id"]: one["transcript"] for one in said if one["type"].endswith("completed")}
        assert done == {first["item_id"]: "one two", second["item_id"]: "three four"}

    run(main())


@pytest.mark.parametrize("in_band", [True, False])
def test_a_commit_needs_sound_since_the_last_wherever_it_travels(in_band: bool) -> None:
    async def main() -> None:
        talk = Talk(audio_in_band=in_band)

        async def heard(seconds: float) -> None:
            if in_band:
                await talk.client("input_audio_buffer.append", audio=pcm(seconds))
            else:
                await talk.call.hear(np.zeros(round(seconds * RATE), np.float32), RATE)

        for seconds, taken in ((0.05, False), (0.05, True), (0.09, False), (0.02, True)):
            await heard(seconds)
            said = await talk.client("input_audio_buffer.commit")
            assert said == [] if taken else error_of(said)["code"] == "input_audio_buffer_commit_empty"
        assert talk.call.told == [("commit", None)] * 2
        await heard(0.2)
        await talk.client("input_audio_buffer.clear")
        assert "holds 0 ms" in error_of(await talk.client("input_audio_buffer.commit"))["message"]

    run(main())


@pytest.mark.parametrize("caption_first", [True, False])
@pytest.mark.parametrize("text", ["", "hello there"])
def test_a_caption_that_reaches_to_the_end_of_a_turn_completes_it(text: str, caption_first: bool) -> None:
    async def main() -> None:
        talk = Talk()
        words = tuple(Word(word, 0.1 + at / 4, 0.3 + at / 4) for at, word in enumerate(text.split()))
        final = Text(text=text, words=words, rate=16000, start=1600, duration=30400, final=True)
        if caption_first:
            await talk.graph(final, "captions")
        said = await talk.event("turn_end", 2.0, reason="manual", waited_ms=0)
        if not caption_first:
            said += await talk.graph(final, "captions")
        assert said[-1]["type"] == "conversation.item.input_audio_transcription.completed"
        assert said[-1]["transcript"] == text
        assert said[-1]["item_id"] == said[0]["item_id"]

    run(main())


def test_a_turn_without_words_is_completed_empty_when_none_can_come() -> None:
    async def main() -> None:
        talk = Talk()
        await talk.event("speech_start", 0.0)
        await talk.event("turn_end", 0.2, reason="silence", waited_ms=200)
        said = await talk.client("input_audio_buffer.append", audio=pcm(5.0))
        assert said == []
        (completed,) = await talk.client("input_audio_buffer.append", audio=pcm(0.3))
        assert completed["transcript"] == ""
        talk = Talk(audio_in_band=False)
        await talk.event("turn_end", 0.2, reason="silence", waited_ms=200)
        talk.call.heard_seconds = 5.3
        (completed, _) = await talk.event("speech_start", 5.3)
        assert completed["transcript"] == ""

    run(main())


# ---------------------------------------------------------------- what the graph says


def test_a_truncation_says_exactly_what_was_heard_whatever_was_estimated() -> None:
    async def main() -> None:
        talk = Talk()
        heard: Any = lambda: (talk.call.session.heard.epoch, talk.call.session.heard.seconds)  # noqa: E731
        id = next(one for one in await talk.sound(3.0, 1.0) if one["type"] == "response.output_item.added")["item"][
            "id"
        ]
        await asyncio.sleep(0.7)
        await talk.client("input_audio_buffer.append", audio=pcm(0.1))
        assert heard() == (0, pytest.approx(3.7))  # as far as real time goes
        await talk.client("conversation.item.truncate", item_id=id, content_index=0, audio_end_ms=123)
        assert heard() == (0, 3.123)
        await talk.sound(4.0, 1.0)  # what is made of the item after that is not played
        await talk.sound(5.0, 0.5, final=True)
        await asyncio.sleep(9.0)
        await talk.client("input_audio_buffer.append", audio=pcm(0.1))
        assert heard() == (0, 3.123)
        assert talk.call.session.heard.until == 5.5
        second = await talk.sound(5.5, 1.0, final=True)
        await asyncio.sleep(9.0)
        await talk.client("input_audio_buffer.append", audio=pcm(0.1))
        assert heard() == (0, 6.5)
        later = second[-1]["response"]["output"][0]["id"]
        await talk.client("conversation.item.truncate", item_id=id, content_index=0, audio_end_ms=2)
        assert heard() == (0, 6.5)  # the later reply was played all the same
        talk.call.epoch = 1
        await talk.event("interrupted", epoch=1)
        await talk.client("conversation.item.truncate", item_id=later, content_index=0, audio_end_ms=250)
        assert heard() == (0, 5.75)

    run(main())


def test_a_stage_that_fails_ends_what_is_open_and_is_named() -> None:
    async def main() -> None:
        talk = Talk()
        await talk.event("turn_end", 1.0, reason="manual", waited_ms=0)
        await talk.sound(0.0, 0.5)
        before = len(talk.said)
        chunk = Text(text="a secret", rate=16000)
        await talk.realtime.fail(StageError("converse", chunk, ValueError("no answer to 'a secret'")))
        said = talk.said[before:]
        assert types(said)[0].endswith("transcription.completed")
        assert (said[-2]["type"], said[-2]["response"]["status"]) == ("response.done", "failed")
        error = said[-1]["error"]
        assert (error["type"], error["code"]) == ("server_error", "server_error")
        assert "'converse' failed" in error["message"]
        assert "secret" not in json.dumps(said)

    run(main())


def test_a_function_call_is_passed_on_and_its_output_goes_into_the_graph() -> None:
    async def main() -> None:
        talk = Talk()
        said = await talk.event("function_call", name="weather", call_id="call_1", arguments='{"city":"Ulm"}')
        assert types(said) == [
            "response.created", "response.output_item.added", "conversation.item.added",
            "response.function_call_arguments.delta", "response.function_call_arguments.done",
            "response.output_item.done", "conversation.item.done", "response.done",
        ]  # fmt: skip
        assert said[-1]["response"]["output"][0]["arguments"] == '{"city":"Ulm"}'
        output = {"type": "function_call_output", "call_id": "call_1", "output": "rain"}
        added, done = await talk.client("conversation.item.create", item=output)
        name, item = talk.call.told[-1]
        assert (name, item["output"], item["id"]) == ("item", "rain", added["item"]["id"])
        assert types([added, done]) == ["conversation.item.added", "conversation.item.done"]

    run(main())


def test_out_of_band_sound_starts_stops_and_an_interruption_truncates_to_what_was_heard() -> None:
    async def main() -> None:
        talk = Talk(audio_in_band=False)
        assert types(await talk.sound(3.0, 1.0, final=True)) == [
            "response.created", "response.output_item.added", "conversation.item.added",
            "response.content_part.added", "output_audio_buffer.started", "response.output_audio.done",
            "response.output_audio_transcript.done", "response.content_part.done", "response.output_item.done",
            "conversation.item.done", "response.done",
        ]  # fmt: skip
        talk.call.played(0, 4.0)
        await talk.realtime.played()
        assert types(talk.said)[-1] == "output_audio_buffer.stopped"
        assert "output_audio_buffer.started" not in types(await talk.sound(4.0, 0.0, final=True))  # an empty reply
        await talk.sound(4.0, 2.0)
        talk.call.epoch = 1
        said = await talk.event("interrupted", epoch=1, heard_seconds=4.5, heard_epoch=0)
        assert types(said)[-3:] == ["response.done", "output_audio_buffer.cleared", "conversation.item.truncated"]
        assert said[-3]["response"]["status_details"]["reason"] == "turn_detected"
        assert said[-1]["audio_end_ms"] == 500

    run(main())


def test_a_transcription_session_makes_no_responses() -> None:
    async def main() -> None:
        talk = Talk(type="transcription")
        await talk.realtime.start()
        assert talk.call.told[0][1]["respond"] is False
        assert await talk.sound(0.0, 0.1, final=True) == []
        error_of(await talk.client("response.create"))

    run(main())


class AnyOrder(RuleBasedStateMachine):
    """Every response ends in exactly one ``response.done``, ids were announced, nothing comes from a stopped one."""

    @initialize(in_band=st.booleans())
    def begin(self, in_band: bool) -> None:
        self.talk, self.at = Talk(audio_in_band=in_band), 0.0
        self.now = 0.0
        self.open = False  # the reply of the graph
        self.lengths: dict[str, int] = {}
        self._run(self.talk.realtime.start())

    def _run(self, work: Coroutine[Any, Any, Any]) -> list[dict[str, Any]]:
        return run(work)

    @rule(seconds=st.sampled_from([0.1, 0.25]), final=st.booleans())
    def sound(self, seconds: float, final: bool) -> None:
        said = self._run(self.talk.sound(self.at, seconds, final=final))
        self.at += seconds
        for one in said:
            if one["type"] == "response.output_audio.delta":
                length = len(base64.b64decode(one["delta"])) * 1000 // (2 * RATE)
                self.lengths[one["item_id"]] = self.lengths.get(one["item_id"], 0) + length

    @rule(text=st.sampled_from(["one", "one two"]), final=st.booleans())
    def words(self, text: str, final: bool) -> None:
        chunk = Text(text=text, rate=RATE, start=0, epoch=self.talk.call.epoch, final=final)
        self._run(self.talk.graph(chunk, "parrot.said"))

    @rule(text=st.sampled_from(["a", "a b", "a b c"]), final=st.booleans())
    def caption(self, text: str, final: bool) -> None:
        self._run(self.talk.caption(text, final=final, start=self.now))

    @rule(length=st.sampled_from([0.2, 1.0]), reason=st.sampled_from(["silence", "manual", "idle"]))
    def turn(self, length: float, reason: str) -> None:
        if reason == "silence":
            self._run(self.talk.event("speech_start", self.now))
        self.now += length
        self._run(self.talk.event("turn_end", self.now, reason=reason, waited_ms=0))

    @rule()
    def interrupted(self) -> None:
        call = self.talk.call
        heard = {} if call.session.heard is None else {"heard_seconds": call.session.heard.seconds, "heard_epoch": 0}
        call.epoch += 1
        said = self._run(self.talk.event("interrupted", epoch=call.epoch, **heard))
        assert types(said).count("response.done") <= 1
        self._stale()

    @rule()
    def cancel(self) -> None:
        if types(self._run(self.talk.client("response.cancel")))[-1] != "error":
            self._stale()

    def _stale(self) -> None:
        """Sound of the epoch that has ended is not passed on."""
        audio = Audio(samples=np.zeros(240, np.float32), rate=RATE, epoch=self.talk.call.epoch - 1)
        assert self._run(self.talk.graph(audio, "parrot.audio")) == []

    @rule()
    def create(self) -> None:
        self._run(self.talk.client("response.create"))

    @rule()
    def call_function(self) -> None:
        self._run(self.talk.event("function_call", name="f", call_id="c", arguments="{}"))

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def truncate(self, data: Any) -> None:
        id = list(self.lengths)[data.draw(st.integers(0, len(self.lengths) - 1))]  # ids are random, their order is not
        asked = data.draw(st.integers(0, self.lengths[id] + 200))
        (said,) = self._run(
            self.talk.client("conversation.item.truncate", item_id=id, content_index=0, audio_end_ms=asked)
        )
        if asked <= self.lengths[id]:
            assert said["audio_end_ms"] == asked
            assert self.talk.call.session.heard.seconds <= self.at + 1e-6
        else:
            assert said["type"] == "error"

    @invariant()
    def order_holds(self) -> None:
        open_response: str | None = None
        items, done, completed = set(), set(), set()
        for one in self.talk.said:
            kind = one["type"]
            if kind == "response.created":
                assert open_response is None
                open_response = one["response"]["id"]
                assert open_response not in done
            elif kind == "response.done":
                assert one["response"]["id"] == open_response
                done.add(open_response)
                open_response = None
            elif kind.startswith("response."):
                assert one["response_id"] == open_response
            elif kind == "conversation.item.added":
                assert one["item"]["id"] not in items
                items.add(one["item"]["id"])
            elif kind == "conversation.item.done":
                assert one["item"]["id"] in items
            elif kind.endswith("transcription.completed"):
                assert one["item_id"] in items
                assert one["item_id"] not in completed
                completed.add(one["item_id"])
            if kind.endswith(".delta") and "item_id" in one and kind.startswith("response."):
                assert one["item_id"] in items

    def teardown(self) -> None:
        if hasattr(self, "talk"):
            self._run(self.talk.realtime.finish())
            self.order_holds()
            assert types(self.talk.said).count("response.created") == types(self.talk.said).count("response.done")


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestAnyOrder = AnyOrder.TestCase


# ---------------------------------------------------------------- the SDK against a server


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with recognising() as engine:
        engine.add("vad", SileroVAD(), slots=4)
        yield engine


def client_of(address: str) -> Any:
    return openai.AsyncOpenAI(
        api_key="unused", base_url=f"http://{address}/v1", websocket_base_url=f"ws://{address}/v1"
    )


async def until(connection: Any, kind: str, seen: list[Any], seconds: float = 30.0) -> Any:
    async with asyncio.timeout(seconds):
        while True:
            event = await connection.recv()
            SERVER_EVENT.validate_python(event.model_dump(exclude_unset=True))
            seen.append(event)
            if event.type == kind:
                return event


async def speak(connection: Any, seconds: float, silence: float) -> None:
    samples = resample(clip(seconds).astype(np.float32) / 32768, 16000, RATE)
    samples = np.concatenate((samples, np.zeros(round(silence * RATE), np.float32)))
    data = (samples * 32767).astype("<i2").tobytes()
    for at in range(0, len(data), 9600):
        await connection.input_audio_buffer.append(audio=base64.b64encode(data[at : at + 9600]).decode())


def test_the_sdk_talks_with_the_parrot(engine: Engine) -> None:
    async def main() -> None:
        service = Service(served.parrot, engine, name="parrot")
        seen: list[Any] = []
        async with serving(routes(service)) as address, client_of(address).realtime.connect(model="any") as connection:
            created = await until(connection, "session.created", seen)
            assert created.session.model == "parrot"
            await connection.session.update(
                session={
                    "type": "realtime",
                    "audio": {
                        "input": {
                            "turn_detection": {
                                "type": "server_vad",
                                "silence_duration_ms": 600,
                                "idle_timeout_ms": None,
                            }
                        }
                    },
                }
            )
            await until(connection, "session.updated", seen)
            await connection.send({"type": "nonsense", "event_id": "mine"})
            assert (await until(connection, "error", seen)).error.event_id == "mine"
            await speak(connection, 3.0, 3.0)
            done = await until(connection, "response.done", seen)
            kinds = [event.type for event in seen]
            if not any(kind.endswith("transcription.completed") for kind in kinds):
                await until(connection, "conversation.item.input_audio_transcription.completed", seen)
            by_type = {event.type: event for event in seen}
            assert done.response.status == "completed"
            sound = (
                sum(len(base64.b64decode(e.delta)) for e in seen if e.type == "response.output_audio.delta") / 2 / RATE
            )
            assert 1.0 < sound < 6.0
            transcript = by_type["conversation.item.input_audio_transcription.completed"].transcript
            assert len(transcript.split()) >= 3
            item = done.response.output[0].id
            await connection.conversation.item.truncate(item_id=item, content_index=0, audio_end_ms=400)
            assert (await until(connection, "conversation.item.truncated", seen)).audio_end_ms == 400

    asyncio.run(main())


def test_push_to_talk_replies_when_asked(engine: Engine) -> None:
    async def main() -> None:
        service, seen = Service(served.parrot, engine), []
        async with serving(routes(service)) as address, client_of(address).realtime.connect(model="any") as connection:
            await connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
            await until(connection, "session.updated", seen)
            await speak(connection, 2.0, 0.0)
            await connection.input_audio_buffer.commit()
            await until(connection, "input_audio_buffer.committed", seen)
            await connection.response.create()
            done = await until(connection, "response.done", seen)
            assert done.response.status == "completed"
            sound = (
                sum(len(base64.b64decode(e.delta)) for e in seen if e.type == "response.output_audio.delta") / 2 / RATE
            )
            assert sound == pytest.approx(2.0, abs=0.02)  # all that was said before the commit

    asyncio.run(main())


def test_a_commit_brings_the_transcript_and_the_reply_without_more_sound(engine: Engine) -> None:
    async def main() -> None:
        service, seen = Service(served.parrot, engine), []
        async with serving(routes(service)) as address, client_of(address).realtime.connect(model="any") as connection:
            await connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
            await connection.response.create()  # nothing was said yet
            done = await until(connection, "response.done", seen)
            assert done.response.status == "completed"
            assert not any(event.type == "response.output_audio.delta" for event in seen)
            for seconds, words in ((2.0001, 3), (0.1501, 0)):  # no whole number of samples at 16 kHz
                seen.clear()
                if words:
                    await speak(connection, seconds, 0.0)
                else:
                    await connection.input_audio_buffer.append(audio=pcm(seconds))
                await connection.input_audio_buffer.commit()
                await connection.response.create()
                kinds: list[str] = []
                while not {"response.done", "conversation.item.input_audio_transcription.completed"} <= set(kinds):
                    seen.append(await asyncio.wait_for(connection.recv(), 20))
                    kinds = [event.type for event in seen]
                by_type = {event.type: event for event in seen}
                transcript = by_type["conversation.item.input_audio_transcription.completed"].transcript
                assert len(transcript.split()) >= words
                assert words or not transcript
                deltas = [event.delta for event in seen if event.type == "response.output_audio.delta"]
                sound = sum(len(base64.b64decode(delta)) for delta in deltas) / 2 / RATE
                assert sound == pytest.approx(seconds, abs=0.02)

    asyncio.run(main())


@stage(name="realtime_test_broken")
async def broken(ctx: Context, audio: Input, control: Input) -> AsyncIterator[Chunk]:
    """Begins to answer, and fails."""
    async for chunk in audio:
        yield Audio(samples=np.zeros(2400, np.float32), rate=RATE, start=0)
        raise ValueError(f"a secret: {chunk}")


def test_a_stage_that_fails_is_named_before_the_close() -> None:
    def graph(options: Any) -> Any:
        made = broken()
        return (Inlet().named("audio") >> made["audio"]) | (Inlet().named("control") >> made["control"])

    async def main() -> None:
        service, seen = Service(graph, None), []
        async with serving(routes(service)) as address, client_of(address).realtime.connect(model="any") as connection:
            await connection.input_audio_buffer.append(audio=pcm(0.1))
            error = (await until(connection, "error", seen)).error
            assert (error.type, error.code) == ("server_error", "server_error")
            assert error.message == "stage 'realtime_test_broken' failed: start a new call"
            assert [event.response.status for event in seen if event.type == "response.done"] == ["failed"]
            with pytest.raises(ConnectionClosed) as closed:
                await connection.recv()
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1011, error.message)

    asyncio.run(main())


def test_a_full_server_says_so_and_a_broken_connection_ends_its_call(engine: Engine) -> None:
    async def main() -> None:
        service = Service(served.parrot, engine, max_calls=1)
        async with serving(routes(service)) as address:
            client = client_of(address)
            async with client.realtime.connect(model="any") as first:
                await until(first, "session.created", [])
                async with client.realtime.connect(model="any") as second:
                    error = await until(second, "error", [])
                    assert error.error.code == "rate_limit_exceeded"
                    with pytest.raises(ConnectionClosed) as closed:
                        await second.recv()
                    assert closed.value.rcvd is not None
                    assert closed.value.rcvd.code == 1013
                first._connection.transport.abort()
                async with asyncio.timeout(5):
                    while service.calls:
                        await asyncio.sleep(0.01)

    asyncio.run(main())
