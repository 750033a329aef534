"""Whisper's features against those of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from antiphon.codecs.whisper_mel import WhisperMel

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("lead", [0, 64000, 127000])
def test_features_are_those_of_transformers(lead: int) -> None:
    from transformers import WhisperFeatureExtractor

    generator = np.random.default_rng(lead)
    pcm = generator.standard_normal(128000).astype(np.float32) * np.linspace(0, 0.3, 128000, dtype=np.float32)
    pcm[:lead] = 0
    extractor = WhisperFeatureExtractor(chunk_length=8)
    expected = extractor(
        pcm, sampling_rate=16000, padding="max_length", max_length=128000, do_normalize=True, return_tensors="np"
    ).input_features
    made = WhisperMel()(torch.from_numpy(pcm)[None])
    np.testing.assert_allclose(made.numpy(), expected, atol=2e-4)
