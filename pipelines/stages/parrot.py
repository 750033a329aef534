"""Stand-ins for a dialogue model: ``Parrot`` says each turn back, ``Echo`` sends sound straight back.

They make no pretence of understanding. What they exercise is everything around a reply: its sound, its interruption,
what of it was heard, and the time from mouth to ear.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace

from ...codecs.resample import Resampler
from ..chunk import UNSET, Audio, Chunk, Event, Text
from ..stage import Context, Input, Stage, select, stage
from ..turn_taking import RATE, TurnSettings

Out = tuple[str, Chunk]


@stage(lasting=True)
class Echo(Stage):
    """Audio in, the same audio out at once: for measuring latency. An interruption does not touch it."""

    name = "echo"

    async def run(self, ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
        """See the class."""
        async for chunk in audio:
            yield replace(chunk, seq=UNSET, epoch=UNSET)


@stage(outputs=("audio", "said"), optional=("text", "control"))
class Parrot(Stage):
    """Says each ended turn back.

    Inputs: ``turn``, from ``Turns``; optionally ``text``, the recogniser's captions, and ``control``, events:
    ``respond`` (reply now, to the turn that ended last; with an empty reply where none had), ``commit`` (what is asked
    after it is done when that turn has ended), ``cancel`` (end the reply), ``turns`` (only whether to reply unasked).

    Outputs: ``audio``, the reply, ``final`` at its end (with no samples where all had gone before); ``said``, where
    captions are connected, the words of the turn as far as they are known when the reply begins, and ``final`` when it
    ends. Replies follow each other in media time.

    rate: hertz of the replies; None for that of the turn. longest: seconds of a turn that are said back, its last.
    """

    name = "parrot"

    def __init__(self, *, rate: int | None = None, longest: float = 60.0) -> None:
        if longest <= 0 or (rate is not None and rate <= 0):
            raise ValueError(f"rate={rate}, longest={longest}: positive hertz and seconds")
        self.rate, self.longest = rate, longest

    async def run(self, ctx: Context, turn: Input, text: Input, control: Input) -> AsyncIterator[Out]:
        """See the class."""
        hearing, ended, captions, told = _Turn(), _Turn(), Captions(), Told()
        captioned = not text.ended
        at = 0  # media position of the next reply, in samples at its rate
        while ready := await select(control, text, turn):
            chunk = ready.get_nowait()
            if ready is text and isinstance(chunk, Text):
                captions.add(chunk)
            elif ready is turn and isinstance(chunk, Audio):
                ctx.count("samples_forgotten", hearing.add(chunk, self.longest))
                if chunk.final:
                    hearing, ended = _Turn(), hearing
                    told.turn_ended(asks=ended.samples > 0, epoch=ctx.epoch)
            elif isinstance(chunk, Event):
                told.take(chunk)
                if chunk.name == "clear":
                    hearing = _Turn()
                elif chunk.name == "cancel" and ctx.playing:
                    ctx.interrupt()
            elif chunk is not None:
                raise TypeError(f"the input {ready.name!r} of parrot does not take {chunk}")
            while (epoch := told.next_reply()) is not None:
                rate, begin = self.rate or ended.rate, at
                if captioned:
                    yield "said", Text(text=captions.between(ended.span), rate=rate, start=begin, epoch=epoch)
                for audio in ended.said(rate, at):
                    while (said := text.get_nowait()) is not None:
                        captions.add(said)
                    while isinstance(event := control.get_nowait(), Event):
                        told.take(event)
                        if event.name == "cancel":
                            ctx.interrupt()
                            break
                    if epoch < ctx.session.epoch:
                        break
                    yield "audio", replace(audio, epoch=epoch)
                    at = audio.end
                if captioned and epoch == ctx.session.epoch:
                    words = captions.between(ended.span)
                    yield "said", Text(
                        text=words, rate=rate, start=begin, duration=at - begin, final=True, epoch=epoch
                    )  # fmt: skip


class Told:
    """What control events have asked for, as far as it was not done yet."""

    def __init__(self) -> None:
        self._settings = TurnSettings()
        self._commits = 0  # turns that are to end, and have not
        self._asked: int | None = None  # the epoch of a reply to make

    def take(self, event: Event) -> None:
        """Take note of an event. ``Turns`` tells of settings that cannot be."""
        if event.name == "turns":
            with suppress(ValueError):
                self._settings = self._settings.changed(event.data)
        elif event.name == "commit":
            self._commits += 1
        elif event.name == "respond":
            self._asked = event.epoch

    def turn_ended(self, *, asks: bool, epoch: int) -> None:
        """A turn has ended. asks: with something to reply to."""
        self._commits = max(0, self._commits - 1)
        if asks and self._settings.responds:
            self._asked = epoch

    def next_reply(self) -> int | None:
        """The epoch of the reply to make now; None for none, also while a turn is to end first."""
        if self._commits:
            return None
        epoch, self._asked = self._asked, None
        return epoch


class _Turn:
    """The sound of a turn, and its place in media time."""

    def __init__(self) -> None:
        self.rate = RATE
        self.samples = 0
        self._pieces: deque[Audio] = deque()

    def add(self, piece: Audio, longest: float) -> int:
        """Take a piece, and drop the first ones while there are more than ``longest`` seconds; samples dropped."""
        self.rate = piece.rate
        self._pieces.append(piece)
        self.samples += piece.duration
        dropped = 0
        while self.samples - dropped > longest * self.rate:
            dropped += self._pieces.popleft().duration
        self.samples -= dropped
        return dropped

    @property
    def span(self) -> tuple[float, float]:
        """Seconds of media."""
        return (self._pieces[0].start_seconds, self._pieces[-1].end_seconds) if self._pieces else (0.0, 0.0)

    def said(self, rate: int, start: int) -> Iterator[Audio]:
        """The sound at ``rate``, from media position ``start`` on, the last piece ``final``."""
        resampler = Resampler(self.rate, rate)
        for piece in self._pieces:
            if len(pcm := resampler.push(piece.samples)):
                yield Audio(samples=pcm, rate=rate, start=start)
                start += len(pcm)
        yield Audio(samples=resampler.flush(), rate=rate, start=start, final=True)


class Captions:
    """What the recogniser has made of the recent past."""

    def __init__(self) -> None:
        self._final: deque[Text] = deque(maxlen=64)
        self._open: Text | None = None

    def add(self, chunk: Chunk) -> None:
        if isinstance(chunk, Event):
            return
        if not isinstance(chunk, Text):
            raise TypeError(f"the input 'text' of parrot does not take {chunk}")
        self._open = None if chunk.final else chunk
        if chunk.final:
            self._final.append(chunk)

    @property
    def open(self) -> bool:
        """Whether the newest caption may still change."""
        return self._open is not None

    def between(self, span: tuple[float, float]) -> str:
        """The words that begin within these seconds of media."""
        start, end = span
        captions = [*self._final, *([self._open] if self._open is not None else [])]
        words = [word for caption in captions for word in caption.words if start <= word.start < end]
        return " ".join(word.text for word in words)
