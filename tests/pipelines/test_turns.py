"""Turn taking on scripted probabilities: the loudness of each window is the probability that it is speech."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from antiphon.models.streaming import StreamingModel, TensorSpec
from antiphon.pipelines.chunk import Audio, Chunk, Event, Stale, Text, Word
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.graph import Graph
from antiphon.pipelines.session import Session
from antiphon.pipelines.spec import parse_graph
from antiphon.pipelines.stage import Context, Inlet, Input, stage
from antiphon.pipelines.stages.parrot import Echo, Parrot
from antiphon.pipelines.stages.turns import Turns
from antiphon.pipelines.turn_taking import RATE, WAITS_MS, WINDOW, TurnSettings, TurnTaker

SPEECH, SILENCE = 0.9, 0.0


class Loudness(StreamingModel):
    """Speech is as probable as the window's first sample says."""

    variants = ("16k",)

    def tick(self, variant: Any) -> float:
        return WINDOW / RATE

    def state_spec(self) -> dict[str, TensorSpec]:
        return {"steps": TensorSpec((), torch.int64)}

    def input_spec(self, variant: Any) -> dict[str, TensorSpec]:
        return {"pcm": TensorSpec((WINDOW,))}

    def step(self, inputs: Any, state: Any, slots: Any, active: Any) -> dict[str, torch.Tensor]:
        return {"speech": inputs["pcm"][:, 0].clone()}


class Judge(Loudness):
    """The speaker has finished where the last but ``STOP`` windows say so: loudness 0.95 yes, 0.9 no."""

    def input_spec(self, variant: Any) -> dict[str, TensorSpec]:
        return {"pcm": TensorSpec((8 * RATE,))}

    def step(self, inputs: Any, state: Any, slots: Any, active: Any) -> dict[str, torch.Tensor]:
        loudest = inputs["pcm"].amax(1)
        return {"finished": torch.where(loudest > 0.92, 1.0, 0.0)}


def script(*parts: tuple[float, int]) -> list[float]:
    """Probabilities from (probability, windows)."""
    return [probability for probability, windows in parts for _ in range(windows)]


def sound(probabilities: Iterable[float], first: int = 0) -> list[Audio]:
    """Windows whose samples hold their probability."""
    return [
        Audio(samples=np.full(WINDOW, p, np.float32), rate=RATE, start=(first + i) * WINDOW)
        for i, p in enumerate(probabilities)
    ]


