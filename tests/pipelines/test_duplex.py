"""The whole frame of a dialogue as one step, and the stage that converses with it."""

from __future__ import annotations

import asyncio
import resource
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import itertools

from conversing import FRAME, RATE, converse, engine, graph, noise, persona, sounds
from tiny_duplex import smallest_duplex, tiny_duplex, tokenizer_bytes
from tiny_moshi import GREEDY, WINDOW, Live

from antiphon.models.conformer.tokenizer import Source, Tokenizer
from antiphon.models.moshi.config import UNSET
from antiphon.models.moshi.persona import SILENCE, TONE
from antiphon.models.moshi.sampling import Sampling
from antiphon.pipelines.chunk import Audio, Chunk, Event, Text
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.duplex import Duplex, Monologue, TokenLog, restart
from antiphon.pipelines.engine import Engine, Lease
from antiphon.pipelines.stages.converse import Converse

FRAMES = 2 * WINDOW
HOT = Sampling(0.9, 20, 1.0, 15, text_seed=1, audio_seed=2)


def batched(model: Duplex, sampling: Sampling, rows: int) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value).expand(rows, *value.shape) for name, value in model.inputs(sampling).items()}


def test_a_frame_is_its_parts_one_after_the_other() -> None:
    model = tiny_duplex(torch.float64)
    model.prepare()
    sound = torch.from_numpy(np.stack([noise(FRAMES, 1), noise(FRAMES, 2)]))
    state = {name: spec.new(3) for name, spec in model.state_spec().items()}
    slots, active, steps = torch.arange(2), torch.ones(2, dtype=torch.bool), []
    mimi = tiny_duplex(torch.float64)
    with torch.inference_mode():
        for frame in range(FRAMES):
            steps.append(model.step(batched(model, HOT, 2) | {"pcm": sound[:, frame]}, state, slots, active))
        # The user's first frame is in the past; the codec begins with the second.
        codes = torch.zeros(2, 8, FRAMES, dtype=torch.int64)
        later = mimi.encoder.network(sound[:, 1:].flatten(1).double(), _whole())
        codes[..., 1:] = mimi.encoder.quantizer.encode(later, 8)
        live = Live(mimi.lm, 2)
        made = [live.step(codes[..., frame], HOT) for frame in range(FRAMES)]
        spoken = torch.stack([one["codes"] for one in made[1:]], 2)
        pcm = mimi.decoder.network(mimi.decoder.quantizer.decode(spoken), _whole())
    assert not steps[0]["valid"].any()
    assert (steps[0]["pcm"] == 0).all()
    assert all(one["valid"].all() for one in steps[1:])
    assert torch.equal(torch.stack([one["heard"] for one in steps[1:]], 2), codes[..., 1:])
    for one, other in zip(steps, made, strict=True):
        assert torch.equal(one["sampled"], other["sampled"])
        assert torch.equal(one["text"], other["text"])
    assert (torch.cat([one["pcm"] for one in steps[1:]], 1) - pcm).abs().max() < 1e-6
    assert pcm.abs().max() > 0.01


def _whole() -> Any:
    from antiphon.codecs.mimi import Whole

    return Whole()


def play(
    made: Engine, names: Sequence[int], moved_at: int | None = None, order: int = 1
) -> dict[int, list[dict[str, Tensor]]]:
    """Calls that begin at different times and pause at different times; all move to a fresh engine once."""
    model = made.model("converse")
    assert isinstance(model, Duplex)
    leases: dict[int, Lease] = {name: made.open_sync("converse") for name in list(names)[::order]}
    heard: dict[int, list[dict[str, Tensor]]] = {name: [] for name in names}
    for turn in range(FRAMES):
        ready = [name for name in names if turn >= 2 * name and (turn + name) % 5]
        chunks = []
        for name in ready[::order]:
            sampling = GREEDY if name == 0 else Sampling(text_seed=name, audio_seed=name + 9)
            pcm = noise(FRAMES, name)[len(heard[name])]
            chunks.append((leases[name], {**model.inputs(sampling), "pcm": pcm}))
        for name, row in zip(ready[::order], made.run_sync(chunks), strict=True):
            heard[name].append({key: value.clone() for key, value in row.items()})
        if turn == moved_at:
            fresh = engine()
            moved = {name: fresh.open_sync("converse") for name in names}
            for name, lease in leases.items():
                moved[name].restore(lease.pack(lease.snapshot_sync()))
            made, leases = fresh, moved
    return heard


def same(left: dict[int, list[dict[str, Tensor]]], right: dict[int, list[dict[str, Tensor]]]) -> bool:
    return all(
        torch.equal(a[key], b[key]) for name in right for a, b in zip(left[name], right[name], strict=True) for key in b
    )


