"""A bank of tones in place of speech: letters of one pitch each, two voices an octave apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from antiphon.apps.train.bank import BankWriter
from antiphon.apps.train.tts_bank import SpeechBank, whole, written
from antiphon.apps.train.tts_sizes import ALPHABET
from antiphon.apps.train.voices import RATE

LETTER = 0.07  # seconds
TEXTS = tuple(f"{one} {two}." for one in ("bad", "cab", "fee", "deaf", "ace", "egg") for two in ("hag", "bead", "each"))


def tones(text: str, octave: int) -> np.ndarray:
    time = np.arange(int(LETTER * RATE)) / RATE
    pitches = [100 * 2**octave * (1 + ALPHABET.index(letter) / 8) for letter in written(text)]
    parts = [0.2 * np.sin(2 * np.pi * pitch * time) * (pitch > 120 * 2**octave) for pitch in pitches]
    return np.concatenate(parts).astype(np.float32)


def toy_speech(folder: Path) -> SpeechBank:
    writer = BankWriter(folder)
    for voice, octave in (("heart", 1), ("michael", 0)):
        for text in TEXTS:
            writer.add(whole(tones(text, octave)), "speech", text, voice)
    writer.close()
    return SpeechBank(folder)
