"""The HiFT vocoder: a stream gives what the whole utterance gives, whoever shares its batch and however it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from antiphon.codecs import hift_checkpoint
from antiphon.codecs.hift import UNKNOWN, HiFT, HiFTConfig
from antiphon.codecs.hift_source import CYCLE, Harmonics, gaussian
from antiphon.models.files import CheckpointError
from antiphon.pipelines.engine import Engine, Lease

TINY = HiFTConfig(width=32, pitch_width=12)
OTHER = HiFTConfig(
    mels=20,
    width=24,
    pitch_width=8,
    harmonics=3,
    rates=(4, 6),
    kernels=(10, 6),
    block_kernels=(5, 3),
    source_kernels=(3, 9),
    dilations=(1, 2),
    n_fft=12,
    hop=6,
)


def vocoder(
    config: HiFTConfig = TINY, dtype: torch.dtype = torch.float64, seed: int = 0, *, together: bool | None = True
) -> HiFT:
    """Random weights that make a loud sound of voiced and unvoiced frames."""
    generator = torch.Generator().manual_seed(seed)
    made = HiFT(config, hops=(10, 1, 4, 25, 50), together=together).double()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            spread = 0.1 if weight.dim() < 2 else 0.5 / weight[0].numel() ** 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * spread)
            if name.endswith("alpha"):
                weight.add_(1.0)
        made.f0_predictor.classifier.weight.mul_(20000)
        made.m_source.l_linear.weight.mul_(30)
    made.to(dtype).prepare()
    return made


def voice(frames: int, config: HiFTConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, config.mels, generator=generator, dtype=torch.float64).cumsum(0).div(5).to(dtype)


class Session:
    """An utterance on its way through the steps of a vocoder."""

    def __init__(self, model: HiFT, mel: Tensor, seed: int) -> None:
        self.model, self.mel, self.seed = model, mel, seed
        self.sent, self.heard = 0, [mel.new_zeros(0)]

    @property
    def done(self) -> bool:
        return self.sent >= len(self.mel) + self.model.flush

    @property
    def pcm(self) -> Tensor:
        return torch.cat(self.heard)

    def inputs(self, hop: int) -> dict[str, Tensor]:
        """The next frames; not-a-number past the end, which becomes known with the last frame."""
        chunk = self.mel.new_full((hop, self.mel.shape[1]), torch.nan)
        real = self.mel[self.sent : self.sent + hop]
        chunk[: len(real)] = real
        self.sent += hop
        self.end = len(self.mel) if self.sent >= len(self.mel) else UNKNOWN
        return {"mel": chunk, "end": torch.tensor(self.end), "seed": torch.tensor(self.seed)}

    def take(self, outputs: dict[str, Tensor]) -> None:
        self.heard.append(self.model.sound(outputs["pcm"], int(outputs["first"]), self.end).clone())


def slots(model: HiFT, count: int) -> dict[str, Tensor]:
    return {name: spec.new(count + 1) for name, spec in model.state_spec().items()}


def step(model: HiFT, state: dict[str, Tensor], rows: dict[int, Session], hop: int, padding: int = 0) -> None:
    """One call for the sessions of these slots."""
    chunks = [row.inputs(hop) for row in rows.values()]
    chunks += [{name: torch.zeros_like(value) for name, value in chunks[0].items()}] * padding
    inputs = {name: torch.stack([chunk[name] for chunk in chunks]) for name in chunks[0]}
    scratch = len(state["hift.seen"]) - 1
    made = model.step(
        inputs,
        state,
        torch.tensor([*rows, *[scratch] * padding]),
        torch.tensor([True] * len(rows) + [False] * padding),
    )
    for index, row in enumerate(rows.values()):
        row.take({name: value[index] for name, value in made.items()})


def stream(model: HiFT, mel: Tensor, hops: Sequence[int], seed: int = 0) -> Tensor:
    session, state = Session(model, mel, seed), slots(model, 1)
    for hop in itertools.cycle(hops):
        if session.done:
            return session.pcm
        step(model, state, {0: session}, hop)
    raise AssertionError("no hops")


@pytest.mark.parametrize("config", [TINY, OTHER], ids=["published kernels", "others"])
@pytest.mark.parametrize("hops", [(2,), (10,), (50,), (7, 1, 22, 2), (200,)], ids=str)
@torch.no_grad()
def test_a_stream_gives_what_the_whole_gives(config: HiFTConfig, hops: tuple[int, ...]) -> None:
    model, mel = vocoder(config), voice(60, config)
    whole = model(mel[None], seed=torch.tensor([5]))[0]
    streamed = stream(model, mel, hops, seed=5)
    assert streamed.shape == (60 * config.frame,)
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-12)
    assert whole.std() > 0.03
    assert (whole.abs() < config.limit).double().mean() > 0.9


@pytest.mark.parametrize("frames", [1, 2, 5, 21])
@torch.no_grad()
def test_short_utterances_too(frames: int) -> None:
    model, mel = vocoder(), voice(frames)
    for hops in ((1,), (25,)):
        torch.testing.assert_close(stream(model, mel, hops), model(mel[None])[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_float32_stays_within_a_millionth() -> None:
    model, mel = vocoder(dtype=torch.float32), voice(150, dtype=torch.float32)
    whole = model(mel[None])[0]
    for hops in ((5,), (10,), (50, 25)):
        streamed = stream(model, mel, hops)
        assert (streamed - whole).abs().max() < 3e-6 * whole.abs().max()


@torch.no_grad()
def test_a_stream_is_no_later_than_the_network_looks_ahead() -> None:
    """Sound that a stream has given does not depend on later frames; what would come next does."""
    model, mel = vocoder(), voice(60)
    other = mel.clone()
    other[40:] += 1
    same, different = (model(x[None])[0] for x in (mel, other))
    first = int((same - different).abs().gt(1e-14).nonzero()[0])
    given = 40 * TINY.frame - model.delay
    # Of the two outermost frames, the many weights in between leave less than is to be seen.
    assert given <= first < given + 2 * TINY.frame


@torch.no_grad()
def test_rows_of_a_batch_may_differ_in_length() -> None:
    model = vocoder()
    mels = [voice(frames, seed=frames) for frames in (31, 50, 9)]
    batch = torch.full((3, 50, TINY.mels), torch.nan, dtype=torch.float64)
    for row, mel in zip(batch, mels, strict=True):
        row[: len(mel)] = mel
    made = model(batch, torch.tensor([31, 50, 9]), seed=torch.tensor([1, 2, 3]))
    for index, (row, mel) in enumerate(zip(made, mels, strict=True)):
        alone = model(mel[None], seed=torch.tensor([index + 1]))[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=0, atol=1e-12)
        assert not row[len(alone) :].any()


def sessions(model: HiFT, count: int) -> dict[int, Session]:
    return {
        slot: Session(model, voice(15 + 9 * slot, seed=slot, dtype=model.dtype), seed=100 + slot)
        for slot in range(count)
    }


@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
def test_a_row_does_not_depend_on_the_others(together: bool) -> None:
    """Apart, not even on how many there may be."""
    model = vocoder(dtype=torch.float32, together=together)
    assert model.batched is together
    alone = sessions(model, 4)
    for slot, row in alone.items():
        state = slots(model, 4)
        while not row.done:
            step(model, state, {slot: row}, 10, padding=3 if together else 0)
    crowd, state, turn = sessions(model, 4), slots(model, 4), 0
    while any(not row.done for row in crowd.values()):
        turn += 1
        ready = [slot for slot, row in crowd.items() if not row.done and turn > slot]
        ready = ready[turn % len(ready) :] + ready[: turn % len(ready)] if ready else []
        step(model, state, {slot: crowd[slot] for slot in ready}, 10, padding=8 - len(ready))
    for slot, row in crowd.items():
        assert torch.equal(row.pcm, alone[slot].pcm), slot


@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
def test_inactive_rows_leave_no_trace(together: bool) -> None:
    model = vocoder(together=together)
    state, rows = slots(model, 2), sessions(model, 2)
    step(model, state, rows, 10)
    before = {name: tensor.clone() for name, tensor in state.items()}
    inputs = {name: torch.stack([row.inputs(10)[name] for row in rows.values()]) for name in ("mel", "end", "seed")}
    model.step(inputs, state, torch.tensor([1, 0]), torch.tensor([False, True]))
    for name, tensor in state.items():
        assert torch.equal(tensor[1], before[name][1]), name
        assert name == "hift.seed" or not torch.equal(tensor[0], before[name][0]), name


def feed(lease: Lease, session: Session, hop: int = 10, stop: int = 2**40) -> None:
    while not session.done and session.sent < stop:
        session.take(dict(lease.step_sync(session.inputs(hop))))


def test_in_the_engine_a_snapshot_continues_exactly() -> None:
    model = vocoder(dtype=torch.float32, together=None)
    straight, moved = (Session(model, voice(64, dtype=torch.float32), seed=9) for _ in range(2))
    with Engine(inline=True) as engine, Engine(inline=True) as fresh:
        for made in (engine, fresh):
            made.add("voice", model, slots=4, variants=(10,))
        feed(engine.open_sync("voice"), straight)
        lease, _, other = engine.open_sync("voice"), fresh.open_sync("voice"), fresh.open_sync("voice")
        feed(lease, moved, stop=30)
        other.restore(lease.pack(lease.snapshot_sync()))
        feed(other, moved)
    assert torch.equal(straight.pcm, moved.pcm)
    with torch.no_grad():
        whole = model(voice(64, dtype=torch.float32)[None], seed=torch.tensor([9]))[0]
    assert (straight.pcm - whole).abs().max() < 3e-6


@torch.no_grad()
def test_the_noise_belongs_to_the_seed() -> None:
    model, mel = vocoder(), voice(12)
    one, same, other = (model(mel[None], seed=torch.tensor([seed]))[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert (one - other).abs().max() > 1e-3


def test_noise_is_a_function_of_seed_and_number() -> None:
    seeds = torch.tensor([0, -3, 2**62])
    whole = gaussian(seeds, torch.zeros(3, dtype=torch.int64), 60000)
    part = gaussian(seeds[1:2], torch.tensor([777]), 100)
    assert torch.equal(part[0], whole[1, 777:877])
    assert whole.isfinite().all()
    assert whole.mean(1).abs().max() < 0.02
    assert (whole.std(1) - 1).abs().max() < 0.02
    assert (whole.pow(4).mean(1) - 3).abs().max() < 0.15
    assert torch.corrcoef(torch.cat((whole, whole.roll(1, 1)))).fill_diagonal_(0).abs().max() < 0.02


def test_phases_do_not_drift() -> None:
    """Two minutes of 441 Hz end within a millionth of a cycle of where they should, in whichever pieces."""
    source = Harmonics(24000, 480, 2, amplitude=1.0, noise=0.0, threshold=10.0).double()
    phase, before = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    frames = 6000
    pitch = torch.full((1, 500), 441.0, dtype=torch.float64)
    silence = torch.zeros(1, 500 * 480, dtype=torch.float64)
    with torch.no_grad():
        for first in range(0, frames, 500):
            pcm, phase = source(pitch, before, phase, torch.tensor([first]), silence)
            before = pitch[:, -1]
    cycles = phase[0] / CYCLE
    expected = torch.tensor([441.0, 882.0], dtype=torch.float64) * 480 / 24000 * frames % 1
    assert ((cycles - expected + 0.5) % 1 - 0.5).abs().max() < 1e-6
    assert pcm.diff().abs().max() < 0.7


def test_training_reaches_every_weight() -> None:
    """The sound reaches all but the pitch predictor, which learns from pitches."""
    model = vocoder().train()
    mel, frames = torch.stack((voice(30, seed=1), voice(30, seed=2))), torch.tensor([30, 11])
    model(mel, frames).square().sum().backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    missed = {name for name, _ in model.named_parameters()} - reached
    assert missed == {name for name, _ in model.named_parameters() if name.startswith("f0_predictor.")}
    hertz = model.pitch(mel, frames)
    assert not hertz[1, 11:].any()
    hertz.sum().backward()
    assert all(model.get_parameter(name).grad.any() for name in missed)


def upstream(model: HiFT, prefix: str = "") -> dict[str, Tensor]:
    """The vocoder's weights as ``hift.pt`` holds them, with norms that are not those of the directions."""
    made: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        names = hift_checkpoint.key_names(model)[key]
        if len(names) == 1:
            made[prefix + key] = value
        else:
            made[prefix + names[0]] = value.norm(dim=(1, 2), keepdim=True)
            made[prefix + names[1]] = value * 3
    return made


