"""Attention of a call's queries over what lies in three places, in Triton: a prompt that sessions share, the session's
ring, and the call's own keys and values. Each is read where it lies, as far as it is filled, by an online softmax."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256  # that keep a GPU busy: where fewer queries a program give no more, they are fewer
MOST = {2: 64, 4: 16}  # queries a program, by the bytes of their numbers: what it holds fits its registers
SETTINGS = {
    2: {"BLOCK": 64, "num_warps": 4, "num_stages": 3},
    4: {"BLOCK": 32, "num_warps": 8, "num_stages": 2},
}


@triton.jit
def _hear(asked, base, entry, there, near, scale, best, total, heard, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """The softmax so far, with the entries of one block."""
    lane = tl.arange(0, WIDTH)
    places = base + entry.to(tl.int64)[:, None] * (2 * HEADS * WIDTH) + lane[None, :]
    key = tl.load(places, mask=there[:, None], other=0.0).to(asked.dtype)
    value = tl.load(places + HEADS * WIDTH, mask=there[:, None], other=0.0).to(asked.dtype)
    score = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
    score = tl.where(near & there[None, :], score, float("-inf"))
    top = tl.maximum(best, tl.max(score, 1))
    floor = tl.where(top == float("-inf"), 0.0, top)
    keep, weight = tl.exp2(best - floor), tl.exp2(score - floor[:, None])
    heard = heard * keep[:, None] + tl.dot(weight.to(asked.dtype), value, input_precision="ieee")
    return top, total * keep + tl.sum(weight, 1), heard


@triton.jit
def _attend(
    query, fresh, ring, prompt, out, slots, voice, shared, seen, count,
    query_row, query_step, ring_row, ring_branch, prompt_row, prompt_branch, rate, size, steps, chunk, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BRANCHES: tl.constexpr, ROLLING: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    session, branch = row // BRANCHES, row % BRANCHES
    told = (tl.load(shared + session) * rate).to(tl.int32)
    before = (tl.load(seen + session) * rate).to(tl.int32)
    first = told + before
    end = first + (tl.load(count + session) * rate).to(tl.int32)
    lane, line = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    step = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    # Padding attends as the last position does.
    position = tl.minimum(first + step, tl.maximum(end - 1, first))
    segment = position // chunk * chunk
    until = tl.minimum(segment + chunk, end)[:, None]
    places = (row * query_row + step * query_step + head * WIDTH)[:, None] + lane[None, :]
    asked = tl.load(query + places, mask=(step < steps)[:, None], other=0.0)
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    heard = tl.zeros([QUERIES, WIDTH], tl.float32)

    base = prompt + tl.load(voice + session) * prompt_row + branch * prompt_branch + head * WIDTH
    for begin in range(0, told, BLOCK):
        entry = begin + line
        near = (entry < told)[None, :] & (step >= 0)[:, None]
        best, total, heard = _hear(asked, base, entry, entry < told, near, scale, best, total, heard, HEADS, WIDTH)

    base = ring + tl.load(slots + session) * ring_row + branch * ring_branch + head * WIDTH
    filled = tl.minimum(before, size)
    for begin in range(0, filled, BLOCK):
        entry = begin + line
        behind = (before - 1 - entry) % size  # of the dividend's sign
        held = first - 1 - tl.where(behind < 0, behind + size, behind)
        near = held[None, :] < until
        if ROLLING:
            near = near & (held[None, :] >= (tl.maximum(segment, first) - size)[:, None])
        best, total, heard = _hear(asked, base, entry, entry < filled, near, scale, best, total, heard, HEADS, WIDTH)

    base = fresh + row * steps * (2 * HEADS * WIDTH) + head * WIDTH
    for begin in range(0, steps, BLOCK):
        entry = begin + line
        near = (first + entry)[None, :] < until
        best, total, heard = _hear(asked, base, entry, entry < steps, near, scale, best, total, heard, HEADS, WIDTH)

    # A row without positions hears nothing: its result means nothing, but is a number.
    made = heard / tl.where(total == 0.0, 1.0, total)[:, None]
    places = ((row * steps + step) * HEADS + head)[:, None] * WIDTH + lane[None, :]
    tl.store(out + places, made.to(asked.dtype), mask=(step < steps)[:, None])


def attend(
    query: Tensor, fresh: Tensor, ring: Tensor, prompt: Tensor, slots: Tensor, voice: Tensor,
    shared: Tensor, seen: Tensor, count: Tensor, *, rate: int, chunk: int, rolling: bool,
) -> Tensor:  # fmt: skip
    """Queries ``[B * branches, n, H * dk]`` of ``B`` sessions over keys and values -> ``[B * branches, n, H * dk]``.

    fresh: ``[B * branches, n, 2, H, dk]``, of the queries' own positions. ring: ``[S, branches, size, 2, H, dk]``, of
    ``slots [B]``; prompt: ``[V, branches, m, 2, H, dk]``, of ``voice [B]``; both of any strides of the first two.
    shared, seen, count: ``[B]`` int64; times ``rate``, how many positions of the prompt there are, how many came before
    this call, and how many of it are real. A query attends the prompt, and up to the end of its chunk (``chunk``
    positions each, counted from the prompt's start) all that is in the ring; with ``rolling``, no more than the
    ``size`` positions before its chunk or, where that began later, the call.
    """
    rows, steps, _ = query.shape
    heads, width = fresh.shape[3:]
    out = query.new_empty(query.shape)
    size = query.element_size()
    few = rows * heads * triton.cdiv(steps, 16) <= PROGRAMS
    queries = 16 if few else min(MOST[size], max(16, triton.next_power_of_2(steps)))
    _attend[(triton.cdiv(steps, queries), heads, rows)](
        query, fresh, ring, prompt, out, slots, voice, shared, seen, count,
        query.stride(0), query.stride(1), ring.stride(0), ring.stride(1), prompt.stride(0), prompt.stride(1),
        rate, ring.shape[2], steps, chunk,
        width**-0.5 * 1.4426950408889634,  # the softmax is by powers of two
        HEADS=heads, WIDTH=width, BRANCHES=ring.shape[1], ROLLING=rolling, QUERIES=queries, **SETTINGS[size],
    )  # fmt: skip
    return out
