"""Draws: distributed as the softmax says, and a function of seed, step and position alone."""

from __future__ import annotations

import pytest
import torch

from antiphon.models.layers.noise import gumbel
from antiphon.models.moshi.sampling import HISTORY, Sampling, draw, penalise, remember


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (1.3, 4), (0.8, 1), (2.0, 512)])
def test_draws_follow_the_softmax(temperature: float, top_k: int) -> None:
    draws, tokens = 40_000, 12
    logits = torch.randn(tokens, generator=torch.Generator().manual_seed(1)) * 2
    kept = logits.clone()
    if 0 < top_k < tokens:
        kept[logits < logits.topk(top_k).values[-1]] = -torch.inf
    expected = (kept / temperature).softmax(0)
    noise = gumbel(torch.full((draws,), 11), torch.arange(draws), 0, tokens)
    drawn = draw(logits.expand(draws, -1), noise, torch.full((draws,), temperature), torch.full((draws,), top_k))
    seen = torch.bincount(drawn, minlength=tokens) / draws
    assert (seen - expected).abs().max() < 4 * (0.25 / draws) ** 0.5
    assert (seen[expected == 0] == 0).all()


def test_rows_choose_for_themselves() -> None:
    logits = torch.randn(4, 600, generator=torch.Generator().manual_seed(2))
    noise = gumbel(torch.arange(4), torch.zeros(4, dtype=torch.int64), 0, 600)
    temperature, top_k = torch.tensor([0.0, 1.0, 1.0, 0.7]), torch.tensor([0, 1, 0, 30])
    drawn = draw(logits, noise, temperature, top_k)
    for row in range(4):
        one = slice(row, row + 1)
        assert torch.equal(draw(logits[one], noise[one], temperature[one], top_k[one]), drawn[one])
    assert drawn[:2].tolist() == logits[:2].argmax(1).tolist()
    assert drawn[2] == (logits[2] + noise[2]).argmax()


def test_a_penalty_counts_only_the_context() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    history = torch.full((1, HISTORY), -2)
    for token in (0, 1, 3, 3):
        history = remember(history, torch.tensor([[token]]), torch.tensor([[True]]))
    history = remember(history, torch.tensor([[2]]), torch.tensor([[False]]))
    penalised = penalise(logits, history, torch.tensor([3]), torch.tensor([2.0]))
    assert penalised.tolist() == [[2.0, -4.0, 1.0, 0.25]]
    assert torch.equal(penalise(logits, history, torch.tensor([0]), torch.tensor([2.0])), logits)
    assert penalise(logits, history, torch.tensor([200]), torch.tensor([2.0])).tolist() == [[1.0, -4.0, 1.0, 0.25]]


@pytest.mark.parametrize(
    "wrong", [{"text_top_k": 513}, {"audio_temperature": -0.1}, {"text_seed": -1}, {"penalty": 0.0}]
)
def test_settings_out_of_range_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
