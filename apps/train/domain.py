"""What the tiny dialogue model can talk about: a closed world of questions whose answers are true and always the same.

A *topic* is a set of facts and the forms in which one asks for them; a *question* is a form filled with a fact. What is
kept for testing follows from hashes of names alone, so no list of it has to be kept: some forms of a topic, some
questions (a form with a fact), and of the topics that can be worked out rather than learnt by heart, some facts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

from num2words import num2words

HELD_OUT = 0.1  # share of forms, questions, facts and voices that is kept for testing
Part = Literal["train", "form", "question"]

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Topic:
    """forms: with slots such as ``{a}``, the last of which matters. facts: what fills the slots, with ``answer``.

    rule: an answer can be worked out, so whole facts may be held out.
    """

    name: str
    forms: tuple[str, ...]
    facts: tuple[Mapping[str, str], ...]
    rule: bool = False


@dataclass(frozen=True)
class Question:
    """As it is spoken. cut: after how many words a pause may come at the latest, for until then the question is not
    complete; 0 where it may be at once."""

    topic: str
    form: str
    text: str
    answer: str
    cut: int
    part: Part

    @property
    def key(self) -> str:
        return f"{self.topic}: {self.text}"

    def halves(self, at: int) -> tuple[str, str]:
        """The question with a pause after ``at`` words, 1 to ``cut``: the first half sounds unfinished."""
        words = self.text.split()
        return " ".join(words[:at]).rstrip(",") + ",", " ".join(words[at:])


def kept_back(kind: str, name: str, share: float = HELD_OUT) -> bool:
    """Whether a thing is only tested on: a share of all names, the same on every computer and for every seed."""
    digest = hashlib.sha256(f"{kind}\n{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def part_of(topic: Topic, form: str, fact: Mapping[str, str]) -> Part:
    """A topic's first two forms are never held out, nor the only question of a form that has no slots."""
    slots = _SLOT.findall(form)
    if form not in topic.forms[:2] and kept_back("form", f"{topic.name}/{form}", 2 * HELD_OUT):
        return "form"
    filled = "/".join(fact[slot] for slot in slots)
    held = slots and kept_back("question", f"{topic.name}/{form}/{filled}")
    if held or (topic.rule and kept_back("fact", f"{topic.name}/{filled}", HELD_OUT / 2)):
        return "question"
    return "train"


def _ask(topic: Topic, form: str, fact: Mapping[str, str]) -> Question:
    text = form.format(**fact)
    slots = list(_SLOT.finditer(form))
    cut = len(form[: slots[-1].start()].format(**fact).split()) if slots else 0
    return Question(topic.name, form, text[0].upper() + text[1:], fact["answer"], cut, part_of(topic, form, fact))


@cache
def questions() -> tuple[Question, ...]:
    """All of them, in a fixed order."""
    return tuple(_ask(topic, form, fact) for topic in TOPICS for form in topic.forms for fact in topic.facts)


def answers() -> tuple[str, ...]:
    """All that the assistant ever says, once each."""
    every = [UNKNOWN, *(question.answer for question in questions()), *AFTER_STOP]
    return tuple(dict.fromkeys(every))


def _number(value: int) -> str:
    return str(num2words(value)).replace("-", " ")


def _sums(sign: str, values: Iterable[tuple[int, int, int]]) -> tuple[dict[str, str], ...]:
    return tuple(
        {
            "a": _number(a),
            "b": _number(b),
            "answer": f"{_number(a).capitalize()} {sign} {_number(b)} is {_number(c)}.",
        }
        for a, b, c in values
    )


def _facts(sentence: str, pairs: Mapping[str, str]) -> tuple[dict[str, str], ...]:
    """``sentence`` with ``{a}`` and ``{b}`` as answer."""
    made = []
    for a, b in pairs.items():
        answer = sentence.format(a=a, b=b)
        made.append({"a": a, "b": b, "answer": answer[0].upper() + answer[1:]})
    return tuple(made)


def _only(answer: str) -> tuple[dict[str, str], ...]:
    return ({"answer": answer},)


