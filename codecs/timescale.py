"""Playing speech a little faster or slower without changing its pitch: whole periods are cut out or put in.

Waveform-similarity overlap-add (WSOLA: Verhelst and Roelands, ICASSP 1993), one splice at a time, as adaptive playout
uses it (Liang, Färber and Girod, IEEE Trans. Multimedia 5(4), 2003): find the lag at which the sound resembles itself
most, and cross-fade from the one place to the other. The functions are pure and account for every sample: a shortened
piece has exactly ``splice.lag`` samples fewer, a lengthened one as many more, and first and last samples stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .resample import Samples

SHORTEST_LAG = 0.0025  # seconds: 400 Hz, a high voice
LONGEST_LAG = 0.0125  # seconds: 80 Hz, a low one
OVERLAP = 0.007  # seconds of the cross-fade, and of what is compared
QUIET = 1e-3  # root mean square (-60 dBFS) below which no splice can be heard

_POWER_FLOOR = 1e-9


@dataclass(frozen=True, slots=True)
class Splice:
    """Where a sound resembles itself: ``x[0:overlap]`` and ``x[lag:lag+overlap]``.

    likeness: their normalised correlation, -1 to 1; 1 where both are too quiet for a splice to be heard.
    """

    lag: int
    overlap: int
    likeness: float


def needed(rate: int) -> int:
    """Samples at ``rate`` Hz that a splice looks at."""
    return round(LONGEST_LAG * rate) + round(OVERLAP * rate)


def find_splice(samples: Samples, rate: int) -> Splice:
    """The best splice at the beginning of ``samples``. Raises ValueError for fewer than ``needed(rate)``."""
    overlap, shortest, longest = (round(seconds * rate) for seconds in (OVERLAP, SHORTEST_LAG, LONGEST_LAG))
    window = samples[: longest + overlap]
    if len(window) < longest + overlap:
        raise ValueError(f"a splice at {rate} Hz looks at {longest + overlap} samples, got {len(samples)}")
    if float(window @ window) <= QUIET * QUIET * len(window):
        return Splice(longest, overlap, 1.0)
    lag, likeness = _most_alike(window[:overlap], window[shortest:])
    return Splice(shortest + lag, overlap, likeness)


def shorten(samples: Samples, splice: Splice) -> Samples:
    """Cut ``splice.lag`` samples out: fade from the beginning into what comes a lag later."""
    return merge(samples[: splice.overlap], samples[splice.lag :])


def lengthen(samples: Samples, splice: Splice) -> Samples:
    """Put ``splice.lag`` samples in: a lag into the sound, fade back to its beginning."""
    end = splice.lag + splice.overlap
    return np.concatenate([samples[: splice.lag], merge(samples[splice.lag : end], samples)])


def merge(tail: Samples, samples: Samples) -> Samples:
    """``samples`` with a cross-fade from ``tail`` at its beginning, ``len(samples)`` long.

    Raises ValueError where the tail is longer than the samples.
    """
    size = len(tail)
    if size > len(samples):
        raise ValueError(f"cannot fade over {size} samples into {len(samples)}")
    merged = samples.copy()
    rising = np.arange(1, size + 1, dtype=np.float32) / np.float32(size + 1)
    merged[:size] = tail + (samples[:size] - tail) * rising
    return merged


def align(tail: Samples, samples: Samples, most: int) -> int:
    """How many samples, at most ``most``, to leave out of ``samples`` so that they continue best where ``tail`` is."""
    most = min(most, len(samples) - len(tail))
    if most <= 0 or float(tail @ tail) <= QUIET * QUIET * len(tail):
        return 0
    return _most_alike(tail, samples[: most + len(tail)])[0]


def _most_alike(pattern: Samples, samples: Samples) -> tuple[int, float]:
    """Where in ``samples`` the pattern fits best, and the normalised correlation there."""
    size = len(pattern)
    products = np.correlate(samples, pattern)
    powers = np.cumsum(np.square(samples, dtype=np.float64))
    energies = powers[size - 1 :].copy()
    energies[1:] -= powers[:-size]
    likeness = products / np.sqrt(np.maximum(energies * float(pattern @ pattern), _POWER_FLOOR))
    best = int(np.argmax(likeness))
    return best, float(likeness[best])
