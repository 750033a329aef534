"""Prompts to be spoken: sentences picked from plain text files, written so that they read as they sound.

A prompt is both what a synthesiser says and the transcript, so anything that could be read in two ways is either
spelled out (whole numbers, years, ordinals, prices, percentages) or rejected (decimals, times, fractions,
abbreviations, symbols).
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from num2words import num2words

MIN_WORDS, MAX_WORDS = 3, 25

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(]*[A-Z])|\n+")
_ASIDE = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
_NUMBER = re.compile(
    r"(?<![\w.,:/-])(\$?)(\d{1,3}(?:,\d{3})+|\d+)(st|nd|rd|th|%|)(?![\w%]|[.,:/-]\d)"
    r"( (?:hundred|thousand|[mbtr]+illion)\b)?"
)
_TITLES = {"Mr.": "Mister", "Mrs.": "Missus", "Dr.": "Doctor"}
_PLAIN = {
    "\u2018": "'",  # single quotation marks
    "\u2019": "'",
    "`": "'",
    "\u201c": '"',  # double quotation marks
    "\u201d": '"',
    "\u2013": ", ",  # dashes
    "\u2014": ", ",
    "--": ", ",
    " - ": ", ",
    "\u2026": ".",  # ellipsis
    "&": " and ",
}
_ALLOWED = re.compile(r"[A-Za-z' ,.?!;:-]+")
_ABBREVIATION = re.compile(r"\b(?:[A-Za-z]\.){2}|\b[A-Z]{2,}\b|\b(?:St|No|vs|etc|Gov|Sen|Gen|Rep|Hon|Prof|Jr|Sr|Mt)\.")
_WORD = re.compile(r"[A-Za-z]+'?[A-Za-z]*")


@dataclass(frozen=True)
class Prompt:
    """One sentence to speak, and the text file (without suffix) it came from."""

    text: str
    source: str


def spell_numbers(text: str) -> str:
    """Whole numbers, years, ordinals, dollar amounts and percentages as words; other digits stay as they are."""

    def words(match: re.Match[str]) -> str:
        dollar, digits, suffix, scale = match.groups(default="")
        value = int(digits.replace(",", ""))
        if suffix in ("st", "nd", "rd", "th"):
            spelled = num2words(value, to="ordinal")
        elif not (dollar or suffix or scale) and re.fullmatch(r"1[1-9]\d\d|20[1-9]\d", digits):
            spelled = num2words(value, to="year")
        else:
            spelled = num2words(value)
        unit = " percent" if suffix == "%" else ""
        if dollar:
            unit = " dollar" if value == 1 and not scale else " dollars"
        return str(spelled).replace("-", " ").replace(",", "") + scale + unit

    return _NUMBER.sub(words, text)


def clean(sentence: str) -> str | None:
    """The sentence as it will be spoken, or None when it cannot be read in just one way or has an unfit length."""
    text = unicodedata.normalize("NFKC", sentence)
    for mark, plain in _PLAIN.items():
        text = text.replace(mark, plain)
    for title, spoken in _TITLES.items():
        text = text.replace(title, spoken)
    text = spell_numbers(_ASIDE.sub(" ", text).replace('"', ""))
    text = re.sub(r"\s+([,.?!;:])", r"\1", " ".join(text.split())).strip(" ,;:-")
    if not _ALLOWED.fullmatch(text) or _ABBREVIATION.search(text):
        return None
    if not MIN_WORDS <= len(_WORD.findall(text)) <= MAX_WORDS:
        return None
    return text if text[-1] in ".?!" else text + "."


def sentences(path: Path) -> Iterator[str]:
    """The speakable sentences of a text file, in order."""
    for part in _SENTENCE_END.split(path.read_text(encoding="utf-8")):
        if (text := clean(part)) is not None:
            yield text


def build_prompts(paths: Sequence[Path], *, seed: int, exclude: Iterable[str] = ()) -> list[Prompt]:
    """All distinct prompts of the files, shuffled so that every stretch of the list mixes the sources.

    A source's share goes with the square root of its size at the start of the list; towards the end the small sources
    run out. exclude: sentences that must not be spoken (a held-out corpus), compared by their words alone.
    """
    seen = {_key(text) for text in exclude}
    sources: dict[str, list[str]] = {}
    for path in paths:
        kept = sources.setdefault(path.stem, [])
        for text in sentences(path):
            if (key := _key(text)) not in seen:
                seen.add(key)
                kept.append(text)
    rng = random.Random(f"prompts {seed}")
    placed: list[tuple[float, Prompt]] = []
    for source in sorted(sources):
        texts = sources[source]
        rng.shuffle(texts)
        step = len(texts) ** -0.5 if texts else 0.0
        placed += [((index + rng.random()) * step, Prompt(text, source)) for index, text in enumerate(texts)]
    placed.sort(key=lambda item: item[0])
    return [prompt for _, prompt in placed]


def shares(prompts: Iterable[Prompt]) -> Counter[str]:
    """Prompts per source."""
    return Counter(prompt.source for prompt in prompts)


def _key(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower().replace("'", "")))
