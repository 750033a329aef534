"""Words of arriving text: said as those of the whole text, never before they are certain, however the text arrives."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_spoken import CASES

from antiphon.pipelines.arriving import Arrived, Arriving
from antiphon.pipelines.spoken import spoken


def arrive(text: str, seed: int | None = None, language: str = "en") -> list[Arrived]:
    words, made = Arriving(language), []
    pieces = random.Random(seed)
    while text:
        size = len(text) if seed is None else pieces.randint(1, 4)
        made += words.push(text[:size])
        text = text[size:]
    return made + list(words.finish())


@pytest.mark.parametrize("text", CASES, ids=lambda text: text[:16])
def test_it_is_said_as_the_whole_text(text: str) -> None:
    text = f"Well,\n{text} it is."
    made = arrive(text)
    assert " ".join(one.said for one in made if one.said).split() == spoken(text).split()
    assert "".join("".join(one.written for one in made).split()) == "".join(text.split())
    for seed in range(20):
        assert arrive(text, seed) == made


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        (["$3", ".", "50", " "], "three dollars and fifty cents"),
        (["$", " 3", " mil", "lion"], "three million dollars"),
        (["1", ",0", "00", " "], "one thousand"),
        (["Mar", "ch 3", ", 20", "24"], "March third, twenty twenty-four"),
        (["15", " ", "of ", "May"], "fifteenth of May"),
        (["5 ", "k", "m", "/h"], "five kilometers per hour"),
        (["5 ", "p.", "m."], "five PM."),
        (["2", "0 ", "%"], "twenty percent"),
        (["in ", "19", "84"], "in nineteen eighty-four"),
        (["No", ". ", "1"], "number one"),
        (["10", " - ", "2", "0"], "ten to twenty"),
        (["[a ", "link](http", "://x.com)"], "a link"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_number_is_said_once_it_is_complete(pieces: list[str], said: str) -> None:
    """Alone, and within a sentence: nothing of it is out before its last piece."""
    words = Arriving()
    assert [one.said for one in words.push("It is ")] == ["It", "is"]
    assert [one for piece in pieces for one in words.push(piece)] == []
    assert [one.said for one in words.finish()] == [said]
    for piece in pieces:
        assert list(words.push(piece)) == []
    made = [one.said for one in words.push(" then, and ")]
    assert " ".join(made).split() == spoken("".join(pieces) + " then, and").split()


def test_other_words_are_out_at_once() -> None:
    words = Arriving()
    assert [one.said for one in words.push("The old m")] == ["The", "old"]
    assert [one.said for one in words.push("an, and ")] == ["man,", "and"]
    assert [one.said for one in words.push("Mr. Sm")] == ["Mister"]
    assert [one.said for one in words.push("ith. ")] == []  # a line may end
    assert [(one.said, one.ends, one.line) for one in words.push("\n")] == [("Smith.", True, True)]
    assert list(words.push(" ")) == []
    assert list(words.finish()) == []


def test_where_sentences_end() -> None:
    def ends(text: str) -> list[str]:
        return [one.written.split()[-1] for one in arrive(text) if one.ends]

    assert ends('Dr. Jones left. "Why?" It was 3. No') == ["left.", '"Why?"', "3."]
    assert ends("Ask J. K. Jones, e.g. him, then. No. 1 is") == ["then."]
    assert [one.said for one in arrive("At 5 p.m.\nNo.\nMay 5.\n")] == ["At", "five PM.", "No.", "May fifth."]
    assert [one.line for one in arrive("So it is. \n Then\nmore!\n")] == [False, False, True, False, True]
    wide = "\u4f60\u597d\uff0c\u4ef7\u683c\u662f3.5\u5143\u5417\uff1f\u201c\u597d\uff01\u201d\u4ed6\u8bf4"
    made = arrive(wide)
    assert [one.ends for one in made] == [False, True, True, False]
    assert "".join(one.said for one in made) == wide
    assert all(arrive(wide, seed) == made for seed in range(20))
    assert [len(one.said) for one in arrive("\u597d" * 30)] == [12, 12, 6]


def test_what_waits_for_one_another_ends() -> None:
    """Numbers without end, a bracket that is never closed."""
    for text in ("1 " * 30, "[ and " + "so " * 40):
        made = arrive(text)
        assert max(len(one.written.split()) for one in made) == 12
        assert " ".join(one.said for one in made).split() == spoken(text).split()


@pytest.mark.parametrize("language", ["en", "de"])
def test_anything_may_arrive(language: str) -> None:
    choose = random.Random(0)
    marks = "0123456789$\u20ac%.,:/-+()[]apmof etc. May No. in \n\u597d\u3002\uff0c\"'*_`"
    for seed in range(300):
        text = "".join(choose.choice(marks) for _ in range(choose.randint(1, 40)))
        made = arrive(text, language=language)
        assert arrive(text, seed, language) == made
        assert "".join("".join(one.written for one in made).split()) == "".join(text.split())
