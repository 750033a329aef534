"""The receive path keeps its promises under loss, measured as the benchmark measures them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from antiphon.apps.bench import transport_loss as bench
from antiphon.apps.bench.plots import plot_transport_loss

RESULTS = Path(__file__).parents[2] / "apps" / "bench" / "results"


@pytest.fixture(scope="module")
def payloads() -> list[bytes]:
    return bench.encoded_clip()


@pytest.mark.parametrize("jitter", bench.JITTERS)
def test_at_five_percent_loss_the_timeline_is_covered_with_little_delay(payloads: list[bytes], jitter: float) -> None:
    seconds = len(payloads) * bench.PTIME - bench.EDGE
    for seed in range(3):
        clean, lossy = (
            bench.ours(payloads, bench.network(len(payloads), loss, jitter, seed), bench.phase(seed))
            for loss in (0.0, 0.05)
        )
        assert lossy.covered(seconds) >= 0.99
        assert lossy.from_packets >= 0.965 * len(payloads) * bench.PTIME
        middles = [sorted(heard.delays(0, seconds))[len(heard.spans) // 2] for heard in (clean, lossy)]
        assert middles[1] - middles[0] <= 40
        stock = bench.stock(payloads, bench.network(len(payloads), 0.05, jitter, seed), 0)
        assert 0.6 < stock.covered(seconds) < 0.85  # the control: the same packets do need our path


def test_two_seconds_after_a_disturbance_the_delay_is_as_before(payloads: list[bytes]) -> None:
    found = bench.recovery(payloads)
    for event in bench.EVENTS:
        one = found["antiphon"][event]
        assert abs(one["after_2_s_ms"] - one["before_ms"]) <= 20, event
    assert found["aiortc"]["packet"]["after_2_s_ms"] > found["aiortc"]["packet"]["before_ms"] + 100


def test_the_published_figures_hold_what_is_promised(tmp_path: Path) -> None:
    numbers = json.loads((RESULTS / "transport_loss.json").read_text(encoding="utf-8"))["numbers"]
    assert bench.verdict(numbers) == numbers["verdict"]
    for name, one in numbers["verdict"].items():
        if isinstance(one, dict):
            assert one["measured"] >= one.get("at_least", one["measured"]), name
            assert one["measured"] <= one.get("at_most", one["measured"]), name
    copy = tmp_path / "transport_loss.json"
    copy.write_bytes((RESULTS / "transport_loss.json").read_bytes())
    assert "aiortc" in plot_transport_loss(copy).read_text(encoding="utf-8")
