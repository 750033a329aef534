"""Words of a text that arrives in pieces, as they are said: each as soon as nothing that may still come changes it.

What is written with spaces may be said as one, so a number waits for what may belong to it ("5" for "km", "March 3,"
for "2024", "$" for "3.50"), and so does a word that is said differently before a number ("No.") or at a sentence's end
("p.m."). What comes out does not depend on how the text was cut up before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .sentences import CLOSERS, ended
from .spoken import MONTHS, SIGN, WIDE, spoken

LONGEST = 12  # words that wait for one another; characters of a script without spaces that come as one
_BEFORE = 80  # characters that tell whether a sentence ends
_STOPS, _WIDE_STOPS, _PAUSES = ".!?\u2026", "\u3002\uff01\uff1f", "\u3001\uff0c\uff1a\uff1b"
_CUT = re.compile(
    rf"[{_WIDE_STOPS}{_PAUSES}]+[{CLOSERS}]*(?=[^{_WIDE_STOPS}{_PAUSES}{CLOSERS}])|{WIDE}{{{LONGEST}}}|(?P<space>\s)"
)
_STOP = re.compile(rf"[{_STOPS}{_WIDE_STOPS};:][{CLOSERS}]*\Z")
_LINE = re.compile(r"[^\S\n]*(?:\n|(?=\S))")
# Said differently before a number, or where no sentence ends.
_OPEN = re.compile(rf"\W*(?:{SIGN}|(?:{MONTHS})[.,]?|no\.|in|since|year|etc\.)", re.IGNORECASE)
_BEHIND_A_NUMBER = re.compile(r"[-\u2013]|of|[ap]\.?m\.", re.IGNORECASE)


@dataclass(frozen=True)
class Arrived:
    """Words that are certain. written: with the space behind them. said: empty where nothing is to be said.

    ends: a sentence ends with them. line: and so does the line.
    """

    written: str
    said: str
    ends: bool
    line: bool


class Arriving:
    """Text in, words out. language: as of ``spoken``."""

    def __init__(self, language: str = "en") -> None:
        self._language = language
        self._text = ""
        self._held: list[str] = []
        self._before = ""

    def push(self, text: str) -> Iterator[Arrived]:
        """The words that this text makes certain."""
        self._text += text
        while word := self._word():
            self._held.append(word)
            if not self._open():
                yield self._take()

    def finish(self) -> Iterator[Arrived]:
        """What is left; the next text starts afresh."""
        self._held += filter(None, [self._text.strip()])
        if self._held:
            yield self._take()
        self._text = self._before = ""

    def _word(self) -> str:
        """The next word and the space behind it; empty while it may still grow."""
        text = self._text = self._text.lstrip()
        if (found := _CUT.search(text)) is None:
            return ""
        end = found.end()
        if found["space"] and _STOP.search(text, 0, found.start()):
            # It counts whether a line ends too.
            if (space := _LINE.match(text, found.start())) is None:
                return ""
            end = space.end()
        self._text = text[end:]
        return text[:end]

    def _open(self) -> bool:
        """Whether the next word may change how those held are said."""
        word, held = self._held[-1].strip(), "".join(self._held)
        if len(self._held) == LONGEST or (held.endswith("\n") and _STOP.search(word)):
            return False
        if held.count("[") > held.count("]"):  # of a link
            return True
        if len(self._held) > 1 and _BEHIND_A_NUMBER.fullmatch(word):
            return True
        if any(character.isdigit() for character in word):
            return _STOP.search(word) is None
        return _OPEN.fullmatch(word) is not None

    def _take(self) -> Arrived:
        written, self._held = "".join(self._held), []
        self._before = (self._before + written)[-_BEFORE:]
        ends = _STOP.search(written.rstrip()) is not None and ended(self._before)
        # Numbers among Han stay as they are, with spaces around them too.
        language = "zh" if re.search(WIDE, self._before) else self._language
        return Arrived(written, spoken(written, language), ends, ends and written.endswith("\n"))
