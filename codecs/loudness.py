"""How loud a recording is as a whole: integrated loudness by ITU-R BS.1770-5, annex 1, for one channel."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

BLOCK, STEP = 0.4, 0.1  # seconds
SILENT = -70.0  # LUFS below which a block does not count
BELOW = 10.0  # LU below the mean of the others, likewise

# Annex 1, tables 1 and 2: the two filters of the K weighting, at 48 kHz.
_RATE = 48000
_SHELF = ((1.53512485958697, -2.69169618940638, 1.19839281085285), (1.0, -1.69065929318241, 0.73248077421585))
_HIGH_PASS = ((1.0, -2.0, 1.0), (1.0, -1.99004745483398, 0.99007225036621))


def loudness(samples: NDArray[np.float32], rate: int) -> float:
    """LUFS of mono samples ``[n]``, n at least 0.4 s; minus infinity for silence.

    The filters are applied as their frequency response, so that they are the standard's at any rate up to 48 kHz.
    Raises ValueError for less than a block.
    """
    block, step = round(BLOCK * rate), round(STEP * rate)
    if len(samples) < block:
        raise ValueError(f"{len(samples) / rate:.2f} s of sound: its loudness is that of blocks of {BLOCK:g} s")
    size = len(samples) + rate  # a second of room for the filters to ring out
    response = _response(np.fft.rfftfreq(size, 1 / rate).astype(np.float64))
    weighted = np.fft.irfft(np.fft.rfft(samples.astype(np.float64), size) * response, size)
    energy = np.concatenate(([0.0], np.cumsum(weighted[: len(samples)] ** 2)))
    starts = np.arange(0, len(samples) - block + 1, step)
    power = np.maximum(energy[starts + block] - energy[starts], 0.0) / block
    power = power[_lufs(power) > SILENT]
    if not len(power):
        return -math.inf
    power = power[_lufs(power) > _lufs(power.mean()) - BELOW]
    return float(_lufs(power.mean()))


def _lufs(power: NDArray[np.float64] | np.float64) -> NDArray[np.float64]:
    return -0.691 + 10 * np.log10(np.maximum(power, 1e-30))


def _response(frequencies: NDArray[np.float64]) -> NDArray[np.complex128]:
    delay = np.exp(-2j * np.pi * frequencies / _RATE)
    powers = np.stack((np.ones_like(delay), delay, delay**2))
    made: NDArray[np.complex128] = np.ones_like(delay)
    for numerator, denominator in (_SHELF, _HIGH_PASS):
        made = made * (np.array(numerator) @ powers) / (np.array(denominator) @ powers)
    return made
