"""The reply to what was said, by a language model that is asked from outside, or by a partner who knows one trick."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..chunk import Audio, Chunk, Event, Text
from ..session import Heard
from ..stage import Context, Input, Stage, select, stage
from ..turn_taking import RATE
from .parrot import Captions, Told

Out = tuple[str, Chunk]
Message = dict[str, str]
Answer = Callable[[Sequence[Message]], AsyncGenerator[str, None]]
"""From the dialogue so far (``role`` and ``content``, oldest first) to the pieces of a reply; raises AnswerError."""

SETTLES = 0.3  # seconds after a turn's end in which its last caption may still change
MESSAGES = 40  # that are remembered


class AnswerError(Exception):
    """There is no reply; the message says why, and holds nothing of what was said."""


async def echo(messages: Sequence[Message]) -> AsyncGenerator[str, None]:
    """Stands in for a language model: says what it has understood."""
    last = messages[-1]["content"] if messages and messages[-1]["role"] == "user" else ""
    yield f"You said: {last.rstrip('.!?')}." if last else "I am listening."


@stage(outputs=("reply", "events"), optional=("said", "control"))
class Respond(Stage):
    """Answers each ended turn in text.

    Inputs: ``turn``, from ``Turns``; ``text``, the recogniser's captions; optionally ``said``, what ``Speak`` has said
    of the replies, in a feedback edge, and ``control``, events as ``Parrot`` takes them (``respond`` may carry
    ``instructions``).

    Outputs: ``reply``, in pieces as they come, ``final`` at its end; ``events``: ``error`` where there is no reply. A
    turn that ends while the reply to the one before is still being written takes its place. Of a reply that was
    interrupted, the dialogue remembers what was heard: the words that began before the last one that a sink has played
    (all that was said where no sink tells).

    answer: what replies; None for ``echo``. instructions: the first message of the dialogue, from the system.
    """

    name = "respond"

    def __init__(self, *, answer: Answer | None = None, instructions: str = "") -> None:
        self.answer, self.instructions = answer or echo, instructions

    async def run(self, ctx: Context, turn: Input, text: Input, said: Input, control: Input) -> AsyncIterator[Out]:
        """See the class."""
        inputs = (control, said, text, turn)
        dialogue, listening = Dialogue(), _Listening()
        reading: asyncio.Task[Input | None] | None = None
        reply: _Reply | None = None
        ended = False
        try:
            while True:
                if reading is None and not ended:
                    reading = asyncio.create_task(select(*inputs))
                waiting: list[asyncio.Task[Any]] = [] if reading is None else [reading]
                if reply is not None:
                    waiting.append(reply.piece)
                if not waiting:
                    return
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=listening.patience(ctx.now))
                if reading is not None and reading.done():
                    ready, reading = reading.result(), None
                    ended = ready is None
                    while ready is not None and (chunk := ready.get_nowait()) is not None:
                        if ready is said and isinstance(chunk, Text):
                            dialogue.said(chunk)
                        else:
                            listening.take(ready.name, chunk, ctx)
                if reply is not None and reply.epoch < ctx.session.epoch:
                    await reply.drop()
                    reply = None
                if reply is not None and reply.piece.done():
                    try:
                        piece = reply.piece.result()
                    except AnswerError as error:
                        ctx.count("failed")
                        yield "events", Event(name="error", data={"message": str(error)}, rate=RATE, start=reply.start)
                        piece = None
                    dialogue.replied(piece or "")
                    yield "reply", Text(
                        text=piece or "", rate=RATE, start=reply.start, final=piece is None, epoch=reply.epoch
                    )  # fmt: skip
                    reply = None if piece is None else reply.next()
                asked = listening.asked(ctx.now, ended)
                if asked is None:
                    continue
                if reply is not None:
                    await reply.drop()
                    asked.epoch = ctx.interrupt()
                dialogue.settle(ctx.session.epoch, ctx.heard)
                dialogue.asked(asked.words)
                messages = dialogue.messages(asked.instructions or self.instructions)
                dialogue.replies(asked.epoch)
                reply = _Reply(self.answer(messages), asked.epoch, asked.start)
        finally:
            if reading is not None:
                reading.cancel()
            if reply is not None:
                await reply.drop()


class _Reply:
    """A reply that is being written. piece: the next of it, None at its end."""

    def __init__(self, pieces: AsyncGenerator[str, None], epoch: int, start: int) -> None:
        self._pieces, self.epoch, self.start = pieces, epoch, start
        self.piece: asyncio.Task[str | None]
        self.next()

    def next(self) -> _Reply:
        """Wait for the next piece."""
        self.piece = asyncio.create_task(self._next())
        return self

    async def _next(self) -> str | None:
        return await anext(self._pieces, None)

    async def drop(self) -> None:
        """End it where it is."""
        self.piece.cancel()
        await asyncio.gather(self.piece, return_exceptions=True)
        await self._pieces.aclose()


@dataclass
class _Asked:
    """A reply to make. words: to answer, empty where it was asked for without any."""

    words: str
    epoch: int
    start: int
    instructions: str = ""


class _Listening:
    """What is heard of the client, and when it is to be answered."""

    def __init__(self) -> None:
        self._captions, self._told = Captions(), Told()
        self._span: tuple[float, float] | None = None  # of the turn under way
        self._open: tuple[float, float] | None = None  # of the turns that have no answer yet
        self._asked: _Asked | None = None
        self._due = 0.0  # clock time at which captions count as they are
        self._forced = False
        self._instructions = ""

    def take(self, name: str, chunk: Chunk, ctx: Context) -> None:
        """A chunk of the input of this name."""
        if name == "text" and isinstance(chunk, Text):
            self._captions.add(chunk)
        elif name == "turn" and isinstance(chunk, Audio):
            start = chunk.start_seconds if self._span is None else self._span[0]
            self._span = start, chunk.end_seconds
            if chunk.final:
                first = self._span[0] if self._open is None else self._open[0]
                self._open, self._span = (first, self._span[1]), None
                self._told.turn_ended(asks=True, epoch=ctx.epoch)
        elif isinstance(chunk, Event):
            self._told.take(chunk)
            if chunk.name == "clear":
                self._span = None
            elif chunk.name == "cancel" and ctx.playing:
                ctx.interrupt()
            elif chunk.name == "respond":
                self._forced, self._instructions = True, str(chunk.data.get("instructions") or "")
        else:
            raise TypeError(f"the input {name!r} of respond does not take {chunk}")
        if (epoch := self._told.next_reply()) is not None:
            end = self._open[1] if self._open else 0.0
            self._asked = _Asked("", epoch, round(end * RATE), self._instructions)
            self._due = ctx.now + SETTLES

    def patience(self, now: float) -> float | None:
        """Seconds for which captions may still be waited for; None where none are."""
        return max(0.0, self._due - now) if self._asked is not None and self._due > now else None

    def asked(self, now: float, ended: bool) -> _Asked | None:
        """The reply to make now. ended: nothing more will be heard."""
        asked = self._asked
        if asked is None or (self._captions.open and now < self._due and not ended):
            return None
        words = self._captions.between(self._open) if self._open else ""
        if not words and not self._forced:
            return None  # a caption may still tell what it was
        asked.words = words
        self._asked, self._open, self._forced, self._instructions = None, None, False, ""
        return asked


class Dialogue:
    """What was said by whom, as far as it was heard."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._epoch: int | None = None  # of the newest reply, while it may still be cut
        self._said: Text | None = None  # of it, with the times of its words

    def messages(self, instructions: str = "") -> list[Message]:
        """Oldest first."""
        system = [{"role": "system", "content": instructions}] if instructions else []
        return [*system, *(dict(message) for message in self._messages)]

    def asked(self, words: str) -> None:
        """The client has said this; what was never answered is said with it."""
        if not words:
            return
        if self._messages and self._messages[-1]["role"] == "user":
            self._messages[-1]["content"] += f" {words}"
        else:
            self._messages.append({"role": "user", "content": words})
        del self._messages[:-MESSAGES]

    def replies(self, epoch: int) -> None:
        """A reply begins."""
        self._epoch, self._said = epoch, None
        self._messages.append({"role": "assistant", "content": ""})

    def replied(self, piece: str) -> None:
        """A piece of the reply was written."""
        if self._epoch is not None:
            self._messages[-1]["content"] += piece

    def said(self, text: Text) -> None:
        """So much of the reply has become sound."""
        if text.epoch == self._epoch:
            self._said = text

    def settle(self, epoch: int, heard: Heard | None) -> None:
        """Before the next message: a reply that an interruption has ended is cut to what was heard of it."""
        if self._epoch is None:
            return
        words = self._said.words if self._said is not None else ()
        if self._epoch < epoch:
            if heard is not None:
                reached = heard.seconds if heard.epoch == self._epoch else float("-inf")
                words = tuple(word for word in words if word.start < reached)
            self._messages[-1]["content"] = " ".join(word.text for word in words)
        if not self._messages[-1]["content"].strip():
            self._messages.pop()
        self._epoch = None
