"""Text as it is spoken (what the recogniser learns) and as it is scored."""

from __future__ import annotations

import re
import unicodedata

_TITLES = {"mr": "mister", "mrs": "missus", "dr": "doctor", "st": "saint"}
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:st|nd|rd|th)?\b")
_YEAR = re.compile(r"1[1-9]\d\d|20[1-9]\d")


def spoken(text: str) -> str:
    """Lower-case words in a-z and apostrophes, numbers spelled out: what a transcript of this recogniser looks like."""
    text = unicodedata.normalize("NFKD", text.replace("\u2019", "'")).encode("ascii", "ignore").decode().lower()
    text = re.sub(r"\$\s?(\d[\d,]*(?:\.\d+)?)", r"\1 dollars", text).replace("&", " and ").replace("%", " percent ")
    if any(character.isdigit() for character in text):
        text = _NUMBER.sub(_spell, text)
    text = re.sub(r"[^a-z' ]", " ", text)
    words = (word.strip("'") for word in text.split())
    return " ".join(_TITLES.get(word, word) for word in words if word)


def scored(text: str) -> str:
    """``spoken`` without apostrophes and with "okay" as "ok": word errors are counted on this."""
    return " ".join("ok" if word == "okay" else word for word in spoken(text).replace("'", "").split())


def _spell(match: re.Match[str]) -> str:
    from num2words import num2words

    digits = match.group().replace(",", "")
    if digits[-1].isalpha():
        words = num2words(int(digits[:-2]), to="ordinal")
    elif _YEAR.fullmatch(match.group()):
        words = num2words(int(digits), to="year")
    else:
        words = num2words(float(digits) if "." in digits else int(digits))
    return f" {words} "
