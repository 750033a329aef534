"""The recognition benchmark, at a size that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from antiphon.apps.bench.asr import NOISE, SHAPES, Ours, agreement, build, floors, main
from antiphon.apps.bench.common import command_line
from antiphon.apps.bench.load import Load

CPU = torch.device("cpu")


def test_it_writes_numbers_and_a_picture(tmp_path: Path) -> None:
    small = "--shapes tiny --lookaheads 0 --batches 1 --chunks 6 --no-references"
    load = "--sessions 2 4 --seconds 0.5 --warm 0.2 --buckets 4 --device cpu --name t"
    main([*small.split(), *load.split(), "--results", str(tmp_path)])
    record = json.loads((tmp_path / "t.json").read_text())
    numbers = record["numbers"]
    assert record["command"].startswith("antiphon bench asr --shapes tiny")
    assert numbers["steps"][0]["ms"]["antiphon"] > 0
    assert numbers["capacity"][0]["runs"][0]["sessions"] == 2
    assert numbers["capacity"][0]["runs"][0]["chunks"] >= 8
    assert numbers["floors"][0]["floor_ms"] < numbers["steps"][0]["ms"]["antiphon"]
    assert (tmp_path / "t.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("begin", [[], ["train", "duplex_eval"]])
def test_a_command_is_told_as_it_can_be_given_again(begin: list[str], tmp_path: Path) -> None:
    told = command_line("antiphon.apps.train.duplex_eval", [*begin, "--bank", str(tmp_path / "bank"), "--calls", "3"])
    assert told == "python -m antiphon.apps.train.duplex_eval --bank bank --calls 3"


@pytest.mark.parametrize("lookahead", [0, 6])
def test_emission_is_pinned(lookahead: int) -> None:
    asr = build(SHAPES["tiny"], lookahead, CPU, torch.float32)
    ours = Ours(asr, lookahead, 4, CPU)
    seconds = ours.times(torch.randn(4, 1280 * 63, generator=torch.Generator().manual_seed(5)) * NOISE)
    ours.close()
    assert len(seconds) == 63 // (lookahead + 1)
    assert 0.1 < sum(map(len, ours.tokens)) / (4 * 63) < 0.7


def test_agreement_counts_up_to_the_first_difference() -> None:
    assert agreement([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5
    assert agreement([[1, 2], [5]], [[1, 2, 3], []]) == 1.0
    assert agreement([[]], [[]]) == 1.0


def test_a_load_holds_when_its_p99_is_within_the_chunk() -> None:
    assert Load(1, 0.08, [0.01] * 100).summary()["held"]
    assert not Load(1, 0.08, [0.01] * 98 + [0.1] * 2).summary()["held"]
    assert not Load(1, 0.08, [0.01] * 100, refused=1).summary()["held"]
    assert not Load(1, 0.08).summary()["held"]


def test_floors_grow_with_the_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antiphon.apps.bench.asr.ceilings", lambda device, dtype: (1e12, 1e14))
    one, many = (floors("114m", 0, rows, CPU, torch.bfloat16) for rows in (1, 1000))
    assert one["weight_bytes"] == 17 * 24 * 512**2 * 2
    assert one["bound"] == "bytes"
    assert many["floor_ms"] > 5 * one["floor_ms"]
