"""Scene changes against FFmpeg's filter, and as a stage."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest

from antiphon.pipelines.chunk import Audio, Event, Video
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.stage import Inlet, StageError
from antiphon.pipelines.stages.scenes import GRID, Change, Scenes, points, to_luma


def pictures() -> list[np.ndarray]:
    """Grey pictures that move, flicker, and are cut twice."""
    random = np.random.default_rng(0)
    found = []
    for number in range(24):
        if number % 8 == 0:
            base = random.integers(0, 256, (108, 192)).astype(np.uint8)
        found.append(np.roll(base, 3 * number, 1) // (1 + number % 3))
    return found


def test_scores_are_those_of_ffmpeg() -> None:
    graph = av.filter.Graph()
    source = graph.add_buffer(width=192, height=108, format=av.VideoFormat("gray"), time_base=Fraction(1, 2))
    scdet, sink = graph.add("scdet", "threshold=0"), graph.add("buffersink")
    source.link_to(scdet)
    scdet.link_to(sink)
    graph.configure()
    change = Change()
    scores = []
    for number, luma in enumerate(pictures()):
        frame = av.VideoFrame.from_ndarray(luma, format="gray")
        frame.pts, frame.time_base = number, Fraction(1, 2)
        graph.push(frame)
        theirs = float(graph.pull().metadata["lavfi.scd.score"])
        scores.append(100 * change.score(luma))
        assert scores[-1] == pytest.approx(theirs, abs=0.0006)
    assert max(scores) > 20
    assert min(scores[1:]) < 5


def test_luma_is_that_of_ffmpeg() -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    gray = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuvj420p").to_ndarray()[:64]
    assert np.abs(to_luma(rgb).astype(int) - gray).max() <= 2


def test_a_cut_is_a_scene_and_neither_steady_motion_nor_another_size_is_one() -> None:
    def moving(place: int, brightness: int, size: int) -> np.ndarray:
        """A box on its way to the right."""
        pixels = np.full((9 * size, 16 * size, 3), brightness, np.uint8)
        pixels[: 2 * size, place * size : (place + 2) * size] = 255
        return pixels

    async def main() -> None:
        async with (Inlet().named("video") >> Scenes()).session() as session:
            for number in range(12):
                pixels = moving(number, 20 if number < 6 else 120, 40 if number < 9 else 25)
                await session.send(Video(pixels=pixels, rate=90000, start=45000 * number))
            session.finish()
            events = [event async for event in session.outputs()]
        assert all(isinstance(event, Event) for event in events)
        seen = [event for event in events if event.name == "picture"]
        assert [event.data["number"] for event in seen] == list(range(1, 13))
        assert [event.start for event in seen] == [45000 * number for number in range(12)]
        assert [(event.data["width"], event.data["height"]) for event in seen[8:10]] == [(640, 360), (400, 225)]
        assert seen[0].data["change"] == 0
        assert seen[0].data["luma"] == pytest.approx((20 * 140 + 255 * 4) / 144 / 255, abs=0.002)
        assert 0 < seen[1].data["change"] < 0.05
        assert [event.data for event in events if event.name == "scene"] == [seen[6].data]
        assert seen[6].data["change"] > 0.3

    run_virtual(main())


def test_every_size_has_the_same_points() -> None:
    for height, width in ((1, 1), (10, 3), (90, 160), (432, 768), (433, 767)):
        y, x = np.mgrid[:height, :width]
        found = points(np.stack((y % 256, x % 256, y // 256 * 16 + x // 256), -1).astype(np.uint8)).astype(int)
        assert found.shape == (*GRID, 3)
        rows = found[:, 0, 0] + 256 * (found[:, 0, 2] // 16)
        assert rows.tolist() == [int((i + 0.5) * height / GRID[0]) for i in range(GRID[0])]


def test_what_it_does_not_take() -> None:
    with pytest.raises(ValueError, match="threshold=0"):
        Scenes(threshold=0)

    async def main() -> None:
        async with (Inlet().named("video") >> Scenes()).session() as session:
            await session.send(Audio(samples=np.zeros(1, np.float32), rate=16000))
            await session.run()

    with pytest.raises(StageError, match="scenes takes video"):
        run_virtual(main())
