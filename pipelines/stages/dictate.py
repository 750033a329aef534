"""Speech to text by a model that writes while it hears, frame by frame (Kyutai's delayed streams, arXiv 2509.08753)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Iterator

import numpy as np
from numpy.typing import NDArray

from ..chunk import Audio, Chunk, Event, Text, Word
from ..duplex import Duplex, Monologue, Utterance
from ..engine import Lease, Row
from ..marks import Marks
from ..stage import Context, Input, Stage, select, stage
from .converse import Frames
from .transcribe import reaching

TAIL = 0.5  # seconds of silence after the last sound and the model's lag: the last word is written by then
HORIZON, LIKELY = 2, 0.5  # of Kyutai's classifiers for pauses of 0.5, 1, 2 and 3 s: the one that tells ends of turns


@stage(optional=("control",), lasting=True)
class Dictate(Stage):
    """Audio of any rate -> ``Text`` chunks: the words so far, and a ``final`` one where speech pauses.

    A model that has classifiers for pauses also tells where a turn seems to have ended: an event ``pause``, once after
    words, that starts at the last one's end (data: ``pauses``, the probabilities that nothing will be said for 0.5, 1,
    2 and 3 s). ``control`` takes the events that ``Transcribe`` takes, ``commit``, ``clear`` and ``mark``.

    model: its name in the engine. endpoint: seconds without a word that end a caption. steps: tell of every frame, with
    an event ``step`` at its end (data: ``step``, its number, and ``pauses`` where known).
    """

    name = "dictate"

    def __init__(self, *, model: str = "dictate", endpoint: float = 1.0, steps: bool = False) -> None:
        if endpoint <= 0:
            raise ValueError(f"endpoint={endpoint:g}: a positive number of seconds")
        self.model, self.endpoint, self.steps = model, endpoint, steps

    async def run(self, ctx: Context, audio: Input, control: Input) -> AsyncIterator[Chunk]:
        """See the class."""
        model = ctx.engine.model(self.model)
        if not isinstance(model, Duplex) or model.decoder is not None:
            raise TypeError(f"dictate needs a model that only writes; {self.model!r} is a {type(model).__name__}")
        lease = await ctx.open(self.model)
        writing = _Writing(model, self, lease)
        await writing.begin()
        heard, waiting = 0.0, deque[Event]()  # ends, after sound that is still on its way
        while ready := await select(control, audio):
            chunk = ready.get_nowait()
            if ready is control and isinstance(chunk, Event):
                if chunk.name in ("commit", "clear"):
                    waiting.append(chunk)
                writing.marks.add(chunk)
            elif ready is audio and isinstance(chunk, Audio):
                heard = chunk.end_seconds
                async for out in writing.hear(chunk):
                    yield out
            elif chunk is not None:
                raise TypeError(f"the input {ready.name!r} of dictate does not take {chunk}")
            while waiting and (audio.ended or waiting[0].start_seconds <= heard):
                end = waiting.popleft()
                said = await writing.rest()
                for out in reaching(end, [text for text in said if isinstance(text, Text)]):
                    yield out
                for mark in writing.marks.passed(end.start_seconds):
                    yield mark
                if writing.sound:
                    lease.reset()
                    await writing.begin(heard)
            for mark in writing.marks.passed(writing.reached):
                yield mark
        for out in await writing.rest():
            yield out
        for mark in writing.marks.passed():
            yield mark


class _Writing:
    """A model's frames as chunks, timed by the sound that they tell of."""

    def __init__(self, model: Duplex, stage: Dictate, lease: Lease) -> None:
        config, tick = model.lm.config, model.tick(1)
        self._model, self._lease, self._steps = model, lease, stage.steps
        self._constant = model.inputs(config.sampling)
        self._rate, self._frame = model.rate, model.frame
        self._lead, self._lag = max(1, math.ceil(config.lead / tick)), round(config.lag * model.rate)
        self._tail = [np.zeros(model.frame, np.float32)] * math.ceil((config.lag + TAIL) / tick)
        self._pause = max(1, round(stage.endpoint / tick))
        self.marks = Marks()
        self._told = 0  # steps

    async def begin(self, seconds: float = 0.0) -> None:
        """A stretch of sound that begins at this media time, with a lease that is fresh."""
        padding = (self._model.lm.config.padding, self._model.lm.config.end_padding)
        self._text = Monologue(self._model.tokenizer, padding, pause=self._pause, split=True)
        self._frames = Frames(self._model)
        self._begin = round(seconds * self._rate)
        self.sound = False  # whether there was any
        self._heard = 0  # frames, the lead left out
        self._end: int | None = None  # of the last word, until a pause after it was told
        # The model never sees its first frame: silence, so that nothing said is lost.
        for _ in range(self._lead):
            self._text.add(int((await self._step(self._tail[0]))["text"]))

    async def hear(self, chunk: Audio) -> AsyncIterator[Chunk]:
        """What the next sound brings out."""
        self.sound = True
        for pcm in self._frames.push(chunk):
            row = await self._step(pcm)
            self._heard += 1
            for out in self._written(row):
                yield out
            if self._steps:
                self._told += 1
                yield Event(
                    name="step", data={"step": self._told, **_pauses(row)}, rate=self._rate,
                    start=self._begin + self._heard * self._frame,
                )  # fmt: skip
            for mark in self.marks.passed(self.reached):
                yield mark

    async def rest(self) -> list[Chunk]:
        """What the end of the sound brings out."""
        made: list[Chunk] = []
        if not self.sound:
            return made
        for pcm in (self._frames.rest(), *self._tail):
            made += self._written(await self._step(pcm))
        news = self._text.end()
        return made if news is None else [*made, self._caption(news)]

    @property
    def reached(self) -> float:
        """Seconds of sound that the text tells of."""
        return (self._begin + max(0, self._heard * self._frame - self._lag)) / self._rate

    async def _step(self, pcm: NDArray[np.float32]) -> Row:
        return await self._lease.step({**self._constant, "pcm": pcm})

    def _written(self, row: Row) -> Iterator[Chunk]:
        news = self._text.add(int(row["text"]))
        if news is None and self._text.silent == 1:
            news = self._text.open  # its last word is whole
        if news is not None:
            yield (said := self._caption(news))
            if not self._text.silent:
                self._end = said.end
        known = _pauses(row)
        if self._end is not None and self._text.silent and known and known["pauses"][HORIZON] > LIKELY:
            yield Event(name="pause", data=known, rate=self._rate, start=self._end)
            self._end = None

    def _caption(self, said: Utterance) -> Text:
        words = tuple(
            Word(word, self._at(first) / self._rate, self._at(after) / self._rate) for word, first, after in said.words
        )
        start, end = self._at(said.words[0][1]), self._at(said.words[-1][2])
        return Text(
            text=said.text.strip(), words=words, settled=len(words) if self._text.silent and not said.final else None,
            rate=self._rate, start=start, duration=end - start, final=said.final,
        )  # fmt: skip

    def _at(self, frame: int) -> int:
        """The sample that a frame's token tells of."""
        return self._begin + max(0, (frame - self._lead) * self._frame - self._lag)


def _pauses(row: Row) -> dict[str, list[float]]:
    """What the classifiers say, where there are Kyutai's."""
    heads = row.get("heads")
    return {"pauses": heads[:, 0].tolist()} if heads is not None and len(heads) > HORIZON else {}
