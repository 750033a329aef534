"""Speech to text by a model that writes while it hears, frame by frame (Kyutai's delayed streams, arXiv 2509.08753)."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator, Mapping

import numpy as np
from torch import Tensor

from ..chunk import Audio, Chunk, Event, Text, Word
from ..duplex import Duplex, Monologue, Utterance
from ..marks import Marks
from ..stage import Context, Input, Stage, select, stage
from .converse import Frames

TAIL = 0.5  # seconds of silence after the last sound and the model's lag: the last word is written by then
HORIZON, LIKELY = 2, 0.5  # of Kyutai's classifiers for pauses of 0.5, 1, 2 and 3 s: the one that tells ends of turns


@stage(optional=("control",), lasting=True)
class Dictate(Stage):
    """Audio of any rate -> ``Text`` chunks: the words so far, and a ``final`` one where speech pauses.

    A model that has classifiers for pauses also tells where a turn seems to have ended: an event ``pause``, once after
    words, that starts at the last one's end (data: ``pauses``, the probabilities that nothing will be said for 0.5, 1,
    2 and 3 s). ``control`` takes the event ``mark``, which comes out again when all from before it is written.

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
        config, tick = model.lm.config, model.tick(1)
        constant = model.inputs(config.sampling)
        lease = await ctx.open(self.model)
        frames, writing = Frames(model), _Writing(model, self)
        silence = np.zeros(model.frame, np.float32)
        # The model never sees its first frame: silence, so that nothing said is lost.
        for _ in range(writing.lead):
            writing.skip(await lease.step({**constant, "pcm": silence}))
        while ready := await select(control, audio):
            chunk = ready.get_nowait()
            if ready is control and isinstance(chunk, Event):
                writing.marks.add(chunk)
                for mark in writing.marks.passed(writing.reached):
                    yield mark
            elif ready is audio and isinstance(chunk, Audio):
                for pcm in frames.push(chunk):
                    for out in writing.take(await lease.step({**constant, "pcm": pcm})):
                        yield out
            elif chunk is not None:
                raise TypeError(f"the input {ready.name!r} of dictate does not take {chunk}")
        tail = [frames.rest(), *[silence] * math.ceil((config.lag + TAIL) / tick)]
        for pcm in tail:
            for out in writing.take(await lease.step({**constant, "pcm": pcm})):
                yield out
        for out in writing.end():
            yield out


class _Writing:
    """A model's frames as chunks, timed by the sound that they tell of. lead: frames of silence that come first."""

    def __init__(self, model: Duplex, stage: Dictate) -> None:
        config, tick = model.lm.config, model.tick(1)
        self.lead = max(1, math.ceil(config.lead / tick))
        self._lag = round(config.lag * model.rate)
        self._rate, self._frame, self._steps = model.rate, model.frame, stage.steps
        pause = max(1, round(stage.endpoint / tick))
        self._text = Monologue(model.tokenizer, (config.padding, config.end_padding), pause=pause, split=True)
        self.marks = Marks()
        self._heard = 0  # frames, the lead left out
        self._end: int | None = None  # of the last word, until a pause after it was told

    def skip(self, row: Mapping[str, Tensor]) -> None:
        """A frame of the lead: what is written there is of nothing."""
        self._text.add(int(row["text"]))

    def take(self, row: Mapping[str, Tensor]) -> Iterator[Chunk]:
        """The next frame."""
        self._heard += 1
        news = self._text.add(int(row["text"]))
        if news is None and self._text.silent == 1:
            news = self._text.open  # its last word is whole
        if news is not None:
            yield (said := self._told(news))
            if not self._text.silent:
                self._end = said.end
        at = self._heard * self._frame
        known = {"pauses": row["heads"][:, 0].tolist()} if "heads" in row else {}
        pauses = known.get("pauses", ())
        if len(pauses) > HORIZON and pauses[HORIZON] > LIKELY and self._end is not None:
            yield Event(name="pause", data=known, rate=self._rate, start=self._end)
            self._end = None
        if self._steps:
            yield Event(name="step", data={"step": self._heard, **known}, rate=self._rate, start=at)
        yield from self.marks.passed(self.reached)

    @property
    def reached(self) -> float:
        """Seconds of sound that the text tells of."""
        return (self._heard * self._frame - self._lag) / self._rate

    def end(self) -> Iterator[Chunk]:
        """What had not ended."""
        if (news := self._text.end()) is not None:
            yield self._told(news)
        yield from self.marks.passed()

    def _told(self, said: Utterance) -> Text:
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
        return max(0, (frame - self.lead) * self._frame - self._lag)
