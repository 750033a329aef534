"""The language model's step: equal to whole sequences in any portions, and to itself alone, moved or in other slots."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from antiphon.models.cosyvoice.lm import SpeechLM
from antiphon.models.cosyvoice.lm_config import Burst, LMConfig
from antiphon.models.cosyvoice.sampling import HISTORY, NONE, Sampling
from antiphon.models.cosyvoice.stream import TextStream
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.engine import Engine, Lease

TINY = LMConfig(
    text=40, speech=31, width=32, layers=2, heads=4, kv_heads=2, feedforward=48, capacity=160, prefill=(4, 8)
)


def network(config: LMConfig = TINY, dtype: torch.dtype = torch.float64) -> SpeechLM:
    generator = torch.Generator().manual_seed(0)
    lm = SpeechLM(config).to(dtype)
    with torch.no_grad():
        for name, parameter in sorted(lm.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + noise * (0.1 if parameter.dim() < 2 else 1.5 * parameter.shape[-1] ** -0.5))
        lm.head.bias[config.speech :] -= 3
    lm.prepare()
    return lm


def rows(sessions: int, variant: int, lm: SpeechLM, **given: Tensor) -> dict[str, Tensor]:
    return {name: given.get(name, spec.new(sessions)) for name, spec in lm.input_spec(variant).items()}


def read(lm: SpeechLM, tokens: Tensor, portions: Sequence[Sequence[int]]) -> Tensor:
    """Logits ``[B, T, classes]`` of ``[B, T]`` tokens, each row read in its own portions; NaN where none were made."""
    state = {name: spec.new(len(tokens) + 1) for name, spec in lm.state_spec().items()}
    made = torch.full((*tokens.shape, lm.config.classes), torch.nan, dtype=lm.head.weight.dtype)
    logits: list[Tensor] = []
    hook = lm.head.register_forward_hook(lambda module, given, out: logits.append(out.clone()))
    at = torch.zeros(len(tokens), dtype=torch.int64)
    for step in range(max(map(len, portions))):
        counts = torch.tensor([sizes[step] if step < len(sizes) else 0 for sizes in portions])
        variant = next(length for length in lm.variants if length >= counts.max())
        chunk = torch.full((len(tokens), variant), 5)
        for row, count in enumerate(counts.tolist()):
            chunk[row, :count] = tokens[row, at[row] : at[row] + count]
        active = counts > 0
        lm.step(rows(len(tokens), variant, lm, tokens=chunk, count=counts), state, torch.arange(len(tokens)), active)
        at += counts
        for row in active.nonzero().flatten().tolist():
            made[row, at[row] - 1] = logits[-1][row]
    hook.remove()
    assert state["lm.seen"][: len(tokens)].tolist() == at.tolist()
    return made


def test_reading_in_any_portions_equals_the_whole() -> None:
    lm, length = network(), 60
    tokens = torch.randint(0, TINY.vocabulary, (5, length), generator=torch.Generator().manual_seed(1))
    cycle = itertools.cycle((1, 1, 7, 2, 5, 8, 3))
    mixed: list[int] = []
    while sum(mixed) < length:
        mixed.append(min(next(cycle), length - sum(mixed)))
    portions = [[1] * length, [8] * 7 + [4], mixed, [3] * 20, [8, 1, 8, 1]]
    made = read(lm, tokens, portions)
    with torch.no_grad():
        whole = lm(tokens)
    there = ~made[..., 0].isnan()
    assert there.sum(1).tolist() == [60, 8, len(mixed), 20, 4]
    assert (made[there] - whole[there]).abs().max() < 1e-10


def run(lm: SpeechLM, stream: TextStream) -> None:
    """To the stream's end."""
    state = {name: spec.new(2) for name, spec in lm.state_spec().items()}
    while (feed := stream.feed()) is not None:
        inputs = {name: torch.from_numpy(value)[None] for name, value in feed.inputs.items()}
        stream.take(int(lm.step(inputs, state, torch.tensor([0]), torch.tensor([True]))["token"]))


