"""Resampling: against libsoxr whole, chunking, lengths, delay, downmix of every sample format."""

from __future__ import annotations

import av
import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.codecs.resample import FileResampler, Resampler, Samples, mono, resample

RATES = [(48000, 16000), (44100, 16000), (8000, 16000), (11025, 16000), (24000, 16000), (16000, 24000)]


def sweep(rate: int, seconds: float, top: float = 3400.0) -> Samples:
    t = np.arange(int(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * (100 + (top - 100) * t / (2 * seconds)) * t)).astype(np.float32)


def snr(reference: Samples, got: Samples) -> float:
    inner = slice(400, min(len(reference), len(got)) - 400)
    error = (reference[inner] - got[inner]).astype(np.float64)
    return float(10 * np.log10(np.mean(reference[inner] ** 2) / np.mean(error**2)))


def in_pieces(source: int, rate: int, samples: Samples, sizes: list[int], live: bool) -> Samples:
    stream, made, at = Resampler(source, rate) if live else FileResampler(source, rate), [], 0
    while at < len(samples):
        size = sizes[len(made) % len(sizes)]
        made.append(stream.push(samples[at : at + size]))
        at += size
    return np.concatenate([*made, stream.flush()])


@pytest.mark.parametrize(("source", "rate"), RATES)
def test_live_matches_soxr(source: int, rate: int) -> None:
    samples = sweep(source, 2.0)
    oracle = soxr.resample(samples, source, rate, quality="VHQ")
    assert snr(oracle, in_pieces(source, rate, samples, [source // 50], live=True)) > 70
    assert snr(oracle, in_pieces(source, rate, samples, [source // 50], live=False)) > 90


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("source", [48000, 44100])
def test_what_16_khz_cannot_hold_is_removed(source: int, live: bool) -> None:
    tone = np.sin(2 * np.pi * 11000 * np.arange(source) / source).astype(np.float32)
    assert np.abs(in_pieces(source, 16000, tone, [960], live)[200:-200]).max() < 1e-2


@settings(max_examples=25, deadline=None)
@given(
    rates=st.sampled_from(RATES),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    length=st.integers(200, 9000),
    live=st.booleans(),
)
def test_pieces_do_not_matter_and_lengths_are_exact(
    rates: tuple[int, int], sizes: list[int], length: int, live: bool
) -> None:
    source, rate = rates
    samples = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    pieces = in_pieces(source, rate, samples, sizes, live)
    assert np.array_equal(pieces, in_pieces(source, rate, samples, [length], live))
    assert abs(len(pieces) - length * rate / source) <= 1


@pytest.mark.parametrize(("source", "rate"), RATES)
def test_live_delay_is_sixteen_samples_of_the_lower_rate(source: int, rate: int) -> None:
    made = Resampler(source, rate).push(sweep(source, 1.0))
    behind = 1.0 - len(made) / rate
    assert 0 < behind <= 18 / min(source, rate)


def test_same_rate_is_untouched() -> None:
    samples = sweep(16000, 0.1)
    assert np.array_equal(in_pieces(16000, 16000, samples, [320], live=True), samples)


def test_channels_of_live_audio_are_averaged() -> None:
    left, right = sweep(48000, 0.1), sweep(48000, 0.1, top=900.0)
    both = Resampler(48000, 16000).push(np.stack([left, right]))
    np.testing.assert_allclose(both, Resampler(48000, 16000).push((left + right) / 2), atol=1e-6)


def test_whole_is_streamed() -> None:
    samples = sweep(44100, 1.0)
    assert np.array_equal(resample(samples, 44100, 16000), soxr.resample(samples, 44100, 16000, quality="HQ"))
    assert len(FileResampler(8000, 16000).flush()) == 0
    assert len(Resampler(8000, 16000).flush()) == 0


def test_bad_rate() -> None:
    with pytest.raises(ValueError, match="positive number of hertz, got 0"):
        Resampler(0, 16000)


KINDS = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "flt": np.float32, "dbl": np.float64}


@pytest.mark.parametrize("sample_format", [*KINDS, *(f"{name}p" for name in KINDS)])
@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1", "7.1", "hexadecagonal"])
def test_downmix_averages_every_format_and_layout(sample_format: str, layout: str) -> None:
    kind = np.dtype(KINDS[sample_format.removesuffix("p")])
    channels = av.AudioLayout(layout).nb_channels
    sound = np.random.default_rng(0).uniform(-0.9, 0.9, (channels, 500))
    levels = 1 if kind.kind == "f" else 1 << (8 * kind.itemsize - 1)
    values = sound * levels if levels == 1 else np.round(sound * levels) + (levels if kind.kind == "u" else 0)
    packed = np.ascontiguousarray(values.T.astype(kind)).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, format=sample_format.removesuffix("p"), layout=layout)
    frame.sample_rate = 16000
    if sample_format.endswith("p"):
        (frame,) = av.AudioResampler(format=sample_format).resample(frame)
        assert frame.format.is_planar
    samples, bad = mono(frame)
    assert bad == 0
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, sound.mean(0), atol=5e-3 if kind.itemsize == 1 else 1e-4)


def test_what_is_not_a_number_is_silence_and_counted() -> None:
    values = np.full((2, 100), 0.5, np.float32)
    values[0, :10], values[1, 5:8], values[0, 50], values[1, 51] = np.nan, np.inf, -np.inf, 3e38
    samples, bad = mono(av.AudioFrame.from_ndarray(values, format="fltp", layout="stereo"))
    assert bad == 15
    assert samples[5] == 0
    assert samples[0] == samples[50] == samples[51] == 0.25
    assert samples[60] == 0.5
