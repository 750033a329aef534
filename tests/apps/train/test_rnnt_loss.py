"""The RNN-T loss against the sum over every alignment, and its gradient against finite differences."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from antiphon.apps.train.rnnt_loss import rnnt_loss


def by_enumeration(logits: Tensor, labels: list[int], frames: int, blank: int) -> Tensor:
    """-log of the sum over all placements of the labels among the blanks; the last step is a blank."""
    log_probs = logits.log_softmax(-1)
    steps = frames - 1 + len(labels)
    paths = []
    for places in combinations(range(steps), len(labels)):
        t = u = 0
        score = logits.new_zeros(())
        for step in range(steps):
            if step in places:
                score = score + log_probs[t, u, labels[u]]
                u += 1
            else:
                score = score + log_probs[t, u, blank]
                t += 1
        paths.append(score + log_probs[t, u, blank])
    return -torch.logsumexp(torch.stack(paths), 0)


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(5, 6, 5, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 6, (5, 4), generator=generator)
    return logits, targets, torch.tensor([6, 4, 1, 6, 2]), torch.tensor([4, 2, 4, 0, 1])


def test_equals_the_sum_over_all_alignments(case: tuple[Tensor, ...]) -> None:
    logits, targets, frames, lengths = case
    logits.requires_grad_()
    loss = rnnt_loss(logits, targets, frames, lengths, blank=6)
    rows = zip(logits, targets.tolist(), frames.tolist(), lengths.tolist(), strict=True)
    expected = torch.stack([by_enumeration(row, labels[:u], t, 6) for row, labels, t, u in rows])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), logits)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


def test_padding_does_not_matter(case: tuple[Tensor, ...]) -> None:
    logits, targets, frames, lengths = case
    wide = torch.full((5, 9, 8, 7), 40.0, dtype=torch.float64)
    wide[:, :6, :5] = logits
    more = torch.full((5, 7), -1)
    more[:, :4] = targets
    narrow = rnnt_loss(logits, targets, frames, lengths, 6)
    torch.testing.assert_close(rnnt_loss(wide, more, frames, lengths, 6), narrow, rtol=1e-12, atol=1e-12)


def test_float32_is_accurate_on_an_untrained_long_lattice() -> None:
    logits = torch.randn(2, 200, 61, 64, generator=torch.Generator().manual_seed(0)) * 2
    targets = torch.randint(0, 63, (2, 60), generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([200, 150]), torch.tensor([60, 31])
    single, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    low, high = rnnt_loss(single, targets, *sizes, 63), rnnt_loss(double, targets, *sizes, 63)
    torch.testing.assert_close(low.double(), high, rtol=1e-5, atol=0)
    low.sum().backward()
    high.sum().backward()
    assert single.grad is not None
    assert double.grad is not None
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=0, atol=5e-3)


def test_rejects_targets_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"need targets \[1, 2\]"):
        rnnt_loss(torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, dtype=torch.int64), torch.ones(1), torch.ones(1), 0)
