"""The stage that speaks: one sound whatever the pace and the neighbours, and silence after an interruption."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from tiny_speech import tiny_speech, voice

from antiphon.models.cosyvoice.flow_stream import NO_TOKEN
from antiphon.pipelines.chunk import Audio, Chunk, Event, Text
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.graph import Graph
from antiphon.pipelines.session import Session
from antiphon.pipelines.speech import PARTS, Speech
from antiphon.pipelines.stage import Context, Inlet, Input, StageError, stage
from antiphon.pipelines.stages import speak as speak_stage
from antiphon.pipelines.stages.speak import Speak
from antiphon.pipelines.synthesis import Step, Synthesis
from antiphon.pipelines.synthesizer import Synthesizer

Samples = NDArray[np.float32]

RATE = 24000
TEXT = "It was the best of times. It was the worst of times, of all 42 of them! We had it all."
LONG = "It was the age of wisdom, it was the age of foolishness, it was the epoch of belief."
OTHER = "It was the season of light, and so on."
SECONDS = {"lm": 0.001, "flow": 0.005, "vocoder": 0.004}


Make = Callable[[], Speech]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Make:
    torch.set_num_threads(1)
    return partial(tiny_speech, tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def expected(speech: Make) -> Samples:
    """What ``TEXT`` sounds like, said by itself."""
    with Synthesizer(speech(), sessions=2) as models:
        models.register("ada", voice(1))
        return np.concatenate([piece.samples for piece in models.speak(TEXT, "ada", 3)])


def engine(speech: Make, slots: int = 4, buckets: Sequence[int] = (4,)) -> Engine:
    made = Engine(inline=True, clock=VirtualClock(), cost=lambda name, *_: SECONDS[name.split(".")[1]], limit=1e9)
    models = speech()
    models.install(made, slots=slots, buckets=dict.fromkeys(PARTS, buckets), exact=False)
    models.register(made, "ada", voice(1))
    return made


def graph(**options: Any) -> Graph:
    text, control = Inlet().named("text"), Inlet().named("control")
    speak = Speak(**{"voice": "ada", "seed": 3, "ahead": None} | options)
    return (text >> speak["text"]) | (control >> speak["control"])


async def say(session: Session, text: str, size: int = 7, pause: float = 0.0, *, final: bool = True) -> None:
    for at in range(0, len(text), size):
        last = final and at + size >= len(text)
        await session.send(Text(text=text[at : at + size], rate=RATE, final=last), "text")
        if pause:
            await session.clock.sleep(pause)


def sound(chunks: Sequence[Chunk]) -> Samples:
    return np.concatenate([np.zeros(0, np.float32), *[chunk.samples for chunk in chunks if isinstance(chunk, Audio)]])


def words(chunks: Sequence[Chunk]) -> list[Text]:
    return [chunk for chunk in chunks if isinstance(chunk, Text)]


@pytest.mark.parametrize(("size", "pause"), [(100, 0.0), (1, 0.0), (5, 0.05)])
def test_it_says_what_the_text_alone_sounds_like(speech: Make, expected: Samples, size: int, pause: float) -> None:
    async def main() -> list[Chunk]:
        with engine(speech) as models:
            async with graph().session(engine=models) as session:
                sending = asyncio.create_task(say(session, TEXT, size, pause))
                made = [chunk async for chunk in _until_final(session)]
                await sending
                session.finish()
                assert [chunk async for chunk in session.outputs()] == []
        return made

    made = run_virtual(main())
    assert np.array_equal(sound(made), expected)
    audio = [chunk for chunk in made if isinstance(chunk, Audio)]
    assert [chunk.final for chunk in audio] == [False] * (len(audio) - 1) + [True]
    assert all(chunk.start == before.end for before, chunk in itertools.pairwise(audio))
    assert max(chunk.seconds for chunk in audio) <= 0.1
    said = words(made)
    assert said[-1].final
    assert said[-1].text == TEXT
    assert all(TEXT.startswith(one.text) for one in said)
    assert [word.text for word in said[-1].words] == TEXT.split()
    assert said[-1].words[-1].end == pytest.approx(len(expected) / RATE, abs=1e-3)
    times = [time for word in said[-1].words for time in (word.start, word.end)]
    assert times == sorted(times)


async def _until_final(session: Session) -> Any:
    async for chunk in session.outputs():
        yield chunk
        if isinstance(chunk, Audio) and chunk.final:
            return


def test_words_may_be_spoken_as_they_arrive(speech: Make) -> None:
    async def run(pause: float) -> tuple[list[Chunk], float]:
        with engine(speech) as models:
            async with graph(arriving=True).session(engine=models) as session:
                sending = asyncio.create_task(say(session, TEXT, 4, pause))
                made: list[Chunk] = []
                async for chunk in _until_final(session):
                    made.append(chunk)
                    if len(made) == 2:
                        first = session.clock.now()
                await sending
        return made, first

    quick, _ = run_virtual(run(0.0))
    slow, first = run_virtual(run(0.25))
    assert np.array_equal(sound(slow), sound(quick))
    assert first < 0.25 * len(TEXT) / 4 / 1.5  # of the time that the text takes to come
    assert [one.text for one in words(slow)] != [one.text for one in words(quick)]
    assert words(slow)[-1].text == TEXT


def test_sessions_sound_as_alone_and_so_does_a_second_utterance(speech: Make, expected: Samples) -> None:
    async def one(models: Engine, number: int) -> None:
        async with graph().session(engine=models) as session:
            await session.clock.sleep(0.013 * number)
            for _ in range(2):
                sending = asyncio.create_task(say(session, TEXT, 10 + number, 0.002 * number))
                assert np.array_equal(sound([chunk async for chunk in _until_final(session)]), expected), number
                await sending

    async def main() -> None:
        with engine(speech) as models:
            await asyncio.gather(*(one(models, number) for number in range(4)))

    run_virtual(main())


@dataclass(frozen=True)
class First:
    """Of an utterance's first sound: when it came, and what had been made by then."""

    latency: float
    tokens: int  # read by the first step of the flow, beyond the voice's
    samples: int  # of the first block


