"""What lies between the products of a streaming convolution, a kernel each in Triton: what came before joins the new
inputs, and what awaits later ones is kept, while the windows are written or the outputs added up."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers that a program makes at a time
STEPS = 32  # steps that a program makes where each has but one output
WIDEST = 256  # inputs a step that it knows
FAR = 4096  # the same where windows reach far into the past, which one program writes


@triton.jit
def _at(
    place, real, x, branch, memory, slot, row, inputs, past, width, begun,
    BRANCH: tl.constexpr, ELU: tl.constexpr, REPLICATE: tl.constexpr,
):  # fmt: skip
    """Of the ``past`` remembered numbers of a row and its ``inputs`` new ones, those at ``place``."""
    fresh = place - past
    if REPLICATE:
        fresh = tl.where((fresh < 0) & (begun == 0), place % width, fresh)
    new = real & (fresh >= 0)
    value = tl.load(x + row * inputs + fresh, mask=new, other=0.0)
    kind = value.dtype
    value = value.to(tl.float32)
    if BRANCH:
        value += tl.load(branch + row * inputs + fresh, mask=new, other=0.0).to(tl.float32)
    if ELU:
        value = tl.where(value > 0, value, tl.exp(tl.minimum(value, 0.0)) - 1)
    old = tl.load(memory + slot * past + place, mask=real & (fresh < 0), other=0.0)
    return tl.where(fresh < 0, old, value.to(kind))


@triton.jit
def _some_windows(
    index, real, x, branch, memory, slot, out, row, inputs, past, width, span, hop, dilation, total, begun,
    DILATED: tl.constexpr, BRANCH: tl.constexpr, ELU: tl.constexpr, REPLICATE: tl.constexpr,
):  # fmt: skip
    column = index % span
    place = (index // span) * hop + column
    if DILATED:
        place += (column // width) * (dilation - 1) * width
    value = _at(
        place, real, x, branch, memory, slot, row, inputs, past, width, begun,
        BRANCH=BRANCH, ELU=ELU, REPLICATE=REPLICATE,
    )  # fmt: skip
    tl.store(out + row * total + index, value, mask=real)


@triton.jit
def _windows(
    x, branch, memory, slots, target, started, out, inputs, past, width, span, hop, dilation, total, early,
    BLOCK: tl.constexpr, EARLY: tl.constexpr, PAST: tl.constexpr, DILATED: tl.constexpr,
    BRANCH: tl.constexpr, ELU: tl.constexpr, REPLICATE: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    slot, begun = row, row
    if PAST > 0:
        slot = tl.load(slots + row)
    if REPLICATE:
        begun = tl.load(started + slot).to(tl.int64)
    if EARLY == 0:
        block += 1
    if block > 0:
        index = early + (block - 1) * BLOCK + lane
        _some_windows(
            index, index < total, x, branch, memory, slot, out, row, inputs, past, width, span, hop, dilation,
            total, begun, DILATED=DILATED, BRANCH=BRANCH, ELU=ELU, REPLICATE=REPLICATE,
        )  # fmt: skip
    else:
        # These alone reach into the past; the program that makes them writes it once they are made.
        for piece in range(EARLY):
            index = piece * BLOCK + lane
            _some_windows(
                index, index < early, x, branch, memory, slot, out, row, inputs, past, width, span, hop, dilation,
                total, begun, DILATED=DILATED, BRANCH=BRANCH, ELU=ELU, REPLICATE=REPLICATE,
            )  # fmt: skip
        kept = tl.load(target + row)
        tl.debug_barrier()
        for piece in range(PAST):
            index = piece * BLOCK + lane
            value = _at(
                inputs + index, index < past, x, branch, memory, slot, row, inputs, past, width, begun,
                BRANCH=BRANCH, ELU=ELU, REPLICATE=REPLICATE,
            )  # fmt: skip
            tl.debug_barrier()  # after few inputs, what moves forward is read before it is written over
            tl.store(memory + kept * past + index, value, mask=index < past)


def windows(
    x: Tensor, branch: Tensor | None, elu: bool, memory: Tensor | None, slots: Tensor, target: Tensor,
    started: Tensor | None, kernel: int = 1, stride: int = 1, dilation: int = 1,
) -> Tensor:  # fmt: skip
    """The windows over ``x + branch``, through ELU if asked for, after what the sessions remember of it.

    x, branch: ``[B, T, C]``. memory: ``[S + 1, past, C]``, read at ``slots [B]`` and, its last ``past`` inputs,
    written at ``target [B]``; started: ``[S + 1]`` bool, where False the first input stands for the past.
    Returns ``[B, n, kernel * C]`` with a window each ``stride`` inputs; with the defaults the signal itself.
    """
    x = x.contiguous()
    rows, steps, width = x.shape
    past = 0 if memory is None else memory.shape[1]
    count = (past + steps - (kernel - 1) * dilation - 1) // stride + 1
    out = x.new_empty(rows, count, kernel * width)
    total = count * kernel * width
    early = min(total, -(-past // stride) * kernel * width)
    block = BLOCK if max(early, past * width) <= 2 * BLOCK else FAR
    programs = (early > 0) + triton.cdiv(total - early, block)
    _windows[(rows, programs)](
        x, x if branch is None else branch.contiguous(), x if memory is None else memory, slots, target,
        slots if started is None else started, out, steps * width, past * width, width, kernel * width,
        stride * width, dilation, total, early,
        BLOCK=block, EARLY=triton.cdiv(early, block), PAST=triton.cdiv(past * width, block),
        DILATED=dilation > 1,
        BRANCH=branch is not None, ELU=elu, REPLICATE=started is not None, num_warps=block // 256,
    )  # fmt: skip
    return out


@triton.jit
def _single(
    x, branch, memory, slots, target, weight, bias, out, inputs, past, width, steps,
    KERNEL: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, PAST: tl.constexpr,
    BRANCH: tl.constexpr, ELU: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    step, lane = block * STEPS + tl.arange(0, STEPS), tl.arange(0, WIDTH)
    inside = lane < width
    real = (step < steps)[:, None] & inside[None, :]
    slot = tl.load(slots + row)
    total = tl.zeros((STEPS,), tl.float32)
    for tap in range(KERNEL):
        value = _at(
            (step + tap)[:, None] * width + lane[None, :], real, x, branch, memory, slot, row, inputs, past, width, 1,
            BRANCH=BRANCH, ELU=ELU, REPLICATE=False,
        )  # fmt: skip
        factor = tl.load(weight + tap * width + lane, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(value.to(tl.float32) * factor[None, :], 1)
    if BIAS:
        total += tl.load(bias).to(tl.float32)
    tl.store(out + row * steps + step, total.to(out.dtype.element_ty), mask=step < steps)
    if PAST > 0:  # noqa: SIM102 - one is known when this is compiled, the other is not
        if block == 0:  # which alone reaches into the past
            kept = tl.load(target + row)
            tl.debug_barrier()
            index = tl.arange(0, PAST)
            value = _at(
                inputs + index, index < past, x, branch, memory, slot, row, inputs, past, width, 1,
                BRANCH=BRANCH, ELU=ELU, REPLICATE=False,
            )  # fmt: skip
            tl.debug_barrier()
            tl.store(memory + kept * past + index, value, mask=index < past)


def single(
    x: Tensor, branch: Tensor | None, elu: bool, memory: Tensor | None, slots: Tensor, target: Tensor,
    weight: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """A convolution to one output: arguments as for :func:`windows`, weight ``[1, kernel * C]`` -> ``[B, T, 1]``.

    The kernel is no longer than ``STEPS``, nor is C more than ``WIDEST``.
    """
    x = x.contiguous()
    rows, steps, width = x.shape
    past = 0 if memory is None else memory.shape[1]
    out = x.new_empty(rows, steps, 1)
    _single[(rows, triton.cdiv(steps, STEPS))](
        x, x if branch is None else branch.contiguous(), x if memory is None else memory, slots, target,
        weight, weight if bias is None else bias, out, steps * width, past * width, width, steps,
        KERNEL=past + 1, WIDTH=triton.next_power_of_2(width), STEPS=STEPS,
        PAST=triton.next_power_of_2(past * width) if past else 0,
        BRANCH=branch is not None, ELU=elu, BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _overlap(
    parts, bias, rest, slots, target, out, steps, half, width, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = index < steps * half
    step, column = index // half, index % half
    base = parts + row * steps * 2 * half
    first = real & (step == 0)
    value = tl.load(base + step * 2 * half + column, mask=real, other=0.0)
    late = tl.load(base + (step * 2 - 1) * half + column, mask=real & (step > 0), other=0.0)
    waiting = tl.load(rest + tl.load(slots + row) * half + column, mask=first, other=0.0)
    total = value.to(tl.float32) + tl.where(first, waiting, late).to(tl.float32)
    if BIAS:
        total += tl.load(bias + column % width, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * steps * half + index, total.to(value.dtype), mask=real)
    # Whoever reads what waits writes, at the same place, what waits next.
    next_ = tl.load(base + (steps * 2 - 1) * half + column, mask=first, other=0.0)
    tl.store(rest + tl.load(target + row) * half + column, next_, mask=first)


def overlap(parts: Tensor, bias: Tensor | None, rest: Tensor, slots: Tensor, target: Tensor) -> Tensor:
    """The outputs of a transposed convolution whose kernel is twice its stride.

    parts: ``[B, T, 2 * stride * C]``, what each input adds to. rest: ``[S + 1, stride, C]``, what the sessions' last
    inputs add to the first outputs, read at ``slots [B]`` and written at ``target [B]``. Returns
    ``[B, T * stride, C]``.
    """
    parts = parts.contiguous()
    rows, steps, _ = parts.shape
    stride, width = rest.shape[1:]
    out = parts.new_empty(rows, steps * stride, width)
    total = steps * stride * width
    _overlap[(rows, triton.cdiv(total, BLOCK))](
        parts, parts if bias is None else bias, rest, slots, target, out, steps, stride * width, width,
        BLOCK=BLOCK, BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    return out
