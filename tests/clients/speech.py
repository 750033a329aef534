"""What the clients say: the start of the sample; and whether it comes back."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import antiphon
from antiphon.codecs.audio_file import read

SAMPLE = Path(antiphon.__file__).parent / "apps" / "samples" / "two_cities.flac"
SECONDS = 3.0
WORDS = "it was the best of times"


@cache
def speech(rate: int) -> NDArray[np.int16]:
    """The first seconds of the sample, mono."""
    return np.rint(read(SAMPLE, rate)[: round(SECONDS * rate)] * 32767).astype(np.int16)


def likeness(heard: NDArray[np.int16], rate: int) -> float:
    """How well some half second of the speech is found in what was heard, from 0 to 1; others may have gaps."""
    size, length = 1 << (len(heard) + rate).bit_length(), rate // 2
    spectrum = np.fft.rfft(heard, size)
    energies = np.cumsum(np.pad(np.square(heard, dtype=np.float64), (1, 0)))
    norms = np.sqrt(energies[length:] - energies[:-length]).clip(1)
    best = 0.0
    for start in range(0, len(speech(rate)) - length + 1, length):
        piece = speech(rate)[start : start + length].astype(np.float64)
        products = np.fft.irfft(spectrum * np.conj(np.fft.rfft(piece, size)), size)[: len(norms)]
        best = max(best, float((products / norms).max() / np.linalg.norm(piece)))
    return best
