"""Captions as text, SubRip (.srt), WebVTT (.vtt) or JSON, written as they come.

Cues keep to what subtitling guides ask for: at most two lines of about 42 characters, at most seven seconds, broken
after punctuation or a pause where there is one, shown long enough to be read and never over the next cue.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from ..pipelines.captions import Caption
from ..pipelines.chunk import Word

LINE = 42  # characters
LINES = 2
LONGEST = 7.0  # seconds
SHORTEST = 1.0
PAUSE = 0.8  # seconds between words that part two cues
SENTENCE_END = (".", "?", "!", "…")


@dataclass(frozen=True, slots=True)
class Cue:
    """Lines shown from ``start`` to ``end``, in seconds."""

    start: float
    end: float
    lines: tuple[str, ...]


def cues(words: Sequence[Word]) -> Iterator[Cue]:
    """One caption's words as cues, in order."""
    held: list[Word] = []
    for word in words:
        if held and _parts(held, word):
            yield _cue(held)
            held = []
        held.append(word)
    if held:
        yield _cue(held)


def _parts(held: list[Word], word: Word) -> bool:
    """Whether ``word`` starts a new cue after ``held``."""
    texts = [one.text for one in held]
    if word.start - held[-1].end >= PAUSE or word.end - held[0].start > LONGEST:
        return True
    if held[-1].text.endswith(SENTENCE_END) and len(" ".join(texts)) >= LINE / 2:
        return True
    return len(_wrap([*texts, word.text])) > LINES


def _cue(words: list[Word]) -> Cue:
    return Cue(words[0].start, words[-1].end, tuple(_balance([word.text for word in words])))


def _wrap(texts: list[str]) -> list[str]:
    """Lines filled one after the other; a word longer than a line stands alone."""
    lines: list[str] = []
    for text in texts:
        if lines and len(lines[-1]) + 1 + len(text) <= LINE:
            lines[-1] += " " + text
        else:
            lines.append(text)
    return lines


def _balance(texts: list[str]) -> list[str]:
    """One line where it fits, else two of the most even length."""
    lines = _wrap(texts)
    if len(lines) < 2:
        return lines
    breaks = [(" ".join(texts[:at]), " ".join(texts[at:])) for at in range(1, len(texts))]
    upper, lower = min(breaks, key=lambda two: (max(len(two[0]), len(two[1])), len(two[0]) > len(two[1])))
    return [upper, lower]


class Subtitles(ABC):
    """Writes one recording's captions to ``out``.

    Give it final captions in order, then close it; ``out`` stays open.
    """

    suffix: str

    def __init__(self, out: TextIO) -> None:
        self._out = out

    @abstractmethod
    def add(self, caption: Caption) -> None:
        """Take the next final caption."""

    @abstractmethod
    def close(self, name: str, seconds: float) -> None:
        """Write what is left. name: of the recording; seconds: its length."""


class PlainText(Subtitles):
    """A line a caption."""

    suffix = ".txt"

    def add(self, caption: Caption) -> None:
        """See the base class."""
        self._out.write(caption.text + "\n")
        self._out.flush()

    def close(self, name: str, seconds: float) -> None:
        """See the base class."""


class _Cues(Subtitles):
    """Holds one cue back, so that it can be shown until it was read or the next one starts."""

    def __init__(self, out: TextIO) -> None:
        super().__init__(out)
        self._held: Cue | None = None
        self._number = 0

    def add(self, caption: Caption) -> None:
        """See the base class."""
        for cue in cues(caption.words):
            self._show(until=cue.start)
            self._held = cue
        self._out.flush()

    def close(self, name: str, seconds: float) -> None:
        """See the base class."""
        self._show(until=max(seconds, self._held.end) if self._held else seconds)
        self._held = None

    def _show(self, until: float) -> None:
        if self._held is not None:
            start, end = self._held.start, self._held.end
            self._number += 1
            self._out.write(self._render(start, min(max(end, start + SHORTEST), max(until, start)), self._held.lines))

    @abstractmethod
    def _render(self, start: float, end: float, lines: Iterable[str]) -> str: ...


class SubRip(_Cues):
    """Numbered cues, comma before the milliseconds."""

    suffix = ".srt"

    def _render(self, start: float, end: float, lines: Iterable[str]) -> str:
        text = "\n".join(lines)
        return f"{self._number}\n{timestamp(start, ',')} --> {timestamp(end, ',')}\n{text}\n\n"


class WebVTT(_Cues):
    """W3C WebVTT: a header, then cues with markup characters escaped."""

    suffix = ".vtt"

    def __init__(self, out: TextIO) -> None:
        super().__init__(out)
        out.write("WEBVTT\n\n")

    def _render(self, start: float, end: float, lines: Iterable[str]) -> str:
        text = "\n".join(lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return f"{timestamp(start, '.')} --> {timestamp(end, '.')}\n{text}\n\n"


class Json(Subtitles):
    """One object on one line: the recording, its seconds, and captions with word times."""

    suffix = ".json"

    def __init__(self, out: TextIO) -> None:
        super().__init__(out)
        self._captions: list[dict[str, object]] = []

    def add(self, caption: Caption) -> None:
        """See the base class."""
        words = [{"text": word.text, "start": word.start, "end": word.end} for word in caption.words]
        times = {"start": round(caption.start, 3), "end": round(caption.end, 3)}
        self._captions.append({"text": caption.text, **times, "words": words})

    def close(self, name: str, seconds: float) -> None:
        """See the base class."""
        recording = {"audio": name, "seconds": round(seconds, 3), "captions": self._captions}
        self._out.write(json.dumps(recording, ensure_ascii=False) + "\n")
        self._out.flush()


FORMATS: dict[str, type[Subtitles]] = {"text": PlainText, "srt": SubRip, "vtt": WebVTT, "json": Json}


def timestamp(seconds: float, point: str) -> str:
    """``hours:minutes:seconds`` with ``point`` before the milliseconds."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"
