"""Text as it is said: numbers, amounts, dates, times, units and symbols as words, and no mark-up.

English is written out in full. Of other languages that num2words knows, plain numbers and percentages are; what is not
known stays as it was, for the model to read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from num2words import num2words

Match = re.Match[str]

_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_UNITS = {
    "km/h": "kilometer per hour", "mph": "mile per hour", "m/s": "meter per second", "km": "kilometer",
    "cm": "centimeter", "mm": "millimeter", "kg": "kilogram", "mg": "milligram", "lbs": "pound", "lb": "pound",
    "oz": "ounce", "ml": "milliliter", "kHz": "kilohertz", "MHz": "megahertz", "GHz": "gigahertz", "Hz": "hertz",
    "kWh": "kilowatt hour", "kW": "kilowatt", "KB": "kilobyte", "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte",
    "ms": "millisecond", "\u00b0C": "degree Celsius", "\u00b0F": "degree Fahrenheit", "\u00b0": "degree",
}  # fmt: skip
_SHORT = {
    "Mr.": "Mister", "Mrs.": "Missus", "Dr.": "Doctor", "Prof.": "Professor", "vs.": "versus", "etc.": "et cetera",
    "e.g.": "for example", "i.e.": "that is", "approx.": "approximately", "Jr.": "Junior", "Sr.": "Senior",
}  # fmt: skip
_SYMBOLS = {"&": "and", "@": "at", "=": "equals", "+": "plus", "\u00d7": "times", "\u00b1": "plus or minus"}
_MONEY = {  # a whole, many of it, and the hundredths
    "$": ("dollar", "dollars", "cent", "cents"),
    "\u20ac": ("euro", "euros", "cent", "cents"),
    "\u00a3": ("pound", "pounds", "penny", "pence"),
    "\u00a5": ("yen", "yen", "sen", "sen"),
}
_SCALES = {"k": "thousand", "m": "million", "bn": "billion", "tn": "trillion"}
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"

_LINK = re.compile(r"!?\[([^\]]*)\]\([^)\s]*\)")
_ADDRESS = re.compile(r"https?://(?:www\.)?([\w.-]*\w)[^\s.,;:!?)]*")
_MARKUP = re.compile(
    r"^[ \t]*(?:#{1,6}|[-*\u2022]|>)[ \t]+|```\w*|`|\*\*|(?<!\w)[*_]+(?=\w)|(?<=[\w.!?,])[*_]+(?!\w)", re.MULTILINE
)
_PLAIN = str.maketrans({"\u2019": "'", "\u2018": "'", "\u2011": "-", "\u2212": "-", "\u00a0": " ", "\u202f": " "})
_KEPT = "\n\t\u00b0"
WIDE = "[\u3040-\u30ff\u3400-\u9fff]"
"""A letter of a script without spaces: kana or Han."""
_WIDE = re.compile(WIDE)


def spoken(text: str, language: str = "en") -> str:
    """The text as words. language: as num2words names it ("en", "de", "pt_BR"); others keep their numbers, and so do
    Chinese and Japanese.

    What looks like a model's special token (``[laughter]``, ``<strong>``) stays.
    """
    text = unicodedata.normalize("NFC", text).translate(_PLAIN)
    text = _MARKUP.sub("", _ADDRESS.sub(r"\1", _LINK.sub(r"\1", text)))
    text = "".join(mark for mark in text if mark in _KEPT or unicodedata.category(mark) not in ("So", "Cf", "Cc"))
    if not language.startswith("en"):
        text = _elsewhere(text, language)
    elif _WIDE.search(text) is None:
        for pattern, say in _ENGLISH:
            text = pattern.sub(say, text)
    return re.sub(r"[ \t]+", " ", text).strip()


def _words(digits: str) -> str:
    digits = digits.replace(",", "")
    if digits.isdigit() and digits[0] == "0" and len(digits) > 1:
        return _each(digits)
    whole, point, fraction = digits.partition(".")
    said = str(num2words(int(whole))).replace(",", "")
    return f"{said} point {_each(fraction)}" if point else said


def _each(digits: str) -> str:
    return " ".join(str(num2words(int(digit))) for digit in digits)


def _ordinal(digits: str) -> str:
    return str(num2words(int(digits.replace(",", "")), to="ordinal")).replace(",", "")


def _year(digits: str) -> str:
    return str(num2words(int(digits), to="year"))


def _month(name: str) -> str:
    return next(month for month in _MONTHS if month.startswith(name[:3]))


def _day(month: str, day: str, year: str | None) -> str:
    return f"{month} {_ordinal(day)}" + (f", {_year(year)}" if year else "")


def _money(match: Match) -> str:
    found = match.groupdict()
    one, many, cent, cents = _MONEY[found.get("before") or found["after"]]
    amount, scale = found["amount"].replace(",", ""), found.get("scale")
    if scale:
        return f"{_words(amount)} {_SCALES.get(scale.lower(), scale)} {many}"
    whole, _, fraction = amount.partition(".")
    if len(fraction) not in (0, 2):
        return f"{_words(amount)} {many}"
    said = [f"{_words(whole)} {one if int(whole) == 1 else many}"] if int(whole) or not int(fraction or 0) else []
    if int(fraction or 0):
        said.append(f"{_words(str(int(fraction)))} {cent if int(fraction) == 1 else cents}")
    return " and ".join(said)


def _numeric_date(match: Match) -> str:
    first, second, year = int(match[1]), int(match[2]), match[3]
    month, day = (first, second) if first <= 12 else (second, first)
    return _day(_MONTHS[month - 1], str(day), year) if month <= 12 and day <= 31 else match.group()


def _time(match: Match) -> str:
    hour, minute = int(match["hour"]), int(match["minute"] or 0)
    half = f" {match['half'].upper()}M" if match["half"] else ""
    said = _words(str(hour))
    if minute:
        said += f" {'oh ' if minute < 10 else ''}{_words(str(minute))}"
    elif not half:
        said += " o'clock" if 0 < hour <= 12 else " hundred"
    return said + half


def _unit(match: Match) -> str:
    name, _, rest = _UNITS[match[2]].partition(" ")
    if match[1] != "1" and name != "hertz" and not name.endswith("hertz"):
        rest, name = (f"{rest}s", name) if rest == "hour" else (rest, f"{name}s")
    return f"{_words(match[1])} {name} {rest}".rstrip()


def _decade(match: Match) -> str:
    said = _year(match[1]) if len(match[1]) == 4 else _words(match[1])
    return said[:-1] + "ies" if said.endswith("y") else said + "s"


def _fraction(match: Match) -> str:
    above, below = int(match[1]), int(match[2])
    if not 1 < below <= 100 or above >= below:
        return f"{_words(match[1])} {_words(match[2])}"
    name = {2: "half", 4: "quarter"}.get(below) or _ordinal(match[2])
    return f"{_words(match[1])} {name if above == 1 else {'half': 'halve'}.get(name, name) + 's'}"


def _apart(match: Match) -> str:
    """A number's words, with a space to letters beside it."""
    text, (start, end) = match.string, match.span()
    before = " " if start and text[start - 1].isalpha() else ""
    after = " " if end < len(text) and text[end].isalpha() else ""
    return before + _words(match.group()) + after


