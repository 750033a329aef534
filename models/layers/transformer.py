"""The transformer step that every language model here configures, and the codecs' transformers.

Pre-norm blocks, grouped-query attention, rotary positions, plain or gated feed-forward. The blocks are written once
against a :class:`Context`, which keeps keys and values: :class:`WholeSequence` those of its input (offline, training),
:class:`RingStep` those in the sessions' slots, :class:`Frame` those of one frame (a depth transformer).

A ring holds ``window + longest - 1`` positions, so that the last step of a call overwrites nothing that the first
still attends; with ``sinks``, the first positions are kept for ever beside it and seem no further away than the window
is long (StreamingLLM, arXiv 2309.17453). Streaming in calls of any length equals the whole sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..streaming import Specs, State, TensorSpec
from .kernels import few_rows, use_kernels
from .linear import Linear
from .norm import RMSNorm
from .rope import Layout, Rotation, rotate, rotation
from .stepped import Depth, SteppedLinear


@dataclass(frozen=True)
class TransformerConfig:
    """Shapes and flags of a stack of blocks.

    window: positions a query may look back, itself included. longest: most steps of one call.
    sinks: first positions that stay in reach for ever. gate: SiLU-gated feed-forward (``up`` makes the gate, then what
    it multiplies), otherwise GELU. per_step: number of weight sets of a depth transformer, 0 for one set.
    raw_keys: cache keys before rotation and turn them when read. kv_dtype: of the cache; None for the weights'.
    """

    width: int
    layers: int
    heads: int
    feedforward: int
    kv_heads: int | None = None
    head_width: int | None = None
    window: int = 3000
    longest: int = 1
    sinks: int = 0
    norm: Literal["rms", "layer"] = "rms"
    eps: float = 1e-8
    gate: bool = True
    rope: Layout | None = "interleaved"
    theta: float = 10000.0
    qkv_bias: bool = False
    out_bias: bool = False
    ff_bias: bool = False
    layer_scale: float | None = None
    per_step: int = 0
    raw_keys: bool = False
    kv_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of {self.heads} heads: give head_width")
        if self.heads % self.kv:
            raise ValueError(f"{self.heads} heads cannot share {self.kv} key and value heads evenly")
        if self.rope is not None and self.head % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head}")
        if self.per_step and (self.qkv_bias or self.out_bias or self.ff_bias):
            raise ValueError("weights per depth step have no biases: leave qkv_bias, out_bias and ff_bias out")
        if min(self.window, self.longest) < 1 or self.sinks < 0:
            raise ValueError(
                f"window {self.window} and longest {self.longest} are at least 1, sinks {self.sinks} at least 0"
            )

    @property
    def kv(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.head_width or self.width // self.heads

    @property
    def ring(self) -> int:
        """Positions of a ring beside the sinks."""
        return self.window + self.longest - 1


class Context(Protocol):
    """Where attention finds what lies outside its input."""

    def attend(self, layer: int, heads: Tensor) -> Tensor:
        """Queries, keys and values, ``[B, T, H + 2 K, D]``, not rotated -> heard ``[B, T, H, D]``."""


class Transformer(nn.Module):
    """A stack of blocks; the norm after the last is its owner's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def forward(self, x: Tensor, context: Context, depth: Depth = None) -> Tensor:
        """``[B, T, d] -> [B, T, d]``; depth: the weights to use where there are several sets."""
        branch: Branch | None = None
        for layer, block in enumerate(self.blocks):
            x, branch = block(x, branch, layer, context, depth)
        return x if branch is None else branch.onto(x)

    def whole(self, steps: int, device: torch.device | str = "cpu") -> WholeSequence:
        """The context of whole sequences of ``steps`` positions: causal, within the window and the sinks."""
        return WholeSequence(self.config, torch.arange(steps, device=device), self.dtype)

    def frame(self, rows: int, steps: int, device: torch.device | str = "cpu") -> Frame:
        """A context that is fed ``steps`` positions a few at a time and keeps nothing beyond them."""
        return Frame(self.config, rows, steps, self.dtype, device)

    def state_spec(self, prefix: str) -> Specs:
        """One session's keys and values, and the number of positions it has seen."""
        config = self.config
        shape = (config.layers, 2, config.kv, config.sinks + config.ring, config.head)
        return {
            f"{prefix}.rings": TensorSpec(shape, config.kv_dtype or self.dtype),
            f"{prefix}.seen": TensorSpec((), torch.int64),
        }

    def step(
        self, prefix: str, x: Tensor, state: State, slots: Tensor, target: Tensor, count: Tensor | None = None
    ) -> Tensor:
        """The next ``T`` positions of ``B`` sessions: ``[B, T, d] -> [B, T, d]``.

        target: ``[B]`` the slots to write: ``slots``, or scratch for rows that must leave no trace.
        count: ``[B]`` int64, how many of a row's steps are real (the first ones); outputs of the others mean nothing.
        Raises ValueError for more steps than ``longest``.
        """
        steps = x.shape[1]
        if steps > self.config.longest:
            raise ValueError(f"{steps} steps in one call, but the rings were made for {self.config.longest}")
        seen = state[f"{prefix}.seen"].index_select(0, slots)
        rings = Rings(state[f"{prefix}.rings"], slots, target, seen, steps, count)
        context = InPlace if _in_place(self.config, x) else RingStep
        x = self(x, context(self.config, rings, x.dtype))
        state[f"{prefix}.seen"].index_copy_(0, target, seen + (steps if count is None else count))
        return x


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised residual branch."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = (_norm(config) for _ in range(2))
        self.attention = Attention(config)
        self.feedforward = FeedForward(config)
        self.scale1, self.scale2 = (_scale(config) for _ in range(2))

    def forward(
        self, x: Tensor, branch: Branch | None, layer: int, context: Context, depth: Depth = None
    ) -> tuple[Tensor, Branch | None]:
        """``[B, T, d]`` and what the block before would add to it -> the same of this block."""
        if branch is None and self._thin(x, depth):
            return self._few(x, layer, context, depth), None
        x, normed = _joined(x, branch, self.norm1)
        branch = Branch(self.attention(normed, layer, context, depth), self.scale1)
        x, normed = _joined(x, branch, self.norm2)
        return x, Branch(self.feedforward(normed, depth), self.scale2)

    def _thin(self, x: Tensor, depth: Depth) -> bool:
        """Whether :meth:`_few` serves: one set of weights for all positions, and norms that it knows."""
        norm = self.norm1
        if not isinstance(norm, RMSNorm) or isinstance(depth, Tensor):
            return False
        return x.dtype.itemsize == 2 and few_rows(x, norm.weight)

    def _few(self, x: Tensor, layer: int, context: Context, depth: Depth) -> Tensor:
        """The whole block for a few rows: each product takes the norm before it, or the sum behind it, along."""
        attention, feedforward = self.attention, self.feedforward
        heads = _around(attention.qkv, x, depth, self.norm1).unflatten(-1, (-1, attention.head))
        heard = context.attend(layer, heads).flatten(2)
        x = _around(attention.out, heard, depth, onto=x, scale=self.scale1)
        wide = _around(feedforward.up, x, depth, self.norm2, gate=feedforward.gate)
        wide = wide if feedforward.gate else F.gelu(wide)
        return _around(feedforward.down, wide, depth, onto=x, scale=self.scale2)