def events_of(taker: TurnTaker, probabilities: Iterable[float], *, playing: bool = False) -> list[tuple[str, int]]:
    """Names and starts (in windows) of the events of a script."""
    made = []
    for i, p in enumerate(probabilities):
        made += [(e.name, e.start // WINDOW) for e in taker.window(p, (i + 1) * WINDOW, playing=playing)]
    return made


# ------------------------------------------------------------------------------------------------ the logic


def test_a_turn_begins_where_speech_does_and_ends_after_the_silence() -> None:
    taker = TurnTaker(TurnSettings(silence_ms=480))
    assert events_of(taker, script((SILENCE, 10), (SPEECH, 20), (SILENCE, 20))) == [
        ("speech_start", 10),
        ("speech_stop", 30),
        ("turn_end", 30),
    ]
    events = TurnTaker(TurnSettings(silence_ms=480))
    ends = [e for i, p in enumerate(script((SPEECH, 20), (0, 20))) for e in events.window(p, (i + 1) * WINDOW)]
    assert ends[-1].data == {"reason": "silence", "waited_ms": 480}


def test_a_pause_within_a_turn_stops_speech_but_not_the_turn() -> None:
    taker = TurnTaker(TurnSettings(silence_ms=480))
    pause = script((SPEECH, 10), (SILENCE, 10), (SPEECH, 10), (SILENCE, 20))
    assert [name for name, _ in events_of(taker, pause)] == [
        "speech_start", "speech_stop", "speech_start", "speech_stop", "turn_end"
    ]  # fmt: skip


def test_hysteresis_holds_speech_that_wavers_and_one_window_is_none() -> None:
    assert events_of(TurnTaker(TurnSettings()), script((0.4, 20))) == []
    wavering = events_of(TurnTaker(TurnSettings()), script((0.5, 1), (0.4, 20)))
    assert wavering == [("speech_start", 0)]
    assert events_of(TurnTaker(TurnSettings()), script((SPEECH, 1), (SILENCE, 20), (SPEECH, 1), (SILENCE, 30))) == []


def test_no_turn_ends_while_speech_may_be_beginning() -> None:
    taker = TurnTaker(TurnSettings(silence_ms=320))
    names = [name for name, _ in events_of(taker, script((SPEECH, 5), (SILENCE, 9), (SPEECH, 5)))]
    assert names == ["speech_start", "speech_stop", "speech_start"]


def test_while_a_reply_plays_only_enough_speech_counts() -> None:
    for spoken, begins in ((4, False), (5, True)):
        taker = TurnTaker(TurnSettings(min_speech_ms=160))
        names = [name for name, _ in events_of(taker, script((SPEECH, spoken), (SILENCE, 30)), playing=True)]
        assert bool(names) is begins
        assert taker.interrupts is False
    taker = TurnTaker(TurnSettings(min_speech_ms=160))
    assert events_of(taker, script((SPEECH, 5)), playing=True) == [("speech_start", 0)]
    assert taker.interrupts


@pytest.mark.parametrize("eagerness", ["low", "medium", "high", "auto"])
def test_semantic_waits_shorten_with_the_probability_of_having_finished(eagerness: Any) -> None:
    short, long = WAITS_MS[eagerness]
    waited = {}
    for finished in (0.0, 0.5, 1.0):
        taker = TurnTaker(TurnSettings(mode="semantic", eagerness=eagerness))
        events = []
        for i, p in enumerate(script((SPEECH, 10), (SILENCE, 300))):
            events += taker.window(p, (i + 1) * WINDOW)
            if events and events[-1].name == "speech_stop":
                taker.finished = finished
        (end,) = [e for e in events if e.name == "turn_end"]
        waited[finished] = end.data["waited_ms"]
        assert end.data["reason"] == ("smart_turn" if finished >= 0.5 else "silence")
    assert short <= waited[1.0] <= short + 32
    assert long <= waited[0.0] <= long + 32
    assert waited[1.0] < waited[0.5] < waited[0.0]


def test_the_recognisers_end_of_utterance_shortens_the_wait_and_its_words_lengthen_speech() -> None:
    def waited(word_end: int, final: bool) -> tuple[str, int]:
        taker = TurnTaker(TurnSettings(mode="semantic"))
        for i, p in enumerate(script((SPEECH, 10), (SILENCE, 300))):
            if i == 14:
                taker.text(word_end * WINDOW, final=final)
            for event in taker.window(p, (i + 1) * WINDOW):
                if event.name == "turn_end":
                    return event.data["reason"], event.data["waited_ms"]
        raise AssertionError("the turn did not end")

    closed, unknown, late = waited(10, True), waited(10, False), waited(14, False)
    assert closed[0] == "eou"
    assert unknown[0] == late[0] == "silence"
    assert closed[1] < 0.5 * unknown[1]
    assert late[1] == unknown[1] + 4 * 32


def test_a_final_caption_of_earlier_speech_does_not_close_this_one() -> None:
    taker = TurnTaker(TurnSettings(mode="semantic"))
    events_of(taker, script((SILENCE, 20), (SPEECH, 10)))
    taker.text(10 * WINDOW, final=True)
    ends = [taker.window(SILENCE, (30 + i) * WINDOW) for i in range(1, 60)]
    assert [e.data["reason"] for made in ends for e in made if e.name == "turn_end"] == ["silence"]


def test_idle_is_said_once_until_somebody_speaks() -> None:
    taker = TurnTaker(TurnSettings(idle_ms=640))
    quiet = script((SILENCE, 100))
    assert [(name, at) for name, at in events_of(taker, quiet)] == [("turn_end", 20)]
    taker = TurnTaker(TurnSettings(idle_ms=640))
    assert events_of(taker, quiet, playing=True) == []
    reasons = []
    for i, p in enumerate(script((SILENCE, 30), (SPEECH, 5), (SILENCE, 60))):
        reasons += [e.data["reason"] for e in taker.window(p, (i + 200) * WINDOW) if e.name == "turn_end"]
    assert reasons == ["idle", "silence", "idle"]


@pytest.mark.parametrize(
    "wrong",
    [{"mode": "vda"}, {"threshold": 1.5}, {"silence_ms": -1}, {"silence_ms": "long"}, {"eagerness": 3},
     {"idle_ms": 5}, {"interrupt": "yes"}, {"treshold": 0.5}, {"threshold": True}],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TurnSettings().changed(wrong)


class AnyoneSpeaks(RuleBasedStateMachine):
    """Whatever is said, set and committed: starts and stops alternate, and every turn ends once."""

    def __init__(self) -> None:
        super().__init__()
        self.taker = TurnTaker(TurnSettings())
        self.at = 0
        self.speaking = False
        self.spoken = False  # speech began since the last turn ended
        self.reached = 0  # the last event's media position
        self.playing = False

    def check(self, events: Sequence[Event], asked: bool = False) -> None:
        for event in events:
            assert 0 <= event.start <= self.at
            if event.name == "speech_start":
                assert not self.speaking
                assert event.start >= self.reached
                self.speaking = self.spoken = True
            elif event.name == "speech_stop":
                assert self.speaking
                self.speaking = False
            else:
                assert event.name == "turn_end"
                assert not self.speaking
                assert event.data["waited_ms"] == round((self.at - event.start) * 1000 / RATE) or (
                    event.data["reason"] == "idle"
                )
                assert self.spoken or event.data["reason"] in ("manual", "idle")
                assert (event.data["reason"] == "manual") == asked
                self.spoken = False
            self.reached = event.start

    @rule(p=st.sampled_from([0.0, 0.2, 0.4, 0.6, 1.0]), windows=st.integers(1, 25))
    def hear(self, p: float, windows: int) -> None:
        for _ in range(windows):
            self.at += WINDOW
            self.check(self.taker.window(p, self.at, playing=self.playing))

    @rule(back=st.integers(0, 20), final=st.booleans())
    def caption(self, back: int, final: bool) -> None:
        self.taker.text(max(0, self.at - back * WINDOW), final=final)

    @rule(finished=st.floats(0, 1))
    @precondition(lambda self: self.taker.open and not self.taker.speaking)
    def judge(self, finished: float) -> None:
        self.taker.finished = finished

    @rule()
    def commit(self) -> None:
        self.check(self.taker.commit(self.at), asked=True)

    @rule()
    def clear(self) -> None:
        self.check(self.taker.clear())
        self.spoken = False

    @rule()
    def reply_begins_or_ends(self) -> None:
        self.playing = not self.playing

    @rule(
        mode=st.sampled_from(["vad", "semantic"]),
        silence=st.sampled_from([32, 200, 800]),
        idle=st.sampled_from([None, 500]),
        eagerness=st.sampled_from(["low", "high"]),
        least=st.sampled_from([0, 320]),
    )
    def change(self, mode: Any, silence: int, idle: Any, eagerness: Any, least: int) -> None:
        self.taker.settings = self.taker.settings.changed(
            {"mode": mode, "silence_ms": silence, "idle_ms": idle, "eagerness": eagerness, "min_speech_ms": least}
        )

    @invariant()
    def agrees(self) -> None:
        assert self.taker.speaking == self.speaking
        assert self.taker.open == self.spoken

    def teardown(self) -> None:
        self.check(self.taker.finish(self.at))
        assert not self.spoken
        assert not self.speaking


TestAnyoneSpeaks = AnyoneSpeaks.TestCase
TestAnyoneSpeaks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# ------------------------------------------------------------------------------------------------ the stages


@stage(name="turns_mic", lasting=True)
async def mic(ctx: Context, *, windows: list[float]) -> AsyncIterator[Audio]:
    """At the pace of its media."""
    for chunk in sound(windows):
        await ctx.clock.sleep_until((chunk.end) / RATE)
        yield chunk


@stage(name="turns_reply")
async def reply(ctx: Context, turn: Input, *, seconds: float = 2.0) -> AsyncIterator[Audio]:
    """Two seconds of answer to each turn, in chunks of 20 ms."""
    at = 0
    async for chunk in turn:
        if not chunk.final:
            continue
        epoch = ctx.epoch
        for i in range(round(seconds * 50)):
            yield Audio(
                samples=np.zeros(320, np.float32), rate=RATE, start=at, epoch=epoch, final=i + 1 == seconds * 50
            )
            at += 320


@stage(name="turns_speaker")
async def speaker(ctx: Context, audio: Input, *, log: list[tuple[float, Audio]]) -> None:
    """Plays at the pace of its media."""
    async for chunk in audio:
        assert isinstance(chunk, Audio)
        log.append((ctx.now, chunk))
        try:
            await ctx.sleep(chunk.seconds)
            ctx.played(chunk)
        except Stale:
            pass


def engine() -> Engine:
    made = Engine(inline=True, clock=VirtualClock())
    made.add("vad", Loudness(), slots=4)
    made.add("judge", Judge(), slots=4)
    return made


async def outputs(graph: Graph, *ports: str) -> tuple[list[Chunk], Session]:
    with engine() as models:
        async with graph.session(engine=models) as session:
            return [chunk async for chunk in session.outputs(*ports)], session


def named(chunks: Iterable[Chunk]) -> list[tuple[str, float]]:
    return [(c.name, round(c.start / WINDOW, 3)) for c in chunks if isinstance(c, Event)]


def test_the_stage_needs_no_captions_control_or_taker_of_turns() -> None:
    graph = mic(windows=script((SILENCE, 10), (SPEECH, 20), (SILENCE, 30))) >> Turns()
    graph.validate()
    made, _ = run_virtual(outputs(graph))
    assert named(made) == [("speech_start", 10), ("speech_stop", 30), ("turn_end", 30)]
    assert all(isinstance(chunk, Event) for chunk in made)


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 48000])
@pytest.mark.parametrize("piece", [0.01, 0.02, 0.1])
def test_sound_of_any_rate_and_chunk_gives_the_same_events(rate: int, piece: float) -> None:
    loud = np.repeat(np.array(script((SILENCE, 10), (0.8, 20), (SILENCE, 30)), np.float32), WINDOW * rate // RATE)

    @stage(name=f"turns_cut_{rate}_{piece}")
    async def cut(ctx: Context) -> AsyncIterator[Audio]:
        size = round(piece * rate)
        for start in range(0, len(loud), size):
            yield Audio(samples=loud[start : start + size], rate=rate, start=start + 5 * rate)

    made, _ = run_virtual(outputs(cut() >> Turns()))
    events = [(c.name, c.start / RATE - 5) for c in made if isinstance(c, Event)]
    assert [name for name, _ in events] == ["speech_start", "speech_stop", "turn_end"]
    assert [at for _, at in events] == pytest.approx([0.32, 0.96, 0.96], abs=0.033)


def test_the_turn_is_its_sound_with_what_came_before_its_onset() -> None:
    windows = script((0.1, 30), (SPEECH, 20), (0.05, 40), (SPEECH, 5), (0.05, 4))
    turns = Turns(prefix_ms=320, silence_ms=480)
    graph = mic(windows=windows) >> turns
    graph = graph | (turns["turn"] >> Echo())
    made, _ = run_virtual(outputs(graph))
    turn = [c for c in made if isinstance(c, Audio)]
    first = turn[: [c.final for c in turn].index(True) + 1]
    heard = np.concatenate([c.samples for c in first])
    assert first[0].start == 20 * WINDOW
    assert all(left.end == right.start for left, right in pairwise(first))
    expected = np.repeat(np.array(windows[20:65], np.float32), WINDOW)
    np.testing.assert_array_equal(heard, expected)
    second = turn[len(first) :]
    assert second[0].start == 80 * WINDOW
    assert [c.final for c in second] == [False] * (len(second) - 1) + [True]  # the sound ended within the turn
    assert named(made)[-2:] == [("speech_stop", 95), ("turn_end", 95)]


def test_two_turns_share_no_sound() -> None:
    turns = Turns(prefix_ms=640, silence_ms=320)
    graph = mic(windows=script((SPEECH, 10), (SILENCE, 15), (SPEECH, 10), (SILENCE, 15))) >> turns
    made, _ = run_virtual(outputs(graph | (turns["turn"] >> Echo())))
    sounds = [c for c in made if isinstance(c, Audio)]
    assert sum(c.final for c in sounds) == 2
    assert all(left.end == right.start for left, right in pairwise(sounds))  # the prefix reaches back to the first turn


def test_what_was_known_at_one_pause_is_forgotten_at_the_next() -> None:
    taker = TurnTaker(TurnSettings(mode="semantic"))
    events_of(taker, script((SPEECH, 10), (SILENCE, 7)))
    taker.finished = 1.0
    taker.text(10 * WINDOW, final=True)
    made = [taker.window(p, (18 + i) * WINDOW) for i, p in enumerate(script((SPEECH, 10), (SILENCE, 60)))]
    assert taker.finished is None
    (end,) = [event for events in made for event in events if event.name == "turn_end"]
    assert end.data["reason"] == "silence"
    assert end.data["waited_ms"] > 1000


def test_the_turn_model_is_asked_at_each_pause() -> None:
    short = {}
    for loud in (0.9, 0.95):
        graph = mic(windows=script((loud, 20), (SILENCE, 200))) >> Turns(mode="semantic", smart_turn="judge")
        made, _ = run_virtual(outputs(graph))
        (end,) = [c for c in made if isinstance(c, Event) and c.name == "turn_end"]
        short[loud] = end.data
    assert short[0.95]["reason"] == "smart_turn"
    assert short[0.95]["waited_ms"] <= 332
    assert short[0.9]["reason"] == "silence"
    assert short[0.9]["waited_ms"] >= 4000


def test_captions_and_control_reach_it() -> None:
    async def main() -> list[Chunk]:
        audio, text, control = Inlet().named("audio"), Inlet().named("text"), Inlet().named("control")
        turns = Turns(mode="semantic")
        graph = (audio >> turns) | (text >> turns["text"]) | (control >> turns["control"])
        made: list[Chunk] = []

        async def tell(name: str, **data: Any) -> None:
            await session.send(Event(name=name, data=data, rate=RATE), "control")
            await session.clock.sleep(0.001)

        async def hear(windows: list[float]) -> None:
            nonlocal at
            for chunk in sound(windows, at):
                await session.send(chunk, "audio")
                await session.clock.sleep(0.032)
            at += len(windows)

        async def read() -> None:
            async for chunk in session.outputs():
                made.append(chunk)

        at = 0
        with engine() as models:
            async with graph.session(engine=models) as session:
                reader = asyncio.create_task(read())
                await hear(script((SPEECH, 10)))
                word = Word("yes", 0.1, 0.3)
                await session.send(Text(text="yes", words=(word,), rate=RATE, duration=4800, final=True), "text")
                await hear(script((SILENCE, 20)))  # ends by the recogniser's word
                assert made[-1].data["reason"] == "eou"  # type: ignore[attr-defined]
                await tell("turns", mode="vad", silence_ms=1600)
                await hear(script((SPEECH, 10), (SILENCE, 40)))
                assert named(made)[-1][0] == "speech_stop"
                await tell("commit")
                assert made[-1].data["reason"] == "manual"  # type: ignore[attr-defined]
                await tell("turns", mode="semantic")
                await hear(script((SPEECH, 10)))
                pause = Event(name="pause", rate=RATE, start=at * WINDOW - 100)
                await session.send(pause, "text")
                await hear(script((SILENCE, 20)))  # ends by the recogniser's classifiers
                assert made[-1].data["reason"] == "eou"  # type: ignore[attr-defined]
                await tell("turns", mode="vad")
                await tell("turns", threshold=7)
                assert "threshold=7" in made[-1].data["message"]  # type: ignore[attr-defined]
                await hear(script((SPEECH, 10)))
                await tell("clear")
                assert named(made)[-1][0] == "speech_stop"
                await hear(script((SILENCE, 100)))
                assert named(made)[-1][0] == "speech_stop"
                await tell("turns", mode="manual")
                await tell("respond")
                await hear(script((SPEECH, 30), (SILENCE, 100)))
                assert named(made)[-1][0] == "speech_stop"
                await tell("commit")
                session.finish()
                await reader
        return made

    made = run_virtual(main())
    reasons = [c.data["reason"] for c in made if isinstance(c, Event) and c.name == "turn_end"]
    assert reasons == ["eou", "manual", "eou", "manual"]


def test_a_manual_turn_is_exactly_what_was_sent_between_commits() -> None:
    async def main() -> list[Chunk]:
        audio, control, turns = Inlet().named("audio"), Inlet().named("control"), Turns(mode="manual")
        graph = (audio >> turns) | (control >> turns["control"]) | (turns["turn"] >> Echo())
        made: list[Chunk] = []
        with engine() as models:
            async with graph.session(engine=models) as session:
                for i, size in enumerate((700, 1300, 99)):
                    await session.send(Audio(samples=np.full(size, i, np.float32), rate=RATE, start=0), "audio")
                    await session.clock.sleep(0.01)
                    name = "clear" if i == 1 else "commit"
                    await session.send(Event(name=name, rate=RATE), "control")
                    await session.clock.sleep(0.01)
                session.finish()
                async for chunk in session.outputs():
                    made.append(chunk)
        return made

    made = run_virtual(main())
    turns: list[list[Chunk]] = [[]]
    for chunk in made:
        if isinstance(chunk, Audio) or (isinstance(chunk, Event) and chunk.name == "clear"):
            turns[-1].append(chunk)
            if chunk.final or isinstance(chunk, Event):
                turns.append([])
    heard = [np.concatenate([c.samples for c in turn if isinstance(c, Audio)]) for turn in turns if turn]
    np.testing.assert_array_equal(heard[0], np.full(700, 0))
    assert isinstance(turns[1][-1], Event)
    np.testing.assert_array_equal(heard[2], np.full(99, 2))


def conversation(windows: list[float], log: list[tuple[float, Audio]], **options: Any) -> Graph:
    turns = Turns(**options)
    graph = mic(windows=windows) >> turns
    return graph | (turns["turn"] >> reply() >> speaker(log=log))


QUESTION = script((SPEECH, 20), (SILENCE, 30))  # ends at 36 windows, 1.152 s


def test_speech_interrupts_a_reply_once_within_a_window_and_nothing_older_follows() -> None:
    log: list[tuple[float, Audio]] = []
    windows = [*QUESTION, *script((SPEECH, 20), (SILENCE, 30))]
    made, session = run_virtual(outputs(conversation(windows, log, min_speech_ms=160), "turns.events"))
    (mark,) = session.trace.marks
    onset = 50 * WINDOW / RATE
    assert mark.at == pytest.approx(onset + 0.160, abs=1e-6)  # the window that makes it enough
    begun = [at for at, chunk in log if chunk.epoch == 0]
    assert begun
    assert max(begun) <= mark.at
    after = [(at, chunk.epoch) for at, chunk in log if at > mark.at]
    assert {epoch for _, epoch in after} == {1}
    assert min(at for at, _ in after) > onset + 20 * WINDOW / RATE  # the reply to the second turn
    assert [name for name, _ in named(made)] == ["speech_start", "speech_stop", "turn_end"] * 2
    assert [c.epoch for c in made] == [0, 0, 0, 1, 1, 1]


def test_what_does_not_interrupt() -> None:
    mumbled = [*QUESTION, *script((SPEECH, 4), (SILENCE, 60))]
    spoken = [*QUESTION, *script((SPEECH, 20), (SILENCE, 30))]
    after = [*QUESTION, *script((SILENCE, 70), (SPEECH, 20), (SILENCE, 30))]  # the reply is over by then
    for windows, options in ((mumbled, {}), (spoken, {"interrupt": False}), (after, {})):
        log: list[tuple[float, Audio]] = []
        made, session = run_virtual(outputs(conversation(windows, log, **options), "turns.events"))
        assert not session.trace.marks
        assert len([c for c in named(made) if c[0] == "turn_end"]) == (1 if windows is mumbled else 2)
        assert sum(chunk.seconds for _, chunk in log) == pytest.approx(2.0 if windows is mumbled else 4.0)


def test_a_reply_that_begins_while_its_listener_speaks_on_is_interrupted() -> None:
    @stage(name="turns_slow")
    async def slow(ctx: Context, turn: Input) -> AsyncIterator[Chunk]:
        async for chunk in turn:
            if chunk.final:
                await ctx.sleep(1.0)
            yield chunk

    log: list[tuple[float, Audio]] = []
    turns = Turns()
    graph = mic(windows=[*QUESTION, *script((SPEECH, 60), (SILENCE, 20))]) >> turns
    graph = graph | (turns["turn"] >> slow() >> reply() >> speaker(log=log))
    _, session = run_virtual(outputs(graph, "turns.events"))
    (mark,) = session.trace.marks
    first = min(at for at, chunk in log if chunk.epoch == 0)
    assert mark.at - first <= WINDOW / RATE + 1e-6


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([SPEECH, SILENCE]), st.integers(1, 40)), min_size=1, max_size=10))
def test_a_conversation_keeps_its_order_whatever_is_said(parts: list[tuple[float, int]]) -> None:
    log: list[tuple[float, Audio]] = []
    made, session = run_virtual(outputs(conversation(script(*parts), log), "turns.events"))
    names = [name for name, _ in named(made)]
    assert names.count("speech_start") == names.count("speech_stop")
    assert names.count("turn_end") <= names.count("speech_start")
    assert not names or names[-1] == "turn_end"
    for mark in session.trace.marks:
        assert all(chunk.epoch >= mark.epoch for at, chunk in log if at > mark.at)


