"""A few rows' product with a matrix of 16 bits, and what lies around it in a transformer, in one kernel in Triton:
before it the root mean square norm; behind it a gate by SiLU, or the residual sum.

A program reads some lines of the weights, piece by piece, the next while it multiplies one. It norms the rows itself:
they are few and come from caches, and a launch costs more. How a row is summed does not depend on how many there are,
and everything is rounded where operations one by one round it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

FEW = 4  # rows up to which it serves
PROGRAMS = 512  # that keep a GPU busy
LINES = 8  # the most of a program
VECTOR = 8  # numbers that a thread loads at once
# Whether a launch begins before the one ahead of it ends, and asks for its weights meanwhile (programmatic dependent
# launch, from Hopper on).
EARLY = False


@triton.jit
def _thin(
    x, norm, weight, bias, onto, scale, out, rows, inputs, outputs, eps,
    ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, VECTOR: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, ONTO: tl.constexpr, SCALE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    if GATE:  # in turn one of the gate, one of what it multiplies
        line = line // 2 + line % 2 * outputs
        wanted = line < 2 * outputs
    else:
        wanted = line < outputs
    lane = tl.arange(0, BLOCK)[None, None, :]
    row = tl.arange(0, ROWS)[:, None, None]
    given, real = x + row * inputs, row < rows
    factors, used = weight + line[None, :, None] * inputs, wanted[None, :, None]
    factor = tl.load(factors + lane, mask=used & (lane < inputs), other=0.0)
    kind = out.dtype.element_ty
    if NORM:
        turned = tl.load(norm + lane, mask=lane < inputs, other=0.0)
        tl.debug_barrier()  # or all this would be asked for once the rows are there
    if EARLY:
        tl.extra.cuda.gdc_wait()  # what comes from other kernels is read and written from here on
    if NORM:
        squares = tl.zeros([ROWS, 1, BLOCK], tl.float32)
        for block in tl.static_range(BLOCKS):
            place = block * BLOCK + lane
            wide = tl.load(given + place, mask=real & (place < inputs), other=0.0).to(tl.float32)
            squares += wide * wide
        root = tl.rsqrt(tl.sum(squares, 2, keep_dims=True) / inputs + eps)
    total = tl.zeros([ROWS, LINES, BLOCK // VECTOR], tl.float32)
    for block in range(BLOCKS):
        place = block * BLOCK + lane
        value = tl.load(given + place, mask=real & (place < inputs), other=0.0)
        if NORM:
            value = (value.to(tl.float32) * root * turned.to(tl.float32)).to(kind)
        product = value.to(tl.float32) * factor.to(tl.float32)
        if BLOCKS > 1:
            place += BLOCK
            factor = tl.load(factors + place, mask=used & (place < inputs), other=0.0)
            if NORM:
                turned = tl.load(norm + place, mask=place < inputs, other=0.0)
        total += tl.sum(tl.reshape(product, [ROWS, LINES, BLOCK // VECTOR, VECTOR]), 3)
    made = tl.sum(total, 2)
    if BIAS:
        made += tl.load(bias + line, mask=wanted, other=0.0).to(tl.float32)[None, :]
    made = made.to(kind).to(tl.float32)
    if GATE:
        gate, made = tl.split(tl.reshape(made, [ROWS, LINES // 2, 2]))
        made = gate * tl.sigmoid(gate) * made
        line = tl.program_id(0) * (LINES // 2) + tl.arange(0, LINES // 2)
    row = tl.arange(0, ROWS)[:, None]
    place, real = row * outputs + line[None, :], (row < rows) & (line < outputs)[None, :]
    if ONTO:
        if SCALE:
            made *= tl.load(scale + line, mask=line < outputs, other=0.0).to(tl.float32)[None, :]
            made = made.to(kind).to(tl.float32)
        made += tl.load(onto + place, mask=real, other=0.0).to(tl.float32)
    tl.store(out + place, made.to(kind), mask=real)


def thin(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gate: bool = False,
    onto: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """``[..., in] -> [..., out]`` of a few rows; weight: ``[out, in]``, contiguous.

    norm: ``[in]``, the weight of a root mean square norm of ``x``, with ``eps``. gate: the first half of the product
    goes through SiLU and is multiplied by the second, so that ``out`` is half as many. onto: ``[..., out]``, to which
    the result is added, times ``scale [out]`` if there is one.
    """
    x = x.contiguous()
    lines, inputs = weight.shape
    outputs = lines // 2 if gate else lines
    rows = x.numel() // inputs
    out = x.new_empty(*x.shape[:-1], outputs)
    size = sizes(inputs, lines)
    _thin[(triton.cdiv(lines, size["LINES"]),)](
        x, weight if norm is None else norm, weight, weight if bias is None else bias,
        x if onto is None else onto.contiguous(), weight if scale is None else scale, out, rows, inputs, outputs, eps,
        ROWS=triton.next_power_of_2(rows), VECTOR=VECTOR, NORM=norm is not None, BIAS=bias is not None, GATE=gate,
        ONTO=onto is not None, SCALE=scale is not None, EARLY=EARLY, **size, **({"launch_pdl": True} if EARLY else {}),
    )  # fmt: skip
    return out


def sizes(inputs: int, lines: int) -> dict[str, int]:
    """Of a program for so many lines of weights with ``inputs`` numbers each, whatever rows there are."""
    some = min(LINES, max(2, triton.next_power_of_2(lines // PROGRAMS + 1) // 2))
    block = min(1024 if some > 2 else 2048, max(256, triton.next_power_of_2(inputs)))
    return {"LINES": some, "BLOCK": block, "BLOCKS": triton.cdiv(inputs, block), "num_warps": min(4, block // 256)}
