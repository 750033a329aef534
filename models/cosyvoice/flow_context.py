"""Where a layer of the flow finds what lies outside its input: the whole utterance, or caches of sessions and voices.

The networks are written once, against the questions of :class:`Context`. :class:`Whole` answers them from the input
itself under a mask, :class:`Cached` from rings in the sessions' slots and from the prompt caches that all sessions of a
voice read; :class:`InPlace` is for kernels that do so themselves.

All use one rule. Positions are counted from the start of the voice's prompt and cut into *segments*, at every multiple
of the mask's chunk and wherever a streaming call starts. A position sees its own segment, the shared prompt, and either
everything between them or the last ``left`` frames before its segment. Calls that start at multiples of the chunk cut
nothing, which gives the mask the model was trained with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..streaming import Specs, State, TensorSpec
from .flow_config import RATE, FlowConfig, FlowLimits

ALIGNED = 16  # a mask's lines begin at multiples of so many values


class Context(Protocol):
    """What a layer asks for. ``n`` is positions of the input, ``m`` positions that may be attended."""

    bias: Tensor  # [B, 1, n, m], 0 where attention is allowed, else -inf
    queries: Tensor  # [B, n] positions of the input
    keys: Tensor  # [B, m] positions that may be attended

    def remember(self, layer: int, keys_values: Tensor) -> Tensor:
        """``[B, n, 2, H, dk] -> [B, m, 2, H, dk]``: everything that may be attended."""

    def history(self, columns: slice, x: Tensor, frames: int) -> Tensor:
        """``[B, n, d] -> [B, frames + n, d]``: the input behind the ``frames`` that a causal convolution needs."""


@dataclass(frozen=True)
class Mask:
    """Which frames a whole utterance attends to; the default is everything, ``chunk`` tokens as trained for streaming.

    calls: tokens at which streaming calls started. shared: tokens of the prompt that everything sees.
    left: mel frames seen before a segment, None for all.
    """

    chunk: int | None = None
    calls: tuple[int, ...] = ()
    shared: int = 0
    left: int | None = None

    def allowed(self, positions: int, rate: int, device: torch.device) -> Tensor:
        """``[positions, positions]`` bool: query i may attend key j. rate: positions per token."""
        key = torch.arange(positions, device=device)
        if self.chunk is None:
            return torch.ones(positions, positions, dtype=torch.bool, device=device)
        first = key // (self.chunk * rate) * (self.chunk * rate)
        end = first + self.chunk * rate
        for call in self.calls:
            before = key < call * rate
            first = torch.where(before, first, first.clamp_min(call * rate))
            end = torch.where(before, end.clamp_max(call * rate), end)
        allowed = key < end[:, None]
        if self.left is not None:
            seen = key >= first[:, None] - self.left * rate // RATE
            allowed = allowed & (seen | (key < self.shared * rate))
        return allowed


class Whole:
    """All positions at once: attention under a mask, convolution behind zeros."""

    def __init__(self, mask: Mask, lengths: Tensor, positions: int, rate: int, dtype: torch.dtype) -> None:
        """lengths: ``[B]`` tokens per row; positions: of the input, ``rate`` a token."""
        real = torch.arange(positions, device=lengths.device) < (lengths * rate)[:, None]
        # Padding attends to itself, so that no softmax is empty.
        itself = torch.eye(positions, dtype=torch.bool, device=lengths.device)
        allowed = (mask.allowed(positions, rate, lengths.device) & real[:, None, :]) | itself
        self.bias = _bias(allowed, dtype)
        self.queries = self.keys = torch.arange(positions, device=lengths.device).expand(len(lengths), -1)

    def remember(self, layer: int, keys_values: Tensor) -> Tensor:
        return keys_values

    def history(self, columns: slice, x: Tensor, frames: int) -> Tensor:
        return F.pad(x, (0, 0, frames, 0))


@dataclass(frozen=True)
class CacheShape:
    """One network's caches: keys and values of ``layers`` attentions, and what its convolutions still need.

    rate: positions per token. passes, branches: how often a step runs it, one after another and side by side.
    keep, columns: positions, and channels of all convolutions together, that the convolutions look back.
    """

    name: str
    rate: int
    layers: int
    heads: int
    head_width: int
    keep: int
    columns: int
    passes: int = 1
    branches: int = 1

    @property
    def rings(self) -> str:
        """Name of the keys and values ``[passes, layers, branches, positions, 2, heads, head_width]``."""
        return f"flow.{self.name}.rings"

    @property
    def tails(self) -> str:
        """Name of the convolutions' inputs ``[passes, branches, keep, columns]``."""
        return f"flow.{self.name}.tails"

    def spec(self, frames: int, dtype: torch.dtype, kept: torch.dtype | None) -> Specs:
        """Caches that hold ``frames`` mel frames; kept: dtype of keys and values where it is not ``dtype``."""
        positions = frames * self.rate // RATE
        rings = (self.passes, self.layers, self.branches, positions, 2, self.heads, self.head_width)
        tails = (self.passes, self.branches, self.keep, self.columns)
        return {self.rings: TensorSpec(rings, kept or dtype), self.tails: TensorSpec(tails, dtype)}


