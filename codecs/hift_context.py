"""Where a vocoder's layer finds what lies beside its input: the whole utterance, or a session's slot.

The vocoder's convolutions look both ways. :class:`Whole` answers from the whole signal with zeros around it;
:class:`Stream` keeps the samples that each layer has yet to look back on, so that a layer runs as many samples behind
its input as it looks ahead and nothing is computed twice. A layer is written once, against the few questions below.

What lies outside of the utterance counts as zero for every layer, as a padded convolution has it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

_FURTHEST = 1000  # frames that a layer may fall behind


class Signal(NamedTuple):
    """``x [B, C, n]`` at ``rate`` samples a frame; an utterance has ``rate * frames + extra`` of them.

    Of a stream, the samples that end ``delay`` before the end of what the frames so far cover.
    """

    x: Tensor
    rate: int = 1
    delay: int = 0
    extra: int = 0

    def then(self, x: Tensor, later: int = 0) -> Signal:
        """What a layer made of this signal, ``later`` samples behind it."""
        return self._replace(x=x, delay=self.delay + later)


class Context(Protocol):
    """What a layer asks for."""

    def lag(self, ahead: int) -> int:
        """Samples by which a layer that looks ``ahead`` falls behind its input."""

    def around(self, signal: Signal, before: int, after: int) -> Tensor:
        """``[B, C, before + n + after]``: the samples ``lag(after)`` back, with what lies beside them."""

    def inside(self, signal: Signal) -> Signal:
        """The signal with zeros outside of the utterance."""

    def mirrored(self, signal: Signal) -> Signal:
        """With one more sample in front, a copy of sample 1."""

    def reflected(self, signal: Signal, before: int) -> tuple[Tensor, int]:
        """A signal of one channel mirrored at both ends of the utterance, ``[B, m]``, and the number of its first
        sample as counted from the first that the chunk's frames cover. ``before``: older samples that are wanted."""


class Whole:
    """All frames at once.

    frames: ``[B]`` int64 of each row, which may be padded with anything finite. edge: samples that may be asked for
    beside a reflected signal.
    """

    def __init__(self, frames: Tensor, edge: int = 0) -> None:
        self._frames = frames
        self._edge = edge

    def lag(self, ahead: int) -> int:
        return 0

    def around(self, signal: Signal, before: int, after: int) -> Tensor:
        return F.pad(signal.x, (before, after))

    def inside(self, signal: Signal) -> Signal:
        index = torch.arange(signal.x.shape[2], device=signal.x.device) - signal.delay
        ends = self._frames[:, None] * signal.rate + signal.extra
        return signal.then(torch.where(((index >= 0) & (index < ends))[:, None], signal.x, 0))

    def mirrored(self, signal: Signal) -> Signal:
        return signal._replace(x=F.pad(signal.x, (1, 0), mode="reflect"), extra=1)

    def reflected(self, signal: Signal, before: int) -> tuple[Tensor, int]:
        x = F.pad(signal.x[:, 0], (self._edge, self._edge))
        index = torch.arange(x.shape[1], device=x.device).expand(x.shape) - self._edge
        return _mirror(x, index, self._frames[:, None] * signal.rate - 1), -self._edge


class Stream:
    """One chunk of ``B`` sessions.

    tails: ``[B, M]``, what :meth:`kept` returned after the chunk before; zeros at first.
    seen, end: ``[B]`` int64, frames before the chunk and of the whole utterance. frames: of the chunk.
    margin: frames by which the slowest layer falls behind, or more.
    """

    def __init__(self, tails: Tensor, seen: Tensor, end: Tensor, frames: int, margin: int) -> None:
        self._tails, self._seen, self._end = tails, seen, end
        self._frames, self._margin = frames, margin
        self._used = 0
        self._kept: list[Tensor] = []
        self._masks: dict[tuple[int, int], Tensor] = {}

    def lag(self, ahead: int) -> int:
        return ahead

    def around(self, signal: Signal, before: int, after: int) -> Tensor:
        keep = before + after
        if keep == 0:
            return signal.x
        window = torch.cat((self._tail(signal.x, keep), signal.x), 2)
        self._kept.append(window[..., -keep:].flatten(1))
        return window

    def _tail(self, x: Tensor, keep: int) -> Tensor:
        rows, channels, _ = x.shape
        first = self._used
        self._used += channels * keep
        return self._tails[:, first : self._used].view(rows, channels, keep)

    def kept(self) -> Tensor:
        """``[B, M]``: what the layers look back on from the next chunk, in the order in which they asked."""
        return torch.cat(self._kept, 1)

    def inside(self, signal: Signal) -> Signal:
        x, rate, delay, extra = signal
        mask = self._masks.get((rate, extra))
        if mask is None:
            index = self._numbers(rate, self._margin * rate, (self._margin + self._frames) * rate)
            real = (index >= 0) & (index < self._end[:, None] * rate + extra)
            mask = self._masks[rate, extra] = real[:, None].to(x.dtype)
        first = self._margin * rate - delay
        return signal.then(x * mask[..., first : first + x.shape[2]])

    def mirrored(self, signal: Signal) -> Signal:
        # One sample more than the mirror takes is held back, so that sample 1 is there when sample 0 is due.
        window, count, delay = self.around(signal, 0, 2), signal.x.shape[2], signal.delay + 1
        front = (self._numbers(signal.rate, delay, count) == 0)[:, None]
        x = torch.where(front, window[..., 2:], window[..., :count])
        return signal._replace(x=x, delay=delay, extra=1)

    def reflected(self, signal: Signal, before: int) -> tuple[Tensor, int]:
        window = self.around(signal, before, 0)[:, 0]
        behind = signal.delay + before
        index = self._numbers(signal.rate, behind, window.shape[1])
        return _mirror(window, index, self._end[:, None] * signal.rate - 1), -behind

    def _numbers(self, rate: int, behind: int, count: int) -> Tensor:
        """``[B, count]``: numbers of the samples from ``behind`` before the chunk on."""
        return self._seen[:, None] * rate - behind + torch.arange(count, device=self._seen.device)


class Layout(Stream):
    """A stream of one frame without a slot, run to see how much its layers keep."""

    def __init__(self, device: torch.device) -> None:
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        super().__init__(zero, zero, zero + 1, frames=1, margin=_FURTHEST)

    def _tail(self, x: Tensor, keep: int) -> Tensor:
        return x.new_zeros(x.shape[0], x.shape[1], keep)


def _mirror(x: Tensor, index: Tensor, last: Tensor) -> Tensor:
    """``x [B, m]``, whose samples are number ``index [B, m]``, with those outside of 0 ... ``last [B, 1]`` mirrored."""
    wanted = index.abs()
    wanted = torch.minimum(wanted, 2 * last - wanted)
    return x.gather(1, (wanted - index[:, :1]).clamp(0, x.shape[1] - 1))