def test_draws_do_not_depend_on_how_the_prompt_is_read() -> None:
    said = []
    for prefill in ((), (4,), (4, 8), (16,)):
        lm = network(dataclasses.replace(TINY, prefill=prefill))
        stream = TextStream(
            lm.config,
            range(9),
            prompt_text=range(4),
            prompt_speech=range(11),
            sampling=Sampling(seed=3),
            lengths=(6, 9),
        )
        run(lm, stream)
        said.append(stream.speech)
    assert len(said[0]) > 50
    assert all(other == said[0] for other in said)


def test_only_what_may_be_said_is_drawn() -> None:
    lm = network()
    with torch.no_grad():
        lm.head.bias[TINY.speech :] += 1000
    try:
        for special in (NONE, TINY.end, TINY.fill):
            inputs = rows(64, 1, lm, special=torch.full((64,), special), seed=torch.arange(64))
            inputs["temperature"] += 1
            state = {name: spec.new(65) for name, spec in lm.state_spec().items()}
            drawn = lm.step(inputs, state, torch.arange(64), torch.ones(64, dtype=torch.bool))["token"]
            assert (drawn == special).all() if special != NONE else (drawn < TINY.speech).all()
    finally:
        with torch.no_grad():
            lm.head.bias[TINY.speech :] -= 1000


def test_a_step_that_is_not_taken_leaves_no_trace() -> None:
    lm = network()
    state = {name: torch.randint(0, 5, (4, *spec.shape)).to(spec.dtype) for name, spec in lm.state_spec().items()}
    before = {name: value.clone() for name, value in state.items()}
    inputs = rows(3, 4, lm, tokens=torch.full((3, 4), 7), count=torch.full((3,), 3))
    lm.step(inputs, state, torch.arange(3), torch.tensor([False, True, False]))
    for name, value in state.items():
        assert torch.equal(value[[0, 2]], before[name][[0, 2]])
        assert not torch.equal(value[1], before[name][1])


