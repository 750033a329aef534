"""A level meter: how loud sound is, in decibels below full scale (dBFS), as a number and as a bar."""

from __future__ import annotations

import math

import numpy as np
from rich.text import Text as Styled

from ...codecs.resample import Samples

FLOOR = -60.0  # dBFS at the left end of the bar
WIDTH = 24  # characters
FALL = 0.85  # of the level from one chunk to the next: a meter that can be read
CLIPPED = 0.999
PARTS = " ▏▎▍▌▋▊▉█"


def dbfs(amplitude: float) -> float:
    """Decibels relative to full scale; silence is minus infinity."""
    return 20 * math.log10(amplitude) if amplitude > 0 else -math.inf


class Level:
    """The level of sound, as it comes in and over all."""

    def __init__(self) -> None:
        self._now = self.peak = 0.0
        self._square = 0.0
        self._count = self.clipped = 0

    def add(self, samples: Samples) -> None:
        """Take the next samples, ``[n]``."""
        if not len(samples):
            return
        loudest = float(np.abs(samples).max())
        square = float(np.square(samples, dtype=np.float64).sum())
        self._now = max(math.sqrt(square / len(samples)), self._now * FALL)
        self.peak = max(self.peak, loudest)
        self._square += square
        self._count += len(samples)
        self.clipped += int(np.count_nonzero(np.abs(samples) >= CLIPPED))

    @property
    def mean(self) -> float:
        """Root of the mean square, over all."""
        return math.sqrt(self._square / self._count) if self._count else 0.0

    @property
    def summary(self) -> str:
        """A line on what was heard."""
        if not self.peak:
            return "nothing but silence: is the microphone muted, or is it another one (antiphon mic --list)?"
        clipped = f", {self.clipped} samples clipped: turn the input down" if self.clipped else ""
        return f"level {dbfs(self.mean):.0f} dBFS, peak {dbfs(self.peak):.0f} dBFS{clipped}"

    def bar(self) -> Styled:
        """``WIDTH`` characters and the level now: green, yellow near full scale, red where it clips."""
        level = dbfs(self._now)
        filled = max(0.0, min(1.0, 1 - level / FLOOR)) * WIDTH
        whole, rest = int(filled), int((filled % 1) * (len(PARTS) - 1))
        blocks = (PARTS[-1] * whole + PARTS[rest]).ljust(WIDTH)[:WIDTH]
        colour = "green" if level < -12 else "yellow" if level < -3 else "red"
        number = f"{level:4.0f} dBFS" if level > -100 else "  silence"
        return Styled.assemble((blocks, f"{colour} on grey15"), (f" {number}", "dim"))
