"""Subtitle writers: timestamps, line breaks, cue lengths, no overlap, escaping."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.apps.subtitles import FORMATS, LINE, LONGEST, Cue, cues, timestamp
from antiphon.pipelines.captions import Final
from antiphon.pipelines.chunk import Word

TEXT = """It was the best of times, it was the worst of times. It was the age of wisdom, it was the age of
foolishness, it was the epoch of belief, it was the epoch of incredulity."""


def spoken(text: str, start: float = 0.0, pace: float = 0.3) -> tuple[Word, ...]:
    return tuple(
        Word(word, round(start + i * pace, 3), round(start + i * pace + 0.2, 3)) for i, word in enumerate(text.split())
    )


def written(format: str, *captions: Final, seconds: float = 60.0) -> str:
    out = io.StringIO()
    writer = FORMATS[format](out)
    for caption in captions:
        writer.add(caption)
    writer.close("a.wav", seconds)
    return out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00,000"),
        (1.2345, "00:00:01,234"),
        (59.9996, "00:01:00,000"),
        (3725.05, "01:02:05,050"),
        (360000, "100:00:00,000"),
    ],
)
def test_timestamps(seconds: float, text: str) -> None:
    assert timestamp(seconds, ",") == text


def test_lines_are_short_and_even_and_cues_keep_sentences_together() -> None:
    made = list(cues(spoken(TEXT)))
    assert [cue.lines for cue in made] == [
        ("It was the best of times,", "it was the worst of times."),
        ("It was the age of wisdom, it was the", "age of foolishness, it was the epoch of"),
        ("belief, it was the epoch of incredulity.",),
    ]
    assert " ".join(line for cue in made for line in cue.lines) == " ".join(TEXT.split())


def test_a_pause_parts_cues_and_a_short_one_does_not() -> None:
    together = (Word("yes", 0, 0.2), Word("no", 0.9, 1.1))
    assert len(list(cues(together))) == 1
    assert list(cues((Word("yes", 0, 0.2), Word("no", 1.1, 1.3)))) == [Cue(0, 0.2, ("yes",)), Cue(1.1, 1.3, ("no",))]


@given(
    st.lists(
        st.tuples(st.text("abcdefgh.,", min_size=1, max_size=60), st.floats(0.05, 2), st.floats(0, 2)), max_size=60
    )
)
def test_cues_hold_every_word_once_within_bounds(parts: list[tuple[str, float, float]]) -> None:
    words, at = [], 0.0
    for text, length, gap in parts:
        words.append(Word(text, at, at + length))
        at += length + gap
    made = list(cues(words))
    assert " ".join(line for cue in made for line in cue.lines) == " ".join(word.text for word in words)
    for cue in made:
        assert len(cue.lines) <= 2
        assert all(len(line) <= LINE or " " not in line for line in cue.lines)
        assert cue.end - cue.start <= LONGEST
    assert all(a.end <= b.start for a, b in pairwise(made))


def test_srt() -> None:
    captions = Final(spoken("Hello there, world."), 2.0), Final((Word("Bye.", 3.0, 3.1),), 4.0)
    assert written("srt", *captions, seconds=3.5) == (
        "1\n00:00:00,000 --> 00:00:01,000\nHello there, world.\n\n2\n00:00:03,000 --> 00:00:03,500\nBye.\n\n"
    )


def test_a_cue_is_not_shown_over_the_next() -> None:
    lines = written("srt", Final((Word("One.", 0.0, 0.1),), 1), Final((Word("Two.", 0.4, 0.5),), 2))
    assert re.findall(r"--> (\S+)", lines) == ["00:00:00,400", "00:00:01,400"]


def test_vtt_escapes_markup() -> None:
    text = written("vtt", Final((Word("<b>&", 0, 1), Word("-->", 1, 2)), 2))
    assert text == "WEBVTT\n\n00:00:00.000 --> 00:00:02.000\n&lt;b&gt;&amp; --&gt;\n\n"


def test_json_has_word_times() -> None:
    recording = json.loads(written("json", Final(spoken("Ça va"), 1.0), seconds=2.5))
    assert recording["audio"] == "a.wav"
    assert recording["seconds"] == 2.5
    (caption,) = recording["captions"]
    assert caption["text"] == "Ça va"
    assert caption["words"][1] == {"text": "va", "start": 0.3, "end": 0.5}


def test_text_is_written_at_once() -> None:
    out = io.StringIO()
    writer = FORMATS["text"](out)
    writer.add(Final(spoken("Hello there."), 1.0))
    assert out.getvalue() == "Hello there.\n"


@pytest.mark.parametrize(("format", "empty"), [("text", ""), ("srt", ""), ("vtt", "WEBVTT\n\n")])
def test_silence(format: str, empty: str) -> None:
    assert written(format) == empty
    assert json.loads(written("json"))["captions"] == []
