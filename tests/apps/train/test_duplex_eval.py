"""The behaviour table is full for a partner that does everything right, and each fault shows in its own row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antiphon.apps.train.bank import Bank
from antiphon.apps.train.dialogues import FRAME
from antiphon.apps.train.domain import AFTER_STOP
from antiphon.apps.train.duplex_card import table
from antiphon.apps.train.duplex_eval import (
    ANSWERS,
    DECLINES,
    FALSE,
    GOES_ON,
    KINDS,
    RIGHT,
    SOON,
    STOPPED,
    STOPS,
    WAITS,
    Call,
    Cast,
    Happened,
    Samples,
    converse,
    judge,
    record,
    stretches,
)
from antiphon.apps.train.voices import RATE

CALLS = 4
FULL = (ANSWERS, RIGHT, WAITS, GOES_ON, STOPS, DECLINES)


class Oracle:
    """Says the right thing at the right time, for it sees the users' scripts; but for its fault. Without one it makes
    room for an encouragement, else it talks on."""

    def __init__(self, calls: Sequence[Call], cast: Cast, fault: str) -> None:
        self.calls, self.cast, self.fault = calls, cast, fault
        self.plans: dict[int, list[tuple[int, int, str]]] = {number: [] for number in range(len(calls))}
        self.seen = dict.fromkeys(self.plans, 0)
        self.waits: dict[int, tuple[int, int]] = {}

    def step(self, frames: Sequence[tuple[int, Samples]]) -> list[tuple[Samples, str]]:
        return [self._one(number, len(self.calls[number].user) + 1) for number, _ in frames]

    def _one(self, number: int, frame: int) -> tuple[Samples, str]:
        call, plan = self.calls[number], self.plans[number]
        for event in call.events[self.seen[number] :]:
            self._plan(number, plan, event)
            self.seen[number] += 1
        if self.fault == "babbles" and frame == 8:
            plan.insert(0, (frame, frame + 8, AFTER_STOP[0]))
        sound, piece = np.zeros(FRAME, np.float32), ""
        stop, again = self.waits.get(number, (frame + 1, frame + 1))
        for begin, end, text in plan:
            if begin <= frame < end and not stop <= frame < again:
                answer = self.cast.bank.audio(self.cast.answers[text])
                place = frame - begin - (12 if begin < stop and frame >= again else 0)
                part = answer[place * FRAME : (place + 1) * FRAME]
                sound[: len(part)] = part
                piece = text if frame == begin else ""
        if self.fault == "says wrong things":
            piece = piece.replace("is", "was").replace("Sorry", "Well").replace("are", "were")
        return sound, piece

    def _plan(self, number: int, plan: list[tuple[int, int, str]], event: Happened) -> None:
        first, last = event.begin / FRAME, event.end / FRAME
        if event.what == "turn" and self.fault != "is mute":
            delay = {"is slow": 2.5, "is impatient": -0.5}.get(self.fault, 0.4)
            begin = int(last + delay * RATE / FRAME) + 1
            length = -(-self.cast.answers[event.expected].samples // FRAME)
            plan.append((begin, begin + length, event.expected))
        elif event.what == "interruption" and self.fault != "talks on":
            stop = int(first) + (6 if self.fault == "stops late" else 3)
            plan[:] = [(begin, min(end, stop), text) for begin, end, text in plan]
            plan.append((int(last) + 6, int(last) + 10, AFTER_STOP[0]))
        elif event.what == "encouragement" and self.fault == "takes fright":
            plan[:] = [(begin, min(end, int(first) + 2), text) for begin, end, text in plan]
        elif event.what == "encouragement" and self.fault == "":
            plan[:] = [(begin, end + 12 if end > first else end, text) for begin, end, text in plan]
            self.waits[number] = int(first) + 2, int(first) + 14


def played(bank: Bank, fault: str = "") -> tuple[dict[str, dict[str, Any]], list[Call]]:
    cast = Cast(bank, "train", held_out=False)
    assert cast.kinds() == KINDS
    calls = [Call(kind, seed) for seed in range(CALLS) for kind in KINDS]
    converse(Oracle(calls, cast, fault), calls, cast)
    return judge(calls, {text: one.samples for text, one in cast.answers.items()}), calls


def failed(rows: dict[str, dict[str, Any]]) -> set[str]:
    found = {name for name in FULL if rows[name]["value"] < rows[name]["of"]}
    return found | ({FALSE} if rows[FALSE]["value"] > 0 else set())


def test_a_perfect_partner_fills_the_table(bank: Bank, tmp_path: Path) -> None:
    rows, calls = played(bank)
    assert failed(rows) == set()
    assert {rows[name]["of"] for name in (WAITS, GOES_ON, STOPS, DECLINES)} == {CALLS}
    assert rows[ANSWERS]["of"] == 6 * CALLS  # two in a call of questions, none in silence
    assert rows[RIGHT]["of"] == 3 * CALLS
    assert 400 <= rows[SOON]["value"] <= 580
    assert 160 <= rows[STOPPED]["value"] <= 260
    record(tmp_path, calls, 1)
    index = json.loads((tmp_path / "index.json").read_text())
    assert [one["file"] for one in index] == [f"{kind}-0.wav" for kind in KINDS]
    assert index[4]["said"] == index[4]["expected"][0]


@pytest.mark.parametrize(
    ("fault", "rows"),
    [
        ("is mute", {ANSWERS, RIGHT, GOES_ON, STOPS, DECLINES}),
        ("is slow", {ANSWERS}),
        ("says wrong things", {RIGHT, DECLINES}),
        ("is impatient", {ANSWERS, RIGHT, WAITS, GOES_ON, DECLINES, FALSE}),
        ("talks on", {STOPS}),
        ("stops late", {STOPS}),
        ("takes fright", {GOES_ON}),
        ("babbles", {FALSE}),
    ],
)
def test_each_fault_shows(bank: Bank, fault: str, rows: set[str]) -> None:
    found = failed(played(bank, fault)[0])
    if fault == "is impatient":  # how much of it shows depends on how long questions are
        assert ANSWERS in found
        assert FALSE in found
        assert found <= rows
    else:
        assert found == rows


def test_stretches_join_what_is_close_and_leave_out_clicks() -> None:
    sound = np.zeros(5 * RATE, np.float32)
    for begin, end in ((0.5, 0.9), (1.2, 1.6), (2.5, 3.0), (4.0, 4.02)):
        sound[int(begin * RATE) : int(end * RATE)] = 0.1
    assert [(begin / RATE, end / RATE) for begin, end in stretches(sound)] == [(0.5, 1.6), (2.5, 3.0)]


def test_the_table_is_markdown() -> None:
    sets = {"a": {"x": {"value": 3, "of": 4}}, "b": {"x": {"value": 2, "of": 4}, "y": {"value": 500, "unit": "ms"}}}
    assert table({"sets": sets}) == [
        "| behaviour | a | b |",
        "|---|---|---|",
        "| x | 3/4 | 2/4 |",
        "| y |  | 500 ms |",
    ]
