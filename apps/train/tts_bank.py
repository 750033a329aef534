"""The bank that the embedded voice learns from: sentences, each spoken by one of its voices.

    antiphon train tts bank --texts DATA/text/state_union.txt --texts DATA/text/wordnet_glosses.txt \\
        --exclude DATA/text/ljspeech_sentences.txt --out speech-bank --hours 144 --kokoro packed \\
        --device cuda:0 --workers 9

It is ``audio.pcm`` and ``manifest.jsonl`` as of ``bank.py``; every utterance begins and ends at an even speech
token, so that ``tokens.npy`` (a number a token) and ``mel.npy`` (two frames a token), which ``tts_tokens.py`` writes
beside them, lie as the samples do. A sentence in a hundred, told by a hash of its words, is only tested on. Banks that
were spoken apart (``--voice``) become one with ``tts_join.py``.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ...pipelines.spoken import spoken
from .bank import PARTS, Bank, BankWriter, Order, Worker, rendered
from .data import to_int16
from .domain import answers, kept_back
from .prompts import build_prompts, sentences
from .synthesise import SECONDS_A_CHARACTER
from .tts_sizes import ALPHABET, FRAME, TOKEN, VOICES
from .voices import RATE

TOKENS, MEL = "tokens.npy", "mel.npy"
HELD_OUT = 0.01  # share of the sentences
EDGES = (TOKEN, 5 * TOKEN)  # samples of the teacher's silence left before and after the sound
SHORTEST, LONGEST = 0.4, 12.0  # seconds
PACE = (0.03, 0.16)  # seconds a character that are credible, without the edges
TEST_WORDS = (4, 16)

MARKS = (
    ("[\u2018\u2019\u02bc`]", "'"),
    (r"\s*(?:[\u2013\u2014]|--+)\s*", ", "),
    (r"\u2026|\.\.+", "."),
    (r"[\s_/]+", " "),
    (f"[^{re.escape(ALPHABET)}]", ""),
)
"""What is replaced, one after the other, in a text of lower-case letters without accents to leave only ``ALPHABET``."""


def written(text: str) -> str:
    """A text as the language model reads it: in words, of ``ALPHABET`` alone."""
    letters = unicodedata.normalize("NFD", spoken(text).lower())
    letters = "".join(letter for letter in letters if unicodedata.category(letter) != "Mn")
    for pattern, mark in MARKS:
        letters = re.sub(pattern, mark, letters)
    return letters.strip()


def characters(text: str) -> list[int]:
    """The text tokens of a ``written`` text."""
    return [ALPHABET.index(letter) for letter in text]


@dataclass(frozen=True)
class Spoken:
    """An utterance. text: as ``written`` has it. voice: its number. begin, count: in speech tokens."""

    text: str
    voice: int
    begin: int
    count: int
    held_out: bool

    @property
    def samples(self) -> slice:
        """Of ``SpeechBank.pcm``."""
        return slice(self.begin * TOKEN, (self.begin + self.count) * TOKEN)

    @property
    def tokens(self) -> slice:
        """Of ``SpeechBank.tokens``."""
        return slice(self.begin, self.begin + self.count)

    @property
    def frames(self) -> slice:
        """Of ``SpeechBank.mel``."""
        return slice(self.begin * TOKEN // FRAME, (self.begin + self.count) * TOKEN // FRAME)


class SpeechBank:
    """A finished bank. ``pcm``: int16 samples at 24 kHz. Arrays are memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bank = folder, Bank(folder)
        names = list(VOICES)
        self.pcm = self.bank.pcm
        self.utterances = [
            Spoken(
                written(one.text),
                names.index(one.voice),
                one.begin // TOKEN,
                one.samples // TOKEN,
                kept_back("sentence", words(one.text), HELD_OUT),
            )
            for one in self.bank.of("speech")
        ]
        if not self.utterances:
            raise ValueError(f"{folder} holds no speech to learn from: make it with 'antiphon train tts bank'")

    @property
    def train(self) -> list[Spoken]:
        """What may be trained on."""
        return [one for one in self.utterances if not one.held_out]

    @property
    def test(self) -> list[Spoken]:
        """What may not."""
        return [one for one in self.utterances if one.held_out]

    @property
    def tokens(self) -> NDArray[np.int16]:
        """``[tokens]``, where ``antiphon train tts tokens`` has been."""
        return self._beside(TOKENS)

    @property
    def mel(self) -> NDArray[np.float16]:
        """``[2 tokens, mels]``, where ``antiphon train tts tokens`` has been: as ``PromptMel`` makes them."""
        return self._beside(MEL)

    def _beside(self, name: str) -> NDArray[Any]:
        if not (self.folder / name).is_file():
            raise FileNotFoundError(f"{self.folder} holds no {name}: make it with 'antiphon train tts tokens'")
        found: NDArray[Any] = np.load(self.folder / name, mmap_mode="r")
        return found


