"""How audible the joins of a sound made in pieces are, without a model of hearing.

A click is a jump that the sound around it does not have. The score of a join is the greatest second difference of the
samples within 2 ms of it, in units of what only one in a hundred second differences nearby exceeds. Speech that was
never cut scores below 2 at 99 of 100 places, and at most 4 where a plosive bursts; a click about 6 and up.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_NEAR, _AROUND = 0.002, 0.16  # seconds to either side of a join
_COMMON = 0.99
_SILENCE = 1e-4
"""A second difference that is no louder than this is not heard: about the rounding of 16-bit samples."""


def seam_scores(pcm: NDArray[np.float32], rate: int, joins: Iterable[int]) -> list[float]:
    """A score for each join.

    pcm: ``[n]`` samples at ``rate`` hertz. joins: numbers of the samples that begin a new piece, between 1 and n - 1.
    Raises ValueError for a join outside of the sound and for a sound of fewer than three samples.
    """
    if len(pcm) < 3:
        raise ValueError(f"{len(pcm)} samples have no second difference")
    bends = np.abs(np.diff(np.asarray(pcm, np.float64), 2))
    near, around = max(2, round(_NEAR * rate)), round(_AROUND * rate)
    scores = []
    for join in joins:
        if not 0 < join < len(pcm):
            raise ValueError(f"a join lies between the samples 1 and {len(pcm) - 1}, got {join}")
        # Second difference i spans samples i to i + 2.
        at = join - 1
        common = float(np.quantile(bends[max(0, at - around) : at + around], _COMMON))
        scores.append(float(bends[max(0, at - near) : at + near].max()) / max(common, _SILENCE))
    return scores