@dataclass(frozen=True)
class Call:
    """One streaming call of ``B`` sessions. Counts are tokens.

    voice: ``[B]`` rows of the voices' tables. shared: ``[B]`` of the voice's prompt that are cached with the voice.
    seen: ``[B]`` made before this call, behind the shared ones. count: ``[B]`` made by it, at most ``hop``.
    target: ``[B]`` the slots to write: ``slots``, or scratch for rows that must leave no trace.
    alone: there is one session, and asking how much of its caches is filled costs nothing: only that is read.
    """

    config: FlowConfig
    limits: FlowLimits
    hop: int
    slots: Tensor
    target: Tensor
    scratch: int
    voice: Tensor
    shared: Tensor
    seen: Tensor
    count: Tensor
    alone: bool

    @property
    def start(self) -> Tensor:
        """``[B]`` position of the first token."""
        return self.shared + self.seen

    def frames(self) -> Tensor:
        """``[B, 2 hop]`` positions of the mel frames."""
        return self.start[:, None] * RATE + torch.arange(self.hop * RATE, device=self.seen.device)

    def made(self) -> Tensor:
        """``[B, 2 hop]`` bool: which of the mel frames are made."""
        return torch.arange(self.hop * RATE, device=self.seen.device) < (self.count * RATE)[:, None]


class Slots:
    """One call of ``B`` sessions through one pass of a network; rows are ``B * branches``, a session's side by side.

    What both ways of reading the caches share: where they are, and ``commit``, which writes what the rings and the
    convolutions keep once the pass is through.
    """

    def __init__(self, shape: CacheShape, call: Call, state: State, voices: State, index: int = 0) -> None:
        """voices: ``[voices, ...]`` prompt caches under the names of the state. index: of the pass."""
        self._shape, self._call = shape, call
        rate, device = shape.rate, call.seen.device
        self._ring, self._prompt = state[shape.rings][:, index], voices[shape.rings][:, index]
        size = self._ring.shape[3]
        self._shared, self._first, self._end = (
            (tokens * rate)[:, None] for tokens in (call.shared, call.start, call.start + call.count)
        )
        self.queries = self._first + torch.arange(call.hop * rate, device=device)

        # Of positions that share a ring entry only the last is written.
        kept = (self.queries < self._end) & (self.queries >= self._end - size)
        rows = torch.where(kept, call.target[:, None], call.scratch)
        branch = torch.arange(shape.branches, device=device)[:, None]
        self._write = (rows[:, None], slice(None), branch, ((self.queries - self._shared) % size)[:, None])

        self._all_tails = state[shape.tails][:, index]
        fresh = ((call.seen == 0) & (call.shared > 0)).view(-1, 1, 1, 1)
        begun = voices[shape.tails][:, index].index_select(0, call.voice)
        self._tails = torch.where(fresh, begun, self._all_tails.index_select(0, call.slots)).flatten(0, 1)
        self._made = (self._end - self._first).repeat_interleave(shape.branches, 0)

    def _keep(self, new: Tensor, tails: Tensor) -> None:
        """new: ``[layers, B, branches, n, 2, heads, head_width]`` keys and values. tails: ``[rows, keep, columns]``."""
        _words(self._ring)[self._write] = _words(new.to(self._ring.dtype).movedim(0, 3))
        self._all_tails.index_copy_(0, self._call.target, tails.unflatten(0, (-1, self._shape.branches)))


