"""How a full-duplex model behaves, measured: a simulated user calls it and reacts to what it does, as a person would.

    antiphon train duplex_eval --model duplex-run/model --bank bank --calls 100 --device cuda --out behaviour.json \\
        --samples samples

Each call is one behaviour: a question to answer, a pause inside a question, an encouragement or an interruption during
a long answer, other talk, silence and noise. All calls of a set run side by side in one engine, through the same step
as a live session. What the model says in a step is heard in the frame after it, so that the times are those of a
session over a perfect network. A behaviour that did not come to pass, for want of an answer to interrupt, counts as
failed.
"""

from __future__ import annotations

import json
import sys
import wave
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from ...models.conformer.tokenizer import WORD_START
from ...pipelines import duplex
from ...pipelines.engine import Engine, Lease
from ..bench.common import command_line, write_result
from .bank import Bank, Utterance
from .dialogues import FRAME
from .domain import UNKNOWN, Part, questions
from .duplex_card import table
from .text import scored
from .voices import RATE

Samples = NDArray[np.float32]
Kind = Literal["question", "pause", "encouragement", "interruption", "talk", "silence"]
Event = Literal["turn", "pause", "encouragement", "interruption"]

KINDS: tuple[Kind, ...] = ("question", "pause", "encouragement", "interruption", "talk", "silence")
SETS: Mapping[str, tuple[Part, bool]] = {
    "known questions, known voices": ("train", False),
    "known questions, new voices": ("train", True),
    "new questions, new voices": ("question", True),
    "new forms, new voices": ("form", True),
}
LEVEL = 0.01  # root mean square from which on 20 ms of sound are heard
WINDOW = RATE // 50
JOINED = int(0.5 * RATE)  # stretches of sound closer than this are one
REPLY = int(2.0 * RATE)  # within which an answer must begin
STOP = int(0.3 * RATE)  # within which it must end when interrupted
BUCKETS = (16, 64, 256)  # calls that step together: few sizes, for each is captured
PATIENCE = int(4.0 * RATE)  # after which the user gives up waiting for an answer
WHOLE = 0.8  # share of an answer's length that must be heard for it to have gone on


@dataclass(frozen=True)
class Happened:
    """What the user did, in samples of the call: ``begin`` to ``end``. expected: the answer to a turn."""

    what: Event
    begin: int
    end: int
    expected: str = ""


@dataclass
class Call:
    """One call and its recording: a frame of each channel a step, and the pieces of text with their frame."""

    kind: Kind
    seed: int
    user: list[Samples] = field(default_factory=list)
    model: list[Samples] = field(default_factory=list)
    said: list[tuple[int, str]] = field(default_factory=list)
    events: list[Happened] = field(default_factory=list)

    @property
    def now(self) -> int:
        """Samples since the call began."""
        return len(self.user) * FRAME

    def sound(self) -> Samples:
        return np.concatenate(self.model)

    def text(self, begin: int, end: int) -> str:
        """What was said from ``begin`` to ``end``, in samples."""
        return "".join(piece for frame, piece in self.said if begin <= frame * FRAME < end).strip()


class Partner(Protocol):
    """What is being called."""

    def step(self, frames: Sequence[tuple[int, Samples]]) -> list[tuple[Samples, str]]:
        """The next frame of some calls, by number: what each hears -> what it says in the frame after, and a piece of
        text."""
        ...


class Model:
    """A dialogue model in an engine; every call is a session with seeds of its own."""

    def __init__(self, model: duplex.Duplex, calls: int, device: str) -> None:
        self.model = model
        self.engine = Engine(device, inline=True)
        buckets = [min(calls, size) for size in BUCKETS]
        self.engine.add("talk", model, slots=calls, variants=[1], buckets=buckets, exact=False)
        self.silent = (model.lm.config.padding, model.lm.config.end_padding)
        self._calls: dict[int, tuple[Lease, dict[str, NDArray[np.generic]]]] = {}

    def step(self, frames: Sequence[tuple[int, Samples]]) -> list[tuple[Samples, str]]:
        for number, _ in frames:
            if number not in self._calls:
                sampling = replace(self.model.lm.config.sampling, text_seed=number, audio_seed=number)
                self._calls[number] = self.engine.open_sync("talk"), self.model.inputs(sampling)
        chunks = [(self._calls[number][0], {**self._calls[number][1], "pcm": pcm}) for number, pcm in frames]
        made = []
        for row in self.engine.run_sync(chunks):
            token = int(row["text"]) if row["valid"] else -1
            known = token not in self.silent and 0 <= token < len(self.model.tokenizer.pieces)
            piece = self.model.tokenizer.pieces[token].replace(WORD_START, " ") if known else ""
            made.append((row["pcm"].numpy(), piece))
        return made

    def hang_up(self) -> None:
        """End all calls; the next have numbers of their own."""
        for lease, _ in self._calls.values():
            lease.close()
        self._calls.clear()

    def close(self) -> None:
        self.engine.close()


