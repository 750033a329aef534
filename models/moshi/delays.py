"""Which token of which stream is read at which position: streams are delayed against each other.

A position of the temporal transformer reads one token of each stream. What the model samples at position ``p`` is read
at ``p + 1``; the user's frame ``p`` is read, codebook by codebook, at ``p + delay``. So tokens are known ahead of where
they are read by a stream's *lead*, and until then wait in a ring of ``longest delay + 2`` positions. A stream reads its
start token up to and including the position of its delay, as in training: user frame 0 is never seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import UNSET, MoshiConfig


class Delays(nn.Module):
    """Reads and writes the ring of waiting tokens, ``[B, streams, delay + 2]`` int64."""

    delays: Tensor
    leads: Tensor
    initial: Tensor

    def __init__(self, config: MoshiConfig) -> None:
        super().__init__()
        made = 1 + config.spoken  # streams that the model makes
        for name, values in (
            ("delays", config.delays),
            ("leads", (*(1,) * made, *config.delays[made:])),
            ("initial", (config.text_card, *(config.card,) * config.codebooks)),
        ):
            self.register_buffer(name, torch.tensor(values, device="cpu"), persistent=False)
        self.made = made
        self.longest = config.delay
        self.size = config.delay + 2

    def read(self, ring: Tensor, seen: Tensor, tokens: Tensor) -> Tensor:
        """What the next ``T`` positions read: ``[B, streams, T]``.

        seen: ``[B]`` positions before them. tokens: ``[B, streams, T]`` that these positions make and hear, the made
        ones needed but for the last position.
        """
        steps = torch.arange(tokens.shape[2], device=seen.device)
        position = seen[:, None] + steps
        waiting = ring.gather(2, (position % self.size)[:, None].expand(-1, ring.shape[1], -1))
        back = steps - self.leads[:, None]  # [streams, T]: the step whose token is read
        fresh = tokens.gather(2, back.clamp(min=0).expand_as(tokens))
        known = torch.where(back >= 0, fresh, waiting)
        return torch.where(position[:, None] <= self.delays[:, None], self.initial[:, None], known)

    def write(self, ring: Tensor, seen: Tensor, tokens: Tensor, count: Tensor) -> Tensor:
        """The ring after ``count`` (``[B]``) of the positions that made and heard ``tokens``."""
        last = seen[:, None] + count[:, None] - 1 + self.leads  # [B, streams]: the newest position known
        place = torch.arange(self.size, device=seen.device)
        held = last[..., None] - (last[..., None] - place) % self.size  # the newest position that maps to each place
        step = held - seen[:, None, None] - self.leads[:, None]
        fresh = tokens.gather(2, step.clamp(0, tokens.shape[2] - 1))
        return torch.where(step >= 0, fresh, ring)

    def frame(self, ring: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The newest frame whose made tokens are all known, undelayed: ``[B, made]``, and whether there is one."""
        place = (seen[:, None] - self.longest + self.delays[: self.made]) % self.size
        tokens = ring[:, : self.made].gather(2, place[..., None])[..., 0]
        there = seen > self.longest
        return torch.where(there[:, None], tokens, UNSET), there
