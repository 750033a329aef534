"""Repetition-aware sampling against a plain one with the same noise, and against the probabilities it should have."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from antiphon.models.cosyvoice.sampling import HISTORY, MOST_CANDIDATES, NONE, Sampling, draw
from antiphon.models.layers.noise import gumbel

TOKENS = 150


def batch(settings: list[Sampling]) -> dict[str, Tensor]:
    columns = [setting.inputs() for setting in settings]
    names = ("temperature", "top_p", "top_k", "window", "repeats")
    return {name: torch.tensor([column[name].item() for column in columns]) for name in names}


def history(tokens: list[int]) -> list[int]:
    return [NONE] * (HISTORY - len(tokens)) + tokens


def plain(logits: list[float], said: list[int], setting: Sampling, noise: list[float]) -> int:
    """One draw, token by token; the noise of the nucleus is by rank, that of the second draw by token."""
    if setting.temperature == 0:
        return max(range(len(logits)), key=logits.__getitem__)
    logits = [value / setting.temperature for value in logits]
    total = sum(map(math.exp, logits))
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
    reach, nucleus = 0.0, []
    for token in ranked:
        if reach >= setting.top_p or len(nucleus) >= setting.top_k:
            break
        reach += math.exp(logits[token]) / total
        nucleus.append(token)
    nucleus = nucleus or ranked[:1]
    first = max(range(len(nucleus)), key=lambda rank: logits[nucleus[rank]] + noise[rank])
    token = nucleus[first]
    recent = said[-setting.window :] if setting.window else []
    if not setting.window or recent.count(token) < max(1, setting.window * setting.tau):
        return token
    others = [other for other in range(len(logits)) if other != token]
    return max(others, key=lambda other: logits[other] + noise[min(MOST_CANDIDATES, len(logits)) + other])


def test_a_plain_sampler_with_the_same_noise_draws_the_same() -> None:
    choose = random.Random(0)
    logits = torch.randn(400, TOKENS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    settings, said = [], []
    for row in range(400):
        setting = Sampling(
            top_p=choose.choice((0.0, 0.3, 0.8, 1.0)),
            top_k=choose.choice((1, 5, 25, MOST_CANDIDATES)),
            window=choose.choice((0, 1, 10, HISTORY)),
            tau=choose.choice((0.0, 0.1, 0.25)),
            temperature=choose.choice((0.0, 0.7, 1.0, 1.0)),
            seed=choose.getrandbits(63),
        )
        settings.append(setting)
        likely = logits[row].topk(6).indices.tolist()
        said.append([choose.choice(likely) for _ in range(choose.randint(0, 60))])
    seeds, steps = torch.tensor([setting.seed for setting in settings]), torch.arange(400) % 90
    recent = torch.tensor([history(tokens[-HISTORY:]) for tokens in said])
    drawn = draw(logits, recent, seeds, steps, **batch(settings)).tolist()
    noise = gumbel(seeds, steps, 0, MOST_CANDIDATES + TOKENS).double().tolist()
    again = 0
    for row, token in enumerate(drawn):
        assert token == plain(logits[row].tolist(), said[row], settings[row], noise[row]), row
        again += token != plain(logits[row].tolist(), [], settings[row], noise[row])
    assert again > 50  # the history mattered


@pytest.mark.parametrize("repeated", [False, True])
def test_draws_have_the_probabilities_meant(repeated: bool) -> None:
    """The nucleus, renormalised; after a repetition what is left of the whole distribution, tail included."""
    draws, setting = 40_000, Sampling(top_p=0.8, top_k=4)
    logits = torch.tensor([3.0, 2.5, 2.0, 1.5, 1.4, 0.5, 0.0, -1.0])
    whole = logits.softmax(0)
    kept = (whole.cumsum(0) - whole < 0.8) & (torch.arange(8) < 4)
    nucleus = torch.where(kept, whole, 0.0) / whole[kept].sum()
    said = [0, 1] if repeated else []
    expected = nucleus.clone()
    for token in said:
        rest = whole.clone()
        rest[token] = 0
        expected += nucleus[token] * (rest / rest.sum())
        expected[token] -= nucleus[token]
    drawn = draw(
        logits.expand(draws, -1),
        torch.tensor(history(said)).expand(draws, -1),
        torch.full((draws,), 7),
        torch.arange(draws),
        **{name: value.expand(draws) for name, value in batch([setting]).items()},
    )
    seen = torch.bincount(drawn, minlength=8) / draws
    assert (seen - expected).abs().max() < 4 * (0.25 / draws) ** 0.5
    assert (seen > 0).tolist() == (expected > 0).tolist()


def test_a_token_ruled_out_is_never_drawn() -> None:
    logits = torch.full((2000, 6), -20.0)
    logits[:, 2], logits[:, 4] = 5.0, -math.inf
    recent = torch.tensor(history([2])).expand(2000, -1)
    drawn = draw(
        logits,
        recent,
        torch.arange(2000),
        torch.zeros(2000, dtype=torch.int64),
        **{name: value.expand(2000) for name, value in batch([Sampling()]).items()},
    )
    assert drawn.unique().tolist() == [0, 1, 3, 5]  # the dominant token repeats, the fifth is ruled out


def test_the_defaults_refuse_any_recurrence() -> None:
    assert Sampling().repeats == 1
    assert Sampling(window=10, tau=0.11).repeats == 2
    assert Sampling(window=0).repeats == 1


@pytest.mark.parametrize(
    "change", [{"top_p": 1.1}, {"top_k": 0}, {"window": HISTORY + 1}, {"tau": -0.1}, {"temperature": -1}, {"seed": -1}]
)
def test_settings_out_of_range_are_refused(change: dict[str, float]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} is "):
        Sampling(**change)
