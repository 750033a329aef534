"""Live speech recognition: audio in, captions out."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

from ...codecs.resample import Resampler
from ..captions import Caption, Final, Partial
from ..chunk import Audio, Chunk, Event, Text
from ..engine import Lease
from ..marks import Marks
from ..recognizer import SAMPLE_RATE
from ..stage import Context, Input, Stage, select, stage
from ..transcription import Transcription


@stage(optional=("control",), lasting=True)
class Transcribe(Stage):
    """Audio of any rate -> ``Text`` chunks: the words so far, and a ``final`` one where speech pauses.

    Inputs: ``audio``; optionally ``control``, events: ``commit`` and ``clear`` end what is being said, when the sound
    from before them has been heard. Each is answered at once by a final caption that reaches to it, empty where no word
    was open; the model then hears what follows as it does the first sound. ``mark`` comes out again among the captions
    when the words from before it are there.

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

    async def run(self, ctx: Context, audio: Input, control: Input) -> AsyncIterator[Chunk]:
        """See the class."""
        recognizer = ctx.engine.model(self.model)
        session = Transcription(recognizer, self.lookahead, language=self.language, endpoint=self.endpoint)
        lease = await ctx.open(self.model, variant=session.variant)
        resampler: Resampler | None = None
        heard, waiting = 0.0, deque[Event]()  # ends, after sound that is still on its way
        marks = Marks()
        while ready := await select(control, audio):
            chunk = ready.get_nowait()
            if ready is control and isinstance(chunk, Event):
                if chunk.name in ("commit", "clear"):
                    waiting.append(chunk)
                marks.add(chunk)
            elif ready is audio and isinstance(chunk, Audio):
                if resampler is None:
                    resampler = Resampler(chunk.rate, SAMPLE_RATE)
                elif chunk.rate != resampler.source_rate:
                    raise ValueError(
                        f"audio at {resampler.source_rate} Hz went on at {chunk.rate} Hz; resample it first"
                    )
                heard = chunk.end_seconds
                for block in session.push(resampler.push(chunk.samples)):
                    for text in texts(session.take(await lease.step(session.inputs(block)), block)):
                        yield text
                    for mark in marks.passed(session.reached):
                        yield mark
            elif chunk is not None:
                raise TypeError(f"the input {ready.name!r} of transcribe does not take {chunk}")
            while waiting and (audio.ended or waiting[0].start_seconds <= heard):
                for text in reaching(waiting.popleft(), await _rest(session, lease, resampler)):
                    yield text
                lease.reset()
                session.restart()
                resampler = None if resampler is None else Resampler(resampler.source_rate, SAMPLE_RATE)
            for mark in marks.passed(session.reached):
                yield mark
        for text in await _rest(session, lease, resampler):
            yield text
        for mark in marks.passed():
            yield mark


async def _rest(session: Transcription, lease: Lease, resampler: Resampler | None) -> list[Text]:
    """What the end of the sound brings out."""
    rest = [] if resampler is None else session.push(resampler.flush())
    captions: list[Caption] = []
    for block in (*rest, *session.flush()):
        captions += session.take(await lease.step(session.inputs(block)), block)
    return [*texts(captions), *texts(session.finish())]


def reaching(end: Event, said: list[Text]) -> list[Text]:
    """What was said up to the end, the last of it final, and lasting until then."""
    if not said or not said[-1].final:
        said = [*said, Text(text="", rate=end.rate, start=end.start, final=True)]
    *before, last = said
    return [*before, replace(last, duration=max(last.duration, round(end.start_seconds * last.rate) - last.start))]


def texts(captions: Iterable[Caption]) -> Iterable[Text]:
    """Captions as chunks, timed in samples at 16 kHz."""
    for caption in captions:
        start, end = round(caption.start * SAMPLE_RATE), round(caption.end * SAMPLE_RATE)
        yield Text(
            text=caption.text,
            words=caption.words,
            settled=caption.settled if isinstance(caption, Partial) else None,
            rate=SAMPLE_RATE,
            start=start,
            duration=end - start,
            final=isinstance(caption, Final),
        )
