"""The flow's Euler step by kernels equals the plain one: on a GPU as it is, elsewhere in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted import HERE, INTERPRETED
from torch import Tensor

from antiphon.models.cosyvoice import flow_stream
from antiphon.models.cosyvoice.flow import FlowMatching
from antiphon.models.cosyvoice.flow_config import RATE, FlowConfig, FlowLimits
from antiphon.models.cosyvoice.flow_stream import StreamingFlow
from antiphon.models.cosyvoice.flow_voices import FlowVoice

unet_fused = pytest.importorskip("antiphon.models.cosyvoice.unet_fused", reason="needs the package triton")
pytestmark = pytest.mark.usefixtures("interpreter")
SMALL = FlowConfig(
    vocabulary=50, mels=8, speaker=6, chunk=5, width=32, heads=2, feedforward=48, layers=1, up_layers=1,
    channels=16, unet_heads=2, unet_head_width=16, stage_blocks=2, middle_stages=0, steps=1,
)  # fmt: skip
WIDE = replace(SMALL, channels=256, unet_head_width=64, stage_blocks=1)
LIMITS = FlowLimits(hops=(5,), left=60, voices=2, prompt=30)
ROLLING = replace(LIMITS, left=6, rolling=True)


@pytest.fixture(autouse=True)
def _setting() -> Iterator[None]:
    with torch.no_grad():
        yield


def streaming(config: FlowConfig, limits: FlowLimits, device: str, dtype: torch.dtype = torch.float32) -> StreamingFlow:
    generator = torch.Generator().manual_seed(0)
    flow = FlowMatching(config).eval()
    for name, parameter in flow.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(centre + noise * (0.2 if parameter.dim() < 2 else parameter[0].numel() ** -0.5))
    model = StreamingFlow(flow.to(device, dtype), limits, together=True)
    model.prepare()
    return model


def spoken(model: StreamingFlow, rows: int, calls: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Frames of sessions with and without a prompt, of other lengths, one of them idle for a call; and what is kept."""
    config, dtype, device = model.config, model.flow.dtype, model.shifts.device
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(config.vocabulary, (config.chunk + config.lookahead,), generator=generator).tolist()
    mel = torch.randn(RATE * len(prompt), config.mels, generator=generator).to(dtype)
    embedding = torch.randn(config.speaker, generator=generator).to(dtype)
    voices = [model.add_voice(prompt, mel, embedding).row, model.add_voice([], mel[:0], embedding).row]
    state = {name: spec.new(rows + 1, device) for name, spec in model.state_spec().items()}
    row = torch.arange(rows, device=device)
    frames = []
    for call in range(calls):
        made = model.probe_inputs(model.variants[0], rows, generator).items()
        inputs = {name: value.to(device) for name, value in made}
        inputs["voice"] = torch.tensor(voices, device=device)[row % 2]
        inputs["count"] -= 2 * row
        active = (row != 1) | (call != 1)
        frames.append(model.step(inputs, state, rows - 1 - row, active)["mel"][active])
    return torch.cat(frames).double(), {name: value[:rows].double() for name, value in state.items()}


def both(
    monkeypatch: pytest.MonkeyPatch, model: StreamingFlow, rows: int, calls: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """All that a plain and a fused run make."""
    results = []
    for fused in (False, True):
        monkeypatch.setattr(flow_stream, "use_kernels", lambda x, fused=fused: fused)
        frames, state = spoken(model, rows, calls)
        results.append([frames, *(state[name] for name in sorted(state))])
        for voice in range(2):
            model.remove_voice(FlowVoice(voice, 0, ()))
    assert (results[0][0] != 0).any()
    return zip(*results, strict=True)


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize(("rows", "limits", "steps"), [(1, LIMITS, 2), (3, ROLLING, 1)], ids=["alone", "rolling"])
def test_sessions_of_other_ages(
    monkeypatch: pytest.MonkeyPatch, rows: int, limits: FlowLimits, steps: int, device: str
) -> None:
    model = streaming(replace(SMALL, steps=steps), limits, device)
    for plain, fused in both(monkeypatch, model, rows, 2):
        assert (plain - fused).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.float16, marks=INTERPRETED),  # it multiplies no matrices of bfloat16
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_half_the_bits(monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype) -> None:
    for plain, fused in both(monkeypatch, streaming(SMALL, LIMITS, device, dtype), 1, 2):
        assert (plain - fused).norm() <= (3e-3 if dtype == torch.float16 else 2e-2) * plain.norm()


@pytest.mark.parametrize("device", HERE)
def test_many_rows(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Norm and product are then kernels of their own."""
    monkeypatch.setattr(unet_fused, "FEW", 9)
    for plain, fused in both(monkeypatch, streaming(SMALL, LIMITS, device), 1, 2):
        assert (plain - fused).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("device", HERE)
def test_a_hop_of_a_second_in_full_width(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    for plain, fused in both(monkeypatch, streaming(WIDE, replace(LIMITS, hops=(25,)), device), 1, 1):
        assert (plain - fused).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("device", HERE)
def test_kernels_it_takes(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Two a transformer block and three a residual beside their products."""
    counts: Counter[str] = Counter()

    def counting(name: str) -> None:
        original = getattr(unet_fused, name)

        def counted(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(unet_fused, name, counted)

    for name in ("norm_linear", "windows", "mish_windows", "mish"):
        counting(name)
    monkeypatch.setattr(flow_stream, "use_kernels", lambda x: True)
    model = streaming(SMALL, LIMITS, device)
    spoken(model, 1, 1)
    passes, stages = 2, SMALL.middle_stages + 2  # one of them for the voice
    assert counts["norm_linear"] == passes * stages * SMALL.stage_blocks * 2
    assert counts["mish_windows"] == passes * stages
    assert counts["windows"] == passes * (stages + 3)
    assert counts["mish"] == passes * (stages + 1)


def test_elsewhere_it_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the CPU has no kernels")

    monkeypatch.setattr(unet_fused, "velocity", refuse)
    spoken(streaming(SMALL, LIMITS, "cpu"), 1, 1)
