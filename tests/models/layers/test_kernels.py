"""The Triton kernels equal the plain path: on a GPU as they are, elsewhere in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from interpreted import HERE

from antiphon.models.layers import kernels, linear, rope, transformer
from antiphon.models.layers.transformer import InPlace, Rings, RingStep, Transformer, TransformerConfig
from antiphon.models.moshi import sampling

PLAIN = TransformerConfig(width=64, layers=1, heads=4, head_width=16, feedforward=96, window=9)
KINDS = {
    "moshi": {},
    "several pieces": {"window": 300},
    "long pieces": {"window": 520, "longest": 5},
    "sinks": {"sinks": 3, "longest": 2},
    "qwen": {"kv_heads": 2, "rope": "half", "qkv_bias": True, "longest": 5},
    "one key head and sinks": {"kv_heads": 1, "sinks": 2, "longest": 3},
    "mimi": {"norm": "layer", "gate": False, "layer_scale": 0.3, "longest": 2, "rope": None},
}


@pytest.fixture(autouse=True)
def _setting():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def plainly(monkeypatch, plain):
    monkeypatch.setattr(transformer, "use_kernels", lambda x: not plain)


def make(device, dtype=torch.float32, **changes):
    model = Transformer(dataclasses.replace(PLAIN, **changes)).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device, dtype)


def streamed(model, device, calls=5, rows=3):
    """Sessions of other ages and rings that hold something, with an idle row and steps that do not count."""
    config = model.config
    state = {name: spec.new(6, device) for name, spec in model.state_spec("lm").items()}
    generator = torch.Generator().manual_seed(1)
    rings = torch.randn(state["lm.rings"].shape, generator=generator) * 0.5
    state["lm.rings"].copy_(rings.to(state["lm.rings"].dtype))
    slots = torch.tensor([3, 0, 4, 1, 2][:rows], device=device)
    state["lm.seen"][slots[1:2]] = config.window + 4
    state["lm.seen"][slots[2:]] = config.window - 2
    heard = []
    for call in range(calls):
        steps = config.longest if call % 2 == 0 else 1
        x = torch.randn(5, steps, config.width, generator=generator)[:rows].to(device, model.dtype)
        counts = torch.randint(1, steps + 1, (5,), generator=generator)[:rows].to(device)
        target = torch.where(torch.arange(rows, device=device) == call, 5, slots)
        y = model.step("lm", x, state, slots, target, None if steps == 1 else counts)
        real = torch.arange(steps, device=device) < counts[:, None]
        heard.append((y if steps == 1 else y * real[..., None]).flatten(0, 1).float())
    return torch.cat(heard), {name: value[:5].float() for name, value in state.items()}


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("kind", KINDS)
def test_rings_in_place_equal_copied_ones(monkeypatch, kind, device):
    model = make(device, **KINDS[kind])
    results = []
    for plain in (True, False):
        plainly(monkeypatch, plain)
        results.append(streamed(model, device))
    (heard, state), (heard_in_place, state_in_place) = results
    assert (heard_in_place - heard).abs().max() < 1e-5
    for name, value in state.items():
        assert (state_in_place[name] - value).abs().max() < 1e-5, name


@pytest.mark.parametrize("device", HERE)
def test_a_frame_equals_the_plain_one(monkeypatch, device):
    model = make(device, per_step=3, rope=None, kv_heads=2)
    x = torch.randn(2, 3, 64, device=device)
    results = []
    for plain in (True, False):
        plainly(monkeypatch, plain)
        frame = model.frame(2, 3, device)
        results.append(torch.cat([model(x[:, i : i + 1], frame, i) for i in range(3)], 1))
    assert (results[0] - results[1]).abs().max() < 1e-5


@pytest.mark.parametrize("device", HERE)
def test_how_many_rows_there_are_changes_no_bit(monkeypatch, device):
    """Of what the kernels do; products are another matter."""
    plainly(monkeypatch, False)
    config = dataclasses.replace(PLAIN, window=270, kv_heads=2)
    rings = torch.randn(6, 1, 2, 2, 270, 16, device=device)
    slots, seen = torch.tensor([4, 1, 2], device=device), torch.tensor([700, 30, 268], device=device)
    heads = torch.randn(3, 1, 8, 16, device=device)

    def attend(some):
        context = Rings(rings.clone(), slots[some], slots[some], seen[some], 1)
        return InPlace(config, context, heads.dtype).attend(0, heads[some])

    together = attend(slice(None))
    for row in range(3):
        assert torch.equal(attend(slice(row, row + 1))[0], together[row])


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize(("window", "sinks"), [(300, 0), (300, 3), (520, 0)])
def test_one_query_in_half_the_bits(device, window, sinks):
    """Products of matrices answer it; each row like the plain path, and the same whatever rows there are."""
    config = dataclasses.replace(PLAIN, window=window, sinks=sinks)
    entries = config.window + sinks
    rings = 0.5 * torch.randn(6, 1, 2, 4, entries, 16, device=device).half()
    slots, seen = torch.tensor([4, 1, 2], device=device), torch.tensor([700, 30, window - 2], device=device)
    heads = torch.randn(3, 1, 12, 16, device=device).half()

    def attend(step, some=slice(None)):
        context = Rings(rings.clone(), slots[some], slots[some], seen[some], 1)
        return step(config, context, heads.dtype).attend(0, heads[some])

    together = attend(InPlace)
    assert (together - attend(RingStep)).abs().max() < 2e-3
    for row in range(3):
        assert torch.equal(attend(InPlace, slice(row, row + 1))[0], together[row])


@pytest.mark.parametrize("device", HERE)
def test_a_few_rows_of_float32_are_multiplied_by_a_kernel(monkeypatch, device):
    from antiphon.models.layers import triton_few

    monkeypatch.setattr(kernels, "use_kernels", lambda x: True)
    served = []
    monkeypatch.setattr(triton_few, "few", lambda *given, made=triton_few.few: served.append(1) or made(*given))
    for shape, outputs, bias in (
        ((1, 1, 600), 10, True),
        ((1, 2, 2048), 5, True),
        ((2, 2, 512), 33, False),
        ((3, 1, 40), 7, True),
    ):
        layer = linear.Linear(shape[-1], outputs, bias=bias).to(device)
        x = torch.randn(shape).to(device)
        made = layer(x)
        assert (made - torch.nn.functional.linear(x, layer.weight, layer.bias)).abs().max() < 1e-5
        assert torch.equal(layer(x[:1])[0], made[0])
    assert len(served) == 8
    for many in (torch.randn(5, 40), torch.randn(2, 40).double()):
        layer = linear.Linear(40, 3).to(device, many.dtype)
        assert layer(many.to(device)).shape == (len(many), 3)
    linear.Linear(triton_few.LONGEST + 1, 1).to(device)(torch.randn(1, triton_few.LONGEST + 1).to(device))
    assert len(served) == 8


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("width", [1, 600, 2048])
def test_the_same_tokens_are_drawn(monkeypatch, width, device):
    """Of random numbers, of equal ones and of infinite ones, hot and cold, whatever the rank of the last candidate."""
    logits = torch.randn(4, width)
    logits[1] = logits[1].mul(2).round()  # ties, zeros of both signs
    logits[2, ::3], logits[2, 1::7] = -torch.inf, torch.inf
    logits[3] = -logits[3].abs() - 1
    ranks = [0, 1, 2, 3, 25, 250, 511, 512]
    logits = logits.repeat_interleave(len(ranks), 0).to(device)
    top_k = torch.tensor(ranks, device=device).repeat(4)
    chances = torch.stack((top_k, top_k), 1)[:, 1]
    # Noise that outdoes every finite number makes the last candidate the one that is drawn.
    order = logits.argsort(dim=1, descending=True, stable=True)
    climbing = 1e4 * order.argsort(dim=1).float()
    for noise in (torch.randn(32, 2, width, device=device)[:, 1], climbing):
        for temperature in (0.0, 0.7):
            heat = torch.full((32, 2), temperature, device=device)[:, 0]
            drawn = []
            for plain in (True, False):
                monkeypatch.setattr(sampling, "use_kernels", lambda x, plain=plain: not plain)
                drawn.append(sampling.draw(logits, noise, heat, chances))
            assert torch.equal(*drawn)


@pytest.mark.parametrize("device", HERE)
def test_tokens_of_half_the_bits_are_drawn_or_forced(monkeypatch, device):
    logits, noise = torch.randn(5, 300, device=device).half(), torch.randn(5, 300, device=device)
    heat, chances = torch.full((5,), 0.8, device=device), torch.full((5,), 25, device=device)
    force = torch.tensor([[-2, 7], [-1, 7], [0, 7], [299, 7], [-3, 7]], device=device)[:, 0]
    drawn = []
    for plain in (True, False):
        monkeypatch.setattr(sampling, "use_kernels", lambda x, plain=plain: not plain)
        drawn.append(sampling.draw(logits, noise, heat, chances, force))
        free = sampling.draw(logits.float(), noise, heat, chances)
        assert drawn[-1].tolist() == [free[0].item(), -1, 0, 299, free[4].item()]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("layout", get_args(rope.Layout))
@pytest.mark.parametrize("width", [16, 48])
def test_the_same_positions_are_turned(monkeypatch, width, layout, device):
    positions = torch.tensor([[0, 1, 700], [5, 10**4, 10**7]], device=device)
    turns = []
    for plain in (True, False):
        monkeypatch.setattr(rope, "use_kernels", lambda x, plain=plain: not plain)
        turns.append(rope.rotation(positions, width, 1e6, torch.float16, layout))
    for one, other in zip(*turns, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert (one - other).abs().max() < 2e-7


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["moshi", "several pieces", "long pieces", "sinks", "qwen"])
@pytest.mark.parametrize("kv", [None, torch.float8_e4m3fn])
def test_half_the_bits_on_a_gpu(monkeypatch, kind, kv):
    model = make("cuda", torch.bfloat16, kv_dtype=kv, **KINDS[kind])
    results = []
    for plain in (True, False):
        plainly(monkeypatch, plain)
        results.append(streamed(model, "cuda")[0])
    assert (results[0] - results[1]).norm() / results[0].norm() < 2e-2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_they_compile_for_a_gpu_that_is_not_there():
    """Also in 8-bit floats; and what they keep in registers finds room there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = dict(line.rsplit(": ", 1) for line in ran.stdout.splitlines())
    assert len(found) == 38
    assert set(found.values()) == {"0"}


def test_elsewhere_rings_are_copied():
    model = make("cpu")
    state = {name: spec.new(2) for name, spec in model.state_spec("lm").items()}
    slots = torch.tensor([0])
    seen = []
    original = RingStep.attend

    def attend(self, layer, heads):
        seen.append(layer)
        return original(self, layer, heads)

    RingStep.attend = attend
    try:
        model.step("lm", torch.zeros(1, 1, 64), state, slots, slots)
    finally:
        RingStep.attend = original
    assert seen == [0]


def test_where_torch_chooses_dtypes_or_wants_gradients_no_kernel_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_there", lambda: True)
    on_a_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert kernels.use_kernels(on_a_gpu)
    with torch.enable_grad():
        assert not kernels.use_kernels(on_a_gpu)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert not kernels.use_kernels(on_a_gpu)
    finally:
        torch.set_autocast_enabled("cuda", False)
