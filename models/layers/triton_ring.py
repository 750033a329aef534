"""Attention over rings where they lie, in Triton: no copy of a session's keys and values, and only filled entries read.

:func:`store` turns queries and keys to their positions and writes keys and values to the sessions' rings;
:func:`attend` reads the rings in pieces of ``PIECE`` entries, each by a program of its own with an online softmax, and
joins the pieces (flash decoding, https://pytorch.org/blog/flash-decoding/). Pieces have one length for all batch sizes,
so a row's result does not depend on how many rows there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 256  # ring entries that a program reads
SHORT = 64  # the same of a ring that two such pieces hold: its few heads and pieces would leave most of a GPU idle
FEW = 4  # queries a key head that are answered one by one
HEADS = 4  # heads that a program of ``store`` turns
ONE = {"BLOCK": 32, "num_warps": 4, "num_stages": 3}  # of a program that answers one query by sums
# Of one that multiplies matrices, for queries and rings of 16 bits and for others.
SOME_HALF = {"BLOCK": 64, "num_warps": 4, "num_stages": 3}
SOME = {"BLOCK": 64, "num_warps": 4, "num_stages": 2}


@triton.jit
def _store(
    heads, cos, sin, far_cos, far_sin, query, far, ring, target, seen, count,
    slot_stride, scratch, entries, sinks, size, steps,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    TURN: tl.constexpr, HALF: tl.constexpr, FAR: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    TOTAL: tl.constexpr = QUERIES + 2 * KEYS
    at = tl.program_id(0).to(tl.int64)
    row, step = at // steps, at % steps
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, WIDTH)
    real = (head < TOTAL)[:, None] & (lane >= 0)[None, :]
    base = heads + (at * TOTAL + head)[:, None] * WIDTH
    plain = tl.load(base + lane[None, :], mask=real, other=0.0)
    turned = plain
    if TURN:
        if HALF:
            other = (lane + WIDTH // 2) % WIDTH
        else:
            other = lane ^ 1
        partner = tl.load(base + other[None, :], mask=real, other=0.0).to(tl.float32)
        c, s = tl.load(cos + at * WIDTH + lane)[None, :], tl.load(sin + at * WIDTH + lane)[None, :]
        wide = plain.to(tl.float32)
        turned = (wide * c + partner * s).to(plain.dtype)
    place = (at * QUERIES + head)[:, None] * WIDTH + lane[None, :]
    asking = real & (head < QUERIES)[:, None]
    tl.store(query + place, turned, mask=asking)
    if FAR:
        c, s = tl.load(far_cos + at * WIDTH + lane)[None, :], tl.load(far_sin + at * WIDTH + lane)[None, :]
        tl.store(far + place, (wide * c + partner * s).to(plain.dtype), mask=asking)
    slot = tl.load(target + row)
    if COUNT:
        slot = tl.where(step < tl.load(count + row), slot, scratch)
    position = tl.load(seen + row) + step
    entry = tl.where(position < sinks, position, sinks + (position - sinks) % size)
    kept = head - QUERIES  # keys, then values
    line = slot * slot_stride + (kept.to(tl.int64) * entries + entry) * WIDTH
    value = tl.where((kept < KEYS)[:, None], turned, plain)
    kind = ring.dtype.element_ty
    tl.store(ring + line[:, None] + lane[None, :], value.to(tl.float32).to(kind), mask=real & (kept >= 0)[:, None])


@triton.jit
def _held(entry, newest, sinks, size):
    """The position whose key an entry holds when ``newest`` is written; below 0 for none."""
    behind = (newest - entry) % size  # both from the ring's first entry; the sign is the dividend's
    behind = tl.where(behind < 0, behind + size, behind)
    held = sinks + newest - behind
    held = tl.where(held < sinks, -1, held)
    return tl.where(entry < 0, entry + sinks, held)


@triton.jit
def _attend_one(
    query, far, ring, slots, seen, parts, stats, out,
    slot_stride, entries, window, sinks, size, pieces, scale, steps,
    KEYS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
    FAR: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """One query a program: every line of a block keeps a softmax of its own, and they are joined once at the end."""
    piece, head = tl.program_id(0), tl.program_id(1)
    row, asking = tl.program_id(2) // (steps * GROUP), tl.program_id(2) % (steps * GROUP)
    step = asking // GROUP
    lane = tl.arange(0, WIDTH)
    begun = tl.load(seen + row)
    position = (begun + step).to(tl.int32)
    filled = tl.minimum(begun + steps, entries).to(tl.int32)
    newest = (begun + steps - 1 - sinks).to(tl.int32)
    slot = ring + tl.load(slots + row) * slot_stride
    base = slot + head.to(tl.int64) * entries * WIDTH
    values = slot + (head + KEYS).to(tl.int64) * entries * WIDTH
    at = ((row * steps + step).to(tl.int64) * KEYS + head) * GROUP + asking % GROUP
    asked = tl.load(query + at * WIDTH + lane).to(tl.float32)[None, :] * scale
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    heard = tl.zeros([BLOCK, WIDTH], tl.float32)
    first = piece * PIECE
    if first < filled:
        for begin in range(0, PIECE, BLOCK):
            entry = first + begin + tl.arange(0, BLOCK)
            held = _held(entry - sinks, newest, sinks, size)
            behind = position - held
            near = (held >= 0) & (entry < filled) & (behind >= 0) & ((behind < window) | (held < sinks))
            places = entry[:, None] * WIDTH + lane[None, :]
            key = tl.load(base + places, mask=near[:, None], other=0.0).to(tl.float32)
            value = tl.load(values + places, mask=near[:, None], other=0.0).to(tl.float32)
            score = tl.sum(key * asked, 1)
            if FAR:
                distant = tl.load(far + at * WIDTH + lane).to(tl.float32)[None, :] * scale
                score = tl.where(held < sinks, tl.sum(key * distant, 1), score)
            score = tl.where(near, score, float("-inf"))
            top = tl.maximum(best, score)
            floor = tl.where(top == float("-inf"), 0.0, top)
            keep, weight = tl.exp2(best - floor), tl.exp2(score - floor)
            heard = heard * keep[:, None] + value * weight[:, None]
            total = total * keep + weight
            best = top
    top = tl.max(best, 0)
    share = tl.exp2(best - tl.where(top == float("-inf"), 0.0, top))
    total_all, heard_all = tl.sum(total * share, 0), tl.sum(heard * share[:, None], 0)
    if JOIN:
        tl.store(stats + (at * pieces + piece) * 2, top)
        tl.store(stats + (at * pieces + piece) * 2 + 1, total_all)
        if first < filled:
            tl.store(parts + (at * pieces + piece) * WIDTH + lane, heard_all)
    else:
        # A step beyond a row's count may hear nothing: its result means nothing, but is a number.
        result = heard_all / tl.where(total_all == 0.0, 1.0, total_all)
        tl.store(out + at * WIDTH + lane, result.to(out.dtype.element_ty))


@triton.jit
def _attend_some(
    query, far, ring, slots, seen, parts, stats, out,
    slot_stride, entries, window, sinks, size, pieces, scale, steps,
    KEYS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, FAR: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Queries of a key head, of one step or more, ``QUERIES`` a program (some of them padding), by matrix products."""
    piece, head = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(steps * GROUP, QUERIES)
    row = tl.program_id(2) // blocks
    lane = tl.arange(0, WIDTH)
    asking = (tl.program_id(2) % blocks) * QUERIES + tl.arange(0, QUERIES)
    step, real = asking // GROUP, asking < steps * GROUP
    begun = tl.load(seen + row)
    position = (begun + step).to(tl.int32)
    filled = tl.minimum(begun + steps, entries).to(tl.int32)
    newest = (begun + steps - 1 - sinks).to(tl.int32)
    slot = ring + tl.load(slots + row) * slot_stride
    base = slot + head.to(tl.int64) * entries * WIDTH
    values = slot + (head + KEYS).to(tl.int64) * entries * WIDTH
    at = ((row * steps + step).to(tl.int64) * KEYS + head) * GROUP + asking % GROUP
    asked = tl.load(query + at[:, None] * WIDTH + lane[None, :], mask=real[:, None], other=0.0)
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    heard = tl.zeros([QUERIES, WIDTH], tl.float32)
    first = piece * PIECE
    if first < filled:
        for begin in range(0, PIECE, BLOCK):
            entry = first + begin + tl.arange(0, BLOCK)
            held = _held(entry - sinks, newest, sinks, size)
            there = (held >= 0) & (entry < filled)
            places = entry[:, None] * WIDTH + lane[None, :]
            key = tl.load(base + places, mask=there[:, None], other=0.0).to(asked.dtype)
            value = tl.load(values + places, mask=there[:, None], other=0.0).to(asked.dtype)
            score = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
            if FAR:
                distant = tl.load(far + at[:, None] * WIDTH + lane[None, :], mask=real[:, None], other=0.0)
                nearer = tl.dot(distant, tl.trans(key), input_precision="ieee") * scale
                score = tl.where((held < sinks)[None, :], nearer, score)
            behind = position[:, None] - held[None, :]
            near = there[None, :] & (behind >= 0) & ((behind < window) | (held < sinks)[None, :])
            score = tl.where(near, score, float("-inf"))
            top = tl.maximum(best, tl.max(score, 1))
            floor = tl.where(top == float("-inf"), 0.0, top)
            keep, weight = tl.exp2(best - floor), tl.exp2(score - floor[:, None])
            heard = heard * keep[:, None] + tl.dot(weight.to(asked.dtype), value, input_precision="ieee")
            total = total * keep + tl.sum(weight, 1)
            best = top
    if JOIN:
        place = at * pieces + piece
        tl.store(stats + place * 2, best, mask=real)
        tl.store(stats + place * 2 + 1, total, mask=real)
        if first < filled:
            tl.store(parts + place[:, None] * WIDTH + lane[None, :], heard, mask=real[:, None])
    else:
        result = heard / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + at[:, None] * WIDTH + lane[None, :], result.to(out.dtype.element_ty), mask=real[:, None])