def test_calls_are_what_they_are_alone_in_any_order_and_moved() -> None:
    together = play(engine(), range(4))
    assert max(len(call) for call in together.values()) > WINDOW
    for name in range(4):
        assert same(together, play(engine(), [name])), name
    assert same(together, play(engine(), range(4), order=-1))
    assert same(together, play(engine(), range(4), moved_at=9))


def test_restart_from_recent_codes_is_a_conversation_that_began_with_them() -> None:
    """To the language model; the codec's own memory begins afresh."""
    model = tiny_duplex(prefill=4)
    log = TokenLog(7)

    async def main() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        with engine(model, clock=VirtualClock()) as made:
            lease = await made.open("converse")
            for pcm in noise(FRAMES):
                row = await lease.step({**model.inputs(HOT), "pcm": pcm})
                log.add(row["sampled"], row["heard"])
            steps = [np.concatenate((row["sampled"].numpy(), row["heard"].numpy()))]
            assert np.array_equal(log.blocks(7)[0]["log"][-1], steps[0])
            await restart(model, lease, log)
            state = await lease.snapshot()
            fresh = Live(model.lm, 4)
            tokens = torch.from_numpy(log.blocks(7)[0]["log"])
            for one in tokens:
                one = one.expand(4, -1)
                fresh.step(one[:, 9:], HOT, one[:, :9])
            lives = {name: fresh.state[name][0] for name in fresh.state}
            return [{name: state[name] for name in lives}], [lives]

    [restarted], [lived] = run_virtual(main())
    for name in ("temporal.seen", "lm.tokens", "lm.history"):
        assert torch.equal(restarted[name], lived[name]), name
    assert int(lived["temporal.seen"]) == 7
    assert (restarted["temporal.rings"] - lived["temporal.rings"]).abs().max() < 1e-5


# ---------------------------------------------------------------- the stage


def test_sound_goes_in_in_any_pieces() -> None:
    sound = noise(10)
    whole = converse(list(sound))
    assert len(sounds(whole)) == 9 * FRAME
    starts = [chunk.start for chunk in whole if isinstance(chunk, Audio)]
    assert starts == [FRAME * frame for frame in range(9)] + [9 * FRAME]
    assert [chunk.final for chunk in whole if isinstance(chunk, Audio)] == [False] * 9 + [True]
    pieces = np.split(sound.ravel(), np.arange(700, sound.size, 700))
    assert np.array_equal(sounds(converse(pieces)), sounds(whole))
    at_48k = converse(list(np.repeat(sound, 2, 1)), rate=48000)
    assert len(sounds(at_48k)) in (8 * FRAME, 9 * FRAME)


def test_text_grows_by_pieces_and_ends_where_the_model_pauses() -> None:
    told = [chunk for chunk in converse(list(noise(40))) if isinstance(chunk, Text)]
    assert len(told) > 5
    assert told[-1].final
    for before, after in itertools.pairwise(told):
        assert after.text.startswith("" if before.final else before.text)
        assert after.start == before.start or before.final


def test_options_are_the_sessions_own() -> None:
    sound = list(noise(12))
    first, again, other, greedy = (
        sounds(converse(sound, **options))
        for options in ({}, {}, {"audio_seed": 3}, {"text_temperature": 0.0, "audio_temperature": 0.0})
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, greedy)
    with pytest.raises(ValueError, match="text_top_k is 900"):
        Converse(text_top_k=900)
    with pytest.raises(ValueError, match="restart_after=60"):
        Converse(restart_after=60.0)


def test_pause_start_and_restart() -> None:
    sound = list(noise(30))
    # Paused, time stands still: what was said meanwhile was never said.
    paused = sounds(converse(sound, {10: "pause", 20: "start"}))
    assert np.array_equal(paused, sounds(converse(sound[:10] + sound[20:])))
    # A new conversation begins as the first did.
    again = sounds(converse(sound[:10] * 2, {10: "restart"}))
    assert len(again) == 18 * FRAME
    assert np.array_equal(again[: 9 * FRAME], again[9 * FRAME :])


