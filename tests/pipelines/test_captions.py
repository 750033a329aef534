"""Captions from tokens: words, times, partials and finals."""

from __future__ import annotations

import pytest

from antiphon.pipelines.captions import Caption, Captioner, Final, Partial

PIECES = ["▁the", "▁cat", "s", "▁sat", "<EOU>", "<en-US>"]
THE, CAT, S, SAT, EOU, TAG = range(6)


class Pieces:
    def starts_word(self, token: int) -> bool:
        return PIECES[token].startswith("▁")

    def is_special(self, token: int) -> bool:
        return PIECES[token].startswith("<")

    def ends_utterance(self, token: int) -> bool:
        return token == EOU

    def decode(self, tokens: list[int]) -> str:
        return "".join(PIECES[token] for token in tokens).replace("▁", " ").strip()


def feed(captioner: Captioner, *steps: tuple[list[tuple[int, int]], int]) -> list[Caption]:
    return [caption for tokens, frames in steps for caption in captioner.add(tokens, frames, frames * 0.08)]


def test_words_grow_until_the_next_begins() -> None:
    captions = feed(Captioner(Pieces()), ([(THE, 2)], 3), ([(CAT, 4)], 5), ([(S, 5), (SAT, 9)], 10))
    assert [type(caption) for caption in captions] == [Partial] * 3
    assert [caption.text for caption in captions] == ["the", "the cat", "the cats sat"]
    words = captions[-1].words
    assert [(word.text, word.start, word.end) for word in words] == [
        ("the", 0.16, 0.24),
        ("cats", 0.32, 0.48),
        ("sat", 0.72, 0.8),
    ]


def test_open_tokens_are_shown_until_they_change_or_are_final() -> None:
    captioner = Captioner(Pieces(), endpoint=0.8)
    steps = [([(THE, 2)], 3, [(CAT, 2)]), ([], 4, [(CAT, 2), (S, 3)]), ([], 5, [(CAT, 2), (S, 3)]), ([(CAT, 2)], 6, [])]
    captions = [one for tokens, frames, shown in steps for one in captioner.add(tokens, frames, 0.08 * frames, shown)]
    assert [caption.text for caption in captions] == ["the cat", "the cats", "the cat"]
    assert [caption.settled for caption in captions if isinstance(caption, Partial)] == [0, 0, 1]
    assert [(word.start, word.end) for word in captions[1].words] == [(0.16, 0.24), (0.16, 0.32)]
    assert [caption.text for caption in captioner.finish(0.5)] == ["the cat"]


def test_a_caption_does_not_end_while_a_token_is_open() -> None:
    captioner = Captioner(Pieces(), endpoint=0.8)
    assert [type(one) for one in captioner.add([(THE, 2)], 20, 1.6, [(CAT, 19)])] == [Partial]
    assert [one.text for one in captioner.add([(CAT, 19)], 30, 2.4)] == ["the", "cat"]


def test_a_step_without_tokens_says_nothing() -> None:
    captioner = Captioner(Pieces())
    assert feed(captioner, ([], 4), ([(THE, 4)], 5), ([], 6))[1:] == []


def test_a_pause_makes_it_final_once() -> None:
    captioner = Captioner(Pieces(), endpoint=0.8)
    captions = feed(captioner, ([(THE, 0)], 1), ([], 10), ([], 11), ([], 40))
    assert [type(caption) for caption in captions] == [Partial, Final]
    assert captions[1].at == pytest.approx(0.88)
    assert feed(captioner, ([(CAT, 41)], 42))[0].text == "cat"


def test_a_pause_inside_one_step_splits_it() -> None:
    captions = feed(Captioner(Pieces(), endpoint=0.8), ([(THE, 0), (CAT, 12)], 14))
    assert [(type(caption), caption.text) for caption in captions] == [(Final, "the"), (Partial, "cat")]


def test_end_of_utterance_token_is_final_and_no_text() -> None:
    captions = feed(Captioner(Pieces()), ([(TAG, 0), (THE, 1), (EOU, 2)], 3), ([(CAT, 3)], 4))
    assert [(type(caption), caption.text) for caption in captions] == [(Final, "the"), (Partial, "cat")]


def test_a_long_caption_is_cut_before_its_last_word() -> None:
    captions = feed(Captioner(Pieces(), longest=1.0), ([(THE, 0), (CAT, 8), (S, 9), (SAT, 13)], 14))
    assert [(type(caption), caption.text) for caption in captions] == [(Final, "the"), (Partial, "cats sat")]


def test_finish_closes_the_open_word_and_then_nothing() -> None:
    captioner = Captioner(Pieces())
    feed(captioner, ([(CAT, 0), (S, 1)], 2))
    assert [caption.text for caption in captioner.finish(1.0)] == ["cats"]
    assert list(captioner.finish(1.0)) == []


def test_times_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive seconds, got 0"):
        Captioner(Pieces(), endpoint=0)
