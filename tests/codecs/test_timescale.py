"""Splices: exact lengths, untouched ends, the same pitch, and nothing where the sound does not repeat."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.codecs import timescale

RATE = 16000


def tone(hertz: float, count: int, phase: float = 0.0) -> np.ndarray:
    """A buzz with a few harmonics: periodic, as a vowel is."""
    at = np.arange(count) / RATE
    wave = sum(np.sin(2 * np.pi * k * hertz * at + phase * k) / k for k in range(1, 5))
    return (0.2 * wave).astype(np.float32)


def step(samples: np.ndarray) -> float:
    """The largest step between neighbours, where a click would show."""
    return float(np.abs(np.diff(samples)).max())


@pytest.mark.parametrize("hertz", [90, 125, 210, 330])
def test_whole_periods_go_and_come_without_a_trace(hertz: float) -> None:
    samples = tone(hertz, 640)
    splice = timescale.find_splice(samples, RATE)
    assert splice.likeness > 0.98
    periods = splice.lag * hertz / RATE
    assert periods == pytest.approx(round(periods), abs=0.03)
    shorter, longer = timescale.shorten(samples, splice), timescale.lengthen(samples, splice)
    assert len(shorter) == 640 - splice.lag
    assert len(longer) == 640 + splice.lag
    assert np.abs(shorter - samples[: len(shorter)]).max() < 0.05
    assert np.abs(longer - tone(hertz, len(longer))).max() < 0.05
    assert max(step(shorter), step(longer)) < 1.1 * step(samples)


@given(st.integers(timescale.needed(RATE), 2000), st.integers(0, 2**32 - 1), st.sampled_from([16000, 24000]))
def test_every_sample_is_accounted_for(count: int, seed: int, rate: int) -> None:
    count = max(count, timescale.needed(rate))
    samples = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    splice = timescale.find_splice(samples, rate)
    assert round(timescale.SHORTEST_LAG * rate) <= splice.lag <= round(timescale.LONGEST_LAG * rate)
    assert -1.001 <= splice.likeness <= 1.001
    end = splice.lag + splice.overlap
    shorter, longer = timescale.shorten(samples, splice), timescale.lengthen(samples, splice)
    assert len(shorter) == count - splice.lag
    assert len(longer) == count + splice.lag
    assert np.array_equal(shorter[splice.overlap :], samples[end:])
    assert np.array_equal(longer[: splice.lag], samples[: splice.lag])
    assert np.array_equal(longer[end:], samples[splice.overlap :])
    assert shorter.dtype == longer.dtype == np.float32


def test_noise_does_not_resemble_itself_and_silence_does() -> None:
    noise = np.random.default_rng(0).standard_normal(640).astype(np.float32)
    assert timescale.find_splice(noise, RATE).likeness < 0.6
    silence = timescale.find_splice(1e-5 * noise, RATE)
    assert silence.likeness == 1.0
    assert silence.lag == round(timescale.LONGEST_LAG * RATE)


def test_too_little_sound_is_refused() -> None:
    with pytest.raises(ValueError, match="got 311"):
        timescale.find_splice(np.zeros(311, np.float32), RATE)
    assert timescale.needed(RATE) == 312
    with pytest.raises(ValueError, match="over 20 samples into 10"):
        timescale.merge(np.zeros(20, np.float32), np.zeros(10, np.float32))


def test_a_merge_begins_with_the_tail_and_ends_with_the_samples() -> None:
    merged = timescale.merge(np.full(99, -1, np.float32), np.ones(200, np.float32))
    assert merged[0] == pytest.approx(-0.98)
    assert np.array_equal(merged[99:], np.ones(101))
    assert np.all(np.diff(merged) >= 0)
    assert np.array_equal(timescale.merge(np.zeros(0, np.float32), merged), merged)


@pytest.mark.parametrize("shift", [0, 17, 64, 120])
def test_sounds_are_joined_in_step(shift: int) -> None:
    noise = np.random.default_rng(1).standard_normal(800).astype(np.float32)
    assert timescale.align(noise[shift : shift + 112], noise, 200) == shift
    assert timescale.align(noise[shift : shift + 112], noise, 16) <= 16
    assert timescale.align(noise[:112], noise[:112], 200) == 0
    assert timescale.align(np.zeros(112, np.float32), noise, 200) == 0
