"""OpenAI's Realtime API: what holds whatever the order of events."""

from __future__ import annotations

import base64
from collections.abc import Coroutine
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from antiphon.pipelines.chunk import Audio, Text
from antiphon.pipelines.stage import StageError

from .talking import RATE, Talk, run, types


class AnyOrder(RuleBasedStateMachine):
    """Every response ends in exactly one ``response.done``, ids were announced, nothing comes from a stopped one."""

    @initialize(in_band=st.booleans(), fails=st.booleans())
    def begin(self, in_band: bool, fails: bool) -> None:
        self.talk, self.at, self.fails = Talk(audio_in_band=in_band), 0.0, fails
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

    @rule(text=st.sampled_from(["", "a", "a b", "a b c"]), final=st.booleans())
    def caption(self, text: str, final: bool) -> None:
        self._run(self.talk.caption(text, final=final, start=self.now))

    @rule(length=st.sampled_from([0.2, 1.0]), reason=st.sampled_from(["silence", "manual", "idle"]))
    def turn(self, length: float, reason: str) -> None:
        if reason == "silence":
            self._run(self.talk.event("speech_start", self.now))
        self.now += length
        self._run(self.talk.event("turn_end", self.now, reason=reason, waited_ms=0))

    @rule()
    def clear(self) -> None:
        assert types(self._run(self.talk.client("input_audio_buffer.clear"))) == ["input_audio_buffer.cleared"]

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

    def completed(self) -> set[str]:
        """Turns whose transcripts are complete."""
        return {one["item_id"] for one in self.talk.said if one["type"].endswith("transcription.completed")}

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
            if self.fails:
                self._run(self.talk.realtime.fail(StageError("parrot", None, ValueError("no"))))
            else:
                self._run(self.talk.realtime.finish())
            self.order_holds()
            committed = {one["item_id"] for one in self.talk.said if one["type"] == "input_audio_buffer.committed"}
            assert committed == self.completed()
            assert types(self.talk.said).count("response.created") == types(self.talk.said).count("response.done")


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestAnyOrder = AnyOrder.TestCase
