"""Integrated loudness, held to the values that the standard itself states."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from antiphon.codecs.loudness import loudness


def sine(seconds: float, level: float, rate: int, frequency: float = 997.0) -> NDArray[np.float32]:
    """level: dB below full scale."""
    time = np.arange(round(seconds * rate)) / rate
    return (10 ** (level / 20) * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


@pytest.mark.parametrize("rate", [16000, 24000, 48000])
@pytest.mark.parametrize("level", [0.0, -20.0])
def test_a_sine_of_997_hz_reads_as_the_standard_says(rate: int, level: float) -> None:
    assert loudness(sine(3, level, rate), rate) == pytest.approx(level - 3.01, abs=0.02)


def test_low_tones_count_less_and_high_ones_more() -> None:
    low, middle, high = (loudness(sine(3, -20, 24000, frequency), 24000) for frequency in (40.0, 997.0, 4000.0))
    assert low < middle - 4
    assert middle + 2.5 < high < middle + 4


def test_pauses_do_not_count() -> None:
    """EBU Tech 3341, case 3: 10 s at -36, 60 s at -23 and 10 s at -36 dB are -23 LUFS in stereo, 3 dB less in mono."""
    rate = 16000
    quiet, loud = sine(10, -36, rate, 1000), sine(60, -23, rate, 1000)
    assert loudness(np.concatenate((quiet, loud, quiet)), rate) == pytest.approx(-26.0, abs=0.1)
    silence = np.zeros(10 * rate, np.float32)
    assert loudness(np.concatenate((silence, loud, silence)), rate) == pytest.approx(-26.0, abs=0.1)


def test_silence_and_too_little() -> None:
    assert loudness(np.zeros(24000, np.float32), 24000) == -math.inf
    with pytest.raises(ValueError, match=r"0\.30 s of sound"):
        loudness(np.zeros(7200, np.float32), 24000)