class Cast:
    """The utterances of a set: which questions, and whether voices are those held out."""

    def __init__(self, bank: Bank, part: Part, held_out: bool) -> None:
        self.bank = bank
        known = {question.key: question for question in questions()}

        def heard(*roles: str) -> list[Utterance]:
            return [one for one in bank.of(*roles) if one.held_out == held_out]  # type: ignore[arg-type]

        def of_part(role: str) -> list[tuple[Utterance, str]]:
            return [(one, known[one.source].answer) for one in heard(role) if known[one.source].part == part]

        second = {one.pair: one for one in heard("second half")}
        self.answers = {one.text: one for one in bank.of("answer")}
        self.asked = of_part("question")
        self.long = [turn for turn in self.asked if self.answers[turn[1]].seconds > 2]
        self.halved = [(one, second[one.pair], answer) for one, answer in of_part("first half") if one.pair in second]
        self.talk, self.noise = heard("talk") or bank.of("talk"), bank.of("noise")
        self.listening, self.stops = heard("backchannel"), heard("stop")

    def kinds(self) -> tuple[Kind, ...]:
        """The calls that can be made with what there is."""
        there: dict[Kind, bool] = {
            "question": bool(self.asked),
            "pause": bool(self.halved),
            "encouragement": bool(self.long and self.listening),
            "interruption": bool(self.long and self.stops),
            "talk": bool(self.talk),
            "silence": True,
        }
        return tuple(kind for kind in KINDS if there[kind])


Script = Generator[Samples, bool, None]
"""Yields what the user says in a frame; is sent whether the model was heard in it."""


