"""OpenAI's Realtime API: the protocol by itself, event by event."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import numpy as np
import pytest

from antiphon.codecs import g711
from antiphon.pipelines.chunk import Text, Word
from antiphon.pipelines.stage import StageError

from .talking import RATE, Talk, error_of, pcm, run, types

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


@pytest.mark.parametrize("ended", [True, False])
def test_words_of_what_was_cleared_are_no_one_elses(ended: bool) -> None:
    async def main() -> None:
        talk = Talk()
        await talk.client("input_audio_buffer.append", audio=pcm(0.6))
        await talk.caption("one two")  # 0 to 0.5 s
        assert types(await talk.client("input_audio_buffer.clear")) == ["input_audio_buffer.cleared"]
        if ended:
            await talk.caption("one two three", final=True)
            await talk.caption("four", start=0.75)
        else:
            await talk.caption("one two three four")
        (started,) = await talk.event("speech_start", 0.75)
        assert started["audio_start_ms"] == 600
        await talk.event("turn_end", 1.0, reason="manual", waited_ms=0)
        said = await talk.caption("four", start=0.75, final=True) if ended else []
        said += await talk.caption("one two three four five", final=True) if not ended else []
        (completed,) = [one for one in said if one["type"].endswith("completed")]
        assert completed["transcript"] == ("four" if ended else "four five")
        assert completed["item_id"] == started["item_id"]

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
        await talk.client("conversation.item.truncate", item_id=later, content_index=0, audio_end_ms=750)
        await asyncio.sleep(9.0)
        await talk.client("input_audio_buffer.append", audio=pcm(0.1))
        assert heard() == (0, 6.25)
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
