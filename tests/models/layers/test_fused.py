"""Kernels around products equal what they stand for: on a GPU as they are, elsewhere in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from interpreted import INTERPRETED
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("interpreter")
# The interpreter multiplies no matrices of bfloat16.
HERE = [
    *(pytest.param("cpu", dtype, marks=INTERPRETED) for dtype in (torch.float32, torch.float16)),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, torch.bfloat16)),
]
CLOSE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
EPS = 1e-5


@pytest.fixture(autouse=True)
def _setting() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def affine(width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = (1 + 0.2 * torch.randn(width)), 0.2 * torch.randn(width)
    return weight.to(like), bias.to(like)


def close(one: Tensor, other: Tensor) -> bool:
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    return bool((one.double() - other.double()).norm() < CLOSE[one.dtype] * other.double().norm())


@pytest.mark.parametrize(("device", "dtype"), HERE)
@pytest.mark.parametrize(("batch", "steps", "width", "outputs"), [(2, 50, 256, 192), (3, 7, 48, 70), (1, 1, 8, 5)])
def test_norm_and_product(batch: int, steps: int, width: int, outputs: int, device: str, dtype: torch.dtype) -> None:
    from antiphon.models.layers.triton_linear import norm_linear

    x, branch = (2 * torch.randn(batch, steps, width, device=device, dtype=dtype) + 1 for _ in range(2))
    norm = affine(width, x)
    weight = (width**-0.5 * torch.randn(outputs, width)).to(x)
    bias = torch.randn(outputs).to(x)
    plain = F.linear(F.layer_norm(x + branch, (width,), *norm, EPS), weight, bias)
    total, made = norm_linear(x, branch, norm, EPS, weight, bias, gelu=True)
    assert close(total, x + branch)
    assert close(made, F.gelu(plain))
    # Without a branch, and with the last outputs put among others.
    plain = F.linear(F.layer_norm(x, (width,), *norm, EPS), weight)
    held = torch.full((batch, 2 + steps, outputs - 2), 7.0).to(x)
    total, made = norm_linear(x, None, norm, EPS, weight, None, kept=held[:, 2:])
    assert torch.equal(total, x)
    assert close(made, plain[..., :2])
    assert close(held[:, 2:], plain[..., 2:])
    assert (held[:, :2] == 7.0).all()


@pytest.mark.parametrize(("device", "dtype"), HERE)
@pytest.mark.parametrize(("batch", "steps", "width"), [(2, 50, 256), (3, 1, 40)])
def test_windows_of_a_convolution(batch: int, steps: int, width: int, device: str, dtype: torch.dtype) -> None:
    """Also of one step, behind which a row of the tails stays."""
    from antiphon.models.layers.triton_conv import mish, mish_windows, windows

    x, branch = (2 * torch.randn(batch, steps, width, device=device, dtype=dtype) for _ in range(2))
    tails = torch.randn(batch, 2, 3 * width).to(x)[..., width : 2 * width]
    last = torch.tensor([steps, 0, 1][:batch], device=device)
    norm = affine(width, x)

    def expected(inputs: Tensor) -> tuple[Tensor, Tensor]:
        behind = torch.cat((tails, inputs), 1)
        window = torch.cat([behind[:, tap : tap + steps] for tap in range(3)], 2)
        return window, torch.stack([row[at : at + 2] for row, at in zip(behind, last.tolist(), strict=True)])

    kept = torch.full((batch, 2, 2 * width), 7.0).to(x)
    total, made = windows(x, branch, 3, tails, last, kept[..., width:])
    window, after = expected(total)
    assert close(total, x + branch)
    assert torch.equal(made, window)
    assert torch.equal(kept[..., width:], after)
    assert (kept[..., :width] == 7.0).all()
    total, made = windows(x, None, 3, tails, last, kept[..., width:])
    assert torch.equal(total, x)
    assert torch.equal(made, expected(x)[0])

    turned = F.mish(F.layer_norm(x, (width,), *norm, EPS))
    for shift in (branch[:1, :1], branch[:, :1]):
        made = mish_windows(x, norm, EPS, shift, 3, tails, last, kept[..., width:])
        window, after = expected(turned + shift)
        assert close(made, window)
        assert close(kept[..., width:], after)
    assert close(mish(x, norm, EPS, branch), turned + branch)
    assert close(mish(x, norm, EPS, None), turned)


@pytest.mark.parametrize(("device", "dtype"), HERE)
def test_embeddings_are_looked_up_and_added(device: str, dtype: torch.dtype) -> None:
    from antiphon.models.layers.triton_fused import looked_up

    table = torch.randn(7, 1100, device=device).to(dtype)
    x = torch.randn(4, 2, 1100, device=device).to(dtype)[:, 1]
    token = torch.tensor([[6, 0], [-1, 0], [0, 0], [-2, 0]], device=device)[:, 0]
    found = F.embedding(token.clamp(min=0), table) * (token >= 0)[:, None]
    assert torch.equal(looked_up(x, table, token), x + found)


@pytest.mark.parametrize(("device", "dtype"), HERE)
def test_mish_far_from_zero(device: str, dtype: torch.dtype) -> None:
    from antiphon.models.layers.triton_conv import mish

    x = torch.linspace(-1.0, 1.0, 33, device=device, dtype=dtype)[None, None]
    norm = torch.full_like(x[0, 0], 80.0), torch.zeros_like(x[0, 0])
    plain = F.mish(F.layer_norm(x, (33,), *norm, EPS))
    assert plain.max() > 100
    assert close(mish(x, norm, EPS, None), plain)


@pytest.mark.parametrize(("device", "dtype"), HERE)
@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("most", [0, 999], ids=["64 a program", "16 a program"])
def test_attention_over_segments(
    monkeypatch: pytest.MonkeyPatch, most: int, rolling: bool, device: str, dtype: torch.dtype
) -> None:
    """Rings not begun, part full and gone round; prompts of other lengths; padding. Chunks of 16 positions."""
    from antiphon.models.layers import triton_segments

    monkeypatch.setattr(triton_segments, "PROGRAMS", most)
    rate, chunk, steps, size, heads, width = 2, 16, 36, 96, 2, 16
    query = torch.randn(6, steps, 2 * heads * width, device=device, dtype=dtype)[..., : heads * width]
    fresh = torch.randn(6, steps, 2, heads, width, device=device, dtype=dtype)
    ring = torch.randn(4, 2, 3, size, 2, heads, width, device=device, dtype=dtype)[:, :, 1:]
    ring = ring[:, 1]
    prompt = torch.randn(2, 2, 70, 2, heads, width, device=device, dtype=dtype)
    slots, voice, shared, seen, count = (
        torch.tensor(numbers, device=device)
        for numbers in ([3, 0, 1], [1, 0, 1], [35, 0, 8], [70 if rolling else 20, 0, 48], [18, 11, 0])
    )
    heard = triton_segments.attend(
        query, fresh, ring, prompt, slots, voice, shared, seen, count, rate=rate, chunk=chunk, rolling=rolling
    )
    assert heard.isfinite().all()
    for row in range(4):  # the last session makes nothing
        session, branch = divmod(row, 2)
        told, before, made = (int(numbers[session]) * rate for numbers in (shared, seen, count))
        first, end = told + before, told + before + made
        kept = range(max(0, before - size), before)
        lines = [prompt[voice[session], branch, :told], ring[slots[session], branch][[at % size for at in kept]]]
        keys, values = torch.cat([*lines, fresh[row, :made]]).double().unbind(1)
        position = torch.tensor([*range(told), *(told + at for at in kept), *range(first, end)], device=device)
        for step in range(made):
            segment = (first + step) // chunk * chunk
            near = position < min(segment + chunk, end)
            if rolling:
                near &= (position < told) | (position >= max(segment, first) - size)
            asked = query[row, step].unflatten(0, (heads, width)).double()
            weight = (torch.einsum("hd,mhd->hm", asked, keys[near]) * width**-0.5).softmax(1)
            expected = torch.einsum("hm,mhd->hd", weight, values[near]).flatten()
            assert (heard[row, step].double() - expected).abs().max() < {torch.float32: 1e-6}.get(dtype, 2e-2)
