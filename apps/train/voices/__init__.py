"""Synthesis teachers: voices that read training text aloud. Only their speech is used; nothing of theirs ships."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

RATE = 24_000  # samples a second of every teacher's speech


@dataclass(frozen=True)
class Line:
    """One utterance to speak. voice: a name of the teacher's own; speed: 1 is its usual pace; seed: of its noise."""

    text: str
    voice: str
    speed: float
    seed: int


class Teacher(Protocol):
    """A synthesiser. ``licence`` and ``source`` go into the manifest of what it speaks."""

    name: str
    licence: str
    source: str

    def draw(self, rng: random.Random) -> str:
        """A random voice name."""
        ...

    def speak(self, lines: Sequence[Line]) -> list[torch.Tensor]:
        """float32 CPU samples [N] at 24 kHz for each line; an unpronounceable line gives an empty tensor."""
        ...
