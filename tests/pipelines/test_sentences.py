"""Sentences of arriving text: cut early, never inside, and the same however the text arrived."""

from __future__ import annotations

import random

import pytest

from antiphon.pipelines.sentences import Sentences

CASES = {
    "Mr. Smith paid $3.50 to Dr. J. K. Jones at 5 p.m. on Jan. 3. It was dear.": [
        "Mr. Smith paid $3.50 to Dr. J. K. Jones at 5 p.m. on Jan. 3.",
        "It was dear.",
    ],
    'He left. "Really?" she asked. "Yes!" Then (at last.) silence.': [
        "He left.",
        '"Really?" she asked.',
        '"Yes!"',
        "Then (at last.) silence.",
    ],
    "See e.g. Fig. 2 etc. for more. Use no. 5, etc. The end": [
        "See e.g. Fig. 2 etc. for more.",
        "Use no. 5, etc.",
        "The end",
    ],
    "No. I won't. Ask I. Then wait... and see... Done": [
        "No.",
        "I won't.",
        "Ask I.",
        "Then wait... and see...",
        "Done",
    ],
    "He came at 5 p.m. Then he slept. It is 3.14.": ["He came at 5 p.m.", "Then he slept.", "It is 3.14."],
    "all small. the next one too": ["all small.", "the next one too"],
    "A line\nthat wraps.\n\nA heading\n\nText:\n- one thing\n- another\n1. First.\n2. Second.": [
        "A line that wraps.",
        "A heading",
        "Text:",
        "- one thing",
        "- another",
        "1. First.",
        "2. Second.",
    ],
    "\u4f60\u597d\u3002\u4ef7\u683c\u662f3.5\u5143\u5417\uff1f\u201c\u597d\uff01\u201d\u4ed6\u8bf4": [
        "\u4f60\u597d\u3002",
        "\u4ef7\u683c\u662f3.5\u5143\u5417\uff1f",
        "\u201c\u597d\uff01\u201d",
        "\u4ed6\u8bf4",
    ],
    "  \n ": [],
    "Ends with a stop.": ["Ends with a stop."],
}


def cut(text: str, longest: int = 400, seed: int | None = None) -> list[str]:
    sentences, made = Sentences(longest=longest), []
    pieces = random.Random(seed)
    while text:
        size = len(text) if seed is None else pieces.randint(1, 6)
        made += sentences.push(text[:size])
        text = text[size:]
    return made + sentences.finish()


@pytest.mark.parametrize("text", CASES, ids=lambda text: text[:12])
def test_sentences_end_where_they_do_however_the_text_arrives(text: str) -> None:
    assert cut(text) == CASES[text]
    for longest in (7, 20, 400):
        whole = cut(text, longest)
        assert all(len(sentence) <= longest for sentence in whole)
        assert "".join("".join(whole).split()) == "".join(text.split())
        for seed in range(30):
            assert cut(text, longest, seed) == whole


def test_a_sentence_is_out_as_soon_as_the_next_one_shows() -> None:
    sentences = Sentences()
    assert sentences.push("It is late. ") == []
    assert sentences.push('"') == []
    assert sentences.push("W") == ["It is late."]
    assert sentences.push('hy?" ') == []
    assert sentences.push("he") == []
    assert sentences.push(" asked.\n\nSo") == ['"Why?" he asked.']
    assert sentences.finish() == ["So"]
    assert sentences.finish() == []


def test_what_is_too_long_is_cut_at_a_clause_or_else_a_word() -> None:
    assert cut("one two, three four five six", 16) == ["one two,", "three four five", "six"]
    assert cut("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
    with pytest.raises(ValueError, match="longest is 0"):
        Sentences(longest=0)