class Cached(Slots):
    """Attention reads the voice's prompt from ``voices``, the session's past from its ring and the call's own
    positions: the first two are fetched for all layers at once."""

    def __init__(self, shape: CacheShape, call: Call, state: State, voices: State, index: int = 0) -> None:
        super().__init__(shape, call, state, voices, index)
        rate, device = shape.rate, call.seen.device
        size, prompt = self._ring.shape[3], self._prompt.shape[3]
        self._used = min(size, int(call.seen.max()) * rate) if call.alone else size
        self._told = int(call.shared.max()) * rate if call.alone else prompt

        shared, first, end = self._shared, self._first, self._end
        told = torch.arange(self._told, device=device).expand(len(first), -1)
        # Ring entry r holds the newest position before the call that lies r behind the prompt, modulo the ring.
        newest = first - shared - 1
        held = shared + newest - (newest - torch.arange(self._used, device=device)) % size
        self.keys = torch.cat((told, held, self.queries), 1)
        allowed = torch.cat(
            (
                (told < shared)[:, None].expand(-1, call.hop * rate, -1),
                self._own(self.keys[:, None, self._told :], shared, first, end, size),
            ),
            2,
        )
        # No softmax is empty, not even that of a row without positions.
        allowed = allowed | (call.count == 0)[:, None, None]
        self.bias = _bias(allowed.repeat_interleave(shape.branches, 0), self._tails.dtype)

        past = self._told + self._used
        line = (2, shape.heads, shape.head_width)
        room = (shape.layers, len(first), shape.branches, past + call.hop * rate, *line)
        self._held = torch.empty(room, dtype=self._tails.dtype, device=device)
        _fetch(self._prompt[:, :, :, : self._told], call.voice, self._held[:, :, :, : self._told])
        _fetch(self._ring[:, :, :, : self._used], call.slots, self._held[:, :, :, self._told : past])
        self._new = self._held[:, :, :, past:]
        self._windows: list[tuple[int, Tensor]] = []  # by the first of their columns

    def _own(self, keys: Tensor, shared: Tensor, first: Tensor, end: Tensor, size: int) -> Tensor:
        """``[B, n, m]`` bool: which of the session's own positions ``keys [B, 1, m]`` the queries may attend."""
        chunk = self._call.config.chunk * self._shape.rate
        # Padding attends as the last position does.
        query = torch.minimum(self.queries, (end - 1).clamp_min(first))
        until = torch.minimum(query // chunk * chunk + chunk, end)
        allowed = (keys >= shared[..., None]) & (keys < until[..., None])
        if self._call.limits.rolling:
            begin = torch.maximum(query // chunk * chunk, first)
            allowed = allowed & (keys >= begin[..., None] - size)
        return allowed

    def remember(self, layer: int, keys_values: Tensor) -> Tensor:
        self._new[layer].copy_(keys_values.unflatten(0, (-1, self._shape.branches)))
        held: Tensor = self._held[layer].flatten(0, 1)
        return held

    def history(self, columns: slice, x: Tensor, frames: int) -> Tensor:
        keep = self._shape.keep
        window = torch.cat((self._tails[:, keep - frames :, columns], x), 1)
        self._windows.append((columns.start, window if frames == keep else F.pad(window, (0, 0, keep - frames, 0))))
        return window

    def commit(self) -> None:
        """Keep what the next call needs."""
        windows = torch.cat([window for _, window in sorted(self._windows, key=lambda pair: pair[0])], 2)
        last = self._made + torch.arange(self._shape.keep, device=windows.device)
        self._keep(self._new, windows.gather(1, last[..., None].expand(-1, -1, windows.shape[2])))


class InPlace(Slots):
    """The same for kernels, which read the caches where they lie, and only as far as they are filled."""

    def __init__(self, shape: CacheShape, call: Call, state: State, voices: State, index: int = 0) -> None:
        super().__init__(shape, call, state, voices, index)
        rows, line = len(self._tails), (2, shape.heads, shape.head_width)
        self._new = self._tails.new_empty(shape.layers, rows, call.hop * shape.rate, *line)
        self._later = torch.empty_like(self._tails)

    def room(self, layer: int) -> Tensor:
        """Where keys and values of the input go, ``[rows, n, 2, heads, head_width]``."""
        return self._new[layer]

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """What queries ``[rows, n, heads * head_width]`` hear, once ``room`` is filled."""
        from ..layers.triton_segments import attend

        call, rate = self._call, self._shape.rate
        return attend(
            query, self._new[layer], self._ring[:, layer], self._prompt[:, layer], call.slots, call.voice,
            call.shared, call.seen, call.count, rate=rate, chunk=call.config.chunk * rate, rolling=call.limits.rolling,
        )  # fmt: skip

    def edges(self, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of a convolution that looks back ``keep`` positions: those positions ``[rows, keep, d]``, from which position
        of them and the input on they are kept ``[rows]``, and where ``[rows, keep, d]``."""
        return self._tails[..., columns], self._made[:, 0], self._later[..., columns]

    def commit(self) -> None:
        """Keep what the next call needs."""
        self._keep(self._new.unflatten(1, (-1, self._shape.branches)), self._later)


def _fetch(table: Tensor, rows: Tensor, into: Tensor) -> None:
    """Rows ``[B]`` of ``table [S, layers, ...]`` into ``[layers, B, ...]``."""
    if table.dtype == into.dtype:
        torch.index_select(_words(table), 0, rows, out=_words(into.transpose(0, 1)))
    else:
        into.copy_(_words(table).index_select(0, rows).view(table.dtype).transpose(0, 1))


def _words(x: Tensor) -> Tensor:
    """The same memory in words of 16 bytes, where lines are whole ones: a device moves these fastest."""
    return x.view(torch.complex128) if x.shape[-1] * x.dtype.itemsize % 16 == 0 else x


def _bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, n, m]`` bool to ``[B, 1, n, m]`` as attention adds it, its lines where kernels want them."""
    *sizes, width = allowed.shape
    bias = torch.zeros((*sizes, -(-width // ALIGNED) * ALIGNED), dtype=dtype, device=allowed.device)[..., :width]
    return bias.masked_fill_(~allowed, -math.inf)[:, None]
