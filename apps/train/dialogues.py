"""Two-channel dialogues for a full-duplex model, composed of a bank's utterances when they are needed.

A dialogue is a *score*: which samples of the bank are heard when, on the user's channel and on the assistant's, and the
assistant's words as its inner monologue. Scores are made on the CPU from a few random numbers; a batch of them becomes
sound on the device that holds the bank, with one gather a channel.

The assistant answers once a question is over, but not in a pause inside one; falls silent at once when the user speaks
during an answer, and goes on with the word it left if he only showed that he listens: what he is about to say cannot be
known so early. It says that it does not know when it hears other talk. Answers begin with a frame, and go on with one
of their frames, so that the codec always makes nearly the same codes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .bank import Bank, Utterance
from .domain import AFTER_STOP, UNKNOWN, Part, questions
from .loop import placed
from .voices import RATE

FRAME = 1920  # samples of a code
PAD, END_PAD = 3, 0
T = TypeVar("T")

FADE = 240  # samples: a cut utterance ends without a click

Words = list[tuple[int, list[int]]]
"""Of an answer: the sample that each word begins at and its tokens."""


@dataclass(frozen=True)
class Style:
    """How people talk. Times in seconds, levels in decibels, odds of what a user does next need not sum to one.

    reply: from the end of a turn to the answer. react: from where the user speaks during an answer to silence, which
    then waits for the next frame. resume: from the end of an encouragement to where the answer goes on. lead: frames
    that the monologue is ahead of the sound. steady: share of dialogues over a steady noise.
    """

    ask: float = 5.0
    long: float = 2.0
    talk: float = 1.0
    listen: float = 0.4
    rest: float = 0.6
    start: tuple[float, float] = (0.3, 2.0)
    gap: tuple[float, float] = (0.3, 2.5)
    silence: tuple[float, float] = (2.0, 6.0)
    reply: tuple[float, float] = (0.35, 0.8)
    pause: tuple[float, float] = (0.4, 1.4)
    react: tuple[float, float] = (0.0, 0.06)
    resume: tuple[float, float] = (0.25, 0.45)
    interrupt: float = 0.25
    encourage: float = 0.3
    lead: int = 2
    speed: tuple[float, float] = (0.9, 1.1)
    gain: tuple[float, float] = (-14.0, 8.0)
    steady: float = 0.4
    noise: tuple[float, float] = (-40.0, -12.0)
    bursts: float = 1.0
    hiss: tuple[float, float] = (-90.0, -55.0)


@dataclass
class Sound:
    """Sound of the bank on a channel: ``length`` samples from ``at`` on, read from ``begin`` at ``rate``."""

    at: int
    begin: int
    length: int
    rate: float = 1.0
    gain: float = 1.0


@dataclass
class Dialogue:
    """A score. text: ``[T]`` tokens. steady: where in the bank a noise under everything lies, or -1, and its gain."""

    user: list[Sound] = field(default_factory=list)
    noise: list[Sound] = field(default_factory=list)
    model: list[Sound] = field(default_factory=list)
    text: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    steady: int = -1
    steady_gain: float = 0.0
    hiss: float = 0.0


@dataclass(frozen=True)
class Batch:
    """user, model ``[B, T * FRAME]`` sound, text ``[B, T]`` int64."""

    user: Tensor
    model: Tensor
    text: Tensor


class Composer:
    """Makes scores of ``frames`` frames.

    encode: a word to its tokens. part: which questions; voices that are held out speak in the test parts only.
    Raises ValueError for a bank that lacks what dialogues are made of.
    """

    def __init__(
        self, bank: Bank, encode: Encode, frames: int, style: Style | None = None, part: Part = "train"
    ) -> None:
        self.style, self.frames = style or Style(), frames
        known = {question.key: question for question in questions()}
        test = part != "train"
        if missing := {one.source for one in bank.of("question", "first half")} - set(known):
            raise ValueError(f"the bank asks {min(missing)!r}, which is no question now: make the bank again")

        def heard(*roles: str) -> list[Utterance]:
            return [one for one in bank.of(*roles) if one.held_out == test]  # type: ignore[arg-type]

        self.answers = {one.text: one for one in bank.of("answer")}
        self.words = {text: [(at, encode(word)) for word, at in one.words] for text, one in self.answers.items()}
        asked = [one for one in heard("question", "first half") if known[one.source].part == part]
        second = {one.pair: one for one in heard("second half")}
        self.turns = [
            ([one] if one.role == "question" else [one, second[one.pair]], known[one.source].answer)
            for one in asked
            if one.role == "question" or one.pair in second
        ]
        self.long = [turn for turn in self.turns if self.answers[turn[1]].seconds > 2]
        self.talk, self.listening, self.stops = heard("talk"), heard("backchannel"), heard("stop")
        self.noises = bank.of("noise")
        for name in ("turns", "long", "listening", "stops"):
            if not getattr(self, name):
                raise ValueError(f"the bank has no {name} for the part {part!r}: speak more questions, by more voices")
        ask, long, rest = self.style.ask, self.style.long, self.style.rest
        odds = [ask, long, self.style.talk if self.talk else 0.0, self.style.listen, rest]
        self.odds = np.cumsum(odds) / np.sum(odds)

    def __call__(self, random: np.random.Generator) -> Dialogue:
        style, end = self.style, self.frames * FRAME
        made = Dialogue(text=np.full(self.frames, PAD))
        made.hiss = 10 ** (random.uniform(*style.hiss) / 20)
        gain = 10 ** (random.uniform(*style.gain) / 20)
        self._disturb(made, gain, random)
        now = _seconds(random, style.start)
        while now < end:
            kind = int(np.searchsorted(self.odds, random.random()))
            if kind == 4:
                now += _seconds(random, style.silence)
                continue
            if kind == 3:
                now = self._say(made, _pick(self.listening, random), now, gain, random)
            elif kind == 2:
                now = self._say(made, _pick(self.talk, random), now, gain, random)
                now = self._answer(made, UNKNOWN, now, gain, random)
            else:
                turn, answer = _pick(self.long if kind == 1 else self.turns, random)
                now = self._ask(made, turn, now, gain, random)
                now = self._answer(made, answer, now, gain, random)
            now += _seconds(random, style.gap)
        return made

    def _say(self, made: Dialogue, one: Utterance, at: int, gain: float, random: np.random.Generator) -> int:
        """Where it ends."""
        rate = random.uniform(*self.style.speed)
        length = int(one.samples / rate)
        made.user.append(Sound(at, one.begin, length, rate, gain * 10 ** (random.uniform(-2, 2) / 20)))
        return at + length

    def _ask(
        self, made: Dialogue, turn: Sequence[Utterance], now: int, gain: float, random: np.random.Generator
    ) -> int:
        for number, one in enumerate(turn):
            now = self._say(made, one, now + (_seconds(random, self.style.pause) if number else 0), gain, random)
        return now

    def _answer(self, made: Dialogue, text: str, heard: int, gain: float, random: np.random.Generator) -> int:
        """The answer to what ended at ``heard``, and what the user does meanwhile; where all that ends."""
        style, one = self.style, self.answers[text]
        begin = _frame_after(heard + _seconds(random, style.reply))
        end = begin + one.samples
        chance = random.random()
        if one.seconds > 1.2 and chance < style.interrupt:
            onset = begin + int(random.uniform(0.4 * RATE, one.samples - 0.4 * RATE))
            stop = self._silent(onset, random)
            self._speak(made, text, begin, min(stop, end), stop < end)
            if random.random() < 0.5:
                now = self._say(made, _pick(self.stops, random), onset, gain, random)
                return self._answer(made, AFTER_STOP[0], now, gain, random)
            turn, answer = _pick(self.turns, random)
            now = self._ask(made, turn, onset, gain, random)
            return self._answer(made, answer, now, gain, random)
        if one.seconds > 1.2 and chance > 1 - style.encourage:
            return self._encouraged(made, text, begin, gain, random)
        self._speak(made, text, begin, end, False)
        return end

    def _silent(self, onset: int, random: np.random.Generator) -> int:
        """Where the assistant falls silent once the user begins to speak."""
        return _frame_after(onset + _seconds(random, self.style.react))

    def _encouraged(self, made: Dialogue, text: str, begin: int, gain: float, random: np.random.Generator) -> int:
        """An answer that makes room for each encouragement and then goes on with the word it left; where it ends."""
        one, source = self.answers[text], 0
        onset = begin + _seconds(random, (0.3, 1.0))
        while onset < begin + one.samples - source - RATE // 2:
            stop = self._silent(onset, random)
            self._speak(made, text, begin, stop, True, source)
            left = source + stop - begin
            source = max(at for at, _ in [(0, []), *self.words[text]] if at <= left) // FRAME * FRAME
            over = self._say(made, _pick(self.listening, random), onset, gain, random)
            begin = _frame_after(over + _seconds(random, self.style.resume))
            onset = begin + _seconds(random, (1.0, 3.0))
        end = begin + one.samples - source
        self._speak(made, text, begin, end, False, source)
        return end

    def _speak(self, made: Dialogue, text: str, begin: int, end: int, cut: bool, source: int = 0) -> None:
        """The assistant's answer from ``begin`` to ``end``, and its words; cut: it is not all of it. source: sample of
        the answer that this begins with."""
        made.model.append(Sound(begin, self.answers[text].begin + source, end - begin))
        free, last = 0, min(end // FRAME, self.frames) if cut else self.frames
        for at, tokens in self.words[text]:
            if at < source:
                continue
            frame = max(free, (begin + at - source) // FRAME - self.style.lead, 0)
            if frame >= last:
                return
            if frame and made.text[frame - 1] == PAD:
                made.text[frame - 1] = END_PAD
            tokens = tokens[: last - frame]
            made.text[frame : frame + len(tokens)] = tokens
            free = frame + len(tokens)

    def _disturb(self, made: Dialogue, gain: float, random: np.random.Generator) -> None:
        """A noise under everything, and short ones now and then."""
        if not self.noises:
            return
        style, end = self.style, self.frames * FRAME
        if random.random() < style.steady:
            made.steady = _pick(self.noises, random).begin
            made.steady_gain = gain * 10 ** (random.uniform(*style.noise) / 20)
        now = 0
        for _ in range(int(random.poisson(style.bursts))):
            now += int(random.uniform(0, end))
            one = _pick(self.noises, random)
            length = min(one.samples, int(random.uniform(0.2, 2.0) * RATE))
            if now + length < end:
                level = gain * 10 ** (random.uniform(*style.noise) / 20)
                made.noise.append(Sound(now, one.begin, length, 1.0, level))
            now += length


class Encode:
    """A word to its tokens, by a SentencePiece model; what a ``Composer`` asks for."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)

    @property
    def size(self) -> int:
        """Tokens that there are."""
        return int(self._pieces.vocab_size())

    def __call__(self, word: str) -> list[int]:
        tokens: list[int] = self._pieces.encode(word)
        return tokens


