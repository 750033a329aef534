"""Turn taking: from the probability of speech in each window of sound to events of speech and of turns.

``TurnTaker`` is the logic alone: no sound, no clock, no model; ``stages/turns.py`` drives it. Speech begins where the
probability passes ``threshold`` and ends where it falls ``HYSTERESIS`` below (the rule of Silero's ``VADIterator``). A
turn spans pauses; when it ends depends on the mode:

- ``vad``: after ``silence_ms`` without speech.
- ``semantic``: after a wait between the eagerness's shortest and longest: ``short * (long / short) ** (1 - p)``, where
  p is how probable it is that the speaker has finished, by a turn model or the recogniser's end of utterance.
- ``manual``: when told to.

All positions are media time in samples at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from .chunk import Event
from .graph import did_you_mean

RATE = 16000
WINDOW = 512  # samples for each probability: 32 ms

HYSTERESIS = 0.15
ONSET = 2 * WINDOW  # speech that counts as such while nothing is being played
STOP_MS = 192  # silence that ends a stretch of speech, within a turn or at its end
CLOSED = 0.9  # how probable it is that the speaker has finished once the recogniser has closed the utterance
UNKNOWN = 0.5  # and when nothing is known
WAITS_MS = {"low": (600, 8000), "medium": (300, 4000), "high": (200, 2000), "auto": (300, 4000)}

Mode = Literal["vad", "semantic", "manual"]
Eagerness = Literal["low", "medium", "high", "auto"]
Reason = Literal["silence", "eou", "smart_turn", "manual", "idle"]


@dataclass(frozen=True, slots=True)
class TurnSettings:
    """How turns are taken. Raises ValueError for a value that cannot be.

    threshold: probability of speech, above 0 and below 1. prefix_ms: sound kept from before the onset of speech.
    silence_ms: what ends a turn in mode ``vad``. idle_ms: silence of both sides after which a turn is given up to the
    other (None: never). eagerness: in mode ``semantic``. interrupt: whether speech ends a reply that is being played;
    min_speech_ms: how much of it, so that a cough or "mhm" does not. respond: whether an ended turn asks for a reply
    by itself (None: except in mode ``manual``).
    """

    mode: Mode = "vad"
    threshold: float = 0.5
    prefix_ms: int = 300
    silence_ms: int = 500
    idle_ms: int | None = None
    eagerness: Eagerness = "auto"
    interrupt: bool = True
    min_speech_ms: int = 160
    respond: bool | None = None

    def __post_init__(self) -> None:
        for name, known in (("mode", get_args(Mode)), ("eagerness", get_args(Eagerness))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(known)}")
        if not _is_number(self.threshold) or not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold!r}: a probability above 0 and below 1")
        for name, least, most in _MILLISECONDS:
            value = getattr(self, name)
            if value is None and name == "idle_ms":
                continue
            if not _is_number(value) or not least <= value <= most:
                raise ValueError(f"{name}={value!r}: milliseconds, {least} to {most}")
        if not isinstance(self.interrupt, bool) or not isinstance(self.respond, bool | None):
            raise ValueError(f"interrupt={self.interrupt!r}, respond={self.respond!r}: true or false")

    @property
    def responds(self) -> bool:
        """Whether an ended turn asks for a reply."""
        return self.mode != "manual" if self.respond is None else self.respond

    def changed(self, data: Mapping[str, Any]) -> TurnSettings:
        """These settings with some replaced. Raises ValueError for an unknown name or a value that cannot be."""
        known = [field.name for field in fields(self)]
        for name in data:
            if name not in known:
                raise ValueError(f"no turn setting {name!r}{did_you_mean(str(name), known)}")
        return replace(self, **data)


_MILLISECONDS = (
    ("prefix_ms", 0, 3000),
    ("silence_ms", 32, 20000),
    ("idle_ms", 100, 3600000),
    ("min_speech_ms", 0, 3000),
)


class TurnTaker:
    """The turns of one session. Every call returns the events that follow from it.

    speaking: between ``speech_start`` and ``speech_stop``. open: between a turn's first ``speech_start`` and its
    ``turn_end``. start: onset of the stretch of speech that is, or was last. finished: how probable a turn model holds
    it that the speaker has finished; None when it was not asked since the last speech.
    """

    def __init__(self, settings: TurnSettings) -> None:
        self.settings = settings
        self.speaking = False
        self.open = False
        self.start = 0
        self.finished: float | None = None
        self._onset: int | None = None  # of what may become speech
        self._voiced = 0  # end of the last window that was speech
        self._word = 0  # end of the last word that the recogniser has heard
        self._closed = False  # and it has closed the utterance
        self._quiet: int | None = None  # since when neither side has said anything; None before the first window
        self._asked = False  # by ``idle``, and nothing was said since

    def window(self, probability: float, at: int, *, playing: bool = False) -> list[Event]:
        """The window that ends at ``at``. playing: a reply is under way to the listener."""
        threshold = self.settings.threshold
        voiced = probability >= max(threshold - HYSTERESIS, 0.01)
        events: list[Event] = []
        if self.speaking:
            if voiced:
                self._voiced = at
            elif at - self._voiced >= self._stop:
                self.speaking = False
                events.append(_event("speech_stop", self._voiced))
        else:
            if not voiced:
                self._onset = None
            elif self._onset is None and probability >= threshold:
                self._onset = at - WINDOW
            if self._onset is not None and at - self._onset >= (self._enough if playing else ONSET):
                self._begin(self._onset, at)
                events.append(_event("speech_start", self.start))
        if self.open and not self.speaking and self._onset is None:
            wait, reason = self._wait()
            if at - self._end >= wait:
                events += self._close(reason, at)
        return events + self._idle(at, playing)

    def text(self, end: int, *, final: bool) -> None:
        """The recogniser's caption reaches to ``end``. final: it has closed the utterance."""
        self._word = max(self._word, end)
        self._closed = final and end > self.start

    def commit(self, at: int) -> list[Event]:
        """End the turn at ``at``, whether anything was said or not."""
        return [*self._hush(), *self._close("manual", at)]

    def clear(self) -> list[Event]:
        """Forget the open turn."""
        events = self._hush()
        self._forget()
        return events

    def finish(self, at: int) -> list[Event]:
        """The sound has ended at ``at``: an open turn ends."""
        return [*self._hush(), *self._close("silence", at)] if self.open else []

    @property
    def interrupts(self) -> bool:
        """Whether what is being said is more than a cough, so that a reply should stop for it."""
        return self.speaking and self.settings.interrupt and self._voiced - self.start >= self._enough

    @property
    def longest_onset(self) -> int:
        """How long after its onset speech may be found to have begun."""
        return self._enough + WINDOW

    @property
    def _enough(self) -> int:
        return max(ONSET, self.settings.min_speech_ms * RATE // 1000)

    @property
    def _stop(self) -> int:
        silence = self.settings.silence_ms if self.settings.mode == "vad" else STOP_MS
        return min(STOP_MS, silence) * RATE // 1000

    @property
    def _end(self) -> int:
        """Where what was said ended: in mode ``semantic`` also words count that the voice detector took for silence."""
        return max(self._voiced, self._word) if self.settings.mode == "semantic" else self._voiced

    def _wait(self) -> tuple[float, Reason]:
        """Samples of silence that end the turn, and what it will be called."""
        settings = self.settings
        if settings.mode != "semantic":
            return settings.silence_ms * RATE / 1000, "silence"
        finished, reason = UNKNOWN, "silence"
        if self._closed:
            finished, reason = CLOSED, "eou"
        if self.finished is not None and (self.finished > finished or not self._closed):
            finished, reason = self.finished, "smart_turn" if self.finished >= UNKNOWN else "silence"
        short, long = WAITS_MS[settings.eagerness]
        return short * (long / short) ** (1 - finished) * RATE / 1000, reason  # type: ignore[return-value]

    def _begin(self, onset: int, at: int) -> None:
        self.speaking = self.open = True
        self.start, self._voiced, self._onset = onset, at, None
        self.finished, self._closed = None, False

    def _hush(self) -> list[Event]:
        """End the stretch of speech here."""
        spoke, self.speaking, self._onset = self.speaking, False, None
        return [_event("speech_stop", self._voiced)] if spoke else []

    def _close(self, reason: Reason, at: int) -> list[Event]:
        end = self._voiced if self.open else at
        self._forget()
        self._quiet, self._asked = at, False
        return [_event("turn_end", end, reason=reason, waited_ms=round((at - end) * 1000 / RATE))]

    def _forget(self) -> None:
        self.open, self.finished, self._closed, self._onset = False, None, False, None

    def _idle(self, at: int, playing: bool) -> list[Event]:
        if self._quiet is None:
            self._quiet = at - WINDOW
        if self.open or playing:
            self._quiet, self._asked = at, False
        idle = self.settings.idle_ms
        waited = round((at - self._quiet) * 1000 / RATE)
        if idle is None or self._asked or self._onset is not None or waited < idle:
            return []
        self._asked = True
        return [_event("turn_end", at, reason="idle", waited_ms=waited)]


def _event(name: str, at: int, **data: Any) -> Event:
    return Event(name=name, data=data, rate=RATE, start=at)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
