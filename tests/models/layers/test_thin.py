"""A few rows of 16 bits, multiplied along with what lies around the product, equal the operations one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from interpreted import HERE, INTERPRETED
from torch import Tensor
from torch.nn import functional as F

from antiphon.models.layers import kernels, transformer
from antiphon.models.layers.linear import Linear
from antiphon.models.layers.norm import RMSNorm
from antiphon.models.layers.stepped import SteppedLinear
from antiphon.models.layers.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.usefixtures("interpreter")
HALVES = [  # the interpreter cuts bfloat16's places off
    pytest.param("cpu", torch.float16, marks=INTERPRETED),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float16, torch.bfloat16)),
]
SIZES = [(40, 6, 512), (896, 34, 4), (1100, 18, 4), (2100, 6, 512)]  # a row, its products, programs that are wanted
EPS = 1e-6
ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.fixture(autouse=True)
def _setting() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernels, transformer):
        monkeypatch.setattr(module, "use_kernels", lambda x: not kernels._plain.get())


def within(made: Tensor, exact: Tensor, dtype: torch.dtype, places: float) -> None:
    """As close as ``places`` roundings to what float64 makes of the same numbers."""
    assert made.dtype == dtype
    assert made.shape == exact.shape
    assert ((made.double() - exact).abs() <= places * ULP[dtype] * (exact.abs() + exact.square().mean().sqrt())).all()


@pytest.mark.parametrize(("device", "dtype"), HALVES)
@pytest.mark.parametrize(("inputs", "outputs", "programs"), SIZES)
def test_a_product_and_what_lies_around_it(
    monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int, programs: int, device: str, dtype: torch.dtype
) -> None:
    from antiphon.models.layers import triton_thin

    monkeypatch.setattr(triton_thin, "PROGRAMS", programs)
    thin = triton_thin.thin

    def some(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape)).to(device, dtype)

    weight, bias = some(outputs, inputs, scale=inputs**-0.5), some(outputs)
    norm, scale = 1 + some(inputs, scale=0.2), some(outputs, scale=0.3)
    for rows in range(1, 5):
        x, onto = 3 * some(rows, 1, inputs), some(rows, 1, outputs)
        product = F.linear(x.double(), weight.double())
        within(thin(x, weight), product, dtype, 1)
        within(thin(x, weight, bias), product + bias.double(), dtype, 1)
        within(thin(x, weight, onto=onto), onto.double() + product, dtype, 2)
        made = thin(x, weight, bias, onto=onto, scale=scale)
        within(made, onto.double() + (product + bias.double()) * scale.double(), dtype, 2)
        normed = F.rms_norm(x.float(), (inputs,), norm.float(), EPS).to(dtype)
        product = F.linear(normed.double(), weight.double())
        within(thin(x, weight, norm=norm, eps=EPS), product, dtype, 1)
        gate, value = product.to(dtype).double().chunk(2, -1)
        made = thin(x, weight, norm=norm, eps=EPS, gate=True)
        within(made, F.silu(gate) * value, dtype, 3)
        made = thin(x, weight, bias, norm=norm, eps=EPS, onto=onto, scale=scale)
        within(made, onto.double() + (product + bias.double()) * scale.double(), dtype, 2)


@pytest.mark.parametrize(("device", "dtype"), HALVES)
@pytest.mark.parametrize(("inputs", "outputs", "programs"), SIZES)
def test_how_many_rows_there_are_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int, programs: int, device: str, dtype: torch.dtype
) -> None:
    from antiphon.models.layers import triton_thin

    monkeypatch.setattr(triton_thin, "PROGRAMS", programs)
    x, onto, weight = (
        torch.randn(rows, size).to(device, dtype) for rows, size in ((4, inputs), (4, outputs), (outputs, inputs))
    )
    norm = torch.rand(inputs).to(x)
    for gate in (False, True):
        more = {"norm": norm, "eps": EPS, "gate": gate}

        def made(rows: list[int], more: dict[str, object] = more, gate: bool = gate) -> Tensor:
            return triton_thin.thin(x[rows], weight, onto=None if gate else onto[rows], **more)

        together = made([0, 1, 2, 3])
        assert together.isfinite().all()
        for rows in ([0], [1], [2], [3], [2, 0], [3, 1, 2]):
            assert torch.equal(made(rows), together[rows])


def _noted(made: Callable[..., Tensor], served: list[int], *given: Tensor, **more: object) -> Tensor:
    served.append(given[0].shape[0])
    return made(*given, **more)


BLOCKS = TransformerConfig(width=32, layers=1, heads=2, head_width=16, feedforward=40, window=9)
KINDS = {
    "depth": {"per_step": 2, "rope": None},
    "qwen": {"kv_heads": 1, "rope": "half", "qkv_bias": True},
    "all else": {"gate": False, "layer_scale": 0.3, "out_bias": True, "ff_bias": True},
}


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("kernels_serve")
def test_blocks_of_few_rows_equal_those_of_many(monkeypatch: pytest.MonkeyPatch, kind: str, device: str) -> None:
    """Up to ``FEW`` rows are served, each as if it were alone, and nearly as when there are more."""
    from antiphon.models.layers import triton_thin

    config = dataclasses.replace(BLOCKS, **KINDS[kind])
    model = Transformer(config).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(device, torch.float16)
    served: list[int] = []
    monkeypatch.setattr(triton_thin, "thin", partial(_noted, triton_thin.thin, served))
    monkeypatch.setattr(triton_thin, "PROGRAMS", 4)
    x = torch.randn(5, 2, config.width).to(device, model.dtype)

    def heard(rows: slice) -> Tensor:
        given = x[rows]
        if config.per_step:
            frame = model.frame(len(given), 2, device)
            return torch.cat([model(given[:, step : step + 1], frame, step) for step in range(2)], 1)
        state = {name: spec.new(len(given) + 1, device) for name, spec in model.state_spec("lm").items()}
        slots = torch.arange(len(given), device=device)
        return torch.cat([model.step("lm", given[:, step : step + 1], state, slots, slots) for step in range(2)], 1)

    together = heard(slice(0, 4))
    assert len(served) == 2 * config.layers * 4
    assert torch.equal(heard(slice(3, 4))[0], together[3])
    served.clear()
    many = heard(slice(0, 5))[:4]
    assert not served
    assert (together - many).norm() < 3e-3 * many.norm()


@pytest.mark.parametrize("device", HERE)
@pytest.mark.usefixtures("kernels_serve")
def test_linear_layers_of_few_rows(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    from antiphon.models.layers import triton_thin

    layers = Linear(48, 20).to(device, torch.float16), SteppedLinear(3, 48, 20).to(device, torch.float16)
    for rows in (1, 4, 5):
        x = torch.randn(rows, 1, 48).to(device, torch.float16)
        served: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(triton_thin, "thin", partial(_noted, triton_thin.thin, served))
            made = layers[0](x), layers[1](x, 2)
        assert len(served) == (2 if rows <= 4 else 0)
        for one, weight, bias in zip(
            made, (layers[0].weight, layers[1].weight[2]), (layers[0].bias, None), strict=True
        ):
            assert (one - F.linear(x, weight, bias)).abs().max() < 2e-3
        norm = RMSNorm(48).to(device, torch.float16)
        norm.weight.uniform_(0.5, 1.5)
        assert (layers[0].after(norm, x) - layers[0](norm(x))).abs().max() < 2e-3
    with pytest.raises(ValueError, match="which step"):
        layers[1](x, None)