# ------------------------------------------------------------------------------------------------ the parrot


def test_the_parrot_says_the_turn_back_with_its_words() -> None:
    async def main(rate: int | None) -> tuple[list[Audio], list[Text]]:
        audio, text, turns, parrot = Inlet().named("audio"), Inlet().named("text"), Turns(), Parrot(rate=rate)
        graph = (audio >> turns["audio"]) | (turns["turn"] >> parrot["turn"]) | (text >> parrot["text"])
        with engine() as models:
            async with graph.session(engine=models) as session:
                words = (Word("before", -9.0, -8.8), Word("good", 0.3, 0.5), Word("day", 0.6, 0.8))
                said = Text(text="good day", words=words, rate=RATE, duration=12800)
                await session.send(said, "text")
                for chunk in sound(script((SILENCE, 10), (SPEECH, 20), (SILENCE, 30))):
                    await session.send(chunk, "audio")
                session.finish()
                made = [chunk async for chunk in session.outputs()]
        return [c for c in made if isinstance(c, Audio)], [c for c in made if isinstance(c, Text)]

    for rate in (None, 24000):
        audio, texts = run_virtual(main(rate))
        assert [(t.text, t.final) for t in texts] == [("good day", False), ("good day", True)]
        assert all(left.end == right.start for left, right in pairwise(audio))
        assert [chunk.final for chunk in audio] == [False] * (len(audio) - 1) + [True]
        assert {chunk.rate for chunk in audio} == {rate or RATE}
        seconds = audio[-1].end_seconds
        assert seconds == pytest.approx(46 * WINDOW / RATE - 0.320 + 0.300, abs=0.033)
        assert texts[-1].seconds == seconds


