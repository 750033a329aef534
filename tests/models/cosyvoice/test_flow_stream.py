"""Streaming the flow gives what the masked offline pass gives, whoever shares the batch, wherever it goes on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from antiphon.models.cosyvoice.flow import FlowMatching
from antiphon.models.cosyvoice.flow_config import RATE, FlowConfig, FlowLimits
from antiphon.models.cosyvoice.flow_context import Mask
from antiphon.models.cosyvoice.flow_hops import Hop, Hops
from antiphon.models.cosyvoice.flow_stream import StreamingFlow
from antiphon.models.cosyvoice.flow_voices import FlowVoice
from antiphon.pipelines.engine import Engine, Lease
from antiphon.pipelines.engine.slots import SlotStore

CHUNK = 5
TINY = FlowConfig(
    vocabulary=50,
    mels=8,
    speaker=6,
    chunk=CHUNK,
    width=32,
    heads=2,
    feedforward=48,
    layers=1,
    up_layers=2,
    channels=16,
    unet_heads=2,
    unet_head_width=8,
    stage_blocks=1,
    middle_stages=1,
    steps=2,
)
LIMITS = FlowLimits(hops=(5, 10, 20), left=400, voices=4, prompt=40)
ROLLING = replace(LIMITS, left=20, rolling=True)
TOLERANCE = 1e-12
PROMPTS = (0, 7, 8, 18, 25)


def network(config: FlowConfig = TINY, dtype: torch.dtype = torch.float64, seed: int = 0) -> FlowMatching:
    generator = torch.Generator().manual_seed(seed)
    flow = FlowMatching(config).to(dtype).eval()
    for name, parameter in flow.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.copy_(centre + noise * (0.2 if parameter.dim() < 2 else parameter[0].numel() ** -0.5))
    return flow


@dataclass(frozen=True)
class Speech:
    """A prompt and what is said after it."""

    prompt: list[int]
    tokens: list[int]
    mel: Tensor
    embedding: Tensor

    @classmethod
    def of(cls, prompt: int, tokens: int, config: FlowConfig = TINY, dtype: torch.dtype = torch.float64) -> Speech:
        generator = torch.Generator().manual_seed(1000 * prompt + tokens)
        said = torch.randint(config.vocabulary, (prompt + tokens,), generator=generator).tolist()
        mel = torch.randn(RATE * prompt, config.mels, generator=generator, dtype=torch.float64)
        embedding = torch.randn(config.speaker, generator=generator, dtype=torch.float64)
        return cls(said[:prompt], said[prompt:], mel.to(dtype), embedding.to(dtype))

    def offline(self, flow: FlowMatching, mask: Mask) -> Tensor:
        """The frames after the prompt."""
        tokens = torch.tensor([self.prompt + self.tokens])
        mel = flow.generate(tokens, torch.tensor([tokens.shape[1]]), self.mel[None], self.embedding[None], mask)
        return mel[0, RATE * len(self.prompt) :]


def streaming(
    limits: FlowLimits = LIMITS,
    config: FlowConfig = TINY,
    dtype: torch.dtype = torch.float64,
    together: bool | None = False,
) -> StreamingFlow:
    model = StreamingFlow(network(config, dtype), limits, together=together)
    model.prepare()
    return model


def add(model: StreamingFlow, speech: Speech) -> FlowVoice:
    return model.add_voice(speech.prompt, speech.mel, speech.embedding)


def slots(model: StreamingFlow, count: int) -> dict[str, Tensor]:
    return {name: spec.new(count + 1) for name, spec in model.state_spec().items()}


def step(
    model: StreamingFlow, state: dict[str, Tensor], hops: Sequence[Hop], at: Sequence[int], pad: int = 0
) -> list[Tensor]:
    """One step of these rows, and ``pad`` rows on scratch; the speech frames of each."""
    scratch = len(state["flow.seen"]) - 1
    specs = model.input_spec(hops[0].variant)
    inputs = {
        name: torch.cat([torch.stack([torch.from_numpy(hop.inputs[name]) for hop in hops]), spec.new(pad)])
        for name, spec in specs.items()
    }
    index, active = torch.tensor([*at, *[scratch] * pad]), torch.tensor([True] * len(hops) + [False] * pad)
    outputs = model.step(inputs, state, index, active)
    for row, hop in enumerate(hops):
        assert outputs["frames"][row] == hop.frames
        assert not outputs["mel"][row, hop.frames :].any()
    return [outputs["mel"][row, hop.skip : hop.frames] for row, hop in enumerate(hops)]


def plan(model: StreamingFlow, voice: FlowVoice, speech: Speech, schedule: Sequence[int], aligned: bool) -> list[Hop]:
    """All steps of the speech, its tokens coming one by one."""
    hops = Hops(voice, model.config, model.limits, schedule, aligned=aligned)
    steps = [hop for token in speech.tokens for hop in hops.push([token])]
    return [*steps, *hops.finish()]


def starts(voice: FlowVoice, steps: Sequence[Hop]) -> tuple[int, ...]:
    """Tokens at which the steps start."""
    counts = [int(hop.inputs["count"]) for hop in steps]
    return tuple(itertools.accumulate(counts, initial=voice.shared))[:-1]


@pytest.mark.parametrize(("prompt", "late"), [(0, 0), (7, 0), (8, 1), (18, 1), (20, 3), (22, 0)])
def test_an_early_first_hop_is_that_of_a_clip_which_begins_later(prompt: int, late: int) -> None:
    schedule, speech = (3, 10), Speech.of(prompt, 30)
    limits = replace(LIMITS, hops=(5, 10, 20), schedule=schedule, early=True)
    model, plain = streaming(limits), streaming()
    cut = Speech(speech.prompt[late:], speech.tokens, speech.mel[RATE * late :], speech.embedding)
    voice, other = add(model, speech), add(plain, cut)
    assert voice == other
    if prompt:
        first = Hops(voice, model.config, limits, schedule)
        assert first.wanted == 3 + model.config.lookahead
    (ours, theirs) = (
        [step(one, state, [hop], [0])[0] for hop in plan(one, known, speech, schedule, True)]
        for one, known, state in ((model, voice, slots(model, 1)), (plain, other, slots(plain, 1)))
    )
    assert torch.equal(torch.cat(ours), torch.cat(theirs))


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize("schedule", [(5,), (5, 10, 20)], ids=str)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_hops_at_chunks_give_the_frames_of_training(prompt: int, schedule: tuple[int, ...], together: bool) -> None:
    model = streaming(together=together)
    speech = Speech.of(prompt, 48)
    voice = add(model, speech)
    state = slots(model, 1)
    steps = plan(model, voice, speech, schedule, aligned=True)
    assert all(start % CHUNK == 0 for start in starts(voice, steps))
    assert len(steps) >= 3
    frames = [step(model, state, [hop], [0])[0] for hop in steps]
    offline = speech.offline(model.flow, Mask(CHUNK))
    assert torch.cat(frames).shape == (RATE * 48, TINY.mels)
    assert (torch.cat(frames) - offline).abs().max() < TOLERANCE
    everything = speech.offline(model.flow, Mask())
    assert (everything - offline).abs().max() > 1e-3


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize("limits", [LIMITS, ROLLING, replace(ROLLING, left=6)], ids=["exact", "rolling", "short"])
@pytest.mark.parametrize("schedule", [(3, 2, 5), (20, 1, 7)], ids=str)
def test_hops_of_any_size_give_the_frames_of_their_mask(
    limits: FlowLimits, schedule: tuple[int, ...], together: bool
) -> None:
    model = streaming(limits, together=together)
    speech = Speech.of(18, 60)
    voice = add(model, speech)
    state = slots(model, 1)
    steps = plan(model, voice, speech, schedule, aligned=False)
    frames = torch.cat([step(model, state, [hop], [0])[0] for hop in steps])
    mask = Mask(CHUNK, starts(voice, steps), voice.shared, limits.left if limits.rolling else None)
    assert (frames - speech.offline(model.flow, mask)).abs().max() < TOLERANCE
    assert (frames - speech.offline(model.flow, Mask(CHUNK))).abs().max() > 1e-3


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize("left", [2, 20, 50])
@pytest.mark.parametrize("prompt", [0, 18])
def test_a_rolling_session_is_the_windowed_offline_pass_and_does_not_end(
    prompt: int, left: int, together: bool
) -> None:
    model = streaming(replace(ROLLING, left=left), together=together)
    speech = Speech.of(prompt, 133)
    voice = add(model, speech)
    state = slots(model, 1)
    steps = plan(model, voice, speech, (5, 10, 20), aligned=True)
    frames = torch.cat([step(model, state, [hop], [0])[0] for hop in steps])
    mask = Mask(CHUNK, starts(voice, steps), voice.shared, left)
    assert (frames - speech.offline(model.flow, mask)).abs().max() < TOLERANCE
    assert state["flow.unet.rings"].shape[4] == left


def test_frames_come_before_later_tokens_are_known() -> None:
    """The same first hop, whatever follows its lookahead."""
    model = streaming()
    speech = Speech.of(8, 40)
    voice = add(model, speech)
    first = Hops(voice, TINY, LIMITS, (5,)).push(speech.tokens[:10])
    again = plan(model, voice, speech, (5,), aligned=True)[: len(first)]
    assert len(first) == 1
    frames = [step(model, slots(model, 1), [hop], [0])[0] for hop in (*first, *again)]
    assert torch.equal(frames[0], frames[1])


def sessions(model: StreamingFlow, dtype: torch.dtype, count: int) -> list[list[Hop]]:
    """Speeches of different lengths by three voices with prompts of different lengths."""
    speeches = [Speech.of(prompt, 1, dtype=dtype) for prompt in (18, 0, 7)]
    voices = [add(model, speech) for speech in speeches]
    lengths = random.Random(count).choices(range(11, 50), k=count)
    spoken = [Speech.of(0, length, dtype=dtype) for length in lengths]
    return [
        plan(model, voices[index % 3], speech, ((5, 10, 20), (5,), (20,))[index % 3], aligned=True)
        for index, speech in enumerate(spoken)
    ]


def play(
    model: StreamingFlow, plans: Sequence[list[Hop]], chosen: Sequence[int], seed: int, batch: int, pad_to: int = 0
) -> dict[int, Tensor]:
    """Step the chosen sessions at random times, rows in random order; what each has heard."""
    chance = random.Random(seed)
    state = slots(model, len(plans))
    places = dict(zip(chosen, chance.sample(range(len(plans)), len(chosen)), strict=True))
    waiting = {index: list(plans[index]) for index in chosen}
    heard: dict[int, list[Tensor]] = {index: [] for index in chosen}
    while any(waiting.values()):
        variant = chance.choice([hops[0].variant for hops in waiting.values() if hops])
        rows = [index for index, hops in waiting.items() if hops and hops[0].variant == variant]
        rows = chance.sample(rows, min(len(rows), batch))
        hops = [waiting[index].pop(0) for index in rows]
        pad = max(0, pad_to - len(rows))
        for index, frames in zip(rows, step(model, state, hops, [places[i] for i in rows], pad), strict=True):
            heard[index].append(frames)
    return {index: torch.cat(frames) for index, frames in heard.items()}


@pytest.mark.parametrize("limits", [LIMITS, ROLLING], ids=["exact", "rolling"])
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_a_row_does_not_depend_on_the_others(limits: FlowLimits, together: bool) -> None:
    model = streaming(limits, dtype=torch.float32, together=together)
    plans = sessions(model, torch.float32, 9)
    assert len({len(hops) for hops in plans}) > 3
    everyone = play(model, plans, range(9), seed=1, batch=8, pad_to=8)
    for others in (
        play(model, plans, range(9), seed=2, batch=4, pad_to=4),
        play(model, plans, [8, 1, 5, 3], seed=3, batch=4, pad_to=8),
        *(play(model, plans, [index], seed=4, batch=1, pad_to=4) for index in (0, 2, 7)),
    ):
        for index, frames in others.items():
            assert torch.equal(frames, everyone[index])


@pytest.mark.parametrize("limits", [LIMITS, ROLLING], ids=["exact", "rolling"])
def test_rows_of_a_batch_are_the_offline_pass_of_each(limits: FlowLimits) -> None:
    model = streaming(limits, together=True)
    speeches = [Speech.of(prompt, length) for prompt, length in ((25, 31), (0, 62), (8, 47), (18, 20))]
    voices = [add(model, speech) for speech in speeches]
    plans = [plan(model, *pair, (5,), aligned=True) for pair in zip(voices, speeches, strict=True)]
    heard = play(model, plans, range(4), seed=5, batch=4)
    for index, (voice, speech) in enumerate(zip(voices, speeches, strict=True)):
        mask = Mask(CHUNK, (), voice.shared, limits.left if limits.rolling else None)
        assert (heard[index] - speech.offline(model.flow, mask)).abs().max() < TOLERANCE


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_inactive_rows_leave_no_trace(together: bool) -> None:
    model = streaming(together=together)
    plans = sessions(model, torch.float64, 3)
    state = slots(model, 3)
    steps = [[hop for hop in hops if hop.variant == 5] for hops in plans]
    plans = [steps[1], steps[1], steps[1]]
    for round_ in range(3):
        step(model, state, [hops[round_] for hops in plans], [0, 1, 2])
    before = {name: tensor.clone() for name, tensor in state.items()}
    inputs = {
        name: torch.stack([torch.from_numpy(hops[3].inputs[name]) for hops in plans]) for name in plans[0][3].inputs
    }
    for index in range(model.slices(5)):
        model.step_slice(index, inputs, state, torch.arange(3), torch.tensor([True, False, True]))
    for name, tensor in state.items():
        assert torch.equal(tensor[1], before[name][1]), name
    for name in ("flow.seen", "flow.unet.rings", "flow.unet.tails", "flow.tokens.rings", "flow.frames.tails"):
        assert not torch.equal(state[name][0], before[name][0]), name


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


def engine_with(engines: list[Engine], model: StreamingFlow) -> Engine:
    engine = Engine(inline=True, inbox=64)
    engines.append(engine)
    engine.add("flow", model, slots=4, buckets=(4,))
    return engine


WIDE = replace(LIMITS, hops=(10,))


def test_sessions_of_an_engine_are_sliced_and_alone(engines: list[Engine]) -> None:
    model = streaming(WIDE, dtype=torch.float32)
    engine = engine_with(engines, model)
    speeches = [Speech.of(prompt, length, dtype=torch.float32) for prompt, length in ((18, 33), (0, 12), (7, 25))]
    voices = [engine.ask_sync(lambda speech=speech: add(model, speech)) for speech in speeches]
    plans = [plan(model, *pair, (5,), aligned=True) for pair in zip(voices, speeches, strict=True)]

    def run(chosen: Sequence[int]) -> dict[int, Tensor]:
        leases = {index: engine.open_sync("flow") for index in chosen}
        heard: dict[int, list[Tensor]] = {index: [] for index in chosen}
        for turn in range(max(map(len, plans))):
            due = {index: plans[index][turn] for index in chosen if turn < len(plans[index])}
            rows = engine.run_sync([(leases[index], hop.inputs) for index, hop in due.items()])
            for (index, hop), row in zip(due.items(), rows, strict=True):
                heard[index].append(row["mel"][hop.skip : hop.frames].clone())
        for lease in leases.values():
            lease.close()
        return {index: torch.cat(frames) for index, frames in heard.items()}

    together = run(range(3))
    for index, speech in enumerate(speeches):
        assert torch.equal(run([index])[index], together[index])
        assert (together[index] - speech.offline(model.flow, Mask(CHUNK))).abs().max() < 1e-4


def test_a_snapshot_goes_on_in_another_engine_with_the_voice_in_another_row(engines: list[Engine]) -> None:
    first, second = (streaming(WIDE, dtype=torch.float32) for _ in range(2))
    speech = Speech.of(18, 45, dtype=torch.float32)
    here, there = engine_with(engines, first), engine_with(engines, second)
    voice = here.ask_sync(lambda: add(first, speech))
    there.ask_sync(lambda: add(second, Speech.of(12, 1, dtype=torch.float32)))
    moved = there.ask_sync(lambda: add(second, speech))
    assert moved.row != voice.row
    steps, others = (plan(first, known, speech, (5,), aligned=True) for known in (voice, moved))

    def run(lease: Lease, hops: Sequence[Hop]) -> list[Tensor]:
        return [lease.step_sync(hop.inputs)["mel"].clone() for hop in hops]

    straight = run(here.open_sync("flow"), steps)
    lease = here.open_sync("flow")
    begun = run(lease, steps[:4])
    packed = lease.pack(lease.snapshot_sync())
    run(lease, steps[4:6])
    other = there.open_sync("flow")
    other.restore(packed)
    assert torch.equal(torch.stack([*begun, *run(other, others[4:])]), torch.stack(straight))


@pytest.mark.gpu
@pytest.mark.parametrize("limits", [WIDE, replace(ROLLING, hops=(10,))], ids=["exact", "rolling"])
@pytest.mark.parametrize("head", [8, 16], ids=["plain", "kernels"])
def test_replayed_graphs_give_the_offline_frames(head: int, limits: FlowLimits) -> None:
    config = replace(TINY, unet_head_width=head)
    model = streaming(limits, config, torch.float32, together=None)
    speeches = [Speech.of(prompt, length, dtype=torch.float32) for prompt, length in ((18, 47), (0, 31), (7, 60))]
    with Engine("cuda") as engine:
        engine.add("flow", model, slots=4, buckets=(4,))
        voices = [engine.ask_sync(lambda speech=speech: add(model, speech)) for speech in speeches]
        for voice, speech in zip(voices, speeches, strict=True):
            steps = plan(model, voice, speech, (5,), aligned=True)
            lease = engine.open_sync("flow")
            frames = torch.cat([lease.step_sync(hop.inputs)["mel"][hop.skip : hop.frames].clone() for hop in steps])
            mask = Mask(CHUNK, starts(voice, steps), voice.shared, limits.left if limits.rolling else None)
            assert (frames - speech.offline(network(config, torch.float32), mask)).abs().max() < 1e-3


def test_prompts_are_cached_once_and_shared() -> None:
    model = streaming()
    speech = Speech.of(33, 40)
    voice = add(model, speech)
    assert (voice.shared, voice.rest) == (30, tuple(speech.prompt[30:]))
    tables = {name: table.clone() for name, table in model.voices.caches.items()}
    steps = plan(model, voice, speech, (5,), aligned=True)
    assert sum(int(hop.inputs["count"]) for hop in steps) == 3 + 40
    store = SlotStore(model, 2)
    for at in (0, 1):
        for hop in steps:
            step(model, store.state, [hop], [at])
    assert torch.equal(store.state["flow.unet.rings"][0], store.state["flow.unet.rings"][1])
    for name, table in model.voices.caches.items():
        assert torch.equal(table, tables[name]), name
        assert table[voice.row].any(), name


def test_rows_of_voices_are_used_again() -> None:
    model = streaming()
    speeches = [Speech.of(prompt, 30) for prompt in (33, 8, 20, 0)]
    voices = [add(model, speech) for speech in speeches]
    with pytest.raises(RuntimeError, match="all 4 voices"):
        add(model, speeches[0])
    model.remove_voice(voices[0])
    with pytest.raises(ValueError, match="not registered"):
        model.remove_voice(voices[0])
    voice = add(model, speeches[1])
    assert voice.row == voices[0].row
    steps = plan(model, voice, speeches[1], (5,), aligned=True)
    state = slots(model, 1)
    frames = torch.cat([step(model, state, [hop], [0])[0] for hop in steps])
    assert (frames - speeches[1].offline(model.flow, Mask(CHUNK))).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": list(range(41))}, "longer than the 40"),
        ({"prompt": [50] * 5}, "0 to 49"),
        ({"mel": torch.zeros(9, 8)}, "has mel frames"),
        ({"embedding": torch.zeros(5)}, r"must be \[6\]"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    model = streaming()
    speech = replace(Speech.of(5, 1), **change)
    with pytest.raises(ValueError, match=message):
        add(model, speech)
    assert len([add(model, Speech.of(5, 1)) for _ in range(LIMITS.voices)]) == LIMITS.voices


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_a_full_session_makes_no_more_frames(together: bool) -> None:
    limits = replace(LIMITS, left=44)
    model = streaming(limits, together=together)
    speech = Speech.of(0, 40)
    voice = add(model, speech)
    roomy = Hops(voice, TINY, LIMITS, (5,))
    steps = [*roomy.push(speech.tokens), *roomy.finish()]
    state = slots(model, 1)
    frames = [step(model, state, [hop], [0])[0] for hop in steps[:4]]
    made = []
    for hop in steps[4:6]:
        inputs = {name: torch.from_numpy(value)[None] for name, value in hop.inputs.items()}
        outputs = model.step(inputs, state, torch.tensor([0]), torch.tensor([True]))
        made.append(int(outputs["frames"]))
        frames.append(outputs["mel"][0, : made[-1]])
    assert made == [4, 0]
    assert state["flow.seen"].tolist()[0] == 22
    offline = speech.offline(model.flow, Mask(CHUNK))
    assert (torch.cat(frames)[:40] - offline[:40]).abs().max() < TOLERANCE
    with pytest.raises(ValueError, match="more than the 22 a session keeps"):
        Hops(voice, TINY, limits).push(speech.tokens[:23])


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_keys_and_values_may_be_kept_shorter(kept: torch.dtype) -> None:
    model = streaming(replace(LIMITS, kept=kept), dtype=torch.float32)
    speech = Speech.of(18, 40, dtype=torch.float32)
    voice = add(model, speech)
    state = slots(model, 1)
    assert state["flow.unet.rings"].dtype == kept
    steps = plan(model, voice, speech, (5,), aligned=True)
    frames = torch.cat([step(model, state, [hop], [0])[0] for hop in steps])
    offline = speech.offline(model.flow, Mask(CHUNK))
    error = (frames - offline).abs().max() / offline.abs().max()
    assert 1e-6 < error < (0.02 if kept == torch.bfloat16 else 0.2)


def test_steps_of_a_size_there_is_no_room_for_are_refused() -> None:
    model = streaming()
    state = slots(model, 1)
    inputs = {name: spec.new(1) for name, spec in model.input_spec(21).items()}
    with pytest.raises(ValueError, match="room for 1 to 20 tokens and 3 ahead, not 21"):
        model.step(inputs, state, torch.tensor([0]), torch.tensor([True]))
    with pytest.raises(TypeError, match="got '5'"):
        model.tick("5")
    assert [model.tick(hop) for hop in model.variants] == pytest.approx([0.2, 0.4, 0.8])
