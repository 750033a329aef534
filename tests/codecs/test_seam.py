"""The seam score: low wherever speech was never cut, high at clicks, gaps and steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import antiphon
from antiphon.codecs.audio_file import stream
from antiphon.codecs.seam import seam_scores

SPEECH = Path(antiphon.__file__).parent / "apps" / "samples" / "two_cities.flac"
RATE = 24000


@pytest.fixture(scope="module")
def speech() -> NDArray[np.float32]:
    return np.concatenate(list(stream(SPEECH, RATE, 10.0)))


def joins(pcm: NDArray[np.float32]) -> list[int]:
    return list(range(round(0.6 * RATE), len(pcm), round(0.6 * RATE)))


def test_speech_that_was_never_cut_is_clean(speech: NDArray[np.float32]) -> None:
    scores = seam_scores(speech, RATE, joins(speech))
    assert len(scores) > 10
    assert max(scores) <= 2


def test_clicks_are_heard(speech: NDArray[np.float32]) -> None:
    broken, cuts = speech.copy(), joins(speech)
    broken[cuts] += 0.3
    assert min(seam_scores(broken, RATE, cuts)) > 5


def test_a_part_left_out_is_heard(speech: NDArray[np.float32]) -> None:
    """A jump where the sound is loud, as a wrong position in a buffer makes it."""
    tone = np.sin(2 * np.pi * 200 / RATE * np.arange(2 * RATE)).astype(np.float32) * 0.3
    cut = RATE + 17
    broken = np.concatenate((tone[:cut], tone[cut + 60 :]))
    assert seam_scores(tone, RATE, [cut])[0] <= 2
    assert seam_scores(broken, RATE, [cut])[0] > 5


def test_only_the_join_itself_counts(speech: NDArray[np.float32]) -> None:
    broken = speech.copy()
    broken[20000] += 0.3
    far, near = seam_scores(broken, RATE, [24000, 20000])
    assert far <= 2 < 5 < near


def test_silence_and_the_ends_have_no_seam() -> None:
    silence = np.zeros(RATE, np.float32)
    silence[RATE // 2] = 1e-5
    assert max(seam_scores(silence, RATE, [1, 2, RATE // 2, RATE - 1])) <= 2


def test_misuse_is_told() -> None:
    for join in (0, 100, -3):
        with pytest.raises(ValueError, match=f"got {join}"):
            seam_scores(np.zeros(100, np.float32), RATE, [join])
    with pytest.raises(ValueError, match="second difference"):
        seam_scores(np.zeros(2, np.float32), RATE, [1])
