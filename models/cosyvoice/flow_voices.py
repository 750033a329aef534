"""Voices of the flow: what all sessions that speak with one share.

A voice is a speaker's embedding and a prompt: the tokens and mel frames of a clip of theirs. The frames of the prompt's
whole chunks do not depend on what is said after it, so their caches are made once, kept in tables with a row a voice,
and read from there by every session. The rest of the prompt, at least the lookahead, is fed to each session in front of
its own tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..streaming import Specs, State
from .flow_config import RATE, FlowConfig, FlowLimits


@dataclass(frozen=True)
class FlowVoice:
    """A registered voice: its row, the prompt's tokens cached with it, and those each session feeds first."""

    row: int
    shared: int
    rest: tuple[int, ...]


class Voices(nn.Module):
    """Tables of ``limits.voices`` rows. They keep their memory: a registration writes into a free row."""

    mel: Tensor
    speaker: Tensor
    shared: Tensor
    length: Tensor

    def __init__(self, config: FlowConfig, limits: FlowLimits, caches: Specs, like: Tensor) -> None:
        """caches: one session's, that hold the longest prompt. like: a tensor of the tables' device and dtype."""
        super().__init__()
        rows = limits.voices
        self._names = {name: name.replace(".", "_") for name in caches}
        tables = {
            "mel": like.new_zeros(rows, limits.prompt * RATE, config.mels),
            "speaker": like.new_zeros(rows, config.mels),
            "shared": like.new_zeros(rows, dtype=torch.int64),
            "length": like.new_zeros(rows, dtype=torch.int64),
            **{self._names[name]: spec.new(rows, like.device) for name, spec in caches.items()},
        }
        for name, table in tables.items():
            self.register_buffer(name, table.detach(), persistent=False)
        self._free = list(range(rows - 1, -1, -1))

    @property
    def caches(self) -> State:
        """``[voices, ...]`` prompt caches under the names of a session's state."""
        return {name: getattr(self, attribute) for name, attribute in self._names.items()}

    def take(self) -> int:
        """A free row. Raises RuntimeError when there is none."""
        if not self._free:
            raise RuntimeError(f"all {len(self.shared)} voices are taken; remove one or allow more")
        return self._free.pop()

    def give(self, row: int) -> None:
        """Free a row. Raises ValueError when it is free already."""
        if row in self._free or not 0 <= row < len(self.shared):
            raise ValueError(f"voice {row} is not registered")
        for table in self.buffers():
            table[row] = 0
        self._free.append(row)

    def introduce(self, row: int, mel: Tensor, speaker: Tensor) -> None:
        """Write what a row's frames are conditioned on, with nothing cached yet."""
        self.mel[row] = 0
        self.mel[row, : len(mel)] = mel
        self.speaker[row] = speaker
        self.length[row] = len(mel) // RATE
        self.shared[row] = 0

    def cache(self, row: int, shared: int, state: State) -> None:
        """Write the caches that a session (slot 0 of ``state``) holds after the prompt's first ``shared`` tokens."""
        for name, table in self.caches.items():
            table[row].copy_(state[name][0])
        self.shared[row] = shared

    def prompt(self, rows: Tensor, frames: Tensor) -> Tensor:
        """The prompt's mel at ``frames [B, n]`` of voices ``rows [B]``, zeros behind it: ``[B, n, mels]``."""
        told = frames < (self.length[rows] * RATE)[:, None]
        mel = self.mel[rows[:, None], torch.where(told, frames, 0)]
        return torch.where(told[..., None], mel, 0.0)


def check_prompt(tokens: Iterable[int], mel: Tensor, embedding: Tensor, config: FlowConfig, limits: FlowLimits) -> None:
    """Raises ValueError naming what does not fit."""
    tokens = tuple(tokens)
    if len(tokens) > limits.prompt:
        raise ValueError(f"a prompt of {len(tokens)} tokens is longer than the {limits.prompt} there is room for")
    if any(not 0 <= token < config.vocabulary for token in tokens):
        raise ValueError(f"prompt tokens must lie in 0 to {config.vocabulary - 1}")
    shape = (RATE * len(tokens), config.mels)
    if tuple(mel.shape) != shape:
        raise ValueError(f"a prompt of {len(tokens)} tokens has mel frames {[*shape]}, not {[*mel.shape]}")
    if tuple(embedding.shape) != (config.speaker,):
        raise ValueError(f"the speaker's embedding must be [{config.speaker}], got {[*embedding.shape]}")
