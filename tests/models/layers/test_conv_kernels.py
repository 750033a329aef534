"""Steps of convolutions by Triton kernels equal the plain ones: on a GPU as they are, elsewhere in the interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreted import HERE

from antiphon.codecs import mimi_quantizer
from antiphon.codecs.mimi import Mimi, MimiConfig, MimiDecoder, MimiEncoder
from antiphon.models.layers import conv
from antiphon.models.layers.conv import CausalConv1d, CausalConvTranspose1d

KINDS = {  # channels, out, kernel, stride, dilation, groups, bias, pad
    "plain": (CausalConv1d, (6, 10, 3)),
    "pointwise": (CausalConv1d, (6, 10, 1)),
    "first of a codec": (CausalConv1d, (1, 16, 7)),
    "last of a codec": (CausalConv1d, (20, 1, 3)),
    "to one output": (CausalConv1d, (6, 1, 1)),
    "twice its stride": (CausalConv1d, (6, 10, 8, 4)),
    "far into the past": (CausalConv1d, (340, 4, 8)),
    "without overlap": (CausalConv1d, (6, 10, 4, 4)),
    "dilated": (CausalConv1d, (6, 10, 3, 1, 9)),
    "dilated and strided": (CausalConv1d, (6, 10, 4, 3, 2)),
    "replicating": (CausalConv1d, (6, 6, 4, 2, 1, 1, False, "replicate")),
    "replicating far": (CausalConv1d, (6, 6, 7, 1, 1, 1, True, "replicate")),
    "depthwise": (CausalConv1d, (6, 6, 5, 1, 1, 6)),
    "transposed": (CausalConvTranspose1d, (6, 10, 8, 4)),
    "transposed, wide": (CausalConvTranspose1d, (6, 120, 10, 5)),
    "transposed, more than twice its stride": (CausalConvTranspose1d, (6, 10, 11, 4)),
    "transposed, depthwise": (CausalConvTranspose1d, (6, 6, 4, 2, 6, False)),
}


def as_on_a_gpu(monkeypatch, large):
    """Packed like there, and all products left to convolutions or none."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(conv, "use_kernels", lambda x: True)
    monkeypatch.setattr(conv, "_pack", torch.Tensor.contiguous)
    monkeypatch.setattr(conv, "LARGE", 0 if large else 1e30)
    monkeypatch.setattr(conv, "LEAST_INPUTS", 1)
    monkeypatch.setattr(conv, "LEAST_OUTPUTS", 1)