class Dialogues:
    """Batches of dialogues, a pure function of seed and step. pcm: the bank's samples, on the device to work on."""

    def __init__(self, composer: Composer, pcm: Tensor, rows: int, seed: int) -> None:
        self.composer, self.pcm, self.rows, self.seed = composer, pcm, rows, seed
        self._ahead = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[list[Dialogue]]] | None = None

    def __call__(self, step: int) -> Batch:
        ready, self._next = self._next, None
        scores = ready[1].result() if ready and ready[0] == step else self.scores(step)
        self._next = (step + 1, self._ahead.submit(self.scores, step + 1))
        return self.sound(scores, step)

    def scores(self, step: int) -> list[Dialogue]:
        """One a row."""
        return [self.composer(np.random.default_rng([self.seed, step, row])) for row in range(self.rows)]

    def sound(self, scores: Sequence[Dialogue], step: int = 0) -> Batch:
        """The batch that scores stand for."""
        device, width = self.pcm.device, self.composer.frames * FRAME
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + step)
        user = lay(self.pcm, [score.user for score in scores], width)
        user += lay(self.pcm, [score.noise for score in scores], width)
        if any(score.steady >= 0 for score in scores):
            longest = max(one.samples for one in self.composer.noises)
            steady = [
                [Sound(at, score.steady, longest, 1.0, score.steady_gain) for at in range(0, width, longest)]
                if score.steady >= 0
                else []
                for score in scores
            ]
            user += lay(self.pcm, steady, width)
        hiss = placed(np.array([[score.hiss] for score in scores], np.float32), device)
        user += hiss * torch.randn(user.shape, generator=generator, device=device)
        model = lay(self.pcm, [score.model for score in scores], width)
        text = placed(np.stack([score.text for score in scores]), device)
        return Batch(user.clamp(-1, 1), model, text)


