"""Causal convolutions: torch's own over a padded signal, whole or in steps of any length, whoever shares the batch."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F

from antiphon.models.layers.conv import CausalConv1d, CausalConvTranspose1d
from antiphon.models.layers.packing import HAS_ONEDNN, pack

FORWARD = {  # channels, out, kernel, stride, dilation, groups, bias, pad
    "plain": (6, 10, 3, 1, 1, 1, True, "zeros"),
    "pointwise": (6, 10, 1, 1, 1, 1, True, "zeros"),
    "first of a codec": (1, 16, 7, 1, 1, 1, True, "zeros"),
    "strided": (6, 10, 8, 4, 1, 1, True, "zeros"),
    "longer than twice its stride": (6, 10, 7, 2, 1, 1, False, "zeros"),
    "without overlap": (6, 10, 4, 4, 1, 1, True, "zeros"),
    "dilated": (6, 10, 3, 1, 9, 1, True, "zeros"),
    "dilated and strided": (6, 10, 4, 3, 2, 1, True, "zeros"),
    "depthwise": (6, 6, 5, 1, 1, 6, True, "zeros"),
    "replicating": (6, 6, 4, 2, 1, 1, False, "replicate"),
    "replicating, dilated": (6, 4, 5, 1, 3, 2, True, "replicate"),
}
TRANSPOSED = {  # channels, out, kernel, stride, groups, bias
    "twice its stride": (6, 10, 8, 4, 1, True),
    "no multiple of its stride": (6, 10, 11, 5, 1, True),
    "many strides": (6, 10, 7, 2, 1, False),
    "without overlap": (6, 10, 4, 4, 1, True),
    "stride of one": (6, 10, 3, 1, 1, True),
    "depthwise": (6, 6, 4, 2, 6, False),
}
LAYERS = {name: (CausalConv1d, settings) for name, settings in FORWARD.items()} | {
    f"transposed, {name}": (CausalConvTranspose1d, settings) for name, settings in TRANSPOSED.items()
}
PRECISIONS = {"plain": (torch.float64, 1e-12), "packed": (torch.float32, 1e-5)}


@pytest.fixture(params=LAYERS, ids=str)
def kind(request):
    return LAYERS[request.param]


@pytest.fixture(params=PRECISIONS, ids=str)
def made(request, kind):
    """A layer, the time steps it takes at least, and what it is exact to."""
    dtype, tolerance = PRECISIONS[request.param]
    cls, settings = kind
    torch.manual_seed(3)
    layer = cls(*settings).to(dtype)
    if dtype == torch.float32:
        pack(layer)
        assert (layer.packed is not None) == (HAS_ONEDNN and layer.groups == 1)
    return layer, layer.stride[0] if cls is CausalConv1d else 1, tolerance


def slots_of(layer, count: int) -> dict[str, torch.Tensor]:
    return {name: spec.new(count + 1) for name, spec in layer.state_spec("conv", layer.weight.dtype).items()}


def stepped(layer, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """A batch from its first step to its last."""
    state, slots = slots_of(layer, len(x)), torch.arange(len(x))
    with torch.no_grad():
        return torch.cat([layer.step("conv", part, state, slots, slots) for part in x.split(sizes, 2)], 2)


def test_a_whole_signal_is_torchs_own(made):
    layer, unit, tolerance = made
    x = torch.randn(3, layer.in_channels, 24 * unit, dtype=layer.weight.dtype)
    if isinstance(layer, CausalConv1d):
        mode = "replicate" if layer.replicate else "constant"
        padded = F.pad(x, ((layer.kernel_size[0] - 1) * layer.dilation[0] + 1 - unit, 0), mode=mode)
        expected = F.conv1d(padded, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)
    else:
        expected = F.conv_transpose1d(x, layer.weight, layer.bias, layer.stride, groups=layer.groups)
        expected = expected[..., : 24 * layer.stride[0]]
    with torch.no_grad():
        found = layer(x)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance


@pytest.mark.parametrize("chunks", [[1] * 24, [2] * 12, [4] * 6, [24], [1, 5, 2, 9, 7]], ids=str)
def test_steps_of_any_length_are_the_whole(made, chunks):
    layer, unit, tolerance = made
    x = torch.randn(2, layer.in_channels, 24 * unit, dtype=layer.weight.dtype)
    with torch.no_grad():
        whole = layer(x)
    assert (stepped(layer, x, [chunk * unit for chunk in chunks]) - whole).abs().max() < tolerance


def test_gradients_flow_as_if_nothing_were_packed(made):
    layer, unit, tolerance = made
    x = torch.randn(2, layer.in_channels, 8 * unit, dtype=layer.weight.dtype)
    with torch.no_grad():
        expected = layer(x)
    found = layer(x)
    found.sum().backward()
    assert layer.weight.grad is not None
    assert (found - expected).abs().max() < tolerance


def test_a_row_does_not_depend_on_the_others(kind):
    cls, settings = kind
    layer = cls(*settings)
    pack(layer)
    unit = 2 * (layer.stride[0] if cls is CausalConv1d else 1)
    signals = torch.randn(16, layer.in_channels, 9 * unit)
    together = stepped(layer, signals, [unit] * 9)
    order = random.Random(1).sample(range(16), 16)
    for rows in (order, order[:4], order[:8], order[3:9]):
        assert torch.equal(stepped(layer, signals[rows], [unit] * 9), together[rows])


@torch.no_grad()
def test_sessions_of_any_age_share_steps_and_inactive_rows_leave_no_trace(kind):
    cls, settings = kind
    layer = cls(*settings)
    pack(layer)
    unit = 2 * (layer.stride[0] if cls is CausalConv1d else 1)
    signals = torch.randn(6, layer.in_channels, 7 * unit).split(unit, 2)
    together = stepped(layer, torch.cat(signals, 2), [unit] * 7)
    state, scratch = slots_of(layer, 6), 6
    age, made = [0] * 6, [[] for _ in range(6)]
    chance = random.Random(2)
    while min(age) < 7:
        rows = chance.sample(range(6), 6)
        active = torch.tensor([age[row] < 7 and chance.random() < 0.7 for row in rows])
        x = torch.stack([signals[min(age[row], 6)][row] for row in rows])
        slots = torch.tensor(rows)
        before = {name: tensor.clone() for name, tensor in state.items()}
        y = layer.step("conv", x, state, slots, torch.where(active, slots, scratch))
        for row, moved, output in zip(rows, active.tolist(), y, strict=True):
            if moved:
                made[row].append(output)
                age[row] += 1
            else:
                assert all(torch.equal(tensor[row], before[name][row]) for name, tensor in state.items())
    assert torch.equal(torch.stack([torch.cat(parts, 1) for parts in made]), together)


def test_impossible_settings_and_inputs_are_refused():
    with pytest.raises(ValueError, match="a kernel of 2 with dilation 1 skips inputs at a stride of 3"):
        CausalConv1d(4, 4, 2, 3)
    with pytest.raises(ValueError, match="a kernel of 2 leaves gaps at a stride of 3"):
        CausalConvTranspose1d(4, 4, 2, 3)
    with pytest.raises(ValueError, match="pad must be zeros or replicate, got 'reflect'"):
        CausalConv1d(4, 4, 3, pad="reflect")
    layer = CausalConv1d(4, 4, 4, 2)
    with pytest.raises(ValueError, match="5 inputs are no multiple of the stride 2"):
        layer(torch.zeros(1, 4, 5))
    with pytest.raises(ValueError, match="5 inputs are no multiple of the stride 2"):
        layer.step("conv", torch.zeros(1, 4, 5), slots_of(layer, 1), torch.tensor([0]), torch.tensor([0]))
