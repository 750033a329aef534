"""Sentences of a text that arrives in pieces: each as soon as it is certain that it has ended.

A full stop ends a sentence where a space and the start of another follow; not after titles and other abbreviations,
initials, or numbers of a list, nor within decimals. What was cut does not depend on how the text was cut up before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST = 400
CLOSERS = "\"'\u201d\u2019)\\]\u00bb\u300d\u300f\uff09\u3011"
_OPENERS = "\"'\u201c\u2018([\u00ab\u300c\u300e\uff08\u3010*_"
_END = re.compile(
    rf"(?P<wide>[\u3002\uff01\uff1f\uff1b]+)[{CLOSERS}]*|(?P<stops>[.!?\u2026]+)(?P<closers>[{CLOSERS}]*)|\n"
)
_NEXT = re.compile(rf"\s*[{re.escape(_OPENERS)}]*(?P<start>[^\s])?")
_ITEM = re.compile(r"[ \t]*(?:\n|(?:[-*\u2022\u2013]|\d+[.)]|#+)\s)")
_ITEM_PART = re.compile(r"[ \t]*(?:[-*\u2022\u2013]|\d+[.)]?|#+)?\Z")
_LAST_WORD = re.compile(r"[^\s(\[\"'\u201c\u2018]*\Z")
_CLAUSE = re.compile(r"[,;:\uff0c\u3001\uff1a\u2014](?:\s|(?<=[\uff0c\u3001\uff1a\u2014]))")
# Never the last word of a sentence.
_TITLE = re.compile(
    r"m(?:r|rs|s|x|t|aj|me|lle|essrs)|[ds]r|prof|[sf]t|rev|hon|gov|sen|rep|gen|col|sgt|capt|lt|cmdr|pres|vs|figs?|vols?"
    r"|approx|est|dept|govt|e\.g|i\.e|cf|viz|al|jan|feb|mar|apr|ju[nl]|aug|sept?|oct|nov|dec",
    re.IGNORECASE,
)
# So before a number only.
_NUMBERED = re.compile(r"nos?|pp?|ch|sec|art|eq", re.IGNORECASE)
# May be the last word, which shows by a capital letter after it.
_SHORT = re.compile(
    r"etc|inc|ltd|corp?|co|jr|bros|[ap]\.m|u\.[skn](?:\.a)?|d\.c|ph\.d|b\.c|a\.d|ave|blvd|rd|hrs?|mins?", re.IGNORECASE
)


class Sentences:
    """Text in, sentences out, with single spaces inside and none around.

    longest: characters after which a sentence is cut at its last clause, or else word.
    """

    def __init__(self, *, longest: int = LONGEST) -> None:
        if longest < 1:
            raise ValueError(f"longest is {longest}; a sentence has at least one character")
        self._longest = longest
        self._text = ""

    def push(self, text: str) -> list[str]:
        """The sentences that this text completes."""
        self._text += text
        return list(self._cut(final=False))

    def finish(self) -> list[str]:
        """What is left; the next text starts afresh."""
        made = list(self._cut(final=True))
        made += filter(None, [_tidy(self._text)])
        self._text = ""
        return made

    def _cut(self, *, final: bool) -> Iterator[str]:
        while True:
            self._text = self._text.lstrip()
            end, certain = self._end(final)
            if end > self._longest:
                end = self._clause()
            elif not certain:
                return
            said, self._text = self._text[:end], self._text[end:]
            if said := _tidy(said):
                yield said

    def _end(self, final: bool) -> tuple[int, bool]:
        """Where the first sentence ends, and True; or how far it is certain that none does, and False."""
        for match in _END.finditer(self._text):
            ends = self._ends(match, final)
            if ends is None:
                return match.start(), False
            if ends:
                return match.end(), True
        return len(self._text), False

    def _ends(self, match: re.Match[str], final: bool) -> bool | None:
        """Whether this is the end of a sentence; None where more text is needed to tell."""
        text, end = self._text, match.end()
        if match.group() == "\n":
            if _ITEM_PART.match(text, end) and not final:
                return None
            return _ITEM.match(text, end) is not None
        if end == len(text):
            return None if not final else False
        if match["wide"]:
            return True
        if not text[end].isspace():
            return False
        following = _NEXT.match(text, end)
        assert following is not None
        start = following["start"]
        if start is None:
            return None if not final else False
        if "\n" in text[end : following.start("start")]:
            return True
        if match["closers"] and start.islower():
            return False
        if match["stops"] == ".":
            return self._stops(text[: match.start()], start)
        return not start.islower() or not set(match["stops"]) <= {".", "\u2026"}

    @staticmethod
    def _stops(before: str, start: str) -> bool:
        """Whether one full stop after this text, with a word from this letter on behind it, ends a sentence."""
        found = _LAST_WORD.search(before)
        word = found.group() if found else ""
        if _TITLE.fullmatch(word) or (len(word) == 1 and word.isupper() and word != "I"):
            return False
        if start.isdigit() and (_NUMBERED.fullmatch(word) or _SHORT.fullmatch(word)):
            return False
        if _SHORT.fullmatch(word):
            return not start.islower()
        if word.isdigit() and before.strip() == word:  # the number of a list's item
            return False
        return not start.islower() or (len(word) > 3 and word.isalpha() and word.islower())

    def _clause(self) -> int:
        part = self._text[: self._longest]
        clauses = [match.end() for match in _CLAUSE.finditer(part)]
        return clauses[-1] if clauses else part.rfind(" ") + 1 or len(part)


def ended(text: str) -> bool:
    """Whether a sentence ends with this text, if what follows begins like one."""
    sentences = Sentences()
    sentences.push(f"{text.rstrip()} Next")
    return sentences.finish() == ["Next"]


def _tidy(text: str) -> str:
    return " ".join(text.split())