def _ring(names: Sequence[str], step: int, sentence: str) -> tuple[dict[str, str], ...]:
    return _facts(sentence, {name: names[(place + step) % len(names)] for place, name in enumerate(names)})


def _pairs(text: str) -> dict[str, str]:
    """``france:Paris, italy:Rome``."""
    parts = (part.strip().partition(":") for part in text.split(","))
    return {a: b for a, _, b in parts}


def _both(pairs: Mapping[str, str]) -> dict[str, str]:
    return {**pairs, **{b: a for a, b in pairs.items()}}


def _letters(word: str) -> str:
    return ", ".join(word.upper())


def _count(numbers: Iterable[int]) -> str:
    return ", ".join(map(_number, numbers)).capitalize() + "."


DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = re.findall(r"\w+", "January February March April May June July August September October November December")
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CAPITALS = _pairs(
    "France:Paris, Italy:Rome, Spain:Madrid, Germany:Berlin, England:London, Ireland:Dublin, Portugal:Lisbon, "
    "Greece:Athens, Austria:Vienna, Poland:Warsaw, Norway:Oslo, Sweden:Stockholm, Denmark:Copenhagen, "
    "Finland:Helsinki, Russia:Moscow, Turkey:Ankara, Egypt:Cairo, Kenya:Nairobi, India:New Delhi, China:Beijing, "
    "Japan:Tokyo, Canada:Ottawa, Mexico:Mexico City, Cuba:Havana, Peru:Lima, Chile:Santiago, Australia:Canberra, "
    "Hungary:Budapest, Belgium:Brussels, Iran:Tehran"
)
COLOURS = _pairs(
    "grass:green, the sky:blue, snow:white, coal:black, a lemon:yellow, blood:red, a carrot:orange, chocolate:brown, "
    "a banana:yellow, milk:white, the sun:yellow, a ripe tomato:red, the sea:blue, an elephant:grey, a flamingo:pink, "
    "a frog:green"
)
OPPOSITES = _both(
    _pairs(
        "hot:cold, big:small, up:down, day:night, left:right, open:closed, fast:slow, happy:sad, wet:dry, full:empty, "
        "young:old, hard:soft, high:low, early:late, light:dark, rich:poor, strong:weak, thick:thin, clean:dirty, "
        "near:far, inside:outside, first:last, push:pull, loud:quiet"
    )
)
SOUNDS = _pairs(
    "cow:moo, dog:woof, cat:meow, sheep:baa, duck:quack, lion:roar, pig:oink, bee:buzz, snake:hiss, "
    "mouse:squeak, crow:caw"
)
LEGS = _pairs("dog:four, cat:four, horse:four, spider:eight, bird:two, bee:six, cow:four")
YOUNG = _pairs("dog:puppy, cat:kitten, cow:calf, sheep:lamb, horse:foal, duck:duckling, bear:cub, goat:kid, hen:chick")
WORDS = re.findall(
    r"\w+",
    "cat dog sun moon tree fish bird milk bread apple table chair house mouse horse water green happy paper river "
    "stone cloud music train plane door hand book king queen ship star snow rain frog lamp clock shoe hat cup",
)

