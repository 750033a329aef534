"""Encoding as it comes: what arrives can be read back, and does not wait for the end."""

from __future__ import annotations

import io

import numpy as np
import pytest

from antiphon.codecs.audio_file import AudioError, info, read
from antiphon.codecs.audio_stream import MEDIA_TYPES, AudioStream

RATE = 24000


def tone(seconds: float) -> np.ndarray:
    return (0.4 * np.sin(np.arange(round(seconds * RATE)) * 0.05)).astype(np.float32)


@pytest.mark.parametrize("format", MEDIA_TYPES)
def test_what_arrives_can_be_read_back(format: str) -> None:
    sound = tone(3.0)
    stream = AudioStream(format, RATE)
    parts = [stream.push(sound[at : at + 2400]) for at in range(0, len(sound), 2400)]
    early = sum(map(len, parts[:10]))
    data = b"".join([*parts, stream.push(sound[:0]), stream.finish()])
    assert early > 0.2 * len(data)
    if format == "pcm":
        heard = np.frombuffer(data, "<i2") / np.float32(32768)
    else:
        heard = read(io.BytesIO(data), RATE)
        assert info(io.BytesIO(data)).channels == 1
    shift = (
        max(range(2400), key=lambda lag: float(heard[lag : lag + 4800] @ sound[:4800]))
        if format in ("mp3", "aac")
        else 0
    )
    heard = heard[shift : shift + len(sound)]
    assert len(heard) > 0.98 * len(sound)
    lossy = {"mp3": 0.05, "aac": 0.1, "opus": 0.1}.get(format, 1e-4)
    assert np.sqrt(np.mean((heard[4800:-4800] - sound[: len(heard)][4800:-4800]) ** 2)) < lossy


def test_another_format_is_told() -> None:
    with pytest.raises(AudioError, match="no format 'midi': use pcm, wav"):
        AudioStream("midi", RATE)
    with pytest.raises(AudioError, match="cannot encode"):
        AudioStream("opus", 22050).push(tone(0.1))


def test_what_is_too_loud_is_clipped() -> None:
    data = AudioStream("pcm", RATE).push(np.array([2.0, -2.0, 0.5], np.float32))
    assert np.frombuffer(data, "<i2").tolist() == [32767, -32768, 16384]
