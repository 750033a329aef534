"""The hibari teacher: one American voice, small enough to run at some 150 times real time on one CPU core.

hibari-tts (Apache-2.0) is distilled from Kokoro-82M; only the voice inside its package is used. Its phonemiser writes
the alphabet Kokoro reads as well.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files

import torch
from hibari import Hibari
from hibari.g2p import G2P

from . import Line


@lru_cache(maxsize=2)
def phonemiser(british: bool) -> G2P:
    """English text -> phonemes, one string a call, in the misaki alphabet (American or British)."""
    return G2P(british=british)


@lru_cache(maxsize=1)
def symbols() -> dict[str, int]:
    """Phoneme characters -> token ids, as Kokoro and hibari number them; id 0 marks both ends."""
    table: dict[str, int] = json.loads((files("hibari") / "assets" / "vocab.json").read_text(encoding="utf-8"))
    return table


class HibariTeacher:
    name = "hibari"
    licence = "Apache-2.0"
    source = "hibari-tts 0.2.1 (synthetic)"

    def __init__(self) -> None:
        self._model = Hibari(threads=1, g2p=phonemiser(british=False))

    def draw(self, rng: random.Random) -> str:
        return "heart"

    def speak(self, lines: Sequence[Line]) -> list[torch.Tensor]:
        read = phonemiser(british=False)
        return [
            torch.from_numpy(self._model.from_phonemes(read(line.text), speed=line.speed, seed=line.seed))
            for line in lines
        ]
