"""The vocoder's benchmark runs, on a vocoder that is small."""

from __future__ import annotations

from antiphon.apps.bench.vocoder import measure
from antiphon.codecs.hift import HiFTConfig


def test_each_way_is_measured() -> None:
    numbers = measure(HiFTConfig(width=16, pitch_width=8), rounds=1, chunks=(5, 10))
    costs = numbers["cpu_seconds_a_second"]
    assert {"step", "window"} <= costs.keys()
    assert all(set(by_chunk) == {5, 10} and min(by_chunk.values()) > 0 for by_chunk in costs.values())
    assert numbers["delay_ms"] == 402.8
