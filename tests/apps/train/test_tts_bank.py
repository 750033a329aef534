"""The embedded voice's bank: texts as they are read, who says what, where utterances and their tokens lie, batches."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_speech import TEXTS, toy_speech

from antiphon.apps.train import tts_bank
from antiphon.apps.train.bank import BankWriter, Order, Worker, rendered
from antiphon.apps.train.tts_bank import (
    Batches,
    SpeechBank,
    characters,
    credible,
    gathered,
    number_sentence,
    plan,
    unseen_sentences,
    whole,
    widened,
    words,
    write,
    written,
)
from antiphon.apps.train.tts_join import joined
from antiphon.apps.train.tts_sizes import ALPHABET, FLOW, LM, TEXT, TOKEN, TOKENIZER, VOICE_TOKENS, VOICES
from antiphon.apps.train.voices import RATE, Line
from antiphon.models.cosyvoice.flow import FlowMatching
from antiphon.models.cosyvoice.lm import SpeechLM
from antiphon.models.cosyvoice.tokenizer import END_OF_TEXT, SPECIALS


def test_the_shipped_networks_fit_together_and_into_forty_megabytes() -> None:
    from antiphon.apps.train.tts_sizes import VOCODER
    from antiphon.codecs.hift import HiFT

    assert LM.speech == FLOW.vocabulary == TOKENIZER.vocabulary
    assert len(ALPHABET) + len(VOICE_TOKENS) + len((END_OF_TEXT, *SPECIALS)) <= TEXT == LM.text
    assert FLOW.mels == VOCODER.mels
    with torch.device("meta"):
        networks = SpeechLM(LM), FlowMatching(FLOW), HiFT(VOCODER)
    assert 2 * sum(value.numel() for network in networks for value in network.state_dict().values()) <= 40_000_000


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Dr. Smith \u2014 he\u2019s 42, isn't he?", "doctor smith, he's forty-two, isn't he?"),
        ("Na\u00efve\u2026 \u201cYes!\u201d (No.)", "naive. yes! no."),
        ("A  line\nand/or a_tab\t.", "a line and or a tab ."),
        ("\u6f22\u5b57", ""),
    ],
)
def test_texts_are_read_as_words_of_the_alphabet(text: str, read: str) -> None:
    assert written(text) == read
    assert "".join(ALPHABET[token] for token in characters(read)) == read
    assert written(read) == read


def test_sentences_with_numbers_hold_no_digit() -> None:
    rng = random.Random(0)
    made = [number_sentence(rng) for _ in range(200)]
    assert not any(character.isdigit() for text in made for character in text)
    assert len({words(text) for text in made}) > 150


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "novel.txt"
    many = (f"This is the {one} sentence of the {two} page." for one in _NAMES for two in _NAMES)
    path.write_text("\n".join(many), encoding="utf-8")
    return path


_NAMES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "last")


def test_every_voice_gets_its_share_and_never_a_sentence_that_is_kept(texts: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("This is the third sentence of the fourth page.\nShort.\n", encoding="utf-8")
    orders = plan([texts], [kept], 0.1, 1)
    assert orders == plan([texts], [kept], 0.1, 1)
    assert orders != plan([texts], [kept], 0.1, 2)
    assert "This is the third sentence of the fourth page." not in {order.text for order in orders}
    letters = {name: sum(len(one.text) for one in orders if one.source == name) for name in VOICES}
    whole_share = sum(speaker.share for speaker in VOICES.values())
    for name, speaker in VOICES.items():
        assert letters[name] / sum(letters.values()) == pytest.approx(speaker.share / whole_share, abs=0.1)
        assert {(one.teacher, one.voice) for one in orders if one.source == name} == {(speaker.teacher, speaker.voice)}


def test_the_unseen_sentences_do_not_change_with_the_file_s_order(texts: Path, tmp_path: Path) -> None:
    chosen = unseen_sentences(texts, 10)
    assert len(set(chosen)) == 10
    other = tmp_path / "other.txt"
    other.write_text("\n".join(reversed(texts.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    assert unseen_sentences(other, 10) == chosen
    assert not set(chosen) & {order.text for order in plan([texts], [texts], 0.01, 0)}


def test_sentences_with_new_words_come_first_and_none_is_lost() -> None:
    texts = ["a cat", "the cat", "the dog", "a dog", "the cat.", "a bird", "the bird", "one fish", "a fish", "a cat!"]
    assert list(widened(texts)) == [
        *("a cat", "the cat", "a dog", "the dog", "a bird", "the cat.", "one fish"),
        *("the bird", "a fish", "a cat!"),
    ]


def test_banks_spoken_apart_become_one(tmp_path: Path) -> None:
    parts = [tmp_path / name for name in ("one", "other")]
    for number, (part, texts) in enumerate(zip(parts, (TEXTS[:3], TEXTS[3:5]), strict=True)):
        writer = BankWriter(part)
        for place, order in enumerate(orders(*texts)):
            tone = np.full((place + 1) * RATE, 0.01 * (10 * number + place + 1), np.float32)
            writer.add(whole(tone), "speech", order.text, order.source, licence="Apache-2.0")  # type: ignore[arg-type]
        writer.close()
        count = len(SpeechBank(part).pcm) // TOKEN
        np.save(part / "tokens.npy", np.arange(count, dtype=np.int16))
        np.save(part / "mel.npy", np.zeros((2 * count, 80), np.float16))
    before = [(bank, one) for bank in map(SpeechBank, parts) for one in bank.utterances]
    bank = joined(parts, tmp_path / "all")
    for (own, old), new in zip(before, bank.utterances, strict=True):
        assert (old.text, old.voice, old.held_out) == (new.text, new.voice, new.held_out)
        assert np.array_equal(own.pcm[old.samples], bank.pcm[new.samples])
        assert np.array_equal(own.tokens[old.tokens], bank.tokens[new.tokens])
    assert len(bank.mel) == 2 * len(bank.tokens)
    silent = joined(parts, tmp_path / "silent", sound=False)
    assert silent.utterances == bank.utterances
    assert np.array_equal(silent.tokens, bank.tokens)
    assert np.array_equal(silent.pcm, np.zeros_like(bank.pcm))
    with pytest.raises(FileNotFoundError, match=r"mel\.npy"):
        _ = silent.mel
    with pytest.raises(ValueError, match="another folder"):
        joined(parts, parts[0])


class Tones:
    """A teacher that says every text as long as it is, and nothing for one."""

    def speak(self, lines: list[Line]) -> list[torch.Tensor]:
        return [
            torch.zeros(0) if line.text == "unsayable" else torch.randn(int(0.06 * len(line.text) * RATE)) * 0.1
            for line in lines
        ]


def orders(*texts: str) -> list[Order]:
    return [
        Order("speech", text, "kokoro" if number % 3 == 0 else "hibari", "x", 1.0, 40, 0, list(VOICES)[number % 3])
        for number, text in enumerate(texts)
    ]


def test_speech_goes_into_the_bank_in_whole_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "teacher", lambda self, name: Tones())
    said = orders("a fine day to be out", "another day it is", "unsayable", "no", "the last of all of them")
    writer = BankWriter(tmp_path)
    assert write(writer, rendered(said, 0, "cpu", None, tts_bank._speak)) == 2
    writer.close()
    bank = SpeechBank(tmp_path)
    spoken = {one.text: one for one in bank.utterances}
    assert set(spoken) == {"a fine day to be out", "another day it is", "the last of all of them"}
    assert [spoken[order.text].voice for order in said if order.text in spoken] == [0, 1, 1]
    assert [one.begin for one in bank.utterances] == [0, *np.cumsum([one.count for one in bank.utterances])[:-1]]
    for one in bank.utterances:
        assert one.count % 2 == 0
        assert one.count * TOKEN >= 0.06 * len(one.text) * RATE > (one.count - 2) * TOKEN
        assert np.abs(bank.pcm[one.samples]).max() > 1000
        assert one.frames == slice(2 * one.begin, 2 * (one.begin + one.count))
    with pytest.raises(FileNotFoundError, match="tts tokens"):
        _ = bank.tokens


def test_a_bank_may_end_early(tmp_path: Path) -> None:
    writer = BankWriter(tmp_path)
    sound = whole(np.ones(RATE, np.float32) * 0.1)
    write(writer, ((order, sound) for order in orders(*["ten letters"] * 9)), minutes=1e-9)
    writer.close()
    assert len(SpeechBank(tmp_path).utterances) == 1


def test_the_teachers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    said = orders(*(f"sentence number {number}" for number in range(600)))
    batches: list[set[str]] = []

    def speak(batch: list[Order]) -> list[np.ndarray]:
        batches.append({order.teacher for order in batch})
        return [np.zeros(1, np.int16)] * len(batch)

    assert sorted(order.text for order, _ in rendered(said, 0, "cpu", None, speak)) == sorted(o.text for o in said)
    assert all(len(teachers) == 1 for teachers in batches)
    assert "kokoro" in set.union(*batches[:2])
    assert "hibari" in set.union(*batches[:2])


def test_speech_that_cannot_be_its_text_is_left_out() -> None:
    assert credible(3 * RATE, "a text of about fifty characters, as they often are")
    assert not credible(int(0.3 * RATE), "no")
    assert not credible(9 * RATE, "far too long for this")
    assert not credible(RATE, "a text that is by far too long for a second of speech, by far")
    assert not credible(13 * RATE, "long " * 40)


def test_one_sentence_in_a_hundred_is_kept_whoever_says_it(tmp_path: Path) -> None:
    writer = BankWriter(tmp_path)
    for three in itertools.product("abcdefghij", repeat=3):
        for voice in ("heart", "emma"):
            writer.add(np.ones(2 * TOKEN, np.int16), "speech", f"sentence {''.join(three)}", voice)  # type: ignore[arg-type]
    writer.close()
    bank = SpeechBank(tmp_path)
    assert 0 < len(bank.test) < 0.05 * len(bank.utterances)
    assert len(bank.test) % 2 == 0
    assert not {one.text for one in bank.test} & {one.text for one in bank.train}


def test_batches_hold_utterances_of_one_length_each() -> None:
    random_counts = np.random.default_rng(0).integers(10, 120, 500)
    batches = Batches(random_counts.tolist(), 400, (40, 80, 100))
    seen = set()
    for step in range(300):
        width, rows = batches(step)
        assert len(rows) == 400 // width
        assert len(set(rows.tolist())) == len(rows)
        assert (random_counts[rows] <= width).all()
        assert (random_counts[rows] > {40: 0, 80: 40, 100: 80}[width]).all()
        seen.update(rows.tolist())
    assert len(seen) > 0.9 * (random_counts <= 100).sum()
    assert np.array_equal(batches(7)[1], Batches(random_counts.tolist(), 400, (40, 80, 100))(7)[1])
    with pytest.raises(ValueError, match="no utterance is as short as 5"):
        Batches([10], 100, (5,))


def test_what_is_gathered_ends_with_its_utterance() -> None:
    table = torch.arange(1, 11)[:, None] * torch.tensor([1, 100])
    found = gathered(table, torch.tensor([0, 8]), torch.tensor([3, 2]), 4)
    assert found[..., 0].tolist() == [[1, 2, 3, 0], [9, 10, 0, 0]]
    assert found[..., 1].tolist() == [[100, 200, 300, 0], [900, 1000, 0, 0]]


def test_sound_is_padded_to_two_tokens() -> None:
    assert len(whole(np.ones(1, np.float32))) == 2 * TOKEN
    assert len(whole(np.ones(2 * TOKEN, np.float32))) == 2 * TOKEN


def test_the_toy_bank_is_a_bank(tmp_path: Path) -> None:
    assert len(toy_speech(tmp_path).utterances) == 2 * len(TEXTS)
