"""Replies to turns: what is asked, what is remembered, and what an interruption takes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

from antiphon.pipelines.chunk import Audio, Chunk, Event, Text, Word
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.session import Heard, Session
from antiphon.pipelines.stage import Inlet
from antiphon.pipelines.stages.respond import Answer, AnswerError, Dialogue, Message, Respond, echo

RATE = 16000


class Model:
    """Answers with the number of the question, a word at a time, and remembers what it was asked."""

    def __init__(self, pause: float = 0.0, fails: bool = False) -> None:
        self.asked: list[list[Message]] = []
        self.dropped = 0
        self._pause, self._fails = pause, fails

    async def __call__(self, messages: Sequence[Message]) -> AsyncGenerator[str, None]:
        self.asked.append([dict(message) for message in messages])
        number = len(self.asked)
        try:
            for piece in ("Answer ", f"number {number}", "."):
                await asyncio.sleep(self._pause)
                if self._fails and piece == ".":
                    raise AnswerError("the model is away")
                yield piece
        except (asyncio.CancelledError, GeneratorExit):
            self.dropped += 1
            raise


class Caller:
    """A client of the stage: turns, captions and events go in, chunks come out."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.made: list[Chunk] = []
        self.at = 0.0
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for chunk in self.session.outputs():
            self.made.append(chunk)

    async def speaks(self, words: str, *, seconds: float = 1.0, captioned: bool = True) -> None:
        """A turn, with a final caption at its end."""
        start, self.at = self.at, self.at + seconds
        if captioned:
            await self.caption(words, start)
        turn = Audio(
            samples=np.zeros(round(seconds * RATE), np.float32), rate=RATE, start=round(start * RATE), final=True
        )
        await self.session.send(turn, "turn")
        await self.session.clock.sleep(0.001)

    async def caption(self, words: str, start: float, *, final: bool = True) -> None:
        timed = tuple(
            Word(word, start + 0.1 * number, start + 0.1 * number + 0.1) for number, word in enumerate(words.split())
        )
        await self.session.send(
            Text(text=words, words=timed, rate=RATE, start=round(start * RATE), final=final), "text"
        )
        await self.session.clock.sleep(0.001)

    async def hears(self, text: str, start: float, epoch: int, seconds: float) -> None:
        """``Speak`` has said this, and so many seconds of it were played."""
        words = tuple(Word(word, start + number, start + number + 1.0) for number, word in enumerate(text.split()))
        await self.session.send(Text(text=text, words=words, rate=RATE, epoch=epoch), "said")
        await self.session.clock.sleep(0.001)
        self.session.report_heard("client", epoch, start + seconds)

    async def tell(self, name: str, **data: Any) -> None:
        await self.session.send(Event(name=name, data=data, rate=RATE), "control")
        await self.session.clock.sleep(0.001)

    @property
    def replies(self) -> list[str]:
        """Whole replies, ``...`` behind those that have not ended."""
        said: list[str] = [""]
        for chunk in self.made:
            if isinstance(chunk, Text):
                said[-1] += chunk.text
                if chunk.final:
                    said.append("")
        return said[:-1] if not said[-1] else [*said[:-1], said[-1] + "..."]


def call(
    answer: Answer | None, script: Callable[[Caller], Coroutine[Any, Any, None]], instructions: str = ""
) -> Caller:
    async def main() -> Caller:
        respond = Respond(answer=answer, instructions=instructions)
        turn, text, said, control = (Inlet().named(name) for name in ("turn", "text", "said", "control"))
        graph = (turn >> respond["turn"]) | (text >> respond["text"]) | (said >> respond["said"])
        async with (graph | (control >> respond["control"])).session() as session:
            caller = Caller(session)
            await script(caller)
            session.finish()
            await caller._reader
        return caller

    return run_virtual(main())


def test_a_turn_is_answered_in_pieces() -> None:
    model = Model()

    async def script(caller: Caller) -> None:
        await caller.speaks("hello there")
        await caller.speaks("and again")

    caller = call(model, script, "Be brief.")
    assert caller.replies == ["Answer number 1.", "Answer number 2."]
    texts = [chunk for chunk in caller.made if isinstance(chunk, Text)]
    assert [chunk.text for chunk in texts[:4]] == ["Answer ", "number 1", ".", ""]
    system = {"role": "system", "content": "Be brief."}
    assert model.asked == [
        [system, {"role": "user", "content": "hello there"}],
        [
            system,
            {"role": "user", "content": "hello there"},
            {"role": "assistant", "content": "Answer number 1."},
            {"role": "user", "content": "and again"},
        ],
    ]


def test_without_a_model_it_says_what_it_has_understood() -> None:
    caller = call(None, lambda caller: caller.speaks("good day to you."))
    assert caller.replies == ["You said: good day to you."]

    async def nothing() -> list[str]:
        return [piece async for piece in echo([])]

    assert run_virtual(nothing()) == ["I am listening."]


