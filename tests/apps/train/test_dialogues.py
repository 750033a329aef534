"""The closed domain, the bank, and dialogues composed of it: true answers, nothing of the tests in training, and an
assistant that keeps its turn."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from antiphon.apps.train.bank import (
    EDGE,
    LOUDNESS,
    Bank,
    BankWriter,
    Order,
    Utterance,
    parted,
    plan,
    trimmed,
    word_times,
    write_speech,
)
from antiphon.apps.train.dialogues import END_PAD, FRAME, PAD, Composer, Dialogue, Dialogues, Encode, Sound, Style, lay
from antiphon.apps.train.domain import AFTER_STOP, UNKNOWN, kept_back, questions
from antiphon.apps.train.duplex import train_tokenizer
from antiphon.apps.train.voices import RATE, Line

FRAMES = 376


@pytest.fixture(scope="module")
def encode(bank: Bank) -> Encode:
    return Encode(train_tokenizer([one.text for one in bank.of("answer")]))


@pytest.fixture(scope="module")
def composer(bank: Bank, encode: Encode) -> Composer:
    return Composer(bank, encode, FRAMES)


def composed(composer: Composer, count: int = 60) -> list[Dialogue]:
    return [composer(np.random.default_rng(seed)) for seed in range(count)]


# ---------------------------------------------------------------- the domain


def test_sums_are_right_and_every_question_has_one_answer() -> None:
    numbers = {word: value for value, word in enumerate(_count_to_a_hundred())}
    checked = 0
    for one in questions():
        if one.topic in ("plus", "minus", "times"):
            a, b, c = re.fullmatch(rf"(.+) {one.topic} (.+) is (.+)\.", one.answer.lower()).groups()  # type: ignore[union-attr]
            work = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}[one.topic]
            assert numbers[c] == work(numbers[a], numbers[b])
            assert {a, b} <= set(re.findall(r"[a-z]+", one.text.lower()))
            checked += 1
    assert checked > 1000
    answers: dict[str, set[str]] = {}
    for one in questions():
        answers.setdefault(one.text.lower(), set()).add(one.answer)
    assert max(map(len, answers.values())) == 1


def _count_to_a_hundred() -> list[str]:
    ones = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()  # noqa: SIM905
    ones += ["sixteen", "seventeen", "eighteen", "nineteen"]
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    rest = [f"{ten} {one}".replace(" zero", "") for ten in tens for one in ones[:10]]
    return [*ones, *rest, "one hundred"]


def test_what_is_held_out_depends_on_names_alone_and_is_a_tenth() -> None:
    assert [kept_back("voice", f"hibari:heart@{n}/40") for n in (40, 46, 50)] == [False, True, True]
    share = sum(kept_back("question", str(number)) for number in range(4000)) / 4000
    assert 0.08 < share < 0.12
    parts: dict[str, set[str]] = {}
    for one in questions():
        parts.setdefault(one.part, set()).add(one.key)
    assert set(parts) == {"train", "question", "form"}
    assert not parts["train"] & (parts["question"] | parts["form"])
    forms = {(one.topic, one.form) for one in questions() if one.part == "form"}
    assert not forms & {(one.topic, one.form) for one in questions() if one.part != "form"}
    assert {one.topic for one in questions()} == {one.topic for one in questions() if one.part == "train"}


def test_a_first_half_is_never_a_question_of_its_own() -> None:
    whole = {re.sub(r"[^a-z ]", "", one.text.lower()) for one in questions()}
    for one in questions():
        for at in range(1, one.cut + 1):
            first, second = one.halves(at)
            assert re.sub(r"[^a-z ]", "", first.lower()) not in whole
            assert first.endswith(",")
            assert second


# ---------------------------------------------------------------- the bank


def test_speech_is_cut_to_its_sound_at_one_loudness() -> None:
    speech = np.zeros(RATE, np.float32)
    speech[8000:16000] = 0.3 * np.sin(np.arange(8000))
    cut = trimmed(speech)
    assert abs(len(cut) - (8000 + 2 * EDGE)) <= 480
    assert np.sqrt(np.square(cut[EDGE : EDGE + 8000]).mean()) == pytest.approx(LOUDNESS, rel=0.1)
    assert len(trimmed(np.zeros(RATE, np.float32))) == 0


def test_long_recordings_are_parted_in_their_pauses():
    speech = np.random.default_rng(0).standard_normal(14 * RATE).astype(np.float32)
    for pause in (5.5, 10.0):
        speech[int(pause * RATE) : int((pause + 0.1) * RATE)] = 0
    pieces = list(parted(speech, 7.0))
    assert np.array_equal(np.concatenate(pieces), speech)
    assert [round(len(piece) / RATE, 1) for piece in pieces] == [5.5, 4.5, 4.0]
    assert len(list(parted(speech[: 7 * RATE], 7.0))) == 1


def test_words_begin_in_proportion_to_their_sounds() -> None:
    times = word_times("one, three", "w\u02c8ʌn, θɹ\u02c8i", 2 * EDGE + 10_000)
    assert [word for word, _ in times] == ["one,", "three"]
    assert times[0][1] == EDGE
    assert times[1][1] == EDGE + 10_000 * 6 // 9


class Hum:
    """A teacher whose every letter is 50 ms of a tone."""

    name, licence, source = "hibari", "Apache-2.0", "hum"

    def draw(self, rng: random.Random) -> str:
        return "heart"

    def speak(self, lines: list[Line]) -> list[torch.Tensor]:
        return [0.2 * torch.sin(torch.arange(len(line.text) * RATE // 20) * 0.05) for line in lines]


def test_a_planned_bank_holds_every_answer_and_both_halves(tmp_path: Path) -> None:
    orders = plan(120, {"hibari": 1.0}, {"hibari": Hum()}, seed=3)
    assert orders == plan(120, {"hibari": 1.0}, {"hibari": Hum()}, seed=3)
    assert {one.text for one in orders if one.role == "answer"} == {
        *(q.answer for q in questions()),
        UNKNOWN,
        *AFTER_STOP,
    }
    halves = [one for one in orders if one.role.endswith("half")]
    assert len({one.pair for one in halves}) * 2 == len(halves) > 10
    chosen = (
        [one for one in orders if one.role == "answer"][:3]
        + halves[:4]
        + [Order("stop", "", "hibari", "heart", 1, 40, 0)]
    )
    writer = BankWriter(tmp_path)
    with pytest.raises(FileNotFoundError, match="make a bank"):
        Bank(tmp_path)
    silent = write_speech(writer, ((one, Hum().speak([Line(one.text, "heart", 1, 0)])[0].numpy()) for one in chosen))
    writer.close()
    assert silent == {"stop": 1}
    bank = Bank(tmp_path)
    assert [one.text for one in bank.utterances] == [one.text for one in chosen[:-1]]
    assert bank.audio(bank.utterances[1]) == pytest.approx(
        Hum().speak([Line(chosen[1].text, "", 1, 0)])[0].numpy(), abs=1e-4
    )
    assert " ".join(word for word, _ in bank.utterances[0].words) == chosen[0].text
    with (tmp_path / "audio.pcm").open("rb+") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="make the bank again"):
        Bank(tmp_path)


# ---------------------------------------------------------------- dialogues


def test_a_score_follows_from_its_numbers(composer: Composer) -> None:
    one, again, other = (composer(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.user == again.user != other.user
    assert np.array_equal(one.text, again.text)


def test_training_never_hears_what_is_tested(bank: Bank, composer: Composer, encode: Encode) -> None:
    known = {one.key: one for one in questions()}
    by_begin = {one.begin: one for one in bank.utterances}

    def used(composer: Composer) -> tuple[set[str], set[bool]]:
        heard = [by_begin[sound.begin] for made in composed(composer) for sound in made.user]
        return {known[one.source].part for one in heard if one.source}, {one.held_out for one in heard}

    assert used(composer) == ({"train"}, {False})
    assert used(Composer(bank, encode, FRAMES, part="question")) == ({"question"}, {True})


def test_the_assistant_keeps_its_turn(bank: Bank, composer: Composer) -> None:
    """It waits for the end of a turn and through pauses, is never heard twice at once, falls silent when the user
    speaks, and goes on with the word it left after an encouragement."""
    style = Style()
    by_begin = {one.begin: one for one in bank.utterances}
    seen = dict.fromkeys(("cut", "encouraged", "resumed", "paused", "whole"), 0)
    for made in composed(composer, 150):
        for before, after in (*pairwise(made.model), *pairwise(made.user)):
            assert before.at + before.length <= after.at
        for number, answer in enumerate(made.model):
            assert answer.at % FRAME == 0
            one, source = spoken(bank, answer)
            end = answer.at + answer.length
            asked = [sound for sound in made.user if sound.at + sound.length <= answer.at]
            last = by_begin[asked[-1].begin]
            wait = (answer.at - asked[-1].at - asked[-1].length) / RATE
            low, high = style.resume if last.role == "backchannel" else style.reply
            assert low <= wait <= high + FRAME / RATE
            if last.role == "backchannel":
                seen["resumed"] += 1
                before, where = spoken(bank, made.model[number - 1])
                left = where + made.model[number - 1].length
                assert before == one
                assert source % FRAME == 0
                assert source <= left
                assert not [at for _, at in one.words if source + FRAME <= at <= left]
            else:
                assert last.role in ("question", "second half", "talk", "stop")
                assert source == 0
            if last.role == "second half":
                seen["paused"] += 1
                assert by_begin[asked[-2].begin].role == "first half"
                assert by_begin[asked[-2].begin].pair == last.pair
            meanwhile = [sound for sound in made.user if answer.at < sound.at < end]
            if source + answer.length < one.samples:
                onset = meanwhile[-1].at
                assert style.react[0] * RATE <= end - onset <= style.react[1] * RATE + FRAME
                role = by_begin[meanwhile[-1].begin].role
                seen["encouraged" if role == "backchannel" else "cut"] += 1
                assert role in ("stop", "question", "first half", "backchannel")
                assert len(meanwhile) == 1
            else:
                seen["whole"] += 1
                assert not meanwhile
    assert min(seen.values()) > 10, seen


def spoken(bank: Bank, sound: Sound) -> tuple[Utterance, int]:
    """Whose sound it is, and where in it that begins."""
    whose = [one for one in bank.utterances if one.begin <= sound.begin < one.begin + one.samples]
    return whose[0], sound.begin - whose[0].begin


def test_the_monologue_is_what_is_said_when_it_is_said(bank: Bank, composer: Composer, encode: Encode) -> None:
    decode = encode._pieces.decode
    whole = resumed = 0
    for made in composed(composer, 40):
        assert made.text.shape == (FRAMES,)
        silent = np.ones(FRAMES, bool)
        for number, answer in enumerate(made.model):
            first = answer.at // FRAME - Style().lead
            following = made.model[number + 1 : number + 2]
            last = min([FRAMES, *(one.at // FRAME - 3 for one in following)])
            tokens = [int(token) for token in made.text[max(0, first) : last] if token not in (PAD, END_PAD)]
            one, source = spoken(bank, answer)
            end = answer.at + answer.length
            if source:
                resumed += 1
                said = decode(tokens).rstrip(".,")
                assert said in one.text
                if source + answer.length == one.samples and end < (FRAMES - 8) * FRAME:
                    assert one.text.endswith(decode(tokens))
            elif answer.length == one.samples and end < (FRAMES - 8) * FRAME:
                whole += 1
                assert decode(tokens) == one.text
                assert first <= 0 or made.text[first] not in (PAD, END_PAD)
                assert first <= 0 or made.text[first - 1] == END_PAD
            elif end < FRAMES * FRAME:
                assert one.text.startswith(decode(tokens).rstrip(".,"))
                assert (made.text[end // FRAME : last] == PAD).sum() >= last - end // FRAME - 1
            silent[max(0, first - 1) : last] = False
        assert (made.text[silent] == PAD).all()
    assert whole > 40
    assert resumed > 5


def test_sound_lies_where_the_score_says() -> None:
    pcm = torch.arange(0, 20_000, dtype=torch.int16)
    rows = [[Sound(100, 5000, 1000, 1.0, 0.5), Sound(2000, 9000, 400, 2.0, 1.0)], []]
    heard = lay(pcm, rows, 3000)
    wanted = torch.zeros(2, 3000)
    wanted[0, 100:1100] = torch.arange(5000, 6000) / 32768 * 0.5
    wanted[0, 2000:2400] = torch.arange(9000, 9800, 2) / 32768
    for end in (1100, 2400):  # the last samples fade
        wanted[0, end - 240 : end] *= torch.arange(240, 0, -1) / 240
    assert (heard - wanted).abs().max() < 1e-6


def test_batches_follow_from_seed_and_step(bank: Bank, encode: Encode) -> None:
    pcm = torch.from_numpy(np.array(bank.pcm))
    made = Dialogues(Composer(bank, encode, 40), pcm, 2, seed=5)
    first, second = made(0), made(1)
    again = Dialogues(Composer(bank, encode, 40), pcm, 2, seed=5)(1)
    assert torch.equal(second.user, again.user)
    assert torch.equal(second.text, again.text)
    assert not torch.equal(first.user, second.user)
    assert first.user.shape == first.model.shape == (2, 40 * FRAME)
    assert first.user.abs().max() <= 1


def test_a_bank_without_voices_to_test_says_so(bank: Bank, encode: Encode, tmp_path: Path) -> None:
    writer = BankWriter(tmp_path)
    writer.add(np.full(4000, 0.1, np.float32), "answer", "Hello!", "hibari:heart@40/40", words=(("Hello!", 0),))
    writer.close()
    with pytest.raises(ValueError, match="no turns for the part 'train'"):
        Composer(Bank(tmp_path), encode, 40)
