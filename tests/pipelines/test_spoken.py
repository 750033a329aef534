"""Text as it is said."""

from __future__ import annotations

import random
import re

import pytest

from antiphon.pipelines.spoken import spoken

CASES = {
    "$3.50, $1, $0.01 and $1,000,000": ("three dollars and fifty cents, one dollar, one cent and one million dollars"),
    "\u20ac2.3 million or 5 \u20ac": "two point three million euros or five euros",
    "\u00a31.01 and \u00a5500 and $5k": "one pound and one penny and five hundred yen and five thousand dollars",
    "1,234 in 3.14 of 1000": "one thousand two hundred and thirty-four in three point one four of one thousand",
    "On March 3, 2024": "On March third, twenty twenty-four",
    "15 Mar. 1999 and Sept 2020": "fifteenth of March, nineteen ninety-nine and September twenty twenty",
    "2024-03-15, 3/15/2024, 15/3/2024": ", ".join(["March fifteenth, twenty twenty-four"] * 3),
    "may 5 people": "may five people",
    "13/13/2024": "thirteen/thirteen/twenty twenty-four",
    "9:00, 14:30, 3:05 pm, 17:00": "nine o'clock, fourteen thirty, three oh five PM, seventeen hundred",
    "at 5 p.m. Then": "at five PM. Then",
    "at 5 p.m. we left at 6am": "at five PM we left at six AM",
    "in 1984, since 1776, 1500 m": "in nineteen eighty-four, since seventeen seventy-six, one thousand five hundred m",
    "the 1990s, the '80s": "the nineteen nineties, the eighties",
    "1939-1945, 10\u201320, -5": "nineteen thirty-nine to nineteen forty-five, ten to twenty, minus five",
    "21st, 100%, 1/2, 3/4, 24/7": "twenty-first, one hundred percent, one half, three quarters, twenty-four seven",
    "call 555-123-4567": "call five five five, one two three, four five six seven",
    "version 3.11.2 of GPT4": "version three point eleven point two of GPT four",
    "007": "zero zero seven",
    "5 km/h, 20\u00b0C, 1 kg, 3 kHz, 2 kWh": (
        "five kilometers per hour, twenty degrees Celsius, one kilogram, three kilohertz, two kilowatt hours"
    ),
    "Mr. Smith & Dr. Jones, No. 5 vs. #3": "Mister Smith and Doctor Jones, number five versus number three",
    "pens, ink, etc. The rest, etc.": "pens, ink, et cetera. The rest, et cetera.",
    "**bold** _it_ [link](http://x.com/a?b=1) `code`": "bold it link code",
    "# Title\n- item\n* other": "Title\nitem\nother",
    "see https://www.example.com/a/b.": "see example dot com.",
    "fine \U0001f600 it\u2019s": "fine it's",
    "snake_case 2 * 3 [laughter] <strong>you</strong>": "snake_case two * three [laughter] <strong>you</strong>",
    "well-known two-year-old T-rex": "well-known two-year-old T-rex",
}


@pytest.mark.parametrize("text", CASES, ids=lambda text: text[:16])
def test_english(text: str) -> None:
    assert spoken(text) == CASES[text]
    assert spoken(CASES[text]) == CASES[text]


@pytest.mark.parametrize("language", ["en", "de", "xx"])
def test_anything_can_be_said(language: str) -> None:
    choose = random.Random(0)
    marks = "0123456789$\u20ac\u00a5%.,:/-+#()apmstndth \u00b0CJanMay'\u2019*_`[]\n\u00b2\u0663"
    for _ in range(3000):
        said = spoken("".join(choose.choice(marks) for _ in range(choose.randint(1, 30))), language)
        assert language != "en" or not re.search(r"[0-9]", said)
    for text in (
        "1" * 5000,
        "$" + "1" * 5000 + ".5",
        "1," + "234," * 2000 + "th",
        "9" * 400 + "th",
        "(" * 5000,
        "_*" * 5000,
    ):
        assert spoken(text, language)


def test_other_languages_as_far_as_they_are_known() -> None:
    assert spoken("Es sind 42 Leute, 3.5 Liter am 3.4.2024", "de") == (
        "Es sind zweiundvierzig Leute, drei Komma fünf Liter am 3.4.2024"
    )
    assert spoken("\u670942\u4e2a 42", "zh") == "\u670942\u4e2a 42"