def lay(pcm: Tensor, rows: Sequence[Sequence[Sound]], width: int) -> Tensor:
    """Sound where it belongs: ``[B, width]``. Parts of a row are in order; a part ends where the next begins."""
    count = max(1, *map(len, rows)) if rows else 1
    places = np.full((5, len(rows), count), float(width))
    for row, parts in enumerate(rows):
        for number, part in enumerate(parts):
            places[:, row, number] = part.at, part.begin, part.length, part.rate, part.gain
    at, begin, length, rate, gain = placed(places, pcm.device)
    position = torch.arange(width, device=pcm.device, dtype=torch.float64).expand(len(rows), -1)
    which = torch.searchsorted(at, position.contiguous(), right=True).sub_(1).clamp_(min=0)
    inside = position - at.gather(1, which)
    length = length.gather(1, which)
    real = (inside >= 0) & (inside < length)
    source = begin.gather(1, which) + inside * rate.gather(1, which)
    index = torch.where(real, source, 0).long().clamp_(max=len(pcm) - 2)
    part = (source - index).float().clamp_(0, 1)
    low, high = pcm[index].float(), pcm[index + 1].float()
    fade = ((length - inside) / FADE).clamp(0, 1).float()
    heard = (low + part * (high - low)) / 32768 * gain.gather(1, which).float() * fade
    return torch.where(real, heard, 0.0)


def _pick(things: Sequence[T], random: np.random.Generator) -> T:
    return things[int(random.integers(len(things)))]


def _frame_after(sample: int) -> int:
    """The first sample of the frame that begins there or next."""
    return -(-sample // FRAME) * FRAME


def _seconds(random: np.random.Generator, between: tuple[float, float]) -> int:
    return int(random.uniform(*between) * RATE)
