"""A bank of utterances that dialogues are composed of: the assistant's answers, users' questions, what people say while
they listen or to interrupt, other talk and noise. At 24 kHz, cut to where there is sound, all at one loudness.

    antiphon train bank --out bank --questions 12000 --voices hibari,kokoro:3 --kokoro packed --device cuda:0 \\
        --workers 14 --talk DATA/librispeech_train_clean_5 --noise DATA/noise_esc10

A bank is ``audio.pcm`` (mono int16, back to back) and ``manifest.jsonl``, one utterance a line. The assistant speaks
with one voice and says each answer in one way; users' voices are hibari's at other speeds and Kokoro's.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from .data import MANIFEST, PCM, open_data, to_int16
from .domain import BACKCHANNELS, STOPS, Question, answers, kept_back, questions
from .synthesise import load_teacher, parse_weights
from .voices import RATE, Line, Teacher
from .voices.signal import resample

Role = Literal["answer", "question", "first half", "second half", "backchannel", "stop", "talk", "noise", "speech"]
ASSISTANT = "heart"  # hibari's voice
SPEEDS = (0.85, 1.2)
PARTS = 40
RATIOS = tuple(range(32, 51))  # of 40 parts: pitch, formants and length of hibari as a user
HALVED = 0.3  # share of the questions that are spoken in two halves
ASIDES = 40  # voices that say each backchannel and each stop
LOUDNESS = 0.08  # root mean square of what there is sound in
STRESS = "\u02c8\u02cc"  # marks before a stressed vowel
EDGE = 480  # samples left before and after the sound
LONGEST_TALK, SHORTEST_TALK = 7.0, 1.5  # seconds
CHUNK = 64  # utterances that a worker renders at a time


@dataclass(frozen=True)
class Utterance:
    """Where one lies. source: the key of its question. pair: the same for two halves of one. words: of an answer, with
    the sample that each begins at."""

    role: Role
    text: str
    voice: str
    begin: int
    samples: int
    source: str = ""
    pair: int = -1
    words: tuple[tuple[str, int], ...] = ()
    licence: str = ""

    @property
    def seconds(self) -> float:
        return self.samples / RATE

    @property
    def held_out(self) -> bool:
        """Whether its voice is only tested on: for a blend of voices, if one of them is."""
        teacher, _, voice = self.voice.partition(":")
        names = (f"{teacher}:{part.partition('*')[0]}" for part in voice.split("+"))
        return self.role not in ("answer", "speech") and any(kept_back("voice", name) for name in names)


@dataclass(frozen=True)
class Order:
    """An utterance to be spoken by a teacher. stretch: samples out for ``PARTS`` in."""

    role: Role
    text: str
    teacher: str
    voice: str
    speed: float
    stretch: int
    seed: int
    source: str = ""
    pair: int = -1


class Bank:
    """A finished bank: ``utterances``, and ``pcm``, the samples, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {MANIFEST}: make a bank with 'antiphon train bank'")
        with path.open(encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        self.utterances = [
            Utterance(**{**record, "words": tuple((word, at) for word, at in record["words"])}) for record in records
        ]
        self.pcm: NDArray[np.int16] = np.memmap(folder / PCM, dtype=np.int16, mode="r")
        if (end := max(one.begin + one.samples for one in self.utterances)) > len(self.pcm):
            raise ValueError(f"{folder / PCM} holds {len(self.pcm)} samples but {end} are listed: make the bank again")

    def of(self, *roles: Role) -> list[Utterance]:
        return [one for one in self.utterances if one.role in roles]

    def summary(self) -> dict[str, dict[str, object]]:
        """What a card says of each role."""
        roles: dict[str, list[Utterance]] = {}
        for one in self.utterances:
            roles.setdefault(one.role, []).append(one)
        return {
            role: {
                "utterances": len(some),
                "hours": round(sum(one.seconds for one in some) / 3600, 2),
                "voices": len({one.voice for one in some}),
                "sources": sorted({one.voice.partition(":")[0] for one in some}),
                "licences": sorted({one.licence for one in some}),
            }
            for role, some in roles.items()
        }

    def audio(self, one: Utterance) -> NDArray[np.float32]:
        """Its samples, in -1 ... 1."""
        return np.divide(self.pcm[one.begin : one.begin + one.samples], 32768, dtype=np.float32)


class BankWriter:
    """Appends utterances; the manifest is written on ``close``, so a bank without one is unfinished."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        self.folder = folder
        self._pcm = (folder / PCM).open("wb")
        self._utterances: list[Utterance] = []
        self._end = 0

    def add(self, samples: NDArray[np.float32], role: Role, text: str, voice: str, **details: object) -> None:
        """samples: at 24 kHz, as they are to be heard."""
        pcm = to_int16(samples)
        self._pcm.write(pcm.tobytes())
        self._utterances.append(Utterance(role, text, voice, self._end, len(pcm), **details))  # type: ignore[arg-type]
        self._end += len(pcm)

    def close(self) -> None:
        self._pcm.close()
        with (self.folder / MANIFEST).open("w", encoding="utf-8") as out:
            for one in self._utterances:
                out.write(json.dumps(asdict(one)) + "\n")


def plan(count: int, weights: dict[str, float], draw: dict[str, Teacher], seed: int) -> list[Order]:
    """What is to be spoken: all answers, ``count`` questions, and what people say besides.

    weights: of the users' teachers. Topics are drawn by the square root of their size, then the questions evenly.
    """
    rng = random.Random(f"bank {seed}")
    teachers, shares = list(weights), list(weights.values())
    topics: dict[str, list[Question]] = {}
    for question in questions():
        topics.setdefault(question.topic, []).append(question)
    names, sizes = list(topics), [len(topic) ** 0.5 for topic in topics.values()]
    orders = [Order("answer", text, "hibari", ASSISTANT, 1.0, PARTS, 1) for text in answers()]

    def voice() -> tuple[str, str, float, int]:
        teacher = rng.choices(teachers, shares)[0]
        stretch = rng.choice(RATIOS) if teacher == "hibari" else PARTS
        return teacher, draw[teacher].draw(rng), round(rng.uniform(*SPEEDS), 3), stretch

    for number in range(count):
        question = rng.choice(topics[rng.choices(names, sizes)[0]])
        who, key = voice(), question.key
        if question.cut and rng.random() < HALVED:
            halves = question.halves(rng.randint(1, question.cut))
            for role, text in zip(("first half", "second half"), halves, strict=True):
                orders.append(Order(role, text, *who, rng.getrandbits(32), key, number))  # type: ignore[arg-type]
        else:
            orders.append(Order("question", question.text, *who, rng.getrandbits(32), key))
    asides: tuple[tuple[Role, tuple[str, ...]], ...] = (("backchannel", BACKCHANNELS), ("stop", STOPS))
    for role, texts in asides:
        for text in texts:
            orders += [Order(role, text, *voice(), rng.getrandbits(32)) for _ in range(ASIDES)]
    return orders


def trimmed(
    speech: NDArray[np.float32], loudness: float = LOUDNESS, edges: tuple[int, int] = (EDGE, EDGE)
) -> NDArray[np.float32]:
    """From the first to the last sound with ``edges`` samples around, at one loudness; empty where there is none."""
    count = len(speech) // 240
    levels = np.sqrt(np.square(speech[: count * 240].reshape(count, 240)).mean(1)) if count else np.zeros(1)
    loud = np.flatnonzero(levels > max(1e-3, 0.03 * levels.max()))
    if not len(loud):
        return np.zeros(0, np.float32)
    begin, end = max(0, loud[0] * 240 - edges[0]), min(len(speech), (loud[-1] + 1) * 240 + edges[1])
    level = np.sqrt(np.square(levels[loud]).mean())
    gain = min(loudness / float(level), 0.99 / float(np.abs(speech).max()))
    return np.multiply(speech[begin:end], gain, dtype=np.float32)


def word_times(text: str, phonemes: str, samples: int) -> tuple[tuple[str, int], ...]:
    """The words and where they begin, in proportion to their phonemes and the stops between them."""
    words = text.split()
    groups = phonemes.split()
    if len(groups) != len(words):
        groups = words
    weights = [
        sum(c.isalpha() and c not in STRESS for c in group) + 3 * (word[-1] in ",.?!")
        for group, word in zip(groups, words, strict=True)
    ]
    begins = np.cumsum([0, *weights])[:-1] / max(1, sum(weights))
    inside = samples - 2 * EDGE
    return tuple((word, EDGE + int(share * inside)) for word, share in zip(words, begins, strict=True))


class Worker:
    """A process's teachers."""

    here: Worker

    def __init__(self, device: str, kokoro: Path | None) -> None:
        self.device, self.kokoro = torch.device(device), kokoro
        self._teachers: dict[str, Teacher] = {}

    def teacher(self, name: str) -> Teacher:
        if name not in self._teachers:
            self._teachers[name] = load_teacher(name, self.device, self.kokoro)
        return self._teachers[name]

    def speak(self, orders: Sequence[Order], edges: tuple[int, int] = (EDGE, EDGE)) -> list[NDArray[np.float32]]:
        """In the order given, see ``trimmed``; empty for what cannot be said."""
        spoken: dict[int, NDArray[np.float32]] = {}
        for name in sorted({order.teacher for order in orders}):
            chosen = [index for index, order in enumerate(orders) if order.teacher == name]
            lines = [Line(orders[i].text, orders[i].voice, orders[i].speed, orders[i].seed) for i in chosen]
            for index, speech in zip(chosen, self.teacher(name).speak(lines), strict=True):
                up, down = orders[index].stretch, PARTS
                divisor = gcd(up, down)
                if up != down and len(speech):
                    speech = resample(speech, (up // divisor, down // divisor))
                spoken[index] = trimmed(speech.numpy(), edges=edges)
        return [spoken[index] for index in range(len(orders))]

    @classmethod
    def start(cls, device: str, kokoro: Path | None) -> None:
        torch.set_num_threads(1)
        cls.here = cls(device, kokoro)


def _speak(orders: Sequence[Order]) -> list[NDArray[np.float32]]:
    return Worker.here.speak(orders)


def rendered(
    orders: Sequence[Order],
    workers: int,
    device: str,
    kokoro: Path | None,
    speak: Callable[[Sequence[Order]], list[NDArray[Any]]] = _speak,
) -> Generator[tuple[Order, NDArray[Any]], None, None]:
    """Each order with its speech, a teacher's in order. Batches are of one teacher; the teachers' batches alternate, so
    that those of the CPU and those of the GPU end together.

    speak: what a process does with a batch; ``Worker.here`` is its worker.
    """
    chunks: list[tuple[float, Sequence[Order]]] = []
    for name in sorted({order.teacher for order in orders}):
        kind = [order for order in orders if order.teacher == name]
        chunks += [(at / len(kind), kind[at : at + CHUNK]) for at in range(0, len(kind), CHUNK)]
    batches = [chunk for _, chunk in sorted(chunks, key=lambda chunk: chunk[0])]
    if workers == 0:
        Worker.here = Worker(device, kokoro)
        for batch in batches:
            yield from zip(batch, speak(batch), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, Worker.start, (device, kokoro)) as pool:
        try:
            for batch, speech in zip(batches, pool.map(speak, batches), strict=True):
                yield from zip(batch, speech, strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def write_speech(writer: BankWriter, pairs: Iterator[tuple[Order, NDArray[np.float32]]]) -> Counter[str]:
    """Into the bank; returns how many of each role were left out because nothing could be heard.

    Raises ValueError where an answer cannot be spoken.
    """
    from .voices.hibari import phonemiser

    silent: Counter[str] = Counter()
    for order, speech in pairs:
        if len(speech) < 4 * EDGE:
            silent[order.role] += 1
            if order.role == "answer":
                raise ValueError(f"the assistant cannot say {order.text!r}: write it in another way")
            continue
        details: dict[str, object] = {"licence": "Apache-2.0", "source": order.source, "pair": order.pair}
        if order.role == "answer":
            details["words"] = word_times(order.text, phonemiser(british=False)(order.text), len(speech))
        voice = order.voice if order.teacher != "hibari" else f"{order.voice}@{order.stretch}/{PARTS}"
        writer.add(speech, order.role, order.text, f"{order.teacher}:{voice}", **details)
    return silent


def parted(sound: NDArray[np.float32], longest: float = LONGEST_TALK) -> Iterator[NDArray[np.float32]]:
    """A recording in pieces of at most ``longest`` seconds, parted where the later half of a piece is quietest."""
    window, most = RATE // 50, int(longest * RATE)
    while len(sound) > most:
        later = sound[most // 2 : most]
        later = later[: len(later) // window * window].reshape(-1, window)
        place = most // 2 + int(np.square(later).sum(1).argmin()) * window + window // 2
        yield sound[:place]
        sound = sound[place:]
    yield sound


def write_recordings(writer: BankWriter, folders: Sequence[Path], role: Role, work: Path, most: float) -> None:
    """Clips of data folders, in random order, up to ``most`` hours; talk in pieces as long as a turn."""
    shards = open_data(folders, work)
    places = [(shard, index) for shard in shards for index in range(len(shard))]
    random.Random(0).shuffle(places)
    seconds = 0.0
    for shard, index in places:
        clip = shard.clips[index]
        if seconds > most * 3600:
            break
        sound = resample(torch.from_numpy(shard.audio(index).astype(np.float32) / 32768), (3, 2)).numpy()
        pieces = list(parted(sound)) if role == "talk" else [sound]
        text = clip.text if len(pieces) == 1 else ""
        for piece in map(trimmed, pieces):
            if len(piece) > (SHORTEST_TALK * RATE if role == "talk" else 4 * EDGE):
                writer.add(piece, role, text, f"{clip.corpus}:{clip.speaker}", licence=clip.licence)
                seconds += len(piece) / RATE


def make(
    out: Annotated[Path, typer.Option(help="Folder of the bank.")],
    questions: Annotated[int, typer.Option("--questions", help="Questions to speak, by so many drawn voices.")] = 12000,
    voices: Annotated[str, typer.Option(help="Users' teachers and weights: hibari,kokoro:3.")] = "hibari",
    kokoro: Annotated[Path | None, typer.Option(help="What antiphon.apps.train.voices.pack wrote.")] = None,
    talk: Annotated[list[Path] | None, typer.Option(help="Data folder of other talk; repeat it.")] = None,
    noise: Annotated[list[Path] | None, typer.Option(help="Data folder of noises; repeat it.")] = None,
    talk_hours: Annotated[float, typer.Option(help="Of other talk, at most.")] = 2.0,
    device: Annotated[str, typer.Option(help="For Kokoro: cpu or cuda:0.")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes; 0 to work in this one.")] = 1,
    seed: Annotated[int, typer.Option(help="Of what is asked by whom.")] = 0,
) -> None:
    """Speak a bank of utterances for dialogues."""
    console = Console()
    weights = parse_weights(voices)
    local = Worker("cpu", kokoro)
    orders = plan(questions, weights, {name: local.teacher(name) for name in weights}, seed)
    writer = BankWriter(out)
    pairs = track(rendered(orders, workers, device, kokoro), "speaking", len(orders), console=console)
    silent = write_speech(writer, iter(pairs))
    write_recordings(writer, talk or [], "talk", out, talk_hours)
    write_recordings(writer, noise or [], "noise", out, 1.0)
    writer.close()
    bank = Bank(out)
    for role, count in Counter(one.role for one in bank.utterances).items():
        some = bank.of(role)
        hours = sum(one.seconds for one in some) / 3600
        held = len({one.voice for one in some if one.held_out})
        console.print(f"{role}: {count:,}, {hours:.2f} h, {len({one.voice for one in some})} voices, {held} held out")
    if silent:
        console.print(f"left out because nothing could be heard: {dict(silent)}")


def main(arguments: Sequence[str]) -> None:
    """The command line; see ``--help``."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(make)
    command(list(arguments), standalone_mode=False, prog_name="antiphon train bank")


if __name__ == "__main__":
    main(sys.argv[1:])
