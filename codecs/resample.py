"""Sample rates: streaming conversion, live (FFmpeg's swresample) and for files (libsoxr).

Both are linear-phase filters with their delay taken out: output sample ``m`` is the input at time ``m / rate``, the
whole of ``n`` input samples gives ``n * rate / source_rate`` samples (rounded up by swresample, to the nearest by
libsoxr), and the result does not depend on how the input was cut into pieces. They differ in how far behind the input
their output runs until ``flush``: swresample 16 samples of the lower rate (1 ms at 16 kHz, 2 ms at 8 kHz), libsoxr
tens of milliseconds for a steeper filter. (swresample
makes nothing of a whole input shorter than its filter, a millisecond or two.)
"""

from __future__ import annotations

from typing import Any

import av
import numpy as np
import soxr
from numpy.typing import NDArray

Samples = NDArray[np.float32]

LOUDEST = 1e6
"""Floating-point samples beyond this are damage, not sound: no scale that is in use reaches it."""

_NOTHING: Samples = np.zeros(0, np.float32)


class _Rates:
    """Two rates in hertz. Raises ValueError for one that is not positive."""

    def __init__(self, source_rate: int, rate: int) -> None:
        for value in (source_rate, rate):
            if value <= 0:
                raise ValueError(f"a sample rate must be a positive number of hertz, got {value}")
        self.source_rate, self.rate = source_rate, rate


class Resampler(_Rates):
    """For live audio: FFmpeg's swresample, a millisecond or two behind its input."""

    def __init__(self, source_rate: int, rate: int) -> None:
        super().__init__(source_rate, rate)
        same = source_rate == rate
        self._resampler = None if same else av.AudioResampler(format="fltp", layout="mono", rate=rate)

    def push(self, samples: Samples) -> Samples:
        """Take ``[n]`` samples, or ``[channels, n]`` to be averaged, and return those that are ready, ``[m]``."""
        if samples.ndim == 2:
            samples = samples.mean(axis=0, dtype=np.float32)
        if self._resampler is None or not len(samples):
            return samples
        piece = np.ascontiguousarray(samples, np.float32)[None]
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
        frame.sample_rate = self.source_rate
        return self._collect(frame)

    def flush(self) -> Samples:
        """End the input and return the rest. Nothing may be pushed after it."""
        return _NOTHING if self._resampler is None else self._collect(None)

    def _collect(self, frame: Any) -> Samples:
        made = [piece.to_ndarray()[0] for piece in self._resampler.resample(frame)]  # type: ignore[union-attr]
        return np.concatenate(made) if made else _NOTHING


class FileResampler(_Rates):
    """For files: libsoxr at high quality. Used like ``Resampler``, with mono samples."""

    def __init__(self, source_rate: int, rate: int) -> None:
        super().__init__(source_rate, rate)
        self._stream = soxr.ResampleStream(source_rate, rate, 1, dtype="float32", quality="HQ")

    def push(self, samples: Samples) -> Samples:
        """Take ``[n]`` samples and return those that are ready, ``[m]``."""
        made: Samples = self._stream.resample_chunk(samples)
        return made

    def flush(self) -> Samples:
        """End the input and return the rest. Nothing may be pushed after it."""
        made: Samples = self._stream.resample_chunk(_NOTHING, last=True)
        return made


def resample(samples: Samples, source_rate: int, rate: int) -> Samples:
    """A whole recording ``[n]`` at ``source_rate`` hertz to ``rate``, with the filter for files."""
    stream = FileResampler(source_rate, rate)
    return np.concatenate([stream.push(np.asarray(samples, np.float32)), stream.flush()])


def mono(frame: Any) -> tuple[Samples, int]:
    """A decoded ``av.AudioFrame`` of any sample format and layout to float32 mono ``[n]`` in -1 ... 1.

    The channels are averaged with equal weights, whatever their layout: nothing clips, and a voice in any one channel
    of eight is kept. Returns the samples and how many values were not numbers (NaN, infinite, or beyond ``LOUDEST``);
    those count as silence.
    """
    channels = frame.layout.nb_channels
    if frame.format.is_planar and channels >= 8:
        # PyAV counts the planes of a frame up to a null pointer, which eight or more channels do not end with.
        (frame,) = av.AudioResampler(format=frame.format.packed).resample(frame)
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, channels).T
    bad = 0
    if values.dtype.kind == "f":
        broken = ~(np.abs(values) <= LOUDEST)
        bad = int(np.count_nonzero(broken))
        if bad:
            values = np.where(broken, 0, values)
    else:
        levels = 1 << (8 * values.dtype.itemsize - 1)
        offset = levels if values.dtype.kind == "u" else 0
        values = (values.astype(np.float64 if levels > 1 << 23 else np.float32) - offset) / levels
    return values.mean(axis=0, dtype=values.dtype).astype(np.float32, copy=False), bad