@pytest.mark.parametrize(("seconds", "remembered"), [(0.0, None), (0.5, "Answer"), (1.5, "Answer number"), (9.0, None)])
def test_memory_is_cut_to_what_was_heard(seconds: float, remembered: str | None) -> None:
    """Heard until then, then interrupted; at 9 s it was heard to its end."""
    model = Model()

    async def script(caller: Caller) -> None:
        await caller.speaks("one")
        await caller.hears("Answer number 1.", 20.0, 0, seconds)
        caller.session.interrupt()
        await caller.speaks("two")

    call(model, script)
    answers = [message["content"] for message in model.asked[1] if message["role"] == "assistant"]
    whole = "Answer number 1." if seconds > 3 else remembered
    assert answers == ([whole] if whole else [])
    said = [message["content"] for message in model.asked[1] if message["role"] == "user"]
    assert said == (["one", "two"] if whole else ["one two"])


def test_a_sink_that_tells_nothing_leaves_what_was_said() -> None:
    dialogue = Dialogue()
    dialogue.asked("one")
    dialogue.replies(0)
    dialogue.replied("First and second and third.")
    words = (Word("First", 0.0, 1.0), Word("and", 1.0, 2.0))
    dialogue.said(Text(text="First and", words=words, rate=RATE, epoch=0))
    dialogue.settle(1, None)
    assert dialogue.messages()[-1] == {"role": "assistant", "content": "First and"}


def test_what_another_reply_was_heard_does_not_count() -> None:
    dialogue = Dialogue()
    dialogue.asked("one")
    dialogue.replies(3)
    dialogue.replied("Never heard.")
    dialogue.said(Text(text="Never", words=(Word("Never", 0.0, 1.0),), rate=RATE, epoch=3))
    dialogue.settle(4, Heard("client", 2, 9.0, 9.0))
    assert dialogue.messages() == [{"role": "user", "content": "one"}]


def test_a_turn_that_ends_while_the_reply_is_written_takes_its_place() -> None:
    model = Model(pause=0.5)

    async def script(caller: Caller) -> None:
        await caller.speaks("I would like")
        await caller.session.clock.sleep(0.7)
        assert caller.replies == ["Answer ..."]
        await caller.speaks("a cup of tea")

    caller = call(model, script)
    assert model.asked[1] == [{"role": "user", "content": "I would like a cup of tea"}]
    assert model.dropped == 1
    assert (
        "".join(chunk.text for chunk in caller.made if isinstance(chunk, Text) and chunk.epoch == 1)
        == "Answer number 2."
    )
    assert caller.session.epoch == 1


def test_an_interruption_ends_the_reply() -> None:
    model = Model(pause=0.5)

    async def script(caller: Caller) -> None:
        await caller.speaks("hello")
        await caller.session.clock.sleep(0.7)
        caller.session.interrupt()
        await caller.session.clock.sleep(5.0)

    caller = call(model, script)
    assert caller.replies == ["Answer ..."]
    assert model.dropped == 1


def test_a_model_that_fails_is_told_and_the_dialogue_goes_on() -> None:
    model = Model(fails=True)

    async def script(caller: Caller) -> None:
        await caller.speaks("hello")
        await caller.speaks("still there?")

    caller = call(model, script)
    assert caller.replies == ["Answer number 1", "Answer number 2"]
    assert [chunk.data for chunk in caller.made if isinstance(chunk, Event)] == [{"message": "the model is away"}] * 2
    assert caller.session.counters["respond.failed"] == 2


def test_a_caption_that_comes_late_is_waited_for() -> None:
    model = Model()

    async def script(caller: Caller) -> None:
        await caller.speaks("what", captioned=False)
        await caller.session.clock.sleep(1.0)
        assert not model.asked
        await caller.caption("what is it", 0.2)
        await caller.speaks("never", captioned=False)  # a noise without words

    call(model, script)
    assert [asked[-1]["content"] for asked in model.asked] == ["what is it"]


def test_an_open_caption_may_settle_first() -> None:
    model = Model()

    async def script(caller: Caller) -> None:
        await caller.caption("what is", 0.0, final=False)
        await caller.speaks("", captioned=False)
        assert not model.asked
        await caller.session.clock.sleep(0.1)
        await caller.caption("what is it", 0.0)
        await caller.caption("and then", 1.0, final=False)
        await caller.speaks("", captioned=False)
        await caller.session.clock.sleep(0.2)
        assert len(model.asked) == 1
        await caller.session.clock.sleep(0.2)
        assert len(model.asked) == 2

    call(model, script)
    assert [asked[-1]["content"] for asked in model.asked] == ["what is it", "and then"]


def test_in_manual_mode_it_answers_when_asked() -> None:
    model = Model()

    async def script(caller: Caller) -> None:
        await caller.tell("turns", mode="manual")
        await caller.speaks("hello")
        assert not model.asked
        await caller.tell("respond", instructions="Whisper.")
        await caller.tell("respond")

    call(model, script)
    assert model.asked[0] == [{"role": "system", "content": "Whisper."}, {"role": "user", "content": "hello"}]
    assert model.asked[1][-1] == {"role": "assistant", "content": "Answer number 1."}


def test_the_dialogue_forgets_its_beginning() -> None:
    dialogue = Dialogue()
    for number in range(100):
        dialogue.asked(f"question {number}")
        dialogue.replies(0)
        dialogue.replied(f"answer {number}")
        dialogue.settle(0, None)
    messages = dialogue.messages("System.")
    assert len(messages) <= 42
    assert messages[0]["role"] == "system"
    assert messages[-1]["content"] == "answer 99"