@pytest.mark.parametrize("logged", [False, True])
def test_a_paused_conversation_gives_its_place_away(logged: bool) -> None:
    """There is one place for two: who pauses comes back when the other one has gone."""
    model = tiny_duplex(prefill=4)
    options: dict[str, Any] = {"restart_after": 9.0, "restart_from": 1.0} if logged else {}

    async def main() -> tuple[list[Chunk], Counter[str]]:
        with engine(model, slots=1, clock=VirtualClock()) as models:

            async def talk(session: Any, first: int, last: int) -> None:
                for frame in range(first, last):
                    await session.send(Audio(samples=noise(30)[frame], rate=RATE, start=frame * FRAME), "audio")
                    await session.clock.sleep(0.08)

            async def read(session: Any) -> list[Chunk]:
                return [chunk async for chunk in session.outputs()]

            async with graph(**options).session(engine=models) as one:
                reading = asyncio.create_task(read(one))
                await talk(one, 0, 10)
                await one.send(Event(name="pause", rate=RATE), "control")
                await one.clock.sleep(0.01)
                assert models.metrics()["models"]["converse"]["used"] == 0
                one.interrupt()
                async with graph().session(engine=models) as two:
                    await talk(two, 0, 3)
                    assert models.metrics()["models"]["converse"]["used"] == 1
                    await one.send(Event(name="start", rate=RATE), "control")
                    await talk(one, 10, 12)
                    two.finish()
                    await read(two)
                await talk(one, 12, 22)
                assert models.metrics()["models"]["converse"]["used"] == 1
                one.finish()
                return await reading, one.counters

    made, counters = run_virtual(main())
    assert counters["converse.samples_paused"] == 2 * FRAME
    assert counters["converse.starts_refused"] == 2
    alone = sounds(converse(list(noise(30)[:10]) + list(noise(30)[12:22]), model=model))
    assert len(sounds(made)) == len(alone) == 19 * FRAME
    assert np.array_equal(sounds(made)[: 9 * FRAME], alone[: 9 * FRAME])
    assert np.array_equal(sounds(made)[9 * FRAME :], alone[9 * FRAME :]) is not logged


def test_an_interruption_does_not_end_the_conversation() -> None:
    sound = list(noise(20))
    quiet, cut = converse(sound), converse(sound, {10: "cancel"})
    assert {chunk.epoch for chunk in cut if isinstance(chunk, Audio)} == {0, 1}
    assert np.array_equal(sounds(cut), sounds(quiet))


def test_a_long_session_may_start_over_from_its_last_codes() -> None:
    model = tiny_duplex(prefill=4)
    sound = list(noise(40))
    rolled = sounds(converse(sound, model=model))
    restarted = sounds(converse(sound, model=model, restart_after=1.6, restart_from=0.4))
    assert len(restarted) == len(rolled)
    assert np.array_equal(restarted[: 18 * FRAME], rolled[: 18 * FRAME])
    assert not np.array_equal(restarted, rolled)


def test_a_prompt_is_read_before_the_conversation() -> None:
    """A text prompt of PersonaPlex's: as if the model had said and heard it, frame by frame."""
    model = persona()
    rows = model.prompt("so it goes")
    text = model.tokenizer.encode("<system> so it goes <system>")
    assert rows[:, 0].tolist() == [3] * 5 + text + [3] * 7
    assert (rows[:, 1:9] == SILENCE).all()
    assert (rows[:, 9:] == TONE).all()
    assert np.array_equal(model.prompt(" <system> so it goes <system>"), rows)

    async def main() -> tuple[dict[str, Tensor], np.ndarray[Any, Any]]:
        with engine(model, clock=VirtualClock()) as made:
            lease = await made.open("converse")
            await restart(model, lease, TokenLog(1, rows))
            state = await lease.snapshot()
            inputs = model.inputs(Sampling(text_seed=1, audio_seed=2))
            heard = [(await lease.step({**inputs, "pcm": pcm}))["pcm"].numpy() for pcm in noise(10)]
            return state, np.concatenate(heard)

    state, expected = run_virtual(main())
    lived = Live(model.lm, 4)
    for row in torch.from_numpy(rows):
        lived.step(row[9:].expand(4, -1), HOT, row[:9].expand(4, -1))
    for name in ("temporal.seen", "lm.tokens", "lm.history"):
        assert torch.equal(state[name], lived.state[name][0]), name
    sound = list(noise(10))
    assert np.array_equal(sounds(converse(sound, model=persona(), prompt="so it goes")), expected)
    other = sounds(converse(sound, model=persona(), prompt="what is it"))
    assert len(other) == len(expected)
    assert not np.array_equal(other, expected)
    # It is not forgotten by a new conversation, nor by one that starts over.
    again = sounds(converse(sound * 2, {10: "restart"}, model=persona(), prompt="so it goes"))
    assert np.array_equal(again, np.concatenate((expected, expected)))
    log = TokenLog(2, rows)
    log.add(torch.arange(9), torch.arange(8))
    (*blocks,) = log.blocks(4)
    assert sum(int(block["count"]) for block in blocks) == len(rows) + 1 == len(rows) + len(log)
    log.clear()
    assert len(log) == 0
    assert log


def test_models_that_take_no_prompt() -> None:
    with pytest.raises(Exception, match="takes no prompts"):
        converse(list(noise(1)), model=tiny_duplex(), prompt="hello")
    with pytest.raises(Exception, match="not made for prompts"):
        converse(list(noise(1)), model=tiny_duplex(prefill=4), prompt="hello")
    with pytest.raises(ValueError, match="4001 characters: 4000 at most"):
        persona().prompt("a" * 4001)