async def told(*events: str, mode: str | None = None) -> tuple[list[tuple[float, Chunk]], Session]:
    """A parrot hears a turn and, a second into its reply, the events."""
    audio, control, turns, parrot = Inlet().named("audio"), Inlet().named("control"), Turns(), Parrot()
    heard: list[tuple[float, Audio]] = []
    graph = (audio >> turns["audio"]) | (turns["turn"] >> parrot["turn"]) | (control >> parrot["control"])
    graph = graph | (parrot["audio"] >> speaker(log=heard))
    with engine() as models:
        async with graph.session(engine=models) as session:
            if mode is not None:
                await session.send(Event(name="turns", data={"mode": mode}, rate=RATE), "control")
            for chunk in sound(script((SPEECH, 90), (SILENCE, 30))):
                await session.send(chunk, "audio")
            await session.clock.sleep(1.0)
            for name in events:
                await session.send(Event(name=name, rate=RATE), "control")
            await session.clock.sleep(8.0)
            session.finish()
            await session.run()
    return [(at, chunk) for at, chunk in heard], session


def test_cancelling_ends_the_reply_at_once_and_responding_repeats_it() -> None:
    whole, session = run_virtual(told())
    assert not session.trace.marks
    seconds = sum(chunk.seconds for _, chunk in whole)
    assert seconds > 3
    cut, session = run_virtual(told("cancel"))
    (mark,) = session.trace.marks
    assert len(cut) > 10
    assert max(at for at, _ in cut) <= mark.at
    twice, session = run_virtual(told("cancel", "respond"))
    assert sum(chunk.seconds for _, chunk in twice if chunk.epoch == 1) == pytest.approx(seconds)
    assert min(c.start for _, c in twice if c.epoch == 1) >= max(c.end for _, c in twice if c.epoch == 0)


