"""The benchmark of peers measures what it says: the lag of a chirp, frames with sound, the knee, the refusal."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from unittest import mock

import aioice.ice
import numpy as np
import pytest

from antiphon.apps.bench import transport_peers as bench
from antiphon.apps.bench.common import write_result
from antiphon.apps.bench.plots import PARTS, TRANSPORTS, plot_transport_peers
from antiphon.codecs import opus


@pytest.mark.parametrize("delay_ms", [5.0, 110.0, 640.0])
def test_the_lag_of_each_chirp_is_found_through_opus_and_its_lookahead(delay_ms: float) -> None:
    decoder = opus.decoder(bench.RATE)
    heard = np.concatenate([decoder.decode(packet) for packet in bench.encoded(bench.chirps(bench.SENT_RATE, 6))])
    delayed = np.concatenate([np.zeros(round(delay_ms / 1000 * bench.RATE), np.float32), heard])
    began = 0.25
    found = bench.lags(delayed[round(began * bench.RATE) :], began)
    assert len(found) >= 4
    assert found == pytest.approx([delay_ms + 6.5] * len(found), abs=0.3)


def test_every_packet_of_the_test_sound_is_larger_than_one_of_silence() -> None:
    encoder = opus.encoder(bench.SENT_RATE)
    silence = [len(encoder.encode(np.zeros(480, np.float32))) for _ in range(30)]
    assert max(silence[5:]) <= bench.SOUND_BYTES < min(map(len, bench.encoded(bench.chirps(bench.SENT_RATE, 10))))


def row(peers: int, frames: float, late: float) -> dict[str, Any]:
    return {"path": "antiphon", "peers": peers, "frames_a_second": frames, "late_ms_p99": late}


def test_the_knee_is_the_largest_number_that_is_carried() -> None:
    rows = [row(30, 49.4, 3), row(10, 50, 3), row(20, 49.9, 19), row(40, 50, 21)]
    assert bench.knee(rows, "antiphon") == 20
    assert bench.knee([row(10, 50, 20.0)], "antiphon") == 0
    assert bench.knee(rows, "aiortc") == 0


def test_two_peers_get_their_sound_back_and_a_third_is_refused() -> None:
    with mock.patch.object(aioice.ice, "get_host_addresses", return_value=["127.0.0.1"]):
        found = asyncio.run(bench.peers("antiphon", 2, 2.0))
    assert found["refused"]["status"] == 503
    assert int(found["refused"]["retry_after"]) > 0
    assert found["frames_a_second"] > 25
    assert found["calls_lost"] == 0
    assert found["gaps"] >= 0
    assert found["concealed_ms"] >= 0
    assert 0 < found["cpu"] < 1
    assert 20 + 2 * bench.LOOKAHEAD_MS < found["mouth_to_ear_ms"] < 1000 * bench.LONGEST


def call(*lags: float) -> dict[str, Any]:
    parts = {"packet": 20.0, "codecs": 13.0, "client_buffer": 20.0, "server_and_network": lags[0] - 53}
    return {"ms": list(lags), "parts_ms": parts}


def test_calls_are_summed_up_and_drawn(tmp_path: Path) -> None:
    arms = {"antiphon": bench.summary([call(70, 71, 70), call(90, 91)]), "aiortc": bench.summary([call(140, 141)])}
    assert (arms["antiphon"]["chirps"], arms["antiphon"]["ms_p50"], arms["antiphon"]["ms_most"]) == (5, 71, 91)
    assert arms["antiphon"]["parts_ms"]["server_and_network"] == 27
    rows = [row(10, 50, 3) | {"refused": {"status": 503}}, row(40, 50, 12), row(50, 30, 90) | {"path": "aiortc"}]
    numbers: dict[str, Any] = {"mouth_to_ear": arms, "rows": rows}
    numbers["verdict"] = bench.verdict(numbers)
    assert numbers["verdict"]["mouth_to_ear_ms"] == {"measured": 71, "at_most": 110}
    assert numbers["verdict"]["peers_per_core"] == {"measured": 40, "at_least": 40}
    picture = plot_transport_peers(write_result("transport_peers", "none", numbers, tmp_path))
    drawn = picture.read_text(encoding="utf-8")
    assert all(label in drawn for label in (*TRANSPORTS.values(), *PARTS.values()))


def test_the_published_figures_hold_what_is_promised() -> None:
    numbers = json.loads(
        (Path(__file__).parents[2] / "apps" / "bench" / "results" / "transport_peers.json").read_text(encoding="utf-8")
    )["numbers"]
    assert bench.verdict(numbers) == numbers["verdict"]
    for name, one in numbers["verdict"].items():
        if isinstance(one, dict):
            assert one["measured"] >= one.get("at_least", one["measured"]), name
            assert one["measured"] <= one.get("at_most", one["measured"]), name