@pytest.mark.parametrize(("tokens", "expected"), [
    ([4, 3, 4, 3, 3], ["o", "oo", "oo!"]),
    ([3, 3, 3, 3], []),
    ([-2, 500], []),
])  # fmt: skip
def test_a_monologue_ends_after_a_pause(tokens: list[int], expected: list[str]) -> None:
    said = Monologue(Tokenizer(Source("tokenizer.model", tokenizer_bytes())), (3, 0), pause=2)
    told = [news for token in tokens if (news := said.add(token))]
    assert [news.text + "!" * news.final for news in told] == expected


def test_an_utterance_that_is_long_enough_ends_with_its_own_words() -> None:
    tokenizer = Tokenizer(Source("tokenizer.model", tokenizer_bytes()))
    said = Monologue(tokenizer, (3, 0), longest=1)
    start, letter = tokenizer.pieces.index("▁"), tokenizer.pieces.index("o")
    news = [said.add(token) for token in (letter, letter, start, letter)]
    assert [one and one.words for one in news] == [
        (("o", 0, 1),), (("oo", 0, 2),), (("oo", 0, 2),), (("o", 2, 4),),
    ]  # fmt: skip
    assert [one.final for one in news if one is not None] == [False, False, True, False]


class _Bytes:
    pieces = ("<0xE2>", "<0x82>", "<0xAC>", "▁a", "<0xFF>")


def test_a_character_of_several_bytes_comes_whole() -> None:
    said = Monologue(_Bytes(), (9,))  # type: ignore[arg-type]
    assert [news and news.text for news in map(said.add, (0, 1, 2, 3, 4))] == [None, None, "€", "€ a", "€ a\ufffd"]


@pytest.mark.slow
def test_an_hour_of_one_session() -> None:
    """Frames of 2.56 s in place of 0.08: 1406 of them, 175 windows; as many samples out as in, less the first frame."""
    model = smallest_duplex((192, 160))
    frames = 3600 * model.rate // model.frame

    def pieces() -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        tone = np.sin(np.arange(model.frame) * 0.01).astype(np.float32) * np.float32(0.1)
        for frame in range(frames):
            yield tone if frame % 10 else -tone

    async def main() -> None:
        samples = heard = last = 0
        memory: list[int] = []
        with engine(model, clock=VirtualClock()) as models:
            async with graph().session(engine=models) as session:

                async def listen() -> None:
                    nonlocal heard
                    async for chunk in session.outputs():
                        if isinstance(chunk, Audio):
                            assert chunk.start == heard
                            heard += len(chunk.samples)

                listening = asyncio.create_task(listen())
                for pcm in pieces():
                    await session.send(Audio(samples=pcm, rate=model.rate, start=samples), "audio")
                    samples += len(pcm)
                    await session.clock.sleep(len(pcm) / model.rate)
                    # What was sent is answered before the next piece: nothing piles up.
                    assert samples - heard == model.frame, samples
                    if samples // model.rate // 600 > last:
                        last = samples // model.rate // 600
                        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
                session.finish()
                await listening
        assert samples == frames * model.frame
        assert heard == samples - model.frame
        assert len(memory) == 5
        assert memory[-1] - memory[1] < 4096, memory  # kilobytes

    run_virtual(main())


def test_forced_tokens_are_said() -> None:
    model = tiny_duplex()
    made = engine(model)
    lease = made.open_sync("converse")
    rows = []
    for number, pcm in enumerate(noise(6)):
        inputs = model.inputs(HOT)
        if number == 2:
            inputs["force"] = np.array([7] + [UNSET] * 8)
        rows.append(lease.step_sync({**inputs, "pcm": pcm}))
    assert int(rows[2]["sampled"][0]) == 7
    assert int(rows[3]["text"]) == 7


@pytest.mark.gpu
def test_captured_frames_say_what_the_cpu_says() -> None:
    """In float64, with draws from the same seeds: the noise does not depend on the device."""

    def said(device: str) -> list[dict[str, Tensor]]:
        model = tiny_duplex(torch.float64)
        with Engine(device) as made:
            made.add("converse", model, slots=4, buckets=(4,))
            leases = [made.open_sync("converse") for _ in range(3)]
            rows: list[dict[str, Tensor]] = []
            for pcm in noise(FRAMES):
                chunks = [
                    (lease, {**model.inputs(Sampling(text_seed=seed, audio_seed=seed)), "pcm": pcm})
                    for seed, lease in enumerate(leases)
                ]
                for row in made.run_sync(chunks):
                    rows.append({name: value.clone() for name, value in row.items()})
        return rows

    for row, expected in zip(said("cuda"), said("cpu"), strict=True):
        assert torch.equal(row["sampled"], expected["sampled"])
        assert torch.equal(row["heard"], expected["heard"])
        assert (row["pcm"] - expected["pcm"]).abs().max() < 1e-6