_NAMES = "|".join(f"{name[:3]}(?:{name[3:]})?" if name != "May" else name for name in _MONTHS)
MONTHS = f"{_NAMES}|Sept"
_MONTH = rf"\b(?P<month>{MONTHS})\b\.?"
_AMOUNT = rf"(?P<amount>{_NUMBER})(?: ?(?P<scale>k|m|bn|tn|hundred|thousand|million|billion|trillion)\b)?"
SIGN = "[" + "".join(_MONEY) + "]"
_HOUR = r"\b(?P<hour>[01]?\d|2[0-3])"
_HALF = r" ?(?P<half>[AaPp])(?:\.[Mm]\.(?!\s+[A-Z]|\s*\Z)|\.?[Mm](?![A-Za-z]))"

_ENGLISH: tuple[tuple[re.Pattern[str], Callable[[Match], str]], ...] = tuple(
    (re.compile(pattern), say)
    for pattern, say in (
        (r"\d(?:,?\d){12,}", lambda match: _each(match.group().replace(",", ""))),  # no number that one would say
        (r"\betc\.(?=\s+[A-Z]|\s*\Z)", lambda match: "et cetera."),
        (r"(?<!\w)(?:" + "|".join(map(re.escape, _SHORT)) + ")", lambda match: _SHORT[match.group()]),
        (r"\b[Nn]o\. ?(?=\d)|#(?=\d)", lambda match: "number "),
        (rf"(?P<before>{SIGN}) ?{_AMOUNT}", _money),
        (rf"(?P<amount>{_NUMBER}) ?(?P<after>{SIGN})", _money),
        (r"\b(?P<y>\d{4})-(?P<m>0[1-9]|1[0-2])-(?P<d>[0-2]\d|3[01])\b",
         lambda match: _day(_MONTHS[int(match["m"]) - 1], match["d"], match["y"])),
        (r"\b(\d{1,2})/(\d{1,2})/(\d{4})\b", _numeric_date),
        (rf"{_MONTH} (?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?!\d|:)(?:,? (?P<year>[12]\d{{3}})\b)?",
         lambda match: _day(_month(match["month"]), match["day"], match["year"])),
        (rf"\b(?P<day>\d{{1,2}})(?:st|nd|rd|th)? (?:of )?{_MONTH}(?:,? (?P<year>[12]\d{{3}})\b)?",
         lambda match: f"{_ordinal(match['day'])} of {_day_of(match)}"),
        (rf"{_MONTH} (?P<year>[12]\d{{3}})\b", lambda match: f"{_month(match['month'])} {_year(match['year'])}"),
        (rf"{_HOUR}:(?P<minute>[0-5]\d)(?!:?\d)(?:{_HALF})?", _time),
        (rf"{_HOUR}(?P<minute>){_HALF}", _time),
        (r"(?<![\w-])(?:\+\d{1,3}[ -]?)?(?:\(\d{3}\) ?|\d{3}[-.])?\d{3}[-.]\d{4}\b",
         lambda match: ", ".join(_each(part) for part in re.findall(r"\d+", match.group()))),
        (r"\b\d+(?:\.\d+){2,}\b", lambda match: " point ".join(map(_words, match.group().split(".")))),
        (rf"\b({_NUMBER}) ?({'|'.join(map(re.escape, sorted(_UNITS, key=len, reverse=True)))})(?!\w)", _unit),
        (r"\b(\d[\d,]*)(?:st|nd|rd|th)\b", lambda match: _ordinal(match[1])),
        (r"(?:\b|')((?:1[1-9]|20)?[1-9]0)s\b", _decade),
        (r"(?<![\d/.])(\d{1,3})/(\d{1,3})(?![\d/])", _fraction),
        (r"(?<![\w.,-])([12]\d{3}) ?[\u2013-] ?([12]\d{3})(?![\d-])",
         lambda match: f"{_year(match[1])} to {_year(match[2])}"),
        (rf"(?<![\w.,-])({_NUMBER}) ?[\u2013-] ?(?={_NUMBER})", lambda match: f"{match[1]} to "),
        (r"(?i)(?<=\bin )1[1-9]\d\d\b(?![.,]\d)|(?<=\bsince )1[1-9]\d\d\b|(?<=\byear )1[1-9]\d\d\b"
         r"|(?<![\w.,])(?:19|20)\d\d\b(?![.,]\d| ?%)", lambda match: _year(match.group())),
        (r"(?<![\w)])-(?=\d)", lambda match: "minus "),
        (r"(?<=\d) ?%", lambda match: " percent"),
        (r"(?<=[\w-])\.(?=(?:com|org|net|io|dev|ai|gov|edu|co|uk)\b)", lambda match: " dot "),
        ("|".join(map(re.escape, _SYMBOLS)), lambda match: f" {_SYMBOLS[match.group()]} "),
        (_NUMBER, _apart),
    )
)  # fmt: skip


def _day_of(match: Match) -> str:
    return _month(match["month"]) + (f", {_year(match['year'])}" if match["year"] else "")


def _elsewhere(text: str, language: str) -> str:
    """Plain numbers and percentages in another language, as far as num2words knows it."""

    def say(match: Match) -> str:
        digits = match.group()
        if len(digits) > 1 and digits[0] == "0" and digits.isdigit():
            return digits
        return str(num2words(float(digits) if "." in digits else int(digits), lang=language))

    try:
        return re.sub(r"(?<![\w.,:/-])\d{1,12}(?:\.\d+)?(?![\w:/-]|[.,]\d)", say, text)
    except NotImplementedError:
        return text
