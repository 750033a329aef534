"""Scene changes: pictures in, what each looks like and where the scene changes out. No model, only arithmetic.

The score is that of FFmpeg's filter ``scdet``: the mean difference of luma to the picture before, or how much that
difference differs from the last one where this is less. So a cut stands out, and steady motion does not. It is taken on
a grid of points, the same for pictures of every size: what a sender does to its resolution is no change of scene.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
from numpy.typing import NDArray

from ..chunk import Event, Video
from ..stage import Context, Input, Stage, stage

GRID = (90, 160)  # points that are looked at, down and across
WEIGHTS = np.array([77, 150, 29], np.uint32)  # of red, green and blue in luma, in 256ths (BT.601)


@stage(lasting=True)
class Scenes(Stage):
    """Video -> for every picture an event ``picture``, and an event ``scene`` where another scene begins.

    Data of both: ``number`` (from 1), ``width``, ``height``, ``luma`` (mean, 0 to 1), ``change`` (the score, 0 to 1).

    threshold: the score from which on a scene is another.
    """

    name = "scenes"

    def __init__(self, *, threshold: float = 0.1) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold:g}: a score above 0 and up to 1")
        self.threshold = threshold

    async def run(self, ctx: Context, video: Input) -> AsyncIterator[Event]:
        """See the class."""
        change, number = Change(), 0
        async for chunk in video:
            if not isinstance(chunk, Video):
                raise TypeError(f"scenes takes video, got {chunk}")
            number += 1
            height, width, _ = chunk.pixels.shape
            luma = to_luma(points(chunk.pixels))
            score = change.score(luma)
            data = {
                "number": number,
                "width": width,
                "height": height,
                "luma": round(float(luma.mean()) / 255, 4),
                "change": round(score, 4),
            }
            yield Event(name="picture", data=data, rate=chunk.rate, start=chunk.start)
            if score >= self.threshold:
                yield Event(name="scene", data=data, rate=chunk.rate, start=chunk.start)


class Change:
    """How much each picture of a sequence differs from the one before it."""

    def __init__(self) -> None:
        self._before: NDArray[np.int16] | None = None
        self._difference = 0.0

    def score(self, luma: NDArray[np.uint8]) -> float:
        """Of the next picture ``[height, width]``: 0 to 1, 0 for the first. The size stays the same."""
        now, before = luma.astype(np.int16), self._before
        self._before = now
        if before is None:
            return 0.0
        last, self._difference = self._difference, float(np.abs(now - before).mean()) / 256
        return min(self._difference, abs(self._difference - last))


def points(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The pixels of a picture at the middles of the cells of ``GRID``."""
    down, across = (
        (2 * np.arange(count) + 1) * size // (2 * count) for count, size in zip(GRID, pixels.shape, strict=False)
    )
    found: NDArray[np.uint8] = pixels[down[:, None], across]
    return found


def to_luma(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB ``[height, width, 3]`` as luma ``[height, width]``."""
    return ((pixels @ WEIGHTS + 128) >> 8).astype(np.uint8)