@triton.jit
def _join(parts, stats, out, pieces, WIDTH: tl.constexpr, PIECES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    lane, piece = tl.arange(0, WIDTH), tl.arange(0, PIECES)
    place = at * pieces + piece
    there = piece < pieces
    best = tl.load(stats + place * 2, mask=there, other=float("-inf"))
    total = tl.load(stats + place * 2 + 1, mask=there, other=0.0)
    top = tl.max(best, 0)
    share = tl.exp2(best - tl.where(top == float("-inf"), 0.0, top))
    wanted = (there & (best > float("-inf")))[:, None]
    heard = tl.load(parts + place[:, None] * WIDTH + lane[None, :], mask=wanted, other=0.0)
    whole = tl.sum(total * share, 0)
    result = tl.sum(heard * share[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + at * WIDTH + lane, result.to(out.dtype.element_ty))


def store(
    heads: Tensor,
    ring: Tensor,
    target: Tensor,
    seen: Tensor,
    count: Tensor | None,
    turn: tuple[Tensor, Tensor] | None,
    far: tuple[Tensor, Tensor] | None,
    half: bool,
    sinks: int,
) -> tuple[Tensor, Tensor | None]:
    """Queries, keys and values ``[B, T, H + 2 K, D]`` as projected: keys and values go to ``ring [S + 1, 2, K, M, D]``
    (a layer's, of any strides between slots), the last slot taking those of steps beyond ``count [B]``. Returns the
    queries ``[B, T, H, D]`` as they meet the window's keys and, with ``far``, as they meet the sinks'.

    target: ``[B]`` slots; seen: ``[B]`` positions before these. turn, far: cosines and signed sines ``[B, T, 1, D]``
    float32 of the positions, and of where sinks see the query. half: see :mod:`.rope`.
    """
    rows, steps, total, width = heads.shape
    keys, entries = ring.shape[2], ring.shape[3]
    queries = total - 2 * keys
    heads = heads.contiguous()
    query = heads.new_empty(rows, steps, queries, width)
    distant = None if far is None else torch.empty_like(query)
    cos, sin = turn if turn is not None else (heads, heads)
    far_cos, far_sin = far if far is not None else (cos, sin)
    grid = (rows * steps, triton.cdiv(total, HEADS))
    _store[grid](
        heads, cos, sin, far_cos, far_sin, query, query if distant is None else distant, ring,
        target, seen, seen if count is None else count,
        ring.stride(0), ring.shape[0] - 1, entries, sinks, entries - sinks, steps,
        QUERIES=queries, KEYS=keys, WIDTH=width, BLOCK=HEADS,
        TURN=turn is not None, HALF=half, FAR=far is not None, COUNT=count is not None, num_warps=2,
    )  # fmt: skip
    return query, distant


def attend(
    query: Tensor, far: Tensor | None, ring: Tensor, slots: Tensor, seen: Tensor, window: int, sinks: int
) -> Tensor:
    """Queries ``[B, T, H, D]`` over the rings of ``slots [B]``, in which these ``T`` positions lie already ->
    ``[B, T, H, D]``. far: the queries as they meet the sinks, None where there are none. Others as for :func:`store`.
    """
    rows, steps, heads, width = query.shape
    keys, entries = ring.shape[2], ring.shape[3]
    group = heads // keys
    piece = PIECE if entries > 2 * PIECE else SHORT
    pieces = triton.cdiv(entries, piece)
    out = torch.empty_like(query)
    join = pieces > 1
    parts = query.new_empty((rows * steps * heads * pieces, width) if join else (1,), dtype=torch.float32)
    stats = query.new_empty((rows * steps * heads * pieces, 2) if join else (1,), dtype=torch.float32)
    scale = width**-0.5 * 1.4426950408889634  # the softmax is by powers of two
    tensors = (query, query if far is None else far, ring, slots, seen, parts, stats, out)
    common = (*tensors, ring.stride(0), entries, window, sinks, entries - sinks, pieces, scale, steps)
    sizes = {"KEYS": keys, "GROUP": group, "WIDTH": width, "PIECE": piece, "FAR": far is not None, "JOIN": join}
    half = query.dtype == ring.dtype and ring.element_size() == 2
    if steps * group <= FEW and not half:
        # Matrix products are faster where both are of 16 bits; 8-bit floats would have to be widened for them.
        _attend_one[(pieces, keys, rows * steps * group)](*common, **sizes, **ONE)
    else:
        some = min(64, max(16, triton.next_power_of_2(steps * group)))
        grid = (pieces, keys, rows * triton.cdiv(steps * group, some))
        _attend_some[grid](*common, **sizes, QUERIES=some, **(SOME_HALF if half else SOME))
    if join:
        _join[(rows * steps * heads,)](
            parts, stats, out, pieces, WIDTH=width, PIECES=triton.next_power_of_2(pieces), num_warps=2
        )
    return out
