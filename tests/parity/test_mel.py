"""Log-mel features against transformers' and NeMo's."""

from __future__ import annotations

import pytest
import torch

from antiphon.codecs.mel import LogMel, MelConfig, slaney_filters

pytestmark = pytest.mark.parity
SAMPLES = 50_123


def speech_like() -> torch.Tensor:
    """Noise whose level moves over 80 dB, with a silent stretch."""
    level = 10 ** (4 * torch.sin(torch.arange(SAMPLES) / 3000) / 2 - 2)
    audio = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0)) * level * 0.1
    audio[20_000:24_000] = 0
    return audio[None]


@pytest.mark.parametrize("n_mels", [80, 128])
def test_transformers(n_mels: int) -> None:
    module = pytest.importorskip(
        "transformers.models.nemotron_asr_streaming.feature_extraction_nemotron_asr_streaming",
        reason="needs the parity extra",
    )
    extractor = module.NemotronAsrStreamingFeatureExtractor(feature_size=n_mels)
    audio = speech_like()
    theirs = extractor(audio[0].numpy(), sampling_rate=16000, center=True, return_tensors="pt")
    ours, lengths = LogMel(MelConfig(n_mels=n_mels))(audio, torch.tensor([SAMPLES]))
    frames = int(theirs["attention_mask"][0].sum())
    assert lengths.tolist() == [frames]
    torch.testing.assert_close(ours[0], theirs["input_features"][0, :frames], atol=2e-4, rtol=0)
    torch.testing.assert_close(
        slaney_filters(MelConfig(n_mels=n_mels)).float().T, extractor.mel_filters, atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("n_mels", [80, 128])
def test_nemo(n_mels: int) -> None:
    modules = pytest.importorskip("nemo.collections.asr.modules", reason="needs the parity extra")
    settings = {"normalize": "NA", "window_size": 0.025, "window_stride": 0.01, "features": n_mels, "n_fft": 512}
    preprocessor = modules.AudioToMelSpectrogramPreprocessor(**settings, dither=0.0, pad_to=0).eval()
    audio = speech_like()
    theirs, frames = preprocessor(input_signal=audio, length=torch.tensor([SAMPLES]))
    ours, lengths = LogMel(MelConfig.from_nemo(settings))(audio, torch.tensor([SAMPLES]))
    assert torch.equal(lengths, frames)
    torch.testing.assert_close(ours[0], theirs[0, :, : frames[0]].T, atol=2e-4, rtol=0)
