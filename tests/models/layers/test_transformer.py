"""The transformer step: streamed in calls of any length it equals the whole sequence, whoever shares the batch."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from antiphon.models.layers.packing import pack
from antiphon.models.layers.rope import Layout, rotate, rotation
from antiphon.models.layers.stepped import SteppedLinear
from antiphon.models.layers.transformer import Transformer, TransformerConfig

PLAIN = TransformerConfig(width=24, layers=2, heads=4, feedforward=40, window=7, longest=5)
KINDS = {
    "moshi": {},
    "sinks": {"sinks": 3},
    "one sink, few heads": {"sinks": 1, "kv_heads": 2, "rope": "half"},
    "qwen": {"kv_heads": 2, "head_width": 8, "rope": "half", "qkv_bias": True, "eps": 1e-6},
    "mimi": {"norm": "layer", "gate": False, "layer_scale": 0.01, "ff_bias": True},
    "raw keys": {"raw_keys": True},
    "raw keys and sinks": {"raw_keys": True, "sinks": 2},
    "no positions": {"rope": None},
    "no positions, sinks": {"rope": None, "sinks": 2},
}
CHUNKS = ([1] * 40, [5] * 8, [3, 1, 5, 2, 4, 1, 1, 5, 3, 5, 5, 2, 3])


@pytest.fixture(autouse=True)
def _exact():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def make(dtype=torch.float64, **changes):
    model = Transformer(dataclasses.replace(PLAIN, **changes)).to(dtype).eval()
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def slots_of(model, slots=8):
    return {name: spec.new(slots + 1) for name, spec in model.state_spec("lm").items()}


def stream(model, x, chunks, state, slots):
    """x ``[B, T, d]`` in chunks, in the given slots."""
    outputs = []
    for part in x.split(chunks, 1):
        outputs.append(model.step("lm", part, state, slots, slots))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_equals_the_whole_sequence(kind):
    model = make(**KINDS[kind])
    x = torch.randn(2, 40, 24, dtype=torch.float64)
    whole = model(x, model.whole(40))
    for chunks in CHUNKS:
        streamed = stream(model, x, chunks, slots_of(model), torch.tensor([5, 2]))
        assert (streamed - whole).abs().max() < 1e-12


@pytest.mark.parametrize(("kind", "reaches"), [("moshi", False), ("sinks", True)])
def test_what_lies_behind_the_window_is_forgotten_but_for_the_sinks(kind, reaches):
    model = make(layers=1, **KINDS[kind])
    x = torch.randn(1, 30, 24, dtype=torch.float64)
    before = model(x, model.whole(30))[:, -1]
    x[:, 0] += 1.0
    assert torch.equal(before, model(x, model.whole(30))[:, -1]) != reaches


def test_sinks_stay_at_the_windows_edge():
    """With one token repeated, what is heard depends on distances alone: once these are capped, it stays the same."""
    model = make(sinks=2, layers=1)
    x = torch.randn(1, 1, 24, dtype=torch.float64).expand(1, 60, 24)
    heard = model(x, model.whole(60))
    assert (heard[:, 20] - heard[:, 59]).abs().max() < 1e-12


def test_attention_is_softmax_over_the_window():
    model = make(layers=1, norm="layer", rope="half", gate=False)
    block = model.blocks[0]
    x = torch.randn(1, 12, 24, dtype=torch.float64)
    query, key, value = block.attention.qkv(block.norm1(x)).unflatten(-1, (3, 4, 6)).unbind(2)
    turn = rotation(torch.arange(12)[None], 6, 10000.0, torch.float64, "half")
    scores = torch.einsum("bthd,bmhd->bhtm", rotate(query, turn, "half"), rotate(key, turn, "half")) / 6**0.5
    index = torch.arange(12)
    behind = index[:, None] - index
    scores = scores.masked_fill((behind < 0) | (behind >= 7), -torch.inf)
    y = x + block.attention.out(torch.einsum("bhtm,bmhd->bthd", scores.softmax(-1), value).flatten(2))
    y = y + block.feedforward.down(F.gelu(block.feedforward.up(block.norm2(y))))
    assert (model(x, model.whole(12)) - y).abs().max() < 1e-12


def test_a_rotation_turns_pairs_by_position():
    pairs, halves = (rotation(torch.tensor([[3]]), 4, 100.0, torch.float64, layout) for layout in get_args(Layout))
    x = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=torch.float64).view(1, 1, 1, 4)
    c, s = torch.tensor([3.0, 0.3], dtype=torch.float64).cos(), torch.tensor([3.0, 0.3], dtype=torch.float64).sin()
    assert torch.allclose(rotate(x, pairs, "interleaved").flatten(), torch.stack((c[0], s[0], -2 * s[1], 2 * c[1])))
    assert torch.allclose(rotate(x, halves, "half").flatten(), torch.stack((c[0], -2 * s[1], s[0], 2 * c[1])))


@pytest.mark.parametrize("kind", KINDS)
def test_batched_equals_alone(kind):
    """Rows of different ages; others in the batch, idle rows and where a slot lies change no bit."""
    model = make(torch.float32, **KINDS[kind])
    pack(model)
    x = torch.randn(4, 30, 24)
    alone = []
    for row in range(4):
        state, slots = slots_of(model), torch.tensor([row, 8, 8, 8])
        batch = torch.cat((x[row : row + 1], torch.full((3, 30, 24), 9.0)))
        alone.append(stream(model, batch, [2] * 15, state, slots)[0])
    state = slots_of(model)
    slots = torch.tensor([6, 1, 4, 3])
    heard = [[] for _ in range(4)]
    for tick in range(0, 48, 2):
        starts = torch.tensor([tick - 6 * row for row in range(4)])
        active = (starts >= 0) & (starts < 30)
        at = starts.clamp(0, 28)
        part = torch.stack([x[row, at[row] : at[row] + 2] for row in range(4)])
        output = model.step("lm", part, state, slots, torch.where(active, slots, 8))
        for row in range(4):
            if active[row]:
                heard[row].append(output[row])
    for row in range(4):
        assert torch.equal(torch.cat(heard[row]), alone[row])


def test_rows_of_different_lengths_in_one_call():
    model = make(kv_heads=2)
    x = torch.randn(3, 30, 24, dtype=torch.float64)
    whole = model(x, model.whole(30))
    state, slots, seen = slots_of(model), torch.tensor([0, 4, 2]), torch.zeros(3, dtype=torch.int64)
    while (seen < 30).any():
        count = torch.minimum(torch.randint(0, 6, (3,)), 30 - seen)
        part = torch.zeros(3, 5, 24, dtype=torch.float64)
        for row in range(3):
            part[row, : count[row]] = x[row, seen[row] : seen[row] + count[row]]
        output = model.step("lm", part, state, slots, slots, count)
        for row in range(3):
            assert (output[row, : count[row]] - whole[row, seen[row] : seen[row] + count[row]]).abs().le(1e-12).all()
        seen += count
        assert torch.equal(state["lm.seen"][slots], seen)
    assert output.isfinite().all()


def test_a_session_goes_on_in_another_store():
    model = make(torch.float32, sinks=2)
    pack(model)
    x = torch.randn(4, 24, 24)
    slots = torch.arange(4)
    expected = stream(model, x, [1] * 24, slots_of(model), slots)
    first = slots_of(model)
    stream(model, x[:, :11], [1] * 11, first, slots)
    second = slots_of(model, 12)
    moved = torch.tensor([7, 9, 0, 11])
    for name, tensor in first.items():
        second[name][moved] = tensor[slots]
    assert torch.equal(stream(model, x[:, 11:], [1] * 13, second, moved), expected[:, 11:])


def test_eight_bit_keys_and_values():
    model = make(torch.float32)
    small = make(torch.float32, kv_dtype=torch.float8_e4m3fn)
    small.load_state_dict(model.state_dict())
    assert small.state_spec("lm")["lm.rings"].bytes * 4 == model.state_spec("lm")["lm.rings"].bytes
    x = torch.randn(4, 30, 24)
    slots = torch.arange(4)
    full = stream(model, x, [1] * 30, slots_of(model), slots)
    rough = stream(small, x, [1] * 30, slots_of(small), slots)
    error = (full - rough).square().mean().sqrt() / full.square().mean().sqrt()
    assert 1e-3 < error < 0.1


@pytest.mark.parametrize("rope", [None, "interleaved"])
def test_a_frame_fed_step_by_step_with_weights_of_its_own_each(rope):
    model = make(per_step=6, rope=rope, window=6)
    x = torch.randn(3, 6, 24, dtype=torch.float64)
    whole = model(x, model.whole(6), torch.arange(6))
    frame = model.frame(3, 6)
    steps = [model(x[:, step : step + 1], frame, step) for step in range(6)]
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-12
    shared = model(x, model.whole(6), torch.zeros(6, dtype=torch.int64))
    assert (shared[:, 0] - whole[:, 0]).abs().max() < 1e-12
    assert (shared[:, 1] - whole[:, 1]).abs().max() > 1e-3


def test_packed_weights_per_step():
    layer = SteppedLinear(3, 16, 8)
    x = torch.randn(4, 1, 16)
    plain = [layer(x, step) for step in range(3)]
    pack(layer)
    for step in range(3):
        assert (layer(x, step) - plain[step]).abs().max() < 1e-6
    with pytest.raises(ValueError, match="say which step"):
        layer(x, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 25}, "no multiple of 4 heads"),
        ({"kv_heads": 3}, "cannot share 3"),
        ({"head_width": 5}, "even head width"),
        ({"per_step": 2, "qkv_bias": True}, "no biases"),
        ({"window": 0}, "window 0"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **changes)


def test_more_steps_than_the_rings_were_made_for():
    model = make()
    with pytest.raises(ValueError, match="6 steps in one call"):
        model.step(
            "lm", torch.zeros(1, 6, 24, dtype=torch.float64), slots_of(model), torch.tensor([0]), torch.tensor([0])
        )
