"""A second of each fuzz target by hypothesis; ``run.py`` runs them for longer, guided by coverage."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import run
from .targets import SEEDS, TARGETS

SECONDS = 1.0


def test_every_target_can_be_run() -> None:
    assert set(run.NAMES) == set(TARGETS) == set(SEEDS)


@pytest.mark.parametrize("name", TARGETS)
def test_only_declared_errors(name: str) -> None:
    target = TARGETS[name]
    for seed in SEEDS[name]:
        target(seed)
    until = time.process_time() + SECONDS
    inputs = st.one_of(
        st.binary(max_size=200),
        st.tuples(st.sampled_from(SEEDS[name]), st.binary(max_size=16), st.integers(0)).map(_cut),
    )

    @settings(
        max_examples=2000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(inputs)
    def check(data: bytes) -> None:
        if time.process_time() < until:
            target(data)

    check()


def _cut(parts: tuple[bytes, bytes, int]) -> bytes:
    """A seed with something else in its middle."""
    seed, other, at = parts
    at %= len(seed) + 1
    return seed[:at] + other + seed[at + len(other) :]