class User:
    """Plays a call. Frames go out one by one; where an utterance begins inside one is drawn."""

    def __init__(self, call: Call, cast: Cast) -> None:
        self.call, self.cast = call, cast
        self.random = np.random.default_rng([call.seed, KINDS.index(call.kind)])

    def script(self) -> Script:
        """The whole call."""
        pick = self._pick
        yield from self._quiet(self.random.uniform(0.5, 1.5))
        match self.call.kind:
            case "question":
                for _ in range(2):
                    one, answer = pick(self.cast.asked)
                    yield from self._say("turn", one, answer)
                    yield from self._listen()
            case "pause":
                first, second, answer = pick(self.cast.halved)
                yield from self._say(None, first)
                begin = self.call.now
                yield from self._quiet(self.random.uniform(0.5, 1.3))
                self.call.events.append(Happened("pause", begin, self.call.now))
                yield from self._say("turn", second, answer)
                yield from self._listen()
            case "encouragement":
                one, answer = pick(self.cast.long)
                yield from self._say("turn", one, answer)
                if (yield from self._wait()):
                    yield from self._quiet(self.random.uniform(0.3, 0.8))
                    yield from self._say("encouragement", pick(self.cast.listening))
                yield from self._listen()
            case "interruption":
                one, answer = pick(self.cast.long)
                yield from self._say("turn", one, answer)
                if (yield from self._wait()):
                    yield from self._quiet(self.random.uniform(0.4, 1.0))
                    yield from self._say("interruption", pick(self.cast.stops))
                yield from self._listen()
            case "talk":
                yield from self._say("turn", pick(self.cast.talk), UNKNOWN)
                yield from self._listen()
            case "silence":
                yield from self._quiet(4.0)
                if self.cast.noise:
                    yield from self._say(None, pick(self.cast.noise), gain=0.3)
                yield from self._say(None, pick(self.cast.listening))
                yield from self._quiet(4.0)

    def _pick(self, things: Sequence[Any]) -> Any:
        return things[int(self.random.integers(len(things)))]

    def _frame(self, samples: Samples) -> Generator[Samples, bool, bool]:
        hiss = 10 ** (-60 / 20) * self.random.standard_normal(FRAME)
        return (yield (samples + hiss).astype(np.float32))

    def _quiet(self, seconds: float) -> Script:
        for _ in range(round(seconds * RATE / FRAME)):
            yield from self._frame(np.zeros(FRAME, np.float32))

    def _say(self, what: Event | None, one: Utterance, expected: str = "", gain: float = 1.0) -> Script:
        samples = self.cast.bank.audio(one)[: 3 * RATE if one.role == "noise" else None] * gain
        late = int(self.random.integers(FRAME))
        begin = self.call.now + late
        if what is not None:
            self.call.events.append(Happened(what, begin, begin + len(samples), expected))
        samples = np.pad(samples, (late, -(late + len(samples)) % FRAME))
        for frame in samples.reshape(-1, FRAME):
            yield from self._frame(frame)

    def _wait(self) -> Generator[Samples, bool, bool]:
        """Until the model is heard; False if that does not happen."""
        for _ in range(PATIENCE // FRAME):
            if (yield from self._frame(np.zeros(FRAME, np.float32))):
                return True
        return False

    def _listen(self) -> Script:
        """To what the model says, until it has been silent for a while."""
        if not (yield from self._wait()):
            return
        silent = 0
        for _ in range(30 * RATE // FRAME):
            heard = yield from self._frame(np.zeros(FRAME, np.float32))
            silent = 0 if heard else silent + 1
            if silent * FRAME > 1.5 * RATE:
                return


def converse(partner: Partner, calls: Sequence[Call], cast: Cast) -> None:
    """Make the calls side by side; each keeps its recording."""
    scripts = [User(call, cast).script() for call in calls]
    next_user: dict[int, Samples] = {number: next(script) for number, script in enumerate(scripts)}
    playing = {number: np.zeros(FRAME, np.float32) for number in next_user}
    while next_user:
        numbers = list(next_user)
        made = partner.step([(number, next_user[number]) for number in numbers])
        for number, (sound, piece) in zip(numbers, made, strict=True):
            call, heard = calls[number], playing[number]
            call.user.append(next_user[number])
            call.model.append(heard)
            if piece:
                call.said.append((len(call.user), piece))
            playing[number] = sound
            try:
                next_user[number] = scripts[number].send(_level(heard) > LEVEL)
            except StopIteration:
                del next_user[number]


def _level(samples: Samples) -> float:
    return float(np.sqrt(np.square(samples).mean()))


def stretches(sound: Samples) -> list[tuple[int, int]]:
    """Where something is heard, in samples: pieces less than half a second apart are one, clicks are none."""
    count = len(sound) // WINDOW
    levels = np.sqrt(np.square(sound[: count * WINDOW].reshape(count, WINDOW)).mean(1))
    found: list[tuple[int, int]] = []
    for place in np.flatnonzero(levels > LEVEL):
        begin, end = int(place) * WINDOW, (int(place) + 1) * WINDOW
        if found and begin - found[-1][1] < JOINED:
            found[-1] = found[-1][0], end
        else:
            found.append((begin, end))
    return [(begin, end) for begin, end in found if end - begin > 2 * WINDOW]


@dataclass
class Row:
    """Of the table: successes of so many, or values whose median or mean is told in ``unit``."""

    unit: str = ""
    good: int = 0
    count: int = 0
    values: list[float] = field(default_factory=list)

    def add(self, good: bool) -> None:
        self.good += good
        self.count += 1

    def told(self) -> dict[str, Any]:
        if not self.unit:
            return {"value": self.good, "of": self.count}
        if self.unit == "a minute":
            return {"value": round(60 * self.good / max(1e-9, sum(self.values)), 2), "unit": self.unit}
        return {"value": round(median(self.values)) if self.values else None, "unit": self.unit}


ANSWERS, SOON, RIGHT = "answers within 2 s", "the answer begins after, median", "answers right (text)"
WAITS, GOES_ON = "stays silent in a pause", "goes on when encouraged"
STOPS, STOPPED, FALSE = "stops within 300 ms", "stopped after, median", "false starts"
DECLINES = "says it does not know"


def judge(calls: Sequence[Call], lengths: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """The table. lengths: of answers, in samples, as the assistant's voice says them."""
    rows = {name: Row() for name in (ANSWERS, RIGHT, WAITS, GOES_ON, STOPS, DECLINES)}
    rows |= {SOON: Row("ms"), STOPPED: Row("ms"), FALSE: Row("a minute")}
    for call in calls:
        heard = stretches(call.sound())
        turns = [one for one in call.events if one.what == "turn"]
        limits = [*(one.begin for one in turns), call.now][1:]
        for turn, limit in zip(turns, limits, strict=True):
            starts = [begin for begin, _ in heard if turn.end <= begin < limit]
            soon = bool(starts) and starts[0] <= turn.end + REPLY
            rows[ANSWERS].add(soon)
            if starts:
                rows[SOON].values.append(1000 * (starts[0] - turn.end) / RATE)
            if call.kind not in ("interruption", "encouragement"):  # which cut the answer, or make it say a word twice
                right = scored(call.text(turn.end, limit)) == scored(turn.expected)
                rows[DECLINES if call.kind == "talk" else RIGHT].add(right)
        _judge_kind(call, heard, turns, rows, lengths)
        _judge_starts(call, heard, rows[FALSE])
    return {name: row.told() for name, row in rows.items() if row.count or row.unit}


def _judge_kind(
    call: Call,
    heard: Sequence[tuple[int, int]],
    turns: Sequence[Happened],
    rows: Mapping[str, Row],
    lengths: Mapping[str, int],
) -> None:
    by = {one.what: one for one in call.events}
    if call.kind == "pause":
        # Until the question is over: what begins in a pause goes on beyond it.
        rows[WAITS].add(not any(begin < turns[-1].end and end > by["pause"].begin for begin, end in heard))
    elif call.kind == "encouragement":
        after = [(begin, end) for begin, end in heard if begin >= turns[0].end]
        spoken = sum(end - begin for begin, end in after)
        again = "encouragement" in by and any(end > by["encouragement"].end for _, end in after)
        rows[GOES_ON].add(again and spoken >= WHOLE * lengths[turns[0].expected])
    elif call.kind == "interruption":
        if "interruption" not in by:
            rows[STOPS].add(False)
            return
        stop = by["interruption"]
        sound = call.sound()[stop.begin : stop.end]
        levels = [_level(sound[at : at + WINDOW]) for at in range(0, len(sound) - WINDOW + 1, WINDOW)]
        last = max((place + 1 for place, level in enumerate(levels) if level > LEVEL), default=0)
        rows[STOPS].add(last * WINDOW <= STOP)
        rows[STOPPED].values.append(1000 * last * WINDOW / RATE)


def _judge_starts(call: Call, heard: Sequence[tuple[int, int]], row: Row) -> None:
    """What the model begins to say with nothing behind it that it has not answered yet, or gone on after."""
    ends = sorted(one.end for one in call.events if one.what != "pause")
    for begin, _ in heard:
        asked = [end for end in ends if end <= begin]
        if asked:
            ends.remove(asked[-1])
        else:
            row.good += 1
    row.values.append(call.now / RATE)


def evaluate(partner: Partner, cast: Cast, calls: int, seed: int = 0) -> tuple[dict[str, dict[str, Any]], list[Call]]:
    """The table of one set, from ``calls`` calls of each kind, and the calls."""
    made = [Call(kind, seed + number) for number in range(calls) for kind in cast.kinds()]
    converse(partner, made, cast)
    return judge(made, {text: one.samples for text, one in cast.answers.items()}), made


def record(folder: Path, calls: Sequence[Call], each: int) -> None:
    """The first calls of each kind as stereo files, the user on the left, with what was asked and said beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    for kind in KINDS:
        for number, call in enumerate([call for call in calls if call.kind == kind][:each]):
            both = np.stack((np.concatenate(call.user), call.sound()), 1)
            path = folder / f"{kind}-{number}.wav"
            with wave.open(str(path), "wb") as file:
                file.setnchannels(2)
                file.setsampwidth(2)
                file.setframerate(RATE)
                file.writeframes((both.clip(-1, 1) * 32767).astype("<i2").tobytes())
            expected = [one.expected for one in call.events if one.what == "turn"]
            index.append({"file": path.name, "expected": expected, "said": call.text(0, call.now + FRAME)})
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def measure(
    bank: Annotated[Path, typer.Option(help="What 'antiphon train bank' made.")],
    out: Annotated[Path, typer.Option(help="JSON file for the table.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or name of a dialogue model; by default the embedded.")
    ] = None,
    calls: Annotated[int, typer.Option(help="Calls of each kind in each set.")] = 40,
    samples: Annotated[Path | None, typer.Option(help="Folder for recordings of some calls.")] = None,
    each: Annotated[int, typer.Option(help="Recordings of each kind.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of what the users say and when.")] = 0,
) -> None:
    """Measure how a full-duplex model behaves."""
    console = Console()
    spoken = Bank(bank)
    results: dict[str, Any] = {}
    partner = Model(duplex.load(model, device=device, dtype=torch.float32), calls * len(KINDS), device)
    for number, (name, (part, held_out)) in enumerate(track(SETS.items(), "calling", console=console)):
        cast = Cast(spoken, part, held_out)
        if not cast.asked:
            console.print(f"left out, for the bank has no such question: {name}")
            continue
        results[name], made = evaluate(partner, cast, calls, seed + 1000 * number)
        partner.hang_up()
        if samples is not None:
            record(samples / name.replace(", ", "-").replace(" ", "_"), made, each)
    partner.close()
    numbers = {"sets": results, "calls": calls, "seed": seed}
    write_result(out.stem, command_line("antiphon.apps.train.duplex_eval", sys.argv[1:]), numbers, out.parent)
    console.print("\n".join(table(numbers)))


def main(arguments: Sequence[str]) -> None:
    """The command line; see ``--help``."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(measure)
    command(list(arguments), standalone_mode=False, prog_name="antiphon train duplex_eval")


if __name__ == "__main__":
    main(sys.argv[1:])
