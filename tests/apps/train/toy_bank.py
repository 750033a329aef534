"""A bank of tones in place of speech: a few questions of every part, by a voice of each kind."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from antiphon.apps.train.bank import Bank, BankWriter, Role
from antiphon.apps.train.domain import AFTER_STOP, BACKCHANNELS, STOPS, UNKNOWN, Question, of_part
from antiphon.apps.train.voices import RATE

KNOWN, NEW = "hibari:heart@40/40", "hibari:heart@46/40"  # the second is held out
TOPICS = ("plus", "capitals", "week", "seasons", "counting", "colours", "ability", "opposites")


def tone(text: str, seconds: float) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    pitch = 150 + zlib.crc32(text.encode()) % 1500
    return (0.2 * np.sin(2 * np.pi * pitch * time)).astype(np.float32)


def chosen() -> list[Question]:
    parts = [[one for one in of_part(part) if one.topic in TOPICS] for part in ("train", "question", "form")]
    train, question, form = parts
    long = [one for one in train if 8 <= len(one.answer.split()) <= 16]
    return list(dict.fromkeys(train[:: len(train) // 40] + long[::4] + question[::6] + form[::6]))


def toy_bank(folder: Path) -> Bank:
    writer = BankWriter(folder)
    asked = chosen()
    for text in dict.fromkeys([UNKNOWN, *AFTER_STOP, *(one.answer for one in asked)]):
        words = text.split()
        times = tuple((word, int(0.02 * RATE + 0.25 * RATE * place)) for place, word in enumerate(words))
        writer.add(tone(text, 0.25 * len(words) + 0.1), "answer", text, KNOWN, words=times)
    pair = 0
    for voice in (KNOWN, NEW):
        for one in asked:
            writer.add(tone(one.text, 0.6), "question", one.text, voice, source=one.key)
            if one.cut:
                halves: list[tuple[Role, str]] = list(
                    zip(("first half", "second half"), one.halves(one.cut), strict=True)
                )
                for role, text in halves:
                    writer.add(tone(text, 0.4), role, text, voice, source=one.key, pair=pair)
                pair += 1
        for text in BACKCHANNELS:
            writer.add(tone(text, 0.3), "backchannel", text, voice)
        for text in STOPS:
            writer.add(tone(text, 0.6), "stop", text, voice)
        writer.add(tone("talk", 1.5), "talk", "something else", voice)
    writer.add(np.random.default_rng(0).standard_normal(RATE).astype(np.float32) * 0.05, "noise", "", "rain")
    writer.close()
    return Bank(folder)
