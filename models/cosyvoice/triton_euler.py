"""Around the estimate of an Euler step, in Triton: its input for both branches, and the move with guidance."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .flow_config import RATE


@triton.jit
def _inputs(
    sample, mu, speaker, prompt, length, slots, voice, shared, seen, out,
    sample_row, mu_row, prompt_row, frames, mels,
    BLOCK: tl.constexpr, RATE: tl.constexpr,
):  # fmt: skip
    row, frame = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    real = lane < mels
    slot, named = tl.load(slots + row), tl.load(voice + row)
    position = (tl.load(shared + row) + tl.load(seen + row)) * RATE + frame
    told = tl.where(position < tl.load(length + named) * RATE, mels, 0)  # numbers of the frame that the prompt has
    moved = tl.load(sample + slot * sample_row + frame * mels + lane, mask=real, other=0.0)
    heard = tl.load(mu + slot * mu_row + frame * mels + lane, mask=real, other=0.0)
    by = tl.load(speaker + named * mels + lane, mask=real, other=0.0)
    like = tl.load(prompt + named * prompt_row + position * mels + lane, mask=lane < told, other=0.0)
    kind = out.dtype.element_ty
    given = out + (row * 2 * frames + frame) * 4 * mels + lane
    tl.store(given, moved.to(kind), mask=real)
    tl.store(given + mels, heard.to(kind), mask=real)
    tl.store(given + 2 * mels, by.to(kind), mask=real)
    tl.store(given + 3 * mels, like.to(kind), mask=real)
    free = given + frames * 4 * mels
    tl.store(free, moved.to(kind), mask=real)
    for part in tl.static_range(1, 4):
        tl.store(free + part * mels, tl.zeros([BLOCK], kind), mask=real)


def inputs(
    sample: Tensor, mu: Tensor, speaker: Tensor, prompt: Tensor, length: Tensor,
    slots: Tensor, voice: Tensor, shared: Tensor, seen: Tensor, frames: int,
) -> Tensor:  # fmt: skip
    """What the estimator is given for the first ``frames`` of ``sample`` and ``mu [S, n, mels]`` at ``slots [B]``: with
    their condition, and without, side by side ``[2 B, frames, 4 mels]``, in the dtype of ``speaker``.

    speaker ``[V, mels]``, prompt ``[V, p, mels]`` and length ``[V]``, its tokens: of ``voice [B]``. shared, seen:
    ``[B]`` tokens before these.
    """
    mels = sample.shape[2]
    out = speaker.new_empty(2 * len(slots), frames, 4 * mels)
    _inputs[(len(slots), frames)](
        sample, mu, speaker, prompt, length, slots, voice, shared, seen, out,
        sample.stride(0), mu.stride(0), prompt.stride(0), frames, mels,
        BLOCK=triton.next_power_of_2(mels), RATE=RATE, num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _move(
    sample, velocity, slots, target, out, sample_row, values, guidance, step, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = lane < values
    given = velocity + row * 2 * values + lane
    towards = tl.load(given, mask=real, other=0.0).to(tl.float32)
    away = tl.load(given + values, mask=real, other=0.0).to(tl.float32)
    moved = tl.load(sample + tl.load(slots + row) * sample_row + lane, mask=real, other=0.0)
    moved += step * (towards + guidance * (towards - away))
    tl.store(sample + tl.load(target + row) * sample_row + lane, moved, mask=real)
    tl.store(out + row * values + lane, moved, mask=real)


def move(sample: Tensor, velocity: Tensor, slots: Tensor, target: Tensor, guidance: float, step: float) -> Tensor:
    """The first ``n`` frames of ``sample [S, N, mels]``, float32, at ``slots [B]``, a ``step`` further: past the
    velocity with condition, away from that without. Kept at ``target [B]``, and returned ``[B, n, mels]``.

    velocity: ``[2 B, n, mels]``, a row's two side by side.
    """
    rows, frames, mels = len(slots), *velocity.shape[1:]
    out = sample.new_empty(rows, frames, mels)
    _move[(rows, triton.cdiv(frames * mels, 1024))](
        sample, velocity.contiguous(), slots, target, out, sample.stride(0), frames * mels, guidance, step, BLOCK=1024
    )  # fmt: skip
    return out
