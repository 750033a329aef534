"""Our vocoder and prompt features against upstream's (``cosyvoice2-eu``, installed with ``--no-deps``).

Upstream draws its noise from torch's generator; the comparison hears what it drew.
"""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from antiphon.codecs import hift_checkpoint
from antiphon.codecs.hift import UNKNOWN, HiFT, HiFTConfig
from antiphon.codecs.prompt_mel import PromptMel

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
for package in ("cosyvoice", "matcha", "librosa", "scipy"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: see CONTRIBUTING", allow_module_level=True)

TINY = HiFTConfig(width=32, pitch_width=16, voiced_hertz=60.0)
FRAMES = 60


def build(config: HiFTConfig) -> torch.nn.Module:
    """Upstream's vocoder of these sizes."""
    from cosyvoice.hifigan.f0_predictor import ConvRNNF0Predictor
    from cosyvoice.hifigan.generator import HiFTGenerator

    dilations = list(config.dilations)
    return HiFTGenerator(
        in_channels=config.mels,
        base_channels=config.width,
        nb_harmonics=config.harmonics - 1,
        sampling_rate=config.sample_rate,
        nsf_alpha=config.amplitude,
        nsf_sigma=config.noise,
        nsf_voiced_threshold=config.voiced_hertz,
        upsample_rates=list(config.rates),
        upsample_kernel_sizes=list(config.kernels),
        istft_params={"n_fft": config.n_fft, "hop_len": config.hop},
        resblock_kernel_sizes=list(config.block_kernels),
        resblock_dilation_sizes=[dilations] * len(config.block_kernels),
        source_resblock_kernel_sizes=list(config.source_kernels),
        source_resblock_dilation_sizes=[dilations] * len(config.source_kernels),
        lrelu_slope=config.slope,
        audio_limit=config.limit,
        f0_predictor=ConvRNNF0Predictor(1, config.mels, config.pitch_width),
    ).eval()


@pytest.fixture(scope="module")
def upstream() -> torch.nn.Module:
    """Random weights in float64 that give a loud sound with voiced and unvoiced frames."""
    torch.manual_seed(2)
    made = build(TINY).double()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("alpha"):
                weight.add_(0.3 * torch.randn_like(weight))
            elif name.endswith("original0"):
                weight.mul_(3 if "conv_p" in name else 1.5)
            elif name.endswith("bias"):
                weight.copy_(0.1 * torch.randn_like(weight))
        made.f0_predictor.classifier.weight.mul_(1200)
        made.f0_predictor.classifier.bias.zero_()
        made.m_source.l_linear.weight.mul_(8)
    # Upstream rounds these two to float32.
    made.stft_window = torch.hann_window(TINY.n_fft, dtype=torch.float64)
    made.m_source.l_sin_gen._f02uv = lambda pitch: (pitch > TINY.voiced_hertz).double()
    return made


@pytest.fixture
def ours(upstream: torch.nn.Module) -> HiFT:
    torch.set_default_dtype(torch.float64)
    made = HiFT(TINY, hops=(7,))
    torch.set_default_dtype(torch.float32)
    made.load_state_dict(hift_checkpoint.from_upstream(upstream.state_dict(), made))
    made.prepare()
    return made


@pytest.fixture
def mel() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(1, FRAMES, TINY.mels, generator=generator, dtype=torch.float64).cumsum(1) / 5


def speak(upstream: torch.nn.Module, mel: Tensor, patch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Upstream's sound, and the noise that it drew for each harmonic, ``[1, samples, harmonics]``."""
    drawn: list[Tensor] = []
    draw = torch.randn_like

    def listen(x: Tensor) -> Tensor:
        drawn.append(draw(x))
        return drawn[-1]

    patch.setattr(torch, "randn_like", listen)
    pcm, _ = upstream.inference(mel.transpose(1, 2))
    patch.undo()
    return pcm.clone(), drawn[0].clone()


@torch.no_grad()
def test_the_vocoder_given_the_same_noise(
    upstream: torch.nn.Module, ours: HiFT, mel: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, drawn = speak(upstream, mel, monkeypatch)
    pitch = upstream.f0_predictor(mel.transpose(1, 2))
    assert 0.05 < (pitch < TINY.voiced_hertz).double().mean() < 0.5
    weight = ours.m_source.l_linear.weight[0]
    made = ours(mel, noise=drawn @ weight / weight.norm())
    assert made.shape == expected.shape == (1, FRAMES * TINY.frame)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-9)
    assert (expected.abs() < TINY.limit).double().mean() > 0.8
    assert expected.std() > 0.05


@torch.no_grad()
def test_a_stream_too_where_there_is_no_noise(
    upstream: torch.nn.Module, ours: HiFT, mel: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own stream of frames against upstream's whole utterance, in calls of seven frames."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    expected, _ = upstream.inference(mel.transpose(1, 2))
    monkeypatch.undo()
    monkeypatch.setattr("antiphon.codecs.hift.gaussian", lambda seed, first, count: torch.zeros(len(seed), count))
    state = {name: spec.new(2) for name, spec in ours.state_spec().items()}
    frames = torch.cat((mel[0], mel.new_full((ours.flush + 7, TINY.mels), torch.nan)))
    heard, slot, yes = [], torch.tensor([0]), torch.tensor([True])
    for first in range(0, FRAMES + ours.flush, 7):
        end = FRAMES if first + 7 >= FRAMES else UNKNOWN
        inputs = {"mel": frames[None, first : first + 7], "end": torch.tensor([end]), "seed": torch.tensor([0])}
        made = ours.step(inputs, state, slot, yes)
        heard.append(ours.sound(made["pcm"][0], int(made["first"]), end))
    torch.testing.assert_close(torch.cat(heard), expected[0], rtol=0, atol=1e-9)


def test_every_key_of_the_published_file_is_read(tmp_path: Path) -> None:
    with torch.device("meta"):
        published = build(HiFTConfig()).state_dict()
        ours = HiFT()
    assert {name for names in hift_checkpoint.key_names(ours).values() for name in names} == published.keys()
    made = hift_checkpoint.from_upstream(published, ours)
    assert sum(value.numel() for value in published.values()) == 20_821_295
    assert {key: value.shape for key, value in made.items()} == {
        key: value.shape for key, value in ours.state_dict().items()
    }


def matcha_audio() -> types.ModuleType:
    """``matcha.utils.audio`` without what ``matcha.utils`` imports."""
    (folder,) = importlib.util.find_spec("matcha").submodule_search_locations
    spec = importlib.util.spec_from_file_location("matcha_audio", Path(folder, "utils", "audio.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("f_max", [8000, None])
@pytest.mark.parametrize("samples", [721, 4800, 50_123])
def test_prompt_features(samples: int, f_max: int | None) -> None:
    generator = torch.Generator().manual_seed(samples)
    level = 10 ** (2 * torch.sin(torch.arange(samples) / 3000) - 2.5)
    pcm = (torch.randn(2, samples, generator=generator) * level).clamp(-1, 1)
    expected = matcha_audio().mel_spectrogram(pcm, 1920, 80, 24000, 480, 1920, 0, f_max, center=False)
    made = PromptMel(f_max=f_max)(pcm)
    assert made.shape == (2, samples // 480, 80)
    torch.testing.assert_close(made, expected.transpose(1, 2), atol=1e-3, rtol=0)
    assert (made - expected.transpose(1, 2)).abs().mean() < 1e-5
