"""Text that a model is made to say: token by token, at the model's own pace between words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny_duplex import tokenizer_bytes
from tiny_moshi import SETTINGS

from antiphon.models.conformer.tokenizer import WORD_START, Source, Tokenizer
from antiphon.models.moshi.config import HELD, UNSET, read_config
from antiphon.pipelines.script import LONGEST, PATIENCE, Script

PAD, END, OTHER = 3, 0, 11
TOKENIZER = Tokenizer(Source("tokenizer.model", tokenizer_bytes()))


def script(text: str = "") -> Script:
    made = Script(TOKENIZER, read_config(SETTINGS))
    assert not text or made.add(text)
    return made


def play(one: Script, drawn: int, steps: int) -> list[int]:
    """The text tokens of some steps whose model would say ``drawn`` by itself."""
    taken = []
    for _ in range(steps):
        force = one.force
        held = drawn if drawn in (PAD, END) else END
        taken.append(drawn if force == UNSET else held if force == HELD else force)
        one.advance(taken[-1])
    return taken


def words(text: str) -> list[list[int]]:
    found: list[list[int]] = []
    for token in TOKENIZER.encode(text):
        if not found or TOKENIZER.pieces[token].startswith(WORD_START):
            found.append([])
        found[-1].append(token)
    return found


def test_a_talkative_model_says_word_after_word() -> None:
    one, (first, second) = script("good day"), words("good day")
    assert len(first) > 1
    assert len(one) == len(first) + len(second)
    expected = [END, *first, END, *second, OTHER, OTHER]
    assert play(one, OTHER, len(expected)) == expected
    assert (len(one), one.force) == (0, UNSET)


def test_a_silent_model_is_waited_for_so_long() -> None:
    (first, second) = words("good day")
    expected = [END, *first, *[PAD] * PATIENCE, END, *second, PAD]
    assert play(script("good day"), PAD, len(expected)) == expected


def test_the_next_text_goes_on_after_the_last() -> None:
    one = script("good")
    assert one.add("day")
    assert play(one, END, 40)[: 1 + len(one)] == play(script("good day"), END, 40)[: 1 + len(one)]
    play(one, PAD, 1)
    assert one.add("yes")
    assert play(one, PAD, 1) == [END]


def test_what_is_nothing_and_what_is_too_much() -> None:
    one = script()
    assert not one.add("")
    assert not one.add(" \n")
    assert len(one) == 0
    assert len(script("day日")) == len(TOKENIZER.encode("day"))  # unknown characters are left out
    while one.add("good day to you"):
        assert len(one) <= LONGEST
    assert LONGEST - len(TOKENIZER.encode("good day to you")) < len(one) <= LONGEST
    waiting = len(one)
    assert play(one, OTHER, 2)[0] == END
    assert one.clear() == waiting - 1
    assert (one.force, one.clear()) == (UNSET, 0)


@pytest.mark.parametrize("drawn", [PAD, OTHER])
def test_every_token_is_said_once_in_order(drawn: int) -> None:
    text = "so it goes one two three"
    said = [token for token in play(script(text), drawn, 200) if token not in (PAD, END, OTHER)]
    assert said == [token for token in TOKENIZER.encode(text) if token != OTHER]
