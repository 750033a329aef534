"""Packed layers compute what plain ones do, row by row, and notice when their weights change."""

from __future__ import annotations

import copy

import pytest
import torch

from antiphon.models.layers.linear import Linear
from antiphon.models.layers.lstm import LSTM
from antiphon.models.layers.packing import HAS_ONEDNN, pack

needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this build of torch has no oneDNN")


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer(bias):
    layer = Linear(48, 32, bias)
    x = torch.randn(3, 5, 48)
    plain = layer(x)
    pack(layer)
    assert (layer(x) - plain).abs().max() < 1e-5
    assert (layer(x.transpose(0, 1)) - plain.transpose(0, 1)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("layers", "bias"), [(1, True), (2, True), (2, False)])
def test_an_lstm_step_by_step(layers, bias, packed):
    lstm = LSTM(12, 16, layers, bias=bias, batch_first=True)
    if packed:
        pack(lstm)
        assert (lstm.packed is not None) == HAS_ONEDNN
    x = torch.randn(4, 9, 12)
    expected, (h, c) = lstm(x)
    memory = torch.zeros(4, 2, layers, 16)
    outputs = []
    for token in x.unbind(1):
        output, memory = lstm.step(token, memory)
        outputs.append(output)
    assert (torch.stack(outputs, 1) - expected).abs().max() < 1e-5
    assert (memory - torch.stack((h, c)).permute(2, 0, 1, 3)).abs().max() < 1e-5


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize(("inputs", "outputs"), [(9, 64), (512, 2048), (2048, 512), (640, 1025), (100, 7)])
def test_a_row_does_not_depend_on_how_many_there_are(inputs, outputs):
    layer = Linear(inputs, outputs)
    pack(layer)
    x = torch.randn(64, inputs)
    whole = layer(x)
    for rows in (4, 5, 8, 16, 33):
        order = torch.randperm(64)[:rows]
        assert torch.equal(layer(x[order]), whole[order])


@needs_onednn
@pytest.mark.parametrize("layer", [Linear(8, 8), LSTM(8, 8)], ids=["linear", "lstm"])
def test_the_copy_goes_when_the_weights_change(layer):
    x, memory = torch.randn(4, 8), torch.zeros(4, 2, 1, 8)

    def run(module):
        return module(x) if isinstance(module, Linear) else module.step(x, memory)[0]

    with torch.no_grad():
        pack(layer)
        assert layer.packed is not None
        before = run(layer)
        layer.load_state_dict({key: value * 2 for key, value in layer.state_dict().items()})
        assert layer.packed is None
        pack(layer)
        assert (run(layer) - before).abs().max() > 1e-3
        assert copy.deepcopy(layer).packed is None
        assert layer.double().packed is None
        pack(layer)
        assert layer.packed is None  # only float32 is packed
        layer.float()
        pack(layer)
    run(layer).sum().backward()  # gradients take the plain path
    assert all(parameter.grad is not None for parameter in layer.parameters())
