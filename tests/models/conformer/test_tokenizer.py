"""Both kinds of tokenizer say the same about their tokens."""

from __future__ import annotations

import pytest

from antiphon.models.conformer.tokenizer import Source, Tokenizer


@pytest.fixture(params=["tokenizer", "json_tokenizer"])
def either(request):
    return request.getfixturevalue(request.param)


def test_text_and_words(either):
    ids = [either.pieces.index(piece) for piece in ("▁the", "▁s", "e", "a")]
    assert either.decode(ids).strip() == "the sea"
    assert [either.starts_word(id) for id in ids] == [True, True, False, False]
    assert either.decode([]) == ""


def test_special_tokens(either):
    tag, end, backchannel = (either.pieces.index(piece) for piece in ("<en-US>", "<EOU>", "<EOB>"))
    assert all(map(either.is_special, (tag, end, backchannel)))
    assert [either.ends_utterance(id) for id in (tag, end, backchannel)] == [False, True, False]
    the = either.pieces.index("▁the")
    assert not either.is_special(the)
    assert either.decode([tag, the, end]).strip() == "the"


def test_the_blank_is_no_piece(json_tokenizer):
    assert "<blank>" not in json_tokenizer.pieces


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x00" * 40])
def test_damage_is_told(name, content):
    with pytest.raises(ValueError, match="not a"):
        Tokenizer(Source(name, content))
