"""Turn taking as a stage: sound in; events of speech and turns, and the sound of each turn, out."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...codecs.resample import Resampler
from ..chunk import Audio, Chunk, Event, Text
from ..stage import Context, Input, Stage, select, stage
from ..turn_taking import RATE, WINDOW, Eagerness, Mode, TurnSettings, TurnTaker

Samples = NDArray[np.float32]
Out = tuple[str, Chunk]

_NOTHING: Samples = np.zeros(0, np.float32)


@stage(outputs=("events", "turn"), optional=("text", "control", "turn"), lasting=True)
class Turns(Stage):
    """Finds where a speaker begins, pauses, and has finished; interrupts the reply when speech begins during one.

    Inputs: ``audio`` of any rate; optionally ``text``, a recogniser's captions and pauses (what mode ``semantic`` goes
    by), and ``control``, events: ``turns`` (changed settings), ``commit`` (end the turn now), ``clear`` (forget it),
    each acted on when the sound from before it has been heard. Settings that cannot be are answered by an event
    ``error``.

    Outputs: ``events``: ``speech_start``, ``speech_stop``, ``turn_end`` (data: ``reason``, ``waited_ms``); and
    optionally ``turn``, the turn's sound at 16 kHz as it comes, from ``prefix_ms`` before its onset: ``final`` at its
    end (with no samples where all had gone before), an event ``clear`` where the turn was forgotten. A stage that takes
    it and is itself held up by playing needs a ``Link`` that holds a turn, unless speech interrupts.

    model: the voice detector's name in the engine (``SileroVAD``). smart_turn: a turn model's (``SmartTurn``), for mode
    ``semantic``. The others: ``TurnSettings``.
    """

    name = "turns"

    def __init__(
        self,
        *,
        model: str = "vad",
        smart_turn: str | None = None,
        mode: Mode = "vad",
        threshold: float = 0.5,
        prefix_ms: int = 300,
        silence_ms: int = 500,
        idle_ms: int | None = None,
        eagerness: Eagerness = "auto",
        interrupt: bool = True,
        min_speech_ms: int = 160,
    ) -> None:
        self.model, self.smart_turn = model, smart_turn
        self.settings = TurnSettings(
            mode, threshold, prefix_ms, silence_ms, idle_ms, eagerness, interrupt, min_speech_ms
        )  # fmt: skip

    async def run(self, ctx: Context, audio: Input, text: Input, control: Input) -> AsyncIterator[Out]:
        """See the class."""
        voice = await ctx.open(self.model)
        judge = None if self.smart_turn is None else await ctx.open(self.smart_turn)
        taker, windows, kept = TurnTaker(self.settings), _Windows(), _Kept()
        waiting: deque[Event] = deque()  # control events from after sound that is still on its way
        while ready := await select(control, text, audio):
            chunk = ready.get_nowait()
            if ready is control and isinstance(chunk, Event):
                waiting.append(chunk)
            elif ready is text and isinstance(chunk, Text | Event):
                if isinstance(chunk, Text) or chunk.name == "pause":
                    taker.text(round(chunk.end_seconds * RATE), final=chunk.final or isinstance(chunk, Event))
            elif ready is audio and isinstance(chunk, Audio):
                for window in windows.push(chunk):
                    if taker.settings.mode == "manual":
                        yield "turn", window.audio()
                        continue
                    speech = float((await voice.step({"pcm": window.pcm}))["speech"])
                    for out in _heard(window, speech, ctx, taker, kept):
                        yield out
                    if judge is not None and taker.open and not taker.speaking and taker.finished is None:
                        taker.finished = float((await judge.step({"pcm": kept.recent()}))["finished"])
            elif chunk is not None:
                raise TypeError(f"the input {ready.name!r} of turns does not take {chunk}")
            while waiting and (audio.ended or waiting[0].start_seconds <= windows.heard_seconds):
                for out in _told(waiting.popleft(), taker, windows, kept):
                    yield out
        for event in taker.finish(windows.at):
            yield "events", event
            if event.name == "turn_end":
                yield "turn", windows.rest().audio(final=True)


def _heard(window: _Window, speech: float, ctx: Context, taker: TurnTaker, kept: _Kept) -> Iterator[Out]:
    """What one window of sound brings about."""
    was_open = taker.open
    events = taker.window(speech, window.end, playing=ctx.playing)
    if taker.interrupts and ctx.playing:
        ctx.interrupt()
    for event in events:
        yield "events", event
    kept.add(window)
    ended = any(event.name == "turn_end" for event in events)
    if taker.open and not was_open:
        for piece in kept.since(taker.start - taker.settings.prefix_ms * RATE // 1000):
            yield "turn", piece.audio()
    elif was_open:
        yield "turn", window.audio(final=ended)
    elif ended:  # idle
        yield "turn", _Window(_NOTHING, window.end).audio(final=True)
    if ended:
        kept.trim(window.end)
    elif not taker.open:
        kept.trim(window.end - taker.longest_onset - taker.settings.prefix_ms * RATE // 1000)


def _told(event: Event, taker: TurnTaker, windows: _Windows, kept: _Kept) -> Iterator[Out]:
    """What a control event brings about; those for other stages bring nothing."""
    manual = taker.settings.mode == "manual"
    if event.name == "commit":
        rest = windows.rest() if manual else _Window(_NOTHING, windows.at)
        if not manual and not taker.open:
            yield from (("turn", piece.audio()) for piece in kept.since(0))
        kept.trim(windows.at)
        yield from (("events", one) for one in taker.commit(windows.at))
        yield "turn", rest.audio(final=True)
    elif event.name == "turns":
        try:
            settings = taker.settings.changed(event.data)
        except ValueError as error:
            yield "events", Event(name="error", data={"message": str(error)}, rate=RATE, start=windows.at)
            return
        if (settings.mode == "manual") != manual:
            yield from _forgotten(taker, windows, kept)
        taker.settings = settings
    elif event.name == "clear":
        yield from _forgotten(taker, windows, kept)


def _forgotten(taker: TurnTaker, windows: _Windows, kept: _Kept) -> Iterator[Out]:
    begun = taker.open or taker.settings.mode == "manual"
    yield from (("events", one) for one in taker.clear())
    windows.rest()
    kept.trim(windows.at)
    if begun:
        yield "turn", Event(name="clear", rate=RATE, start=windows.at)


@dataclass(frozen=True, slots=True)
class _Window:
    """Samples at 16 kHz, and the media position of their end."""

    pcm: Samples
    end: int

    def audio(self, *, final: bool = False) -> Audio:
        return Audio(samples=self.pcm, rate=RATE, start=self.end - len(self.pcm), final=final)


class _Windows:
    """Cuts sound of any rate into windows with media positions; a gap in the sound moves the positions on.

    at: the media position that the sound taken so far reaches to, at 16 kHz.
    """

    def __init__(self) -> None:
        self.at = 0
        self._resampler: Resampler | None = None
        self._expected = 0  # where the next chunk should start, at its own rate
        self._pending = _NOTHING

    @property
    def heard_seconds(self) -> float:
        """Media time that the sound taken reaches to, with what the resampler still holds."""
        return 0.0 if self._resampler is None else self._expected / self._resampler.source_rate

    def push(self, chunk: Audio) -> Iterator[_Window]:
        """The windows that the chunk completes."""
        if self._resampler is None:
            self._resampler, self._expected = Resampler(chunk.rate, RATE), chunk.start
            self.at = round(chunk.start_seconds * RATE)
        elif chunk.rate != self._resampler.source_rate:
            raise ValueError(f"audio at {self._resampler.source_rate} Hz went on at {chunk.rate} Hz; resample it first")
        self.at += round((chunk.start - self._expected) * RATE / chunk.rate)
        self._expected = chunk.end
        pcm = self._resampler.push(chunk.samples)
        self.at += len(pcm)
        self._pending = np.concatenate((self._pending, pcm))
        while len(self._pending) >= WINDOW:
            pcm, self._pending = self._pending[:WINDOW], self._pending[WINDOW:]
            yield _Window(pcm, self.at - len(self._pending))

    def rest(self) -> _Window:
        """Take out what does not fill a window."""
        rest, self._pending = self._pending, _NOTHING
        return _Window(rest, self.at)


class _Kept:
    """Windows of the recent past: from before the onset of speech, and of the open turn for a turn model."""

    _MOST = 8 * RATE // WINDOW  # what a turn model hears

    def __init__(self) -> None:
        self._windows: deque[_Window] = deque(maxlen=self._MOST)

    def add(self, window: _Window) -> None:
        self._windows.append(window)

    def trim(self, before: int) -> None:
        """Drop what ended before."""
        while self._windows and self._windows[0].end <= before:
            self._windows.popleft()

    def since(self, start: int) -> list[_Window]:
        """The windows that reach beyond ``start``."""
        return [window for window in self._windows if window.end > start]

    def recent(self) -> Samples:
        """The last 8 s, silence before them where there is less."""
        heard = np.concatenate([window.pcm for window in self._windows])
        return np.concatenate((np.zeros(self._MOST * WINDOW - len(heard), np.float32), heard))
