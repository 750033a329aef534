"""How a session's tokens are cut into steps of the flow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.models.cosyvoice.flow_config import FlowConfig, FlowLimits
from antiphon.models.cosyvoice.flow_hops import Hop, Hops
from antiphon.models.cosyvoice.flow_stream import NO_TOKEN
from antiphon.models.cosyvoice.flow_voices import FlowVoice

CONFIG = FlowConfig()
LIMITS = FlowLimits()


def voice(prompt: int) -> FlowVoice:
    shared = CONFIG.shared(prompt)
    return FlowVoice(2, shared, tuple(range(shared, prompt)))


def hops(prompt: int, schedule: tuple[int, ...], *, limits: FlowLimits = LIMITS, aligned: bool = True) -> Hops:
    return Hops(voice(prompt), CONFIG, limits, schedule, aligned=aligned)


def counts(steps: list[Hop]) -> list[int]:
    return [int(hop.inputs["count"]) for hop in steps]


@pytest.mark.parametrize(
    ("prompt", "schedule", "first", "made"),
    [
        (125, (25, 50, 100), 25, [50, 50, 100, 25]),  # the prompt's last chunk waits for its lookahead
        (128, (25, 50, 100), 47, [50, 50, 100, 3]),
        (128, (1, 25, 50), 22, [25, 25, 50, 50, 50, 3]),
        (140, (10, 25, 50, 100), 10, [25, 25, 50, 100, 15]),
        (0, (25,), 25, [25] * 8),
    ],
)
def test_hops_end_at_chunks(prompt: int, schedule: tuple[int, ...], first: int, made: list[int]) -> None:
    cutter = hops(prompt, schedule)
    assert cutter.wanted == first + CONFIG.lookahead
    steps = [hop for token in range(200) for hop in cutter.push([prompt + token])]
    steps += cutter.finish()
    assert counts(steps) == made
    assert steps[0].frames - steps[0].skip == 2 * first
    assert sum(hop.frames - hop.skip for hop in steps) == 400


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(0, 250),
    pieces=st.lists(st.lists(st.integers(0, 9), max_size=60), max_size=12),
    schedule=st.lists(st.integers(1, 130), min_size=1, max_size=4),
    aligned=st.booleans(),
)
def test_every_token_is_made_once_and_hears_those_after_it(
    prompt: int, pieces: list[list[int]], schedule: list[int], aligned: bool
) -> None:
    cutter = hops(prompt, tuple(schedule), aligned=aligned)
    steps = [hop for piece in pieces for hop in cutter.push(piece)]
    cut = len(steps)
    steps += cutter.finish()
    said = [token for piece in pieces for token in piece]
    fed = [*voice(prompt).rest, *said] if said else []
    at = 0
    for number, hop in enumerate(steps):
        tokens, count = hop.inputs["tokens"].tolist(), int(hop.inputs["count"])
        assert len(tokens) == hop.variant + CONFIG.lookahead
        assert 1 <= count <= hop.variant
        assert hop.variant == min(size for size in LIMITS.hops if size >= count)
        heard = fed[at : at + count + CONFIG.lookahead]
        assert tokens == [*heard, *[NO_TOKEN] * (len(tokens) - len(heard))]
        assert len(heard) == count + CONFIG.lookahead or number >= cut
        assert hop.skip == 2 * max(0, min(count, len(voice(prompt).rest) - at))
        assert not aligned or number >= cut or (at + count) % CONFIG.chunk == 0
        at += count
    assert at == len(fed)


def test_a_session_that_ended_starts_over() -> None:
    cutter = hops(10, (25,))
    first = [*cutter.push(range(40)), *cutter.finish()]
    second = [*cutter.push(range(40)), *cutter.finish()]
    assert counts(first) == counts(second) == [50]
    assert cutter.finish() == []


def test_tokens_beyond_the_caches_are_refused_and_not_taken() -> None:
    limits = FlowLimits(left=200)
    cutter = hops(28, (25,), limits=limits)
    assert counts(cutter.push(range(97))) == [50, 25]
    with pytest.raises(ValueError, match=r"101 tokens \(of them 3 of the prompt\) are more than the 100 a session"):
        cutter.push([1])
    assert counts(cutter.finish()) == [25]
    assert len(hops(28, (25,), limits=FlowLimits(left=200, rolling=True)).push(range(500))) == 19


@pytest.mark.parametrize("schedule", [(), (25, 0)])
def test_schedules_have_tokens(schedule: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="token counts of at least 1"):
        hops(0, schedule)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": 0}, "left must be positive"),
        ({"left": 101}, "whole tokens"),
        ({"hops": ()}, "distinct token counts"),
        ({"hops": (25, 25)}, "distinct token counts"),
        ({"voices": 0}, "voices must be positive"),
    ],
)
def test_limits_are_checked(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowLimits(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"width": 500}, "twice the 8 heads"), ({"steps": 0}, "steps must be positive"), ({"guidance": -1.0}, "guidance")],
)
def test_sizes_are_checked(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowConfig(**change)
