"""Live speech recognition: audio in, captions out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from ...codecs.resample import Resampler
from ..captions import Caption, Final
from ..chunk import Audio, Chunk, Text
from ..recognizer import SAMPLE_RATE
from ..stage import Context, Input, Stage, stage
from ..transcription import Transcription


@stage(lasting=True)
class Transcribe(Stage):
    """Audio of any rate -> ``Text`` chunks: the words so far, and a ``final`` one where speech pauses.

    model: the recogniser's name in the engine. lookahead: milliseconds, one of the model's (None: its default).
    language: for models with a language prompt. endpoint: seconds without a word that end a caption.
    """

    name = "transcribe"

    def __init__(
        self,
        *,
        model: str = "asr",
        lookahead: float | None = None,
        language: str | None = None,
        endpoint: float = 1.0,
    ) -> None:
        self.model, self.lookahead, self.language, self.endpoint = model, lookahead, language, endpoint

    async def run(self, ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
        """See the class."""
        recognizer = ctx.engine.model(self.model)
        session = Transcription(recognizer, self.lookahead, language=self.language, endpoint=self.endpoint)
        lease = await ctx.open(self.model, variant=session.variant)
        resampler: Resampler | None = None
        async for chunk in audio:
            if not isinstance(chunk, Audio):
                raise TypeError(f"transcribe takes audio, got {chunk}")
            if resampler is None:
                resampler = Resampler(chunk.rate, SAMPLE_RATE)
            elif chunk.rate != resampler.source_rate:
                raise ValueError(f"audio at {resampler.source_rate} Hz went on at {chunk.rate} Hz; resample it first")
            for block in session.push(resampler.push(chunk.samples)):
                for text in texts(session.take(await lease.step(session.inputs(block)), block)):
                    yield text
        tail = [] if resampler is None else session.push(resampler.flush())
        for block in (*tail, *session.flush()):
            for text in texts(session.take(await lease.step(session.inputs(block)), block)):
                yield text
        for text in texts(session.finish()):
            yield text


def texts(captions: Iterable[Caption]) -> Iterable[Text]:
    """Captions as chunks, timed in samples at 16 kHz."""
    for caption in captions:
        start, end = round(caption.start * SAMPLE_RATE), round(caption.end * SAMPLE_RATE)
        yield Text(
            text=caption.text,
            words=caption.words,
            rate=SAMPLE_RATE,
            start=start,
            duration=end - start,
            final=isinstance(caption, Final),
        )
