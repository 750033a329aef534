"""Speech to text by a model that writes while it hears, frame by frame (Kyutai's delayed streams, arXiv 2509.08753)."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator

import numpy as np

from ..chunk import Audio, Chunk, Text, Word
from ..duplex import Duplex, Monologue
from ..stage import Context, Input, Stage, stage
from .converse import Frames

TAIL = 0.5  # seconds of silence after the last sound and the model's lag: the last word is written by then


@stage(lasting=True)
class Dictate(Stage):
    """Audio of any rate -> ``Text`` chunks: the words so far, and a ``final`` one where speech pauses.

    model: its name in the engine. endpoint: seconds without a word that end a caption.
    """

    name = "dictate"

    def __init__(self, *, model: str = "dictate", endpoint: float = 1.0) -> None:
        if endpoint <= 0:
            raise ValueError(f"endpoint={endpoint:g}: a positive number of seconds")
        self.model, self.endpoint = model, endpoint

    async def run(self, ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
        """See the class."""
        model = ctx.engine.model(self.model)
        if not isinstance(model, Duplex) or model.decoder is not None:
            raise TypeError(f"dictate needs a model that only writes; {self.model!r} is a {type(model).__name__}")
        config, tick = model.lm.config, model.tick(1)
        constant = model.inputs(config.sampling)
        lease = await ctx.open(self.model)
        frames, captions = Frames(model), _Captions(model, self.endpoint)
        silence = np.zeros(model.frame, np.float32)
        # The model never sees its first frame: silence, so that nothing said is lost.
        for _ in range(captions.lead):
            captions.take(int((await lease.step({**constant, "pcm": silence}))["text"]))
        async for chunk in audio:
            if not isinstance(chunk, Audio):
                raise TypeError(f"dictate takes audio, got {chunk}")
            for pcm in frames.push(chunk):
                for text in captions.take(int((await lease.step({**constant, "pcm": pcm}))["text"])):
                    yield text
        tail = [frames.rest(), *[silence] * math.ceil((config.lag + TAIL) / tick)]
        for pcm in tail:
            for text in captions.take(int((await lease.step({**constant, "pcm": pcm}))["text"])):
                yield text
        for text in captions.end():
            yield text


class _Captions:
    """Tokens as captions, timed by the sound that they tell of. lead: frames of silence that come first."""

    def __init__(self, model: Duplex, endpoint: float) -> None:
        config, tick = model.lm.config, model.tick(1)
        self.lead = max(1, math.ceil(config.lead / tick))
        self._behind = self.lead * model.frame + round(config.lag * model.rate)
        self._rate, self._frame = model.rate, model.frame
        pause = max(1, round(endpoint / tick))
        self._text = Monologue(model.tokenizer, (config.padding, config.end_padding), pause=pause)

    def take(self, token: int) -> Iterator[Text]:
        """The next frame's token."""
        return self._told(self._text.add(token))

    def end(self) -> Iterator[Text]:
        """What had not ended."""
        return self._told(self._text.end())

    def _told(self, news: tuple[str, int, bool] | None) -> Iterator[Text]:
        if news is None:
            return
        text, _, final = news
        words = tuple(
            Word(word, self._at(first) / self._rate, self._at(after) / self._rate)
            for word, first, after in self._text.words
        )
        start, end = self._at(self._text.words[0][1]), self._at(self._text.words[-1][2])
        yield Text(text=text.strip(), words=words, rate=self._rate, start=start, duration=end - start, final=final)

    def _at(self, frame: int) -> int:
        """The sample that a frame's token tells of."""
        return max(0, frame * self._frame - self._behind)
