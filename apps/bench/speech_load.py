"""Sessions that speak over the engine, as the stage ``speak`` drives it, and an open-loop load of them.

Session ``i`` of ``n`` is asked for an utterance every ``period`` seconds, at a phase of its own and up to ``jitter``
later each time, both seeded. First audio counts from when the utterance was due, whatever the engine does; an utterance
is due again as soon as the last has been played, so that every stream is always in progress.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...pipelines.engine import Engine, Row
from ...pipelines.speech import PARTS, Part, Speech
from ...pipelines.synthesis import Step, Synthesis
from ...pipelines.synthesizer import Places

AHEAD = 10.0  # seconds of sound that may be made before they are played, as the stage has it
NAP = 0.1
WORDS = (
    *("it", "was", "the", "best", "of", "times", "worst", "age", "wisdom", "foolishness", "epoch", "belief"),
    *("season", "light", "darkness", "spring", "hope", "winter", "despair", "we", "had", "everything", "before", "us"),
)


@dataclass
class Said:
    """An utterance: what it sounded like, and when its parts were there, in seconds of the event loop's clock."""

    due: float
    rate: int
    samples: list[np.ndarray[Any, np.dtype[np.float32]]] = field(default_factory=list)
    written: list[np.ndarray[Any, Any]] = field(default_factory=list)  # tokens, as they were kept
    drawn: list[np.ndarray[Any, Any]] = field(default_factory=list)  # frames
    done: dict[Part, float] = field(default_factory=dict)  # first hop: tokens written, frames drawn, sound made
    made: int = 0
    late: float = 0.0  # seconds that playback, begun at first audio, had to wait at most
    end: float = 0.0

    @property
    def first(self) -> float:
        """Seconds from when it was due to its first audio."""
        return self.done["vocoder"] - self.due

    def take(self, samples: np.ndarray[Any, np.dtype[np.float32]], now: float, keep: bool) -> None:
        """Sound that has just been made."""
        if self.made:
            self.late = max(self.late, now - self.done["vocoder"] - self.made / self.rate)
        elif len(samples):
            self.done["vocoder"] = now
        self.made += len(samples)
        if keep:
            self.samples.append(samples)

    def spare(self, now: float) -> float:
        """Seconds of sound made and not played."""
        return max(0.0, self.done["vocoder"] + self.made / self.rate - now) if self.made else 0.0

    def keep(self, part: Part, made: Row) -> None:
        """What a step made."""
        if part == "lm":
            self.written.append(made["drawn" if "drawn" in made else "token"].reshape(-1).numpy())
        elif part == "flow":
            self.drawn.append(made["mel"].numpy())

    def sound(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """All of it."""
        return np.concatenate(self.samples)

    def made_by(self, part: Part) -> np.ndarray[Any, Any]:
        """All that was kept of a part: tokens, frames or samples."""
        return np.concatenate({"lm": self.written, "flow": self.drawn, "vocoder": self.samples}[part])


def text_of(words: int, seed: int) -> str:
    """A sentence of so many words, no two alike for long."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


async def say(
    speech: Speech, places: Places, text: str, seed: int, *, due: float | None = None, keep: bool = False
) -> Said:
    """Speak one utterance. due: on the event loop's clock, now by default. keep: its tokens, frames and sound."""
    clock = asyncio.get_running_loop().time
    said = Said(clock() if due is None else due, speech.rate)
    voices = list(speech.reader.voices)
    synthesis = Synthesis(speech, voices[seed % len(voices)], seed)
    synthesis.push(text)
    synthesis.finish()
    flying: dict[asyncio.Future[Any], Step] = {}
    while True:
        now = clock()
        for piece in synthesis.pieces():
            said.take(piece.samples, now, keep)
        if synthesis.done:
            said.end = now
            return said
        spare = said.spare(now)
        enough = spare >= AHEAD
        for part in PARTS:
            if (part == "lm" or not enough) and (step := synthesis.next(part)) is not None:
                if part == "flow":
                    said.done.setdefault("lm", now)
                lease = places.ready(step)
                flying[lease.step(step.inputs, deadline=step.deadline(said.due, now, spare))] = step
        if flying:
            done, _ = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                step = flying.pop(future)
                synthesis.take(step, future.result())
                if keep:
                    said.keep(step.part, future.result())
                if step.part == "flow":
                    said.done.setdefault("flow", clock())
        else:
            await asyncio.sleep(NAP)


async def open_places(engine: Engine, name: str, count: int) -> list[Places]:
    """Slots for so many sessions in every model, whatever admission says: how many it can carry is to be found out."""
    return [Places({part: await engine.open(f"{name}.{part}", paced=False) for part in PARTS}) for _ in range(count)]


@dataclass
class Load:
    """What one run of ``sessions`` gave. limit: seconds to first audio that hold."""

    sessions: int
    limit: float
    said: list[Said] = field(default_factory=list)
    unfinished: int = 0  # utterances that were measured and had not been made half a period after the end

    def summary(self) -> dict[str, Any]:
        """Milliseconds. underruns: utterances whose playback had to wait. held: p99 within the limit, and none."""
        numbers: dict[str, Any] = {"sessions": self.sessions, "utterances": len(self.said), "lost": self.unfinished}
        if not self.said:
            return {**numbers, "held": False}
        first = np.array([one.first for one in self.said]) * 1e3
        p50, p95, p99 = np.percentile(first, [50, 95, 99])
        underruns = sum(one.late > 0 for one in self.said)
        parts = {
            part: round(float(np.median([one.done[part] - one.due for one in self.said])) * 1e3, 2) for part in PARTS
        }
        return {
            **numbers,
            "p50_ms": round(float(p50), 2),
            "p95_ms": round(float(p95), 2),
            "p99_ms": round(float(p99), 2),
            "max_ms": round(float(first.max()), 2),
            "median_ms_until": parts,
            "underruns": underruns,
            "longest_wait_ms": round(max(one.late for one in self.said) * 1e3, 2),
            "held": bool(p99 < self.limit * 1e3 and not underruns and not self.unfinished),
        }


async def run_load(
    engine: Engine,
    name: str,
    sessions: int,
    period: float,
    words: int,
    *,
    seconds: float,
    warm: float,
    limit: float,
    seed: int = 0,
    jitter: float = 0.5,
    enough: Callable[[Load], bool] = lambda load: False,
) -> Load:
    """Speak with ``sessions`` for ``warm + seconds`` and record the utterances that are due after ``warm``.

    words: of an utterance. enough: asked after every utterance whether it is worth going on.
    """
    speech = Speech.of(engine, name)
    places = await open_places(engine, name, sessions)
    load = Load(sessions, limit)
    loop = asyncio.get_running_loop()
    gc.collect()
    gc.freeze()  # a full collection over everything that was imported would stop all sessions
    start = loop.time() + 0.1
    until = start + warm + seconds
    plan = schedule(sessions, period, warm + seconds, seed, jitter)
    stop = asyncio.Event()

    async def session(number: int) -> None:
        for turn, at in enumerate(plan[number]):
            await asyncio.sleep(max(0.0, start + at - loop.time()))
            load.unfinished += at >= warm
            mine = seed + number + sessions * turn
            said = await say(speech, places[number], text_of(words, mine), mine, due=start + at)
            if at >= warm:
                load.unfinished -= 1
                load.said.append(said)
                if enough(load):
                    stop.set()

    tasks = [asyncio.create_task(session(number)) for number in range(sessions)]
    stopping = asyncio.create_task(stop.wait())
    everyone = asyncio.gather(*tasks)
    try:
        await asyncio.wait(
            (everyone, stopping),
            timeout=until - loop.time() + period / 2,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if everyone.done():
            everyone.result()
    finally:
        stopping.cancel()
        everyone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await everyone
        gc.unfreeze()
        for place in places:
            place.close()
    return load


def schedule(sessions: int, period: float, seconds: float, seed: int, jitter: float) -> Sequence[Sequence[float]]:
    """When each session's utterances are due, in seconds."""
    rng = np.random.default_rng(seed)
    turns = np.arange(int(np.ceil(seconds / period)))
    due = (rng.random((sessions, 1)) + turns) * period + rng.random((sessions, len(turns))) * jitter
    return [row[row < seconds].tolist() for row in due]
