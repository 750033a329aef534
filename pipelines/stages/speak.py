"""Text to sound, while the text still comes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing

import numpy as np

from ..chunk import Audio, Chunk, Event, Stale, Text, Word
from ..engine.runner import Row
from ..speech import PARTS, Speech
from ..stage import Context, Input, Stage, select, stage
from ..synthesis import Piece, Step, Synthesis, timings
from ..synthesizer import Places

Out = tuple[str, Chunk]
Flying = dict["asyncio.Future[Row]", Step]

PIECE_SECONDS = 0.1  # of sound in one chunk
PASSAGES_WAITING = 8  # of text taken in advance
NAP = 0.1  # seconds between looks at how far the listener is


@stage(outputs=("audio", "said"), optional=("control",))
class Speak(Stage):
    """Text in pieces of any length, the last of an utterance ``final`` -> its sound at the models' rate.

    Outputs: ``audio``, ``final`` at an utterance's end (with no samples where all had gone before); ``said``, the text
    of the utterance as far as its sound goes, with its words' times, and ``final`` at its end. Times of words are
    approximate (see ``synthesis.timings``). Utterances follow each other in media time. An interruption ends the
    utterance, and nothing more of it comes out. ``control`` takes the event ``cancel``, which interrupts.

    model: the name that ``Speech.install`` was given. voice: a registered one; None for the first. seed: of everything
    drawn; None for another in each session. arriving: speak a few words behind the text that comes, instead of sentence
    by sentence. ahead: seconds of sound that may be made before they are played; None for as many as the output takes.
    """

    name = "speak"

    def __init__(
        self,
        *,
        model: str = "speak",
        voice: str | None = None,
        seed: int | None = None,
        arriving: bool = False,
        ahead: float | None = 10.0,
    ) -> None:
        if ahead is not None and ahead <= 0:
            raise ValueError(f"ahead={ahead}: a positive number of seconds, or None")
        if seed is not None and not 0 <= seed < 2**62:
            raise ValueError(f"seed={seed}: a whole number from 0 to 2**62 - 1")
        self.model, self.voice, self.seed, self.arriving, self.ahead = model, voice, seed, arriving, ahead

    async def run(self, ctx: Context, text: Input, control: Input) -> AsyncIterator[Out]:
        """See the class."""
        speech = Speech.of(ctx.engine, self.model)
        speech.reader.voice(self.voice)
        seed = secrets.randbits(61) if self.seed is None else self.seed
        leases = await ctx.open_together([f"{self.model}.{part}" for part in PARTS])
        places = Places(dict(zip(PARTS, leases, strict=True)))
        at = 0  # media position of the next sound
        while ready := await select(control, text):
            chunk = ready.get_nowait()
            if isinstance(chunk, Event):
                if chunk.name == "cancel" and ctx.playing:
                    ctx.interrupt()
                continue
            if chunk is None or chunk.epoch < ctx.session.epoch:
                continue
            synthesis = Synthesis(speech, self.voice, seed, arriving=self.arriving)
            saying = _Saying(self, ctx, synthesis, places, speech.rate, at, chunk.epoch)
            saying.take(chunk)
            try:
                async with aclosing(saying.run(text, control)) as outs:
                    async for port, out in outs:
                        if isinstance(out, Audio):
                            at = out.end
                        yield port, out
            except Stale:
                ctx.count("interrupted")
            finally:
                saying.drop()
                if synthesis.cut:
                    ctx.count("passages_cut", synthesis.cut)


class _Saying:
    """One utterance being spoken."""

    def __init__(
        self, stage: Speak, ctx: Context, synthesis: Synthesis, places: Places, rate: int, at: int, epoch: int
    ) -> None:
        self.ctx, self.synthesis, self.places, self.rate, self.epoch = ctx, synthesis, places, rate, epoch
        self._ahead = stage.ahead
        self._start = self._at = at
        self._asked = ctx.now  # clock time of the last text
        self._began: float | None = None  # and of the first sound
        self._finished = False
        self._passage = at  # where the passage that comes out begins
        self._number = -1
        self._words: tuple[Word, ...] = ()  # of the passages before
        self._text = ""
        self._told = ""  # of the passage that comes out
        self._flying: Flying = {}

    def take(self, chunk: Chunk) -> None:
        """More text."""
        if not isinstance(chunk, Text):
            raise TypeError(f"speak takes text, got {chunk}")
        self._asked = self.ctx.now
        self.synthesis.push(chunk.text)
        if chunk.final:
            self.finish()

    def finish(self) -> None:
        """No more text."""
        self._finished = True
        self.synthesis.finish()

    def drop(self) -> None:
        """Nothing that is still being made is wanted."""
        for future in self._flying:
            future.cancel()

    async def run(self, text: Input, control: Input) -> AsyncGenerator[Out, None]:
        """The sound. Raises Stale when an interruption has ended it."""
        while True:
            self._poll(text, control)
            for piece in self.synthesis.pieces():
                for out in self._out(piece):
                    yield out
                    self._check()
            if self.synthesis.done:
                break
            spare = self._spare()
            enough = self._ahead is not None and spare >= self._ahead
            for part in PARTS:
                if (part == "lm" or not enough) and (step := self.synthesis.next(part)) is not None:
                    lease = self.places.ready(step)
                    deadline = step.deadline(self._asked, self.ctx.now, spare)
                    self._flying[lease.step(step.inputs, deadline=deadline)] = step
            if self._flying:
                done, _ = await asyncio.wait(self._flying, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    self.synthesis.take(self._flying.pop(future), future.result())
            elif enough:
                await self.ctx.sleep(NAP)
            elif await select(control, text) is None:
                self.finish()
        self._check()
        yield "said", self._said((), final=True)
        yield "audio", self._audio(np.zeros(0, np.float32), final=True)

    def _check(self) -> None:
        if self.epoch < self.ctx.session.epoch:
            raise Stale(f"epoch {self.epoch} was interrupted")

    def _poll(self, text: Input, control: Input) -> None:
        """What has come in the meantime."""
        self._check()
        while isinstance(event := control.get_nowait(), Event):
            if event.name == "cancel" and self.ctx.playing:
                self.ctx.interrupt()
                self._check()
        while not self._finished and self.synthesis.waiting < PASSAGES_WAITING and text.ready:
            if (chunk := text.get_nowait()) is not None:
                self.take(chunk)
        if not self._finished and text.ended:
            self.finish()

    def _spare(self) -> float:
        """Seconds of sound made that the listener, who hears no faster than the clock runs, has not heard yet."""
        if self._began is None:
            return 0.0
        heard = self.ctx.heard
        played = self._start / self.rate + self.ctx.now - self._began
        if heard is not None and heard.epoch == self.epoch:
            played = max(played, heard.until)
        return max(0.0, self._at / self.rate - played)

    def _out(self, piece: Piece) -> Iterator[Out]:
        """A piece of sound in chunks, and the words that begin or end with it."""
        if self._began is None:
            self._began = self.ctx.now
        if piece.passage != self._number:
            self._number, self._passage, self._told = piece.passage, self._at, ""
        if piece.text != self._told or piece.final:
            self._told = piece.text
            words = timings(piece.text, self._passage / self.rate, piece.seconds)
            whole = self._text + piece.text
            yield "said", self._said(words, whole)
            if piece.final:
                self._words, self._text = (*self._words, *words), whole + " "
        size = round(PIECE_SECONDS * self.rate)
        for first in range(0, len(piece.samples), size):
            yield "audio", self._audio(piece.samples[first : first + size])

    def _said(self, words: tuple[Word, ...], text: str | None = None, *, final: bool = False) -> Text:
        whole = self._text.rstrip() if text is None else text
        return Text(
            text=whole, words=(*self._words, *words), rate=self.rate, start=self._start,
            duration=self._at - self._start, final=final, epoch=self.epoch,
        )  # fmt: skip

    def _audio(self, samples: np.ndarray[tuple[int], np.dtype[np.float32]], *, final: bool = False) -> Audio:
        audio = Audio(samples=samples, rate=self.rate, start=self._at, final=final, epoch=self.epoch)
        self._at = audio.end
        return audio