class Batches:
    """Which utterances make the batch of a step: of similar length, a pure function of seed and step.

    counts: lengths. room: the longest utterance's, in the same unit, times the rows of its batch. widths: what a batch
    is padded to; longer utterances are left out. Every shape comes with a number of rows of its own.
    """

    def __init__(self, counts: Sequence[int], room: int, widths: Sequence[int], seed: int = 0) -> None:
        self.counts, self.seed = np.asarray(counts), seed
        which = np.searchsorted(np.asarray(sorted(widths)), self.counts)
        self.groups = [
            (width, max(1, room // width), found)
            for place, width in enumerate(sorted(widths))
            if len(found := np.flatnonzero(which == place))
        ]
        if not self.groups:
            raise ValueError(f"no utterance is as short as {max(widths)}: give more widths")
        batches = np.array([len(found) / rows for _, rows, found in self.groups])
        self._odds = np.cumsum(batches) / batches.sum()

    def __call__(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The width of the batch, and the utterances in it."""
        random = np.random.default_rng([self.seed, step])
        width, rows, found = self.groups[int(np.searchsorted(self._odds, random.random(), side="right"))]
        return width, random.choice(found, rows, replace=rows > len(found))


def gathered(table: Tensor, begin: Tensor, count: Tensor, width: int) -> Tensor:
    """``[N, ...]`` -> ``[B, width, ...]``: ``count [B]`` entries from ``begin [B]`` on, zeros behind them."""
    index = torch.arange(width, device=table.device)
    real = index < count[:, None]
    found = table[(begin[:, None] + index).clamp(max=len(table) - 1)]
    return found * real.view(*real.shape, *[1] * (found.dim() - 2)).to(found.dtype)


# ---------------------------------------------------------------- making it


def words(text: str) -> str:
    """What tells sentences apart."""
    return " ".join(re.findall(r"[a-z]+", text.lower().replace("'", "")))


def unseen_sentences(path: Path, count: int = 100) -> list[str]:
    """The sentences that the finished voice is tested with: of a text that no bank holds (``--exclude``), those of 4 to
    16 words whose words have the lowest SHA-256."""
    low, high = TEST_WORDS
    fit = {words(text): text for text in sentences(path) if low <= len(text.split()) <= high}
    chosen = sorted(fit, key=lambda key: hashlib.sha256(key.encode()).digest())[:count]
    return [fit[key] for key in chosen]


def number_sentence(rng: random.Random) -> str:
    """A sentence with a number, a time, a price or a date."""
    form = rng.choice(_FORMS)
    values = {
        "small": rng.randint(0, 20),
        "n": rng.randint(21, 999),
        "large": rng.randint(1000, 99999),
        "hour": rng.randint(1, 12),
        "minute": f"{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50, rng.randint(1, 59))):02}",
        "half": rng.choice(("am", "pm")),
        "cents": f"{rng.randint(1, 99):02}",
        "decimal": f"{rng.randint(0, 40)}.{rng.randint(1, 9)}",
        "percent": rng.randint(1, 100),
        "day": rng.randint(1, 28),
        "month": rng.choice(("January", "February", "March", "April", "May", "June", "July", "August", "September",
                             "October", "November", "December")),
        "weekday": rng.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")),
        "year": rng.randint(1700, 2049),
        "phone": f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
        "place": rng.choice(("first", "second", "third", "fourth", "fifth", "ninth", "tenth", "twelfth", "twentieth")),
    }  # fmt: skip
    return spoken(form.format(**values))


_FORMS = (
    "The train leaves at {hour}:{minute} {half}.",
    "It is {hour}:{minute} now.",
    "We meet on {weekday}, {month} {day}, at {hour} o'clock.",
    "That will be {n} dollars.",
    "It costs ${small}.{cents} in all.",
    "There were {large} people in the {place} year.",
    "Turn to page {n}, please.",
    "The answer is {n}.",
    "Is it {small} or {n}?",
    "{small} and {small} more make how many?",
    "About {percent}% of them agreed.",
    "The temperature is {decimal} degrees today.",
    "She was born in {year}, on the {place} of {month}.",
    "My number is {phone}.",
    "He ran {decimal} kilometers in {n} minutes.",
    "In {year}, the price rose by {percent} percent.",
    "Your table is number {small}, on the {place} floor.",
    "I counted {n}, then {large}, and then I stopped!",
    "The meeting on {weekday} takes {small} hours and {minute} minutes.",
)


def widened(texts: Iterable[str]) -> Iterator[str]:
    """All of them, two with a word that none before had and one without in turn: characters do not tell how English
    words sound, so that the language model speaks best those that it has heard."""
    seen: set[str] = set()
    new: list[str] = []
    old: list[str] = []
    for text in texts:
        found = set(words(text).split())
        (old if found <= seen else new).append(text)
        seen |= found
    for place, text in enumerate(new):
        yield text
        if place % 2 and place // 2 < len(old):
            yield old[place // 2]
    yield from old[len(new) // 2 :]


def plan(texts: Sequence[Path], exclude: Sequence[Path], hours: float, seed: int) -> list[Order]:
    """Who says what, in random order: text of the files, first what widens the vocabulary (``widened``), the dialogue
    model's answers, and sentences with numbers.

    A voice's share of the hours is its speaker's. Sentences of ``exclude`` are not spoken.
    """
    rng = random.Random(f"speech {seed}")
    prompts = build_prompts(texts, seed=seed, exclude=[text for path in exclude for text in sentences(path)])
    longest = (LONGEST - 1) / SECONDS_A_CHARACTER
    read = widened(prompt.text for prompt in prompts if len(prompt.text) <= longest)
    said = iter(answers())
    whole = sum(speaker.share for speaker in VOICES.values())
    wanted = {name: 3600 * hours * speaker.share / whole for name, speaker in VOICES.items()}
    made = dict.fromkeys(VOICES, 0.0)
    orders = []
    while open_ := [name for name in VOICES if made[name] < wanted[name]]:
        name = min(open_, key=lambda voice: made[voice] / wanted[voice])
        kind = rng.random()
        text = number_sentence(rng) if kind < 0.06 else next(said, None) if kind < 0.09 else None
        text = text or next(read, None) or number_sentence(rng)
        speaker = VOICES[name]
        orders.append(Order("speech", text, speaker.teacher, speaker.voice, 1.0, PARTS, rng.getrandbits(32), name))
        made[name] += SECONDS_A_CHARACTER * len(text) + 0.2
    return orders


def whole(sound: NDArray[np.float32]) -> NDArray[np.int16]:
    """Samples with silence behind them up to a whole frame of the recogniser, two speech tokens."""
    pcm = to_int16(sound)
    return np.pad(pcm, (0, -len(pcm) % (2 * TOKEN)))


def credible(samples: int, text: str) -> bool:
    """Whether so many samples may be this text."""
    seconds = samples / RATE
    low, high = (pace * len(text) for pace in PACE)
    return SHORTEST <= seconds <= LONGEST and low <= seconds - sum(EDGES) / RATE <= max(high, 1.0)


def _speak(orders: Sequence[Order]) -> list[NDArray[np.int16]]:
    return [whole(sound) for sound in Worker.here.speak(orders, EDGES)]


def write(writer: BankWriter, pairs: Iterator[tuple[Order, NDArray[np.int16]]], minutes: float | None = None) -> int:
    """Into the bank, for so long; returns how many were left out because they cannot be their text."""
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    left_out = 0
    for order, sound in pairs:
        if credible(len(sound), order.text):
            writer.add(sound, "speech", order.text, order.source, licence="Apache-2.0")  # type: ignore[arg-type]  # int16 is kept
        else:
            left_out += 1
        if time.monotonic() > deadline:
            break
    return left_out


def make(
    texts: Annotated[list[Path], typer.Option(help="Text to read; repeat it.")],
    out: Annotated[Path, typer.Option(help="Folder of the bank.")],
    exclude: Annotated[list[Path] | None, typer.Option(help="Text never to read; repeat it.")] = None,
    hours: Annotated[float, typer.Option(help="Of all voices together, about.")] = 40.0,
    kokoro: Annotated[Path | None, typer.Option(help="What antiphon.apps.train.voices.pack wrote.")] = None,
    device: Annotated[str, typer.Option(help="For Kokoro: cpu or cuda:0.")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes; 0 to work in this one.")] = 1,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long: the bank is then smaller.")] = None,
    voice: Annotated[list[str] | None, typer.Option(help="Only this voice's part; repeat it.")] = None,
    seed: Annotated[int, typer.Option(help="Of who says what.")] = 0,
) -> None:
    """Speak the bank; without --kokoro only the voices of hibari do."""
    if unknown := set(voice or ()) - set(VOICES):
        raise typer.BadParameter(f"--voice {', '.join(sorted(unknown))}: there are {', '.join(VOICES)}")
    console = Console()
    chosen = [name for name in voice or VOICES if kokoro or VOICES[name].teacher != "kokoro"]
    orders = [one for one in plan(texts, exclude or [], hours, seed) if one.source in chosen]
    writer = BankWriter(out)
    with closing(rendered(orders, workers, device, kokoro, _speak)) as pairs:
        left_out = write(writer, iter(track(pairs, "speaking", len(orders), console=console)), minutes)
    writer.close()
    bank = SpeechBank(out)
    for number, name in enumerate(VOICES):
        own = [one for one in bank.utterances if one.voice == number]
        spoken_hours = sum(one.count for one in own) * TOKEN / RATE / 3600
        console.print(f"{name}: {len(own):,} utterances, {spoken_hours:.2f} h")
    console.print(f"{len(bank.test):,} utterances are kept for testing; {left_out:,} were left out")
