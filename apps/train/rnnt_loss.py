"""The RNN-T loss and its exact gradient (Graves, "Sequence Transduction with Recurrent Neural Networks", 2012).

The forward and backward variables of the T x (U + 1) lattice are computed one *label* at a time: within a label, moving
along time is a linear recurrence of log-probabilities, which a cumulative sum and a cumulative log-sum-exp solve at
once. That takes U short steps of large tensors instead of T + U, in plain torch, on any device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NEVER = -1e30  # log-probability of an impossible path; finite, so that differences stay numbers


def rnnt_loss(logits: Tensor, targets: Tensor, frames: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """Negative log-likelihood of each row, ``[B]`` float32 (float64 for float64 logits).

    logits: ``[B, T, U + 1, V]`` unnormalised. targets: ``[B, U]`` int64, anything past ``lengths [B]``.
    frames: ``[B]`` encoder frames of each row, at least one. blank: its index in V.
    """
    batch, _, labels, _ = logits.shape
    if targets.shape != (batch, labels - 1):
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets [{batch}, {labels - 1}], got {tuple(targets.shape)}"
        )
    if frames.shape != (batch,) or lengths.shape != (batch,):
        raise ValueError(f"frames and lengths must be [{batch}], got {tuple(frames.shape)} and {tuple(lengths.shape)}")
    result: Tensor = _RNNTLoss.apply(logits, targets, frames, lengths, blank)  # type: ignore[no-untyped-call]
    return result


class _RNNTLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, frames: Tensor, lengths: Tensor, blank: int) -> Tensor:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        normaliser = torch.logsumexp(logits.to(dtype), dim=-1)
        labels = torch.where(torch.arange(targets.shape[1], device=targets.device) < lengths[:, None], targets, 0)
        stay = logits[..., blank].to(dtype) - normaliser  # [B, T, U + 1]: one frame on
        index = labels[:, None, :, None].expand(-1, logits.shape[1], -1, 1)
        move = (
            logits[:, :, :-1].gather(3, index).squeeze(3).to(dtype) - normaliser[:, :, :-1]
        )  # [B, T, U]: one label on
        loss, stay_share, move_share = lattice(stay, move, frames, lengths)
        ctx.save_for_backward(logits, normaliser, labels, stay_share, move_share)
        ctx.blank = blank
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, normaliser, labels, stay_share, move_share = ctx.saved_tensors
        stay_share = stay_share * grad[:, None, None]
        move_share = move_share * grad[:, None, None]
        visits = stay_share.clone()
        visits[:, :, :-1] += move_share
        result = (torch.exp(logits - normaliser[..., None]) * visits[..., None]).to(logits.dtype)
        result[..., ctx.blank] -= stay_share.to(logits.dtype)
        index = labels[:, None, :, None].expand(-1, logits.shape[1], -1, 1)
        result[:, :, :-1].scatter_add_(3, index, -move_share[..., None].to(logits.dtype))
        return result, None, None, None, None


def lattice(stay: Tensor, move: Tensor, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over all alignments.

    stay ``[B, T, U + 1]`` and move ``[B, T, U]``: log-probabilities of a blank (to the next frame) and of the next
    label, at each node. Returns the negative log-likelihood ``[B]``, and the posterior probabilities that an alignment
    takes each blank and each label, shaped like ``stay`` and ``move``.
    """
    time, states = stay.shape[1], stay.shape[2]
    batch = len(stay)
    # Labels first and time last, so that each step scans contiguous memory.
    stay, move = stay.permute(2, 0, 1).contiguous(), move.permute(2, 0, 1).contiguous()
    real = (torch.arange(time, device=stay.device) < frames[:, None])[None]
    stay = torch.where(real, stay, 0)
    move = torch.where(real, move, _NEVER)
    ahead = stay.cumsum(2)  # blanks from the first frame up to and with this one
    before = ahead - stay
    after = ahead[:, :, -1:] - before  # blanks from this frame to the last

    # Backwards in time and labels, beta obeys alpha's recurrence: both are scanned in one tensor, alpha's rows first.
    # Column 0 is where a path comes from: nowhere for alpha, but for beta the end, reached with all labels said.
    scan = torch.cat([before, after.flip(0, 2)], dim=1)
    end = torch.where(torch.arange(states - 1, -1, -1, device=stay.device)[:, None] == lengths, 0.0, _NEVER)
    arrive = stay.new_full((states, 2 * batch, time + 1), _NEVER)
    arrive[:, batch:, 0] = end
    arrive[0, :batch, 0] = 0
    enter = torch.cat([move - before[1:], (move - after[:-1]).flip(0, 2)], dim=1)  # score of entering state u + 1
    score = torch.empty_like(scan)
    for u in range(states):
        if u:
            torch.add(score[u - 1], enter[u - 1], out=arrive[u, :, 1:])
        torch.add(scan[u], torch.logcumsumexp(arrive[u], dim=1)[:, 1:], out=score[u])
    alpha = score[:, :batch]
    beta = torch.cat([score[:, batch:].flip(0, 2), end.flip(0)[:, :, None]], dim=2)

    likelihood = beta[0, :, 0]
    total = likelihood[None, :, None]
    stay_share = torch.where(real, torch.exp(alpha + stay + beta[:, :, 1:] - total), 0)
    move_share = torch.exp(alpha[:-1] + move + beta[1:, :, :time] - total)
    return -likelihood, stay_share.permute(1, 2, 0), move_share.permute(1, 2, 0)
