"""Cuts one session's speech tokens into steps of the flow: the host's side of :mod:`.flow_stream`.

A schedule says how many tokens each hop makes at least, its last entry for all that follow: a short first hop is heard
early, long later ones cost less. Hops end at multiples of the mask's chunk, counted from the start of the voice's
prompt, which gives the frames the model was trained to make. How soon the first one ends therefore depends on the
prompt: one of 25 k + 15 tokens has its first frames after 10 tokens and the lookahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .flow_config import RATE, FlowConfig, FlowLimits
from .flow_stream import NO_TOKEN
from .flow_voices import FlowVoice

SCHEDULE = (25, 50, 100)


@dataclass(frozen=True)
class Hop:
    """One step: its variant and inputs, and which of its frames are speech: ``skip`` frames of prompt come first."""

    variant: int
    inputs: dict[str, NDArray[np.int64]]
    skip: int
    frames: int


class Hops:
    """One session's tokens on their way into the flow.

    schedule: tokens each hop makes at least. aligned: False ends hops after just as many tokens, off the trained mask.
    Raises ValueError for tokens beyond what the session's caches hold, before any of them is cut into a hop.
    """

    def __init__(
        self,
        voice: FlowVoice,
        config: FlowConfig,
        limits: FlowLimits,
        schedule: Sequence[int] = SCHEDULE,
        *,
        aligned: bool = True,
    ) -> None:
        if not schedule or min(schedule) < 1:
            raise ValueError(f"a schedule is token counts of at least 1, got {tuple(schedule)}")
        self._voice, self._config, self._limits = voice, config, limits
        self._schedule, self._aligned = tuple(schedule), aligned
        self._steps = sorted(limits.hops)
        self._pending = list(voice.rest)
        self._spoken = voice.shared + len(voice.rest)  # position of the first token after the prompt
        self._at = voice.shared  # position of the first pending token
        self._hops = 0

    @property
    def wanted(self) -> int:
        """Tokens that complete the next hop."""
        return max(0, self._end() + self._config.lookahead - self._at - len(self._pending))

    def push(self, tokens: Iterable[int]) -> list[Hop]:
        """Take tokens; returns the steps they complete, in order."""
        self._take(tokens)
        hops: list[Hop] = []
        while not self.wanted:
            hops += self._cut(self._end())
            self._hops += 1
        return hops

    def finish(self, tokens: Iterable[int] = ()) -> list[Hop]:
        """The steps that end the utterance, under the same mask as all others; the session starts over."""
        self._take(tokens)
        end = self._at + len(self._pending)
        hops = self._cut(end) if end > self._spoken else []
        self._pending, self._at, self._hops = list(self._voice.rest), self._voice.shared, 0
        return hops

    def _take(self, tokens: Iterable[int]) -> None:
        joined = [*self._pending, *tokens]
        made, room = self._at - self._voice.shared + len(joined), self._limits.left // RATE
        if not self._limits.rolling and made > room:
            raise ValueError(
                f"{made} tokens (of them {len(self._voice.rest)} of the prompt) are more than the {room} a session "
                "keeps: end the utterance earlier, allow more frames on the left, or let them roll"
            )
        self._pending = joined

    def _end(self) -> int:
        """Position where the next hop ends."""
        end = max(self._at, self._spoken) + self._schedule[min(self._hops, len(self._schedule) - 1)]
        return -(-end // self._config.chunk) * self._config.chunk if self._aligned else end

    def _cut(self, end: int) -> list[Hop]:
        """The steps up to ``end``, cut at chunks where one step is too short for them."""
        hops = []
        chunk, longest = self._config.chunk, self._limits.longest
        while self._at < end:
            until = min(end, self._at + longest)
            if until < end and until // chunk * chunk > self._at:
                until = until // chunk * chunk
            hops.append(self._step(until - self._at))
        return hops

    def _step(self, count: int) -> Hop:
        variant = next(hop for hop in self._steps if hop >= count)
        tokens = np.full(variant + self._config.lookahead, NO_TOKEN, np.int64)
        heard = self._pending[: count + self._config.lookahead]
        tokens[: len(heard)] = heard
        skip = min(count, max(0, self._spoken - self._at)) * RATE
        inputs = {"tokens": tokens, "count": np.array(count), "voice": np.array(self._voice.row)}
        self._pending, self._at = self._pending[count:], self._at + count
        return Hop(variant, inputs, skip, count * RATE)