def test_in_manual_mode_the_parrot_waits_to_be_asked() -> None:
    silent, _ = run_virtual(told(mode="manual"))
    assert silent == []
    asked, _ = run_virtual(told("respond", mode="manual"))
    assert sum(chunk.seconds for _, chunk in asked) > 3


async def asked_for(*events: str, windows: int) -> list[Chunk]:
    """What a parrot in manual mode makes of so many windows of sound and, right after them, the events."""
    audio, control, turns, parrot = Inlet().named("audio"), Inlet().named("control"), Turns(), Parrot(rate=24000)
    graph = (audio >> turns["audio"]) | (control >> turns["control"]) | (control >> parrot["control"])
    graph = graph | (turns["turn"] >> parrot["turn"]) | (Inlet().named("text") >> parrot["text"])
    with engine() as models:
        async with graph.session(engine=models) as session:
            await session.send(Event(name="turns", data={"mode": "manual"}, rate=RATE), "control")
            for chunk in sound(script((SPEECH, windows))):
                await session.send(chunk, "audio")
            for name in events:
                await session.send(Event(name=name, rate=RATE, start=windows * WINDOW), "control")
            await session.clock.sleep(1.0)
            session.finish()
            return [chunk async for chunk in session.outputs("parrot.audio", "parrot.said")]


