"""Scheduling policies compared on virtual time with the real scheduler: only all parts together hold the load."""

from __future__ import annotations

import pytest
from mixed_load import missed

from antiphon.pipelines.engine import EDF, EDF_TICKS, EDF_TICKS_SLICES, FIFO, ONE_AT_A_TIME, Policy

SECONDS = 6.0
ALLOWED = 0.001  # share of chunks that may miss their deadline, for every model


def worst(policy: Policy, sessions: int, seed: int = 0) -> float:
    return max(missed(policy, sessions, SECONDS, seed).values())


@pytest.mark.parametrize("seed", [0, 1])
def test_ticks_deadlines_and_slices_together_hold_448_sessions(seed: int) -> None:
    assert worst(EDF_TICKS_SLICES, 448, seed) <= ALLOWED
    assert worst(EDF_TICKS_SLICES, 64, seed) <= ALLOWED


@pytest.mark.parametrize("policy", [ONE_AT_A_TIME, FIFO, EDF, EDF_TICKS], ids=["one", "fifo", "edf", "ticks"])
def test_no_part_alone_does(policy: Policy) -> None:
    assert worst(policy, 448) > 0.1


def test_one_at_a_time_holds_fewer_than_ten() -> None:
    assert worst(ONE_AT_A_TIME, 6) <= ALLOWED
    assert worst(ONE_AT_A_TIME, 16) > 0.9


def test_deadlines_without_ticks_are_worse_than_first_come() -> None:
    # The earliest deadline is often one new chunk: batches fall apart.
    assert worst(FIFO, 128) <= ALLOWED
    assert worst(EDF, 128) > 10 * ALLOWED
    assert worst(EDF, 256) > worst(FIFO, 256) > ALLOWED


def test_an_unsliced_long_step_breaks_the_short_deadlines() -> None:
    late = missed(EDF_TICKS, 64, SECONDS)
    assert late["language"] > ALLOWED
    assert late["flow"] <= ALLOWED


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_table_over_twenty_seconds(seed: int) -> None:
    for sessions in (8, 64, 128, 256, 384, 448):
        assert max(missed(EDF_TICKS_SLICES, sessions, 20.0, seed).values()) <= ALLOWED
    assert max(missed(EDF, 160, 20.0, seed).values()) > ALLOWED