@pytest.mark.parametrize("prefix", ["", "generator."])
def test_a_checkpoint_is_read_back(tmp_path: Path, prefix: str) -> None:
    model = vocoder(dtype=torch.float32)
    torch.save(upstream(model, prefix), tmp_path / "hift.pt")
    read = hift_checkpoint.load(tmp_path / "hift.pt", TINY)
    assert read.f0_predictor.dtype == torch.float64
    for (name, mine), value in zip(model.named_parameters(), read.parameters(), strict=True):
        torch.testing.assert_close(value, mine, rtol=1e-6, atol=1e-7, check_dtype=False, msg=name)


def test_what_is_wrong_with_a_checkpoint_is_told(tmp_path: Path) -> None:
    path, weights = tmp_path / "hift.pt", upstream(vocoder(dtype=torch.float32))
    name = "ups.0.parametrizations.weight.original1"
    wrong = {
        "lacks conv_pre.bias": {key: value for key, value in weights.items() if key != "conv_pre.bias"},
        "no place for more.weight": weights | {"more.weight": torch.zeros(1)},
        "ups.0.weight": weights | {name: weights[name][..., :-1]},
        "no mapping": list(weights.values()),
        "holds more than weights": {"conv_pre.bias": Path("/")},
    }
    for message, content in wrong.items():
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            hift_checkpoint.load(path, TINY)
    with pytest.raises(CheckpointError, match="absent"):
        hift_checkpoint.load(tmp_path / "absent.pt")


def test_the_published_sizes() -> None:
    model = HiFT()
    names, weights = hift_checkpoint.key_names(model), model.state_dict()
    assert sum(map(len, names.values())) == 328
    norms = sum(len(weights[name]) for name, theirs in names.items() if len(theirs) == 2)
    assert sum(weight.numel() for weight in weights.values()) + norms == 20_821_295
    model.prepare()
    assert model.flush == 21
    assert sum(spec.bytes for spec in model.state_spec().values()) < 750_000


def test_misuse_is_told() -> None:
    for changes, message in (
        ({"rates": (8, 5)}, "as many kernels"),
        ({"kernels": (15, 11, 7)}, "even number"),
        ({"block_kernels": (4,)}, "odd"),
        ({"block_kernels": ()}, "need kernels"),
        ({"width": 100}, "halved"),
        ({"hop": 5}, "multiple of the hop"),
    ):
        with pytest.raises(ValueError, match=message):
            HiFTConfig(**changes)
    with pytest.raises(ValueError, match="hops"):
        HiFT(TINY, hops=())
    with pytest.raises(TypeError, match="mel frames"):
        HiFT(TINY).tick("fast")