class Branch(NamedTuple):
    """A residual branch that waits to be added: one kernel adds it and makes the next norm."""

    x: Tensor
    scale: Tensor | None

    def onto(self, x: Tensor) -> Tensor:
        return x + (self.x if self.scale is None else self.x * self.scale)


def _joined(x: Tensor, branch: Branch | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    if use_kernels(x) and isinstance(norm, RMSNorm | nn.LayerNorm):
        from .triton_fused import add_norm

        bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
        added, scale = (None, None) if branch is None else branch
        return add_norm(x, added, scale, norm.weight, bias, norm.eps)
    x = x if branch is None else branch.onto(x)
    return x, norm(x)


class Attention(nn.Module):
    """Grouped-query attention; ``qkv`` makes queries, keys and values in this order."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head = config.head
        inner = config.heads * config.head
        self.qkv = _linear(config, config.width, inner + 2 * config.kv * config.head, config.qkv_bias)
        self.out = _linear(config, inner, config.width, config.out_bias)

    def forward(self, x: Tensor, layer: int, context: Context, depth: Depth = None) -> Tensor:
        """``[B, T, d] -> [B, T, d]``."""
        heads = _through(self.qkv, x, depth).unflatten(-1, (-1, self.head))
        return _through(self.out, context.attend(layer, heads).flatten(2), depth)


class FeedForward(nn.Module):
    """Gated by SiLU (arXiv 2002.05202), or two layers around GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = config.gate
        self.up = _linear(config, config.width, (1 + config.gate) * config.feedforward, config.ff_bias)
        self.down = _linear(config, config.feedforward, config.width, config.ff_bias)

    def forward(self, x: Tensor, depth: Depth = None) -> Tensor:
        """``[B, T, d] -> [B, T, d]``."""
        x = _through(self.up, x, depth)
        if self.gate and use_kernels(x):
            from .triton_fused import gated

            x = gated(x)
        elif self.gate:
            gate, x = x.chunk(2, -1)
            x = F.silu(gate) * x
        else:
            x = F.gelu(x)
        return _through(self.down, x, depth)


class WholeSequence:
    """All positions of a sequence at once, under the mask that streaming amounts to."""

    def __init__(self, config: TransformerConfig, positions: Tensor, dtype: torch.dtype) -> None:
        """positions: ``[T]`` int64, the same for every row, rising by one."""
        self.attention = _Attention(config, positions[None], positions[None], dtype)

    def attend(self, layer: int, heads: Tensor) -> Tensor:
        query, far, fresh = self.attention.turn(heads)
        return self.attention(query, far, fresh.movedim(1, 3))


@dataclass(frozen=True, eq=False)
class Rings:
    """Where ``B`` sessions keep their keys and values, and which positions come next.

    kept: ``[S + 1, layers, 2, K, sinks + ring, D]``. slots: ``[B]``; target: the slots to write. seen: ``[B]``
    positions before these ``steps``, of which the first ``count [B]`` are real, all of them where it is None.
    """

    kept: Tensor
    slots: Tensor
    target: Tensor
    seen: Tensor
    steps: int
    count: Tensor | None = None

    def positions(self) -> Tensor:
        """``[B, steps]``."""
        return self.seen[:, None] + torch.arange(self.steps, device=self.seen.device)


class RingStep:
    """The next positions of sessions whose rings are copied to be read."""

    def __init__(self, config: TransformerConfig, rings: Rings, dtype: torch.dtype) -> None:
        # 8-bit floats are moved as bytes: few operations know them.
        self.stored = rings.kept.dtype
        self.kept = rings.kept.view(torch.uint8) if self.stored.itemsize == 1 else rings.kept
        self.slots, self.dtype = rings.slots, dtype
        sinks, ring = config.sinks, config.ring
        positions = rings.positions()
        entries = torch.arange(sinks + ring, device=positions.device)
        # A ring entry holds the newest position that maps to it; a sink's entry its own.
        newest = positions[:, -1:] - sinks
        held = torch.where(entries < sinks, entries, sinks + newest - (newest - (entries - sinks)) % ring)
        held = torch.where((entries >= sinks) & (held < sinks), -1, held)
        self.attention = _Attention(config, positions, held, dtype)
        place = torch.where(positions < sinks, positions, sinks + (positions - sinks) % ring)
        rows = rings.target[:, None].expand_as(positions)
        if rings.count is not None:
            real = positions < (rings.seen + rings.count)[:, None]
            rows = torch.where(real, rows, len(rings.kept) - 1)
        self.write = (rows, place)

    def attend(self, layer: int, heads: Tensor) -> Tensor:
        query, far, fresh = self.attention.turn(heads)
        fresh = fresh.to(self.stored)
        ring = self.kept[:, layer]
        lines = ring.movedim(3, 1)  # [S + 1, M, 2, K, D]
        lines.index_put_(self.write, fresh.view(ring.dtype) if ring.dtype != self.stored else fresh)
        return self.attention(query, far, ring.index_select(0, self.slots).view(self.stored).to(self.dtype))


class InPlace:
    """The same on a GPU: rings are written and read where they lie, and only as far as they are filled."""

    def __init__(self, config: TransformerConfig, rings: Rings, dtype: torch.dtype) -> None:
        self.config, self.rings = config, rings
        self.turn: Rotation | None = None
        self.far: Rotation | None = None
        if config.rope is not None:
            positions = rings.positions()
            self.turn = rotation(positions, config.head, config.theta, dtype, config.rope)
            if config.sinks:
                nearest = positions.clamp(max=config.sinks + config.window - 1)
                self.far = rotation(nearest, config.head, config.theta, dtype, config.rope)

    def attend(self, layer: int, heads: Tensor) -> Tensor:
        from . import triton_ring

        config, rings, ring = self.config, self.rings, self.rings.kept[:, layer]
        query, far = triton_ring.store(
            heads, ring, rings.target, rings.seen, rings.count, self.turn, self.far, config.rope == "half", config.sinks
        )  # fmt: skip
        return triton_ring.attend(query, far, ring, rings.slots, rings.seen, config.window, config.sinks)


def _in_place(config: TransformerConfig, x: Tensor) -> bool:
    """Whether the kernels of :mod:`.triton_ring` know these rings: not those whose keys are kept raw."""
    return use_kernels(x) and not config.raw_keys and _power(config.head)


def _power(width: int) -> bool:
    """Whether a head is as wide as kernels want it."""
    return 16 <= width <= 256 and width & (width - 1) == 0


class Frame:
    """The positions of one frame of ``B`` rows, fed a few at a time from an empty cache."""

    def __init__(
        self, config: TransformerConfig, rows: int, steps: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.config = config
        self.cache = torch.zeros(config.layers, rows, 2, config.kv, steps, config.head, dtype=dtype, device=device)
        self.positions = torch.arange(steps, device=device)[None]
        self.fed = [0] * config.layers
        self.attention: _Attention | None = None
        self.plain = config.rope is None and not config.sinks and _power(config.head)

    def attend(self, layer: int, heads: Tensor) -> Tensor:
        first = self.fed[layer]
        last = self.fed[layer] = first + heads.shape[1]
        if self.plain and heads.shape[1] == 1 and last <= self.config.window and use_kernels(heads):
            from .triton_fused import frame

            return frame(heads, self.cache[layer], first)
        if layer == 0:
            positions = self.positions[:, :last]
            self.attention = _Attention(self.config, positions[:, first:], positions, heads.dtype, newest=True)
        assert self.attention is not None
        query, far, fresh = self.attention.turn(heads)
        held = self.cache[layer, :, :, :, :last]
        held[:, :, :, first:] = fresh.movedim(1, 3)
        return self.attention(query, far, held)


class _Attention:
    """Attention of queries at ``positions`` over keys at ``held``: rotation, mask, softmax."""

    def __init__(
        self, config: TransformerConfig, positions: Tensor, held: Tensor, dtype: torch.dtype, *, newest: bool = False
    ) -> None:
        """positions ``[B or 1, T]``; held ``[B or 1, M]``, -1 for entries without a key.

        newest: all of ``held`` are positions up to the last query: one query alone needs no mask within the window.
        """
        self.config = config
        self.dtype = dtype
        self.grouped = config.kv != config.heads
        self.bias: Tensor | None = None
        if not (newest and positions.shape[1] == 1 and held.shape[1] <= config.window) or config.sinks:
            query, key = positions[:, :, None], held[:, None]
            near = (key <= query) & ((key > query - config.window) | (key < config.sinks)) & (key >= 0)
            bias = torch.zeros(near.shape, dtype=dtype, device=held.device).masked_fill_(~near, -math.inf)
            self.bias = bias[:, None]
        self.turns = self.turns_far = self.turns_held = None
        if config.rope is not None:
            self.turns = self._angles(positions, config.rope)
            if config.sinks:
                self.turns_far = self._angles(positions.clamp(max=config.sinks + config.window - 1), config.rope)
            if config.raw_keys:
                cos, sin = self._angles(held.clamp(min=0), config.rope)
                self.turns_held = cos.transpose(1, 2), sin.transpose(1, 2)  # [B, 1, M, D]

    def _angles(self, positions: Tensor, layout: Layout) -> Rotation:
        return rotation(positions, self.config.head, self.config.theta, self.dtype, layout)

    def turn(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries as they meet the window's keys and as they meet the sinks' (``[B, T, H, D]``), rotated, and keys and
        values (``[B, T, 2, K, D]``), keys rotated unless they are kept raw."""
        count, kv = self.config.heads, self.config.kv
        query, fresh = heads[:, :, :count], heads[:, :, count:].unflatten(2, (2, kv))
        if self.turns is None or (layout := self.config.rope) is None:
            return query, query, fresh
        far = None if self.turns_far is None else rotate(query, self.turns_far, layout)
        if self.turns_held is None:
            turned = rotate(heads[:, :, : count + kv], self.turns, layout)  # queries and keys at once
            query, fresh = turned[:, :, :count], torch.stack((turned[:, :, count:], fresh[:, :, 1]), 2)
        else:
            query = rotate(query, self.turns, layout)
        return query, query if far is None else far, fresh

    def __call__(self, query: Tensor, far: Tensor, held: Tensor) -> Tensor:
        """query and far ``[B, T, H, D]``, keys and values ``[B, 2, K, M, D]`` -> ``[B, T, H, D]``."""
        keys, values = held.unbind(1)
        if self.turns_held is not None and self.config.rope is not None:
            keys = rotate(keys, self.turns_held, self.config.rope)
        query, far = query.transpose(1, 2), far.transpose(1, 2)
        bias = self.bias
        if bias is not None and self.turns_far is not None:
            # What the sinks score from the window's edge, less what they score from where the query really is.
            sinks = keys[:, :, : self.config.sinks].repeat_interleave(query.shape[1] // keys.shape[1], 1)
            nearer = (far - query) @ sinks.transpose(2, 3) * self.config.head**-0.5
            bias = bias + F.pad(nearer, (0, keys.shape[2] - nearer.shape[3]))
        heard = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, enable_gqa=self.grouped)
        return heard.transpose(1, 2)


def _norm(config: TransformerConfig) -> nn.Module:
    return RMSNorm(config.width, config.eps) if config.norm == "rms" else nn.LayerNorm(config.width, config.eps)


def _scale(config: TransformerConfig) -> nn.Parameter | None:
    return None if config.layer_scale is None else nn.Parameter(torch.full((config.width,), config.layer_scale))


def _linear(config: TransformerConfig, inputs: int, outputs: int, bias: bool) -> nn.Module:
    return SteppedLinear(config.per_step, inputs, outputs) if config.per_step else Linear(inputs, outputs, bias=bias)


def _around(layer: nn.Module, x: Tensor, depth: Depth, norm: nn.Module | None = None, **more: Any) -> Tensor:
    """A product and what lies around it, by :func:`.triton_thin.thin`."""
    from .triton_thin import thin

    if isinstance(norm, RMSNorm):
        more |= {"norm": norm.weight, "eps": norm.eps}
    if isinstance(layer, SteppedLinear):
        return thin(x, layer.of(depth), **more)
    assert isinstance(layer, Linear)
    return thin(x, layer.weight, layer.bias, **more)


def _through(layer: nn.Module, x: Tensor, depth: Depth) -> Tensor:
    result: Tensor = layer(x, depth) if isinstance(layer, SteppedLinear) else layer(x)
    return result
