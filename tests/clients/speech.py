"""What the clients say: the first words of the sample; and whether it comes back."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import antiphon
from antiphon.codecs.audio_file import read

SAMPLE = Path(antiphon.__file__).parent / "apps" / "samples" / "two_cities.flac"
BEGIN, SECONDS = 1.0, 2.0  # of WORDS in the sample; before them is a breath that could be taken for a turn
WORDS = "it was the best of times"


@cache
def speech(rate: int) -> NDArray[np.int16]:
    """The words, mono."""
    samples = read(SAMPLE, rate)[round(BEGIN * rate) :][: round(SECONDS * rate)]
    return np.rint(samples * 32767).astype(np.int16)


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