TOPICS: tuple[Topic, ...] = (
    Topic(
        "plus",
        ("what is {a} plus {b}?", "{a} plus {b}.", "how much is {a} plus {b}?", "can you add {a} and {b}?",
         "what do you get when you add {a} and {b}?", "tell me {a} plus {b}.", "what is the sum of {a} and {b}?"),
        _sums("plus", ((a, b, a + b) for a in range(13) for b in range(13))),
        rule=True,
    ),
    Topic(
        "minus",
        ("what is {a} minus {b}?", "{a} minus {b}.", "how much is {a} minus {b}?", "take away from {a} the number {b}.",
         "tell me {a} minus {b}."),
        _sums("minus", ((a, b, a - b) for a in range(13) for b in range(a + 1))),
        rule=True,
    ),
    Topic(
        "times",
        ("what is {a} times {b}?", "{a} times {b}.", "how much is {a} times {b}?", "can you multiply {a} by {b}?"),
        _sums("times", ((a, b, a * b) for a in range(2, 11) for b in range(2, 11))),
        rule=True,
    ),
    Topic(
        "next number",
        ("what number comes after {a}?", "which number comes after {a}?", "what comes after {a}?",
         "tell me the number that follows {a}."),
        _facts("After {a} comes {b}.", {_number(n): _number(n + 1) for n in range(100)}),
        rule=True,
    ),
    Topic(
        "number before",
        ("what number comes before {a}?", "which number comes before {a}?", "what comes before {a}?"),
        _facts("Before {a} comes {b}.", {_number(n): _number(n - 1) for n in range(1, 101)}),
        rule=True,
    ),
    Topic(
        "counting",
        ("count to {a}.", "can you count to {a}?", "please count to {a}.", "count from one to {a}."),
        tuple({"a": _number(n), "answer": _count(range(1, n + 1))} for n in range(3, 21)),
    ),
    Topic(
        "counting down",
        ("count down from {a}.", "can you count down from {a}?", "count backwards from {a}."),
        tuple({"a": _number(n), "answer": _count(range(n, 0, -1))} for n in range(3, 13)),
    ),
    Topic(
        "spelling",
        ("how do you spell {a}?", "spell {a}.", "can you spell {a}?", "spell the word {a}.",
         "what are the letters of {a}?"),
        _facts("{a} is spelled {b}.", {word: _letters(word) for word in WORDS}),
    ),
    Topic(
        "next letter",
        ("what letter comes after {a}?", "which letter comes after {a}?", "tell me the letter after {a}."),
        _facts("After {a} comes {b}.", dict(pairwise(ALPHABET))),
    ),
    Topic(
        "next day",
        ("what day comes after {a}?", "which day comes after {a}?", "what is the day after {a}?",
         "tell me the day that follows {a}."),
        _ring(DAYS, 1, "{b} comes after {a}."),
    ),
    Topic(
        "day before",
        ("what day comes before {a}?", "which day comes before {a}?", "what is the day before {a}?"),
        _ring(DAYS, -1, "{b} comes before {a}."),
    ),
    Topic(
        "next month",
        ("what month comes after {a}?", "which month comes after {a}?", "what is the month after {a}?"),
        _ring(MONTHS, 1, "{b} comes after {a}."),
    ),
    Topic(
        "month before",
        ("what month comes before {a}?", "which month comes before {a}?", "what is the month before {a}?"),
        _ring(MONTHS, -1, "{b} comes before {a}."),
    ),
    Topic(
        "month lengths",
        ("how many days are in {a}?", "how many days does {a} have?", "how long is {a}?"),
        _facts("{a} has {b} days.", {month: _number(days) for month, days in zip(MONTHS, LENGTHS, strict=True)}),
    ),
    Topic(
        "capitals",
        ("what is the capital of {a}?", "tell me the capital of {a}.", "which city is the capital of {a}?",
         "do you know the capital of {a}?", "name the capital of {a}."),
        _facts("The capital of {a} is {b}.", CAPITALS),
    ),
    Topic(
        "countries",
        ("which country has the capital {b}?", "what country is {b} in?", "where is {b}?"),
        _facts("{b} is in {a}.", CAPITALS),
    ),
    Topic(
        "colours",
        ("what colour is {a}?", "which colour is {a}?", "tell me the colour of {a}.",
         "do you know what colour is {a}?"),
        _facts("{a} is {b}.", COLOURS),
    ),
    Topic(
        "opposites",
        ("what is the opposite of {a}?", "tell me the opposite of {a}.", "what's the opposite of {a}?",
         "which word is the opposite of {a}?", "name the opposite of {a}."),
        _facts("The opposite of {a} is {b}.", OPPOSITES),
    ),
    Topic(
        "sounds",
        ("what does a {a} say?", "what sound does a {a} make?", "how does a {a} sound?"),
        _facts("A {a} says {b}.", SOUNDS),
    ),
    Topic(
        "legs",
        ("how many legs does a {a} have?", "how many legs has a {a}?", "count the legs of a {a}."),
        _facts("A {a} has {b} legs.", LEGS),
    ),
    Topic(
        "young animals",
        ("what do you call a young {a}?", "what is a young {a} called?", "what is the name for a baby {a}?"),
        _facts("A young {a} is called a {b}.", YOUNG),
    ),
    Topic("alphabet", ("say the alphabet.", "can you say the alphabet?", "what are the letters of the alphabet?"),
          _only(", ".join(ALPHABET) + ".")),
    Topic("week", ("what are the days of the week?", "name the days of the week.", "tell me the days of the week."),
          _only("The days of the week are " + ", ".join(DAYS[:-1]) + " and Sunday.")),
    Topic("year", ("what are the months of the year?", "name the months of the year.", "tell me all the months."),
          _only("The months are " + ", ".join(MONTHS[:-1]) + " and December.")),
    Topic("seasons", ("what are the four seasons?", "name the seasons.", "tell me the seasons of the year."),
          _only("The four seasons are spring, summer, autumn and winter.")),
    Topic("rainbow", ("what are the colours of the rainbow?", "name the colours of the rainbow."),
          _only("The colours of the rainbow are red, orange, yellow, green, blue, indigo and violet.")),
    Topic("planets", ("what are the planets?", "name the planets.", "tell me the names of the planets."),
          _only("The planets are Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.")),
    Topic(
        "story", ("tell me a story.", "can you tell me a story?", "I would like to hear a story."),
        _only("Once there was a small fox who lived by the sea. Every morning she ran along the sand and counted the "
              "waves. One day she counted a hundred, and the sea was so pleased that it gave her a shell."),
    ),
    Topic("time", ("what time is it?", "can you tell me the time?", "do you know what time it is?", "what's the time?"),
          _only("I do not know the time, I have no clock.")),
    Topic("date", ("what day is it today?", "what is the date today?", "what's today's date?"),
          _only("I do not know the date, I have no calendar.")),
    Topic("weather", ("what is the weather like?", "is it raining?", "how is the weather today?"),
          _only("I do not know the weather, I have no window.")),
    Topic("hello", ("hello.", "hello there.", "hi.", "good morning.", "hey there.", "good evening."),
          _only("Hello! How can I help you?")),
    Topic("how are you", ("how are you?", "how are you doing?", "how are you today?"), _only("I am fine, thank you.")),
    Topic("name", ("what is your name?", "who are you?", "what are you called?", "tell me your name."),
          _only("My name is Antiphon.")),
    Topic(
        "ability", ("what can you do?", "what do you know?", "how can you help me?"),
        _only("I can add and subtract small numbers, count, spell short words, and tell you about days, months, "
              "capitals, colours and animals."),
    ),
    Topic("machine", ("are you a person?", "are you a machine?", "are you human?"), _only("I am a small machine.")),
    Topic("thanks", ("thank you.", "thanks.", "thank you very much.", "thanks a lot."), _only("You are welcome.")),
    Topic("goodbye", ("goodbye.", "bye.", "bye bye.", "see you later.", "good night."), _only("Goodbye.")),
)  # fmt: skip

UNKNOWN = "Sorry, I do not know that."
"""The answer to talk about anything else."""
AFTER_STOP = ("Okay.",)
STOPS = (
    "stop.",
    "stop it.",
    "wait.",
    "wait a moment.",
    "hold on.",
    "okay stop.",
    "please stop.",
    "no, stop.",
    "enough.",
    "that's enough.",
    "thank you, that's enough.",
    "be quiet please.",
)
"""What ends an answer from outside; the assistant says ``AFTER_STOP``."""
BACKCHANNELS = ("mm hmm.", "uh huh.", "hmm.", "yeah.", "right.", "I see.", "ah.", "oh.")
"""What one says while listening; the assistant goes on, and says nothing where it has nothing to say."""


def of_part(part: Part) -> Iterator[Question]:
    """The questions of one part."""
    return (question for question in questions() if question.part == part)