def test_sizes_that_do_not_fit_are_refused() -> None:
    for changes, message in (
        ({"speech": 0}, "speech must be positive"),
        ({"prefill": (8, 4)}, "rising lengths"),
        ({"prefill": (1, 4)}, "at least 2"),
        ({"capacity": 7}, "below the longest step, of 8"),
        ({"kv_heads": 3}, "cannot share"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match="text token 40 is not among the 40"):
        TINY.text_id(40)
    with pytest.raises(TypeError, match="'1'"):
        network().input_spec("1")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("bursts", [(3,), (2, 7), (25,)])
def test_bursts_draw_what_single_steps_do(bursts: tuple[int, ...], known: bool) -> None:
    """Whatever ends them: the drawn end, fills drawn and due, the longest length, the capacity."""

    def spoken(bursts: tuple[int, ...], seed: int, capacity: int) -> tuple[list[int], object, int, int]:
        lm = network(dataclasses.replace(TINY, bursts=bursts, capacity=capacity))
        with torch.no_grad():
            lm.head.bias[TINY.end] += 7 * (seed == 2)
        given: dict[str, Any] = {"prompt_text": range(4), "prompt_speech": range(11), "lengths": (2, 6)}
        stream = TextStream(lm.config, range(9) if known else None, sampling=Sampling(seed=seed), **given)
        state = {name: spec.new(2) for name, spec in lm.state_spec().items()}
        arriving, steps = iter([] if known else range(14)), 0
        while stream.end is None:
            if (feed := stream.feed(9)) is None:
                if stream.end is None:
                    token = next(arriving, None)
                    stream.finish() if token is None else stream.push([token])
                continue
            inputs = {name: torch.from_numpy(value)[None] for name, value in feed.inputs.items()}
            outputs = lm.step(inputs, state, torch.tensor([0]), torch.tensor([True]))
            stream.take_all(outputs["drawn" if "drawn" in outputs else "token"][0:1].flatten().tolist())
            steps += 1
        return stream.speech, stream.end, int(state["lm.seen"][0]), steps

    ends = set()
    for seed, capacity in ((0, 160), (1, 160), (2, 160), (3, 160), (4, 60)):
        *single, steps = spoken((), seed, capacity)
        *several, fewer = spoken(bursts, seed, capacity)
        assert several == single
        assert fewer < 0.7 * steps
        ends.add(single[1])
    assert ends == {"said", "length", "capacity"}


def test_sessions_that_join_a_burst_draw_what_they_do_alone() -> None:
    """Each begins while others are in the middle of theirs."""
    lm = network(dataclasses.replace(TINY, bursts=(25,)), torch.float32)

    async def main(sessions: Sequence[int]) -> tuple[dict[int, list[int]], float]:
        made: dict[int, list[int]] = {}
        with Engine(inline=True, clock=VirtualClock(), cost=lambda *_: 0.001) as engine:
            engine.add("lm", lm, slots=8, tick=0.0)

            async def say(session: int) -> None:
                lease = await engine.open("lm", paced=False)
                stream = TextStream(lm.config, range(3 + session), sampling=Sampling(seed=session), lengths=(4, 8))
                await asyncio.sleep(0.0037 * session)
                while (feed := stream.feed(10 + session)) is not None:
                    lease.use(feed.variant)
                    row = await lease.step(feed.inputs)
                    stream.take_all(row["drawn" if "drawn" in row else "token"].flatten().tolist())
                made[session] = stream.speech

            await asyncio.gather(*map(say, sessions))
            metrics = engine.metrics()["models"]["lm"]["variants"][Burst(25)]
        return made, metrics["rows"] / metrics["batches"]

    together, rows = run_virtual(main(range(7)))
    assert rows > 3
    for session, speech in together.items():
        assert len(speech) > 11
        assert run_virtual(main([session]))[0][session] == speech


def test_rows_of_a_burst_stop_each_at_its_own_place() -> None:
    lm = network(dataclasses.replace(TINY, bursts=(6,)))
    variant = lm.variants[-1]
    state = {name: spec.new(5) for name, spec in lm.state_spec().items()}
    inputs = rows(4, variant, lm, draws=torch.tensor([6, 2, 6, 1]), seed=torch.arange(4))
    inputs["temperature"] += 1
    before = {name: value[2].clone() for name, value in state.items()}
    drawn = lm.step(inputs, state, torch.arange(4), torch.tensor([True, True, False, True]))["drawn"]
    assert (drawn >= 0).sum(1).tolist() == [6, 2, 0, 1]
    assert state["lm.seen"][:4].tolist() == [6, 2, 0, 1]
    assert all(torch.equal(state[name][2], value) for name, value in before.items())
    alone = {name: spec.new(2) for name, spec in lm.state_spec().items()}
    one = {name: value[1:2] for name, value in inputs.items()}
    assert torch.equal(lm.step(one, alone, torch.tensor([0]), torch.tensor([True]))["drawn"][0], drawn[1])


# ---------------------------------------------------------------- on the engine

NAMES = "abcdef"


def engine() -> Engine:
    made = Engine(inline=True)
    made.add("lm", network(dtype=torch.float32), slots=8)
    return made


def utterance(name: str) -> tuple[TextStream, list[int]]:
    """Every other one's text is known as a whole; all differ in prompt, length and sampling. And the arriving text."""
    place = NAMES.index(name)
    sampling = Sampling(seed=place, top_k=20 + place, temperature=1 + place / 10, window=5 + place)
    text, prompt = [(7 * place + token) % TINY.text for token in range(8 + place)], range(3 * place)
    given = {"prompt_text": range(2 * place), "prompt_speech": prompt, "sampling": sampling, "lengths": (2, 4)}
    if place % 2:
        return TextStream(TINY, **given), text
    return TextStream(TINY, text, **given), []


def play(names: Sequence[str], moves: Sequence[int] = (), order: int = 1) -> dict[str, list[int]]:
    """Speech of utterances that begin one after another; after each round in ``moves`` all go to a fresh engine."""
    made = engine()
    leases: dict[str, Lease] = {name: made.open_sync("lm") for name in list(names)[::order]}
    streams = {name: utterance(name) for name in names}
    mixed = 0
    for turn in itertools.count():
        chunks = []
        for name in list(names)[::order]:
            stream, text = streams[name]
            if turn < 3 * NAMES.index(name):
                continue
            while (feed := stream.feed()) is None and stream.end is None:
                stream.push([text.pop(0)]) if text else stream.finish()
            if feed is not None:
                leases[name].use(feed.variant)
                chunks.append((name, feed))
        if not chunks and turn > 3 * len(NAMES):
            break
        mixed += len({feed.variant for _, feed in chunks}) > 1
        answers = made.run_sync([(leases[name], feed.inputs) for name, feed in chunks])
        for (name, _), row in zip(chunks, answers, strict=True):
            streams[name][0].take(int(row["token"]))
        if turn in moves:
            fresh = engine()
            moved = {name: fresh.open_sync("lm") for name in names}
            for name, lease in leases.items():
                moved[name].restore(lease.pack(lease.snapshot_sync()))
            made, leases, streams = fresh, moved, copy.deepcopy(streams)
    assert mixed >= 10 or len(names) == 1
    return {name: stream.speech for name, (stream, _) in streams.items()}


@pytest.fixture(scope="module")
def together() -> dict[str, list[int]]:
    torch.set_num_threads(1)
    return play(NAMES)


def test_neighbours_change_nothing(together: dict[str, list[int]]) -> None:
    assert min(map(len, together.values())) > 16
    assert max(map(len, together.values())) > 40
    for name in NAMES:
        assert play(name) == {name: together[name]}


def test_slots_and_order_change_nothing(together: dict[str, list[int]]) -> None:
    assert play(NAMES, order=-1) == together


def test_a_move_in_the_middle_changes_nothing(together: dict[str, list[int]]) -> None:
    assert play(NAMES, moves=(2, 17)) == together


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_greedy_speech_is_what_whole_sequences_make_likeliest(device: str) -> None:
    """Through the engine's thread, on a GPU from replayed graphs."""
    with Engine(device) as made:
        made.add("lm", network(dtype=torch.float32), slots=4, buckets=(4,))
        for known, text in ((range(9), []), (None, list(range(12)))):
            stream = TextStream(
                TINY,
                known,
                prompt_text=range(3),
                prompt_speech=range(7),
                sampling=Sampling(temperature=0),
                lengths=(5, 5),
            )
            lease, tokens = made.open_sync("lm"), []
            while stream.end is None:
                if (feed := stream.feed()) is not None:
                    lease.use(feed.variant)
                    tokens += feed.inputs["tokens"][: int(feed.inputs["count"])].tolist()
                    stream.take(int(lease.step_sync(feed.inputs)["token"]))
                elif stream.end is None:
                    stream.push([text.pop(0)]) if text else stream.finish()
            tokens.append(stream.speech[-1])
            assert len(stream.speech) > 40
            places = [place for place, token in enumerate(tokens) if token < TINY.speech][7:]
            with torch.no_grad():
                logits = network()(torch.tensor([tokens]))[0, [place - 1 for place in places], : TINY.speech]
            assert [tokens[place] for place in places] == stream.speech
            taken = logits.gather(1, torch.tensor(stream.speech)[:, None])[:, 0]
            assert (logits.amax(1) - taken).max() < 1e-3


def test_what_a_step_takes() -> None:
    assert TINY.lengths == network().variants == (1, 4, 8)
    assert network().input_spec(1)["recent"].shape == (HISTORY,)