def test_a_parrot_that_is_asked_always_answers_if_only_with_nothing() -> None:
    for events in (("respond",), ("commit", "respond")):
        said = run_virtual(asked_for(*events, windows=0))
        assert [(one.duration, one.final) for one in said if isinstance(one, Audio)] == [(0, True)]
        assert [(one.text, one.final) for one in said if isinstance(one, Text)] == [("", False), ("", True)]


def test_a_parrot_asked_right_after_a_commit_says_the_turn_that_it_ends() -> None:
    said = run_virtual(asked_for("commit", "respond", windows=40))
    seconds = sum(one.seconds for one in said if isinstance(one, Audio))
    assert seconds == pytest.approx(40 * WINDOW / RATE, abs=1e-3)


def test_a_turn_that_is_too_long_is_said_back_from_its_end() -> None:
    turns, parrot = Turns(), Parrot(longest=0.5)
    graph = mic(windows=script((SPEECH, 60), (SILENCE, 30))) >> turns
    graph = graph | (turns["turn"] >> parrot)
    made, session = run_virtual(outputs(graph))
    assert sum(c.seconds for c in made if isinstance(c, Audio)) == pytest.approx(0.5, abs=0.033)
    assert session.counters["parrot.samples_forgotten"] > RATE


def test_an_echo_is_the_same_sound_at_once() -> None:
    windows = script((SPEECH, 3))
    made, session = run_virtual(outputs(mic(windows=windows) >> Echo()))
    assert [c.start for c in made] == [0, 512, 1024]
    np.testing.assert_array_equal(made[0].samples, sound(windows)[0].samples)  # type: ignore[attr-defined]
    assert all(span.emitted == span.taken for span in session.trace.spans if span.stage == "echo")


def test_a_conversation_in_yaml() -> None:
    graph = parse_graph("""
stages:
  audio: inlet
  turns: {stage: turns, mode: semantic, eagerness: high, silence_ms: 300, idle_ms: null}
  parrot: {stage: parrot, rate: 24000}
edges:
  - audio >> turns
  - turns.turn >> parrot
""")
    assert [f"{graph.names[port.stage]}.{port.name}" for port in graph.open_outputs] == [
        "turns.events", "parrot.audio", "parrot.said"
    ]  # fmt: skip
    assert "turns" in graph.draw("mermaid")