class Watched(Synthesis):
    """Notes what the first steps of each utterance were."""

    made: ClassVar[list[Watched]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.tokens = self.samples = 0
        self.made.append(self)

    def take(self, step: Step, outputs: Mapping[str, torch.Tensor]) -> None:
        if step.part == "flow" and not self.tokens:
            heard = step.inputs["tokens"]
            self.tokens = int((heard != NO_TOKEN).sum()) - len(self.voice.flow.rest)
        super().take(step, outputs)
        if step.part == "vocoder" and not self.samples:
            self.samples = len(self._pieces[-1].samples)


async def utterance(session: Session, text: str) -> tuple[First, Samples]:
    """Say a text as a whole; what its first sound was like, and all of it."""
    began = session.clock.now()
    await session.send(Text(text=text, rate=RATE, final=True), "text")
    first, made = None, []
    async for chunk in _until_final(session):
        if isinstance(chunk, Audio) and first is None:
            first = session.clock.now() - began
        made.append(chunk)
    assert first is not None
    watched = Watched.made.pop(0)
    return First(round(first, 9), watched.tokens, watched.samples), sound(made)


def test_three_in_a_row_and_twenty_at_once_begin_as_alone(speech: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first hop is never longer for what was said before or beside it (upstream's grows with every request)."""
    monkeypatch.setattr(speak_stage, "Synthesis", Watched)
    cases = [(LONG, seed) for seed in (3, 4)] + [(OTHER, 3)]

    async def alone(text: str, seed: int) -> tuple[First, Samples]:
        with engine(speech, 20, (4, 32)) as models:
            async with graph(seed=seed).session(engine=models) as session:
                return await utterance(session, text)

    expected = {case: run_virtual(alone(*case)) for case in cases}
    # The voice's 13 tokens and a hop of 25 end within a chunk of 5, which 27 fill; three are heard ahead.
    assert {first.tokens for first, _ in expected.values()} == {30}
    assert len({first for first, _ in expected.values()}) == 2  # OTHER is read in one step less
    assert len({len(heard) for _, heard in expected.values()}) == len(cases)

    async def in_a_row() -> None:
        with engine(speech, 20, (4, 32)) as models:
            async with graph(seed=3).session(engine=models) as session:
                for text in (LONG, OTHER, LONG):
                    first, heard = await utterance(session, text)
                    assert first == expected[text, 3][0]
                    assert np.array_equal(heard, expected[text, 3][1])
                    await session.clock.sleep(10.0)

    run_virtual(in_a_row())

    async def at_once(cases: Sequence[tuple[str, int]]) -> list[tuple[First, First]]:
        """Their first sounds, and those of the same alone."""

        async def one(number: int) -> tuple[First, First]:
            text, seed = case = cases[number % len(cases)]
            async with graph(seed=seed).session(engine=models) as session:
                first, heard = await utterance(session, text)
            assert np.array_equal(heard, expected[case][1]), number
            return first, expected[case][0]

        with engine(speech, 20, (4, 32)) as models:
            return list(await asyncio.gather(*map(one, range(20))))

    assert all(first == lone for first, lone in run_virtual(at_once(cases[:2])))
    for first, lone in run_virtual(at_once(cases)):  # two batches, which take turns
        assert (first.tokens, first.samples) == (lone.tokens, lone.samples)
        assert first.latency < 2 * lone.latency


@pytest.mark.parametrize("after", [1, 9, 40])
@pytest.mark.parametrize("how", ["session", "cancel"])
def test_after_an_interruption_nothing_old_comes_out(speech: Make, expected: Samples, after: int, how: str) -> None:
    async def main() -> None:
        with engine(speech) as models:
            async with graph().session(engine=models) as session:
                await say(session, TEXT)
                old: list[Chunk] = []
                async for chunk in session.outputs():
                    old.append(chunk)
                    if len(old) == after:
                        break
                if how == "session":
                    session.interrupt()
                else:
                    assert session.playing or after == 1
                    if not session.playing:
                        return
                    await session.send(Event(name="cancel", rate=RATE), "control")
                    while not session.epoch:
                        await session.clock.sleep(0.001)
                cut = sound(old)
                assert np.array_equal(cut, expected[: len(cut)])
                assert not session.playing
                await say(session, TEXT)
                new = [chunk async for chunk in _until_final(session)]
                assert {chunk.epoch for chunk in new} == {1}
                assert np.array_equal(sound(new), expected)
                assert session.counters["speak.interrupted"] == 1
            used = [model["used"] for model in models.metrics()["models"].values()]
            assert used == [0, 0, 0]

    run_virtual(main())


@stage(name="speak_test_speaker")
async def loudspeaker(ctx: Context, audio: Input) -> None:
    """Plays in real time, and says so."""
    async for chunk in audio:
        await ctx.sleep(chunk.seconds)
        ctx.played(chunk)


def test_it_stays_so_far_ahead_of_the_listener_and_no_further(speech: Make) -> None:
    """A stage behind a loudspeaker, and one whose listener reports nothing."""

    async def main(ahead: float | None) -> float:
        furthest = 0.0
        with engine(speech) as models:
            async with graph(ahead=ahead).session(engine=models) as session:
                sending = asyncio.create_task(say(session, TEXT))
                began: float | None = None
                async for chunk in _until_final(session):
                    if isinstance(chunk, Audio):
                        now = session.clock.now()
                        began = now if began is None else began
                        furthest = max(furthest, chunk.end_seconds - (now - began))
                await sending
        return furthest

    alone = run_virtual(main(None))
    assert alone > 4.0
    assert run_virtual(main(2.0)) < 2.0 + 1.1 + 0.2  # a block of the vocoder more, and a nap

    async def heard() -> None:
        speak = Speak(voice="ada", seed=3, ahead=2.0)
        text = Inlet().named("text")
        with engine(speech) as models:
            run = (text >> speak["text"]) | (speak["audio"] >> loudspeaker())
            async with run.session(engine=models) as session:
                sending = asyncio.create_task(say(session, TEXT))
                async for chunk in session.outputs("speak.said"):
                    if chunk.final:
                        break
                await sending
                session.finish()
                await session.run()
                assert session.heard is not None
                assert session.heard.seconds == pytest.approx(chunk.end_seconds)

    run_virtual(heard())


def test_an_end_without_a_final_ends_the_utterance(speech: Make, expected: Samples) -> None:
    async def main() -> list[Chunk]:
        with engine(speech) as models:
            async with graph().session(engine=models) as session:
                await say(session, TEXT, 100, final=False)
                session.finish()
                return [chunk async for chunk in session.outputs()]

    made = run_virtual(main())
    assert np.array_equal(sound(made), expected)
    assert made[-1].final


def test_nothing_to_say_ends_at_once(speech: Make) -> None:
    async def main() -> list[Chunk]:
        with engine(speech) as models:
            async with graph().session(engine=models) as session:
                await session.send(Text(text=" \u2026 ", rate=RATE, final=True), "text")
                session.finish()
                return [chunk async for chunk in session.outputs()]

    made = run_virtual(main())
    assert {(type(chunk), chunk.final, chunk.duration) for chunk in made} == {(Text, True, 0), (Audio, True, 0)}
    assert len(made) == 2


def test_what_cannot_be(speech: Make) -> None:
    for options, message in (({"ahead": 0}, "ahead=0"), ({"seed": -1}, "seed=-1")):
        with pytest.raises(ValueError, match=message):
            Speak(**options)

    async def main(**options: Any) -> None:
        with engine(speech) as models:
            async with graph(**options).session(engine=models) as session:
                await say(session, TEXT)
                await session.run()

    with pytest.raises(StageError, match="no voice 'eve'"):
        run_virtual(main(voice="eve"))
    with pytest.raises(StageError, match=r"no model named 'other\.lm'"):
        run_virtual(main(model="other"))