@torch.no_grad()
@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("large", [False, True], ids=["products", "convolutions"])
@pytest.mark.parametrize(
    ("branched", "elu"), [(False, False), (False, True), (True, True)], ids=["as it is", "ELU", "ELU of a sum"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_plain_ones(monkeypatch, device, kind, branched, elu, large):
    """Of sessions of any age and in any order, one of them idle, by steps shorter and longer than the past."""
    as_on_a_gpu(monkeypatch, large)
    torch.manual_seed(5)
    cls, settings = KINDS[kind]
    layer = cls(*settings).to(device)
    unit = layer.stride[0] if cls is CausalConv1d else 1
    calls = []
    for call, size in enumerate((2, 1, 13, 3)):
        signals = [0.5 * torch.randn(4, layer.in_channels, size * unit).to(device) for _ in range(2)]
        calls.append((signals[0], signals[1] if branched else None, torch.arange(4, device=device) != call))

    def streamed(kernels):
        layer.packed = None
        if kernels:
            layer.pack()
        monkeypatch.setattr(conv, "use_kernels", lambda x: kernels)
        state = {name: spec.new(6, device) for name, spec in layer.state_spec("conv", torch.float32).items()}
        slots = torch.tensor([3, 0, 4, 1], device=device)
        made = []
        for x, branch, active in calls:
            x, branch = x.clone(), None if branch is None else branch.clone()
            y = layer.step("conv", x, state, slots, torch.where(active, slots, 5), branch, elu)
            made.append(y[active].flatten())
        return torch.cat(made), {name: value[:5].float() for name, value in state.items()}

    (plain, state), (made, kept) = streamed(False), streamed(True)
    assert made.shape == plain.shape
    assert (made - plain).abs().max() < 1e-5
    assert all(value.any() for value in state.values())
    for name, value in state.items():
        assert (kept[name] - value).abs().max() < 1e-5, name


@torch.no_grad()
@pytest.mark.parametrize("device", HERE)
def test_how_many_rows_there_are_changes_no_bit_of_windows_and_sums(device):
    from antiphon.models.layers.triton_windows import overlap, windows

    torch.manual_seed(6)
    x, branch, memory = (torch.randn(5, 8, 12, device=device) for _ in range(3))
    slots = torch.tensor([4, 1, 2], device=device)

    def run(some):
        rest, past = memory[:, :2].clone().contiguous(), memory[:, :6].clone().contiguous()
        seen = windows(x[some], branch[some], True, past, slots[some], slots[some], None, 7)
        return seen, overlap(x[some].reshape(-1, 2, 48), None, rest, slots[some], slots[some])

    together = run(slice(0, 3))
    for row in range(3):
        for alone, one in zip(run(slice(row, row + 1)), together, strict=True):
            assert torch.equal(alone[0], one[row])


@torch.no_grad()
@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("large", [False, True], ids=["products", "convolutions"])
@pytest.mark.parametrize(("frames", "residuals"), [(1, 1), (2, 2)])
def test_a_codec_in_steps_equals_the_whole_signal(monkeypatch, device, large, frames, residuals):
    sizes = {"channels": 4, "ratios": (5, 8), "width": 32, "layers": 1, "heads": 4, "feedforward": 64, "window": 6}
    config = MimiConfig(**sizes, residuals=residuals, codebooks=4, bins=64, code_width=8)
    torch.manual_seed(7)
    mimi = Mimi(config).eval().to(device)
    for weight in mimi.parameters():
        weight.mul_(2)
    for branch in (mimi.quantizer.semantic, mimi.quantizer.acoustic):
        branch.codebooks.embedding.normal_(std=0.1)
    pcm = torch.randn(2, 8 * config.frame).to(device)
    codes = mimi.encode(pcm)
    sound = mimi.decode(codes)
    assert all(len(book.unique()) > 3 for book in codes.movedim(1, 0))
    assert sound.std() > 1e-2
    as_on_a_gpu(monkeypatch, large)
    monkeypatch.setattr(mimi_quantizer, "use_kernels", lambda x: True)
    slots, active = torch.tensor([2, 0], device=device), torch.ones(2, dtype=torch.bool, device=device)
    made = []
    for model, name, given, size in (
        (MimiEncoder(mimi, 4), "pcm", pcm, frames * config.frame),
        (MimiDecoder(mimi, 4), "codes", codes, frames),
    ):
        model.prepare()
        state = {key: spec.new(4, device) for key, spec in model.state_spec().items()}
        steps = [model.step({name: part}, state, slots, active) for part in given.split(size, -1)]
        made.append(torch.cat([next(iter(step.values())) for step in steps], -1))
    assert torch.equal(made[0], codes)
    assert (made[1] - sound).abs().max() < 1e-5 * sound.abs().max().clamp(min=1)


@torch.no_grad()
@pytest.mark.parametrize("device", HERE)
def test_the_nearest_entry_and_what_it_leaves(device):
    """With ties, and in any number of entries of any width."""
    from antiphon.models.layers.triton_nearest import nearest

    torch.manual_seed(8)
    for rows, bins, width in ((5, 64, 8), (3, 50, 12), (1, 2048, 256)):
        scores, x = (torch.randn(rows, size).mul(2).round().clamp(max=2).to(device) for size in (bins, width))
        entries = torch.randn(bins, width).to(device)
        codes, left = nearest(scores, entries, x)
        best = scores == scores.amax(1, keepdim=True)
        assert best.sum() > rows
        assert torch.equal(codes, best.int().argmax(1))
        assert torch.equal(left, x - entries[codes])
