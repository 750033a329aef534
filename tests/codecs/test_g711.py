"""G.711 against the standard library's coders where it still has them, FFmpeg's, and values from the standard."""

from __future__ import annotations

import sys
import warnings

import av
import numpy as np
import pytest

from antiphon.codecs import g711

ALL = np.arange(-32768, 32768).astype(np.int16)
CODES = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("law", ["mulaw", "alaw"])
def test_decoding_agrees_with_ffmpeg(law):
    decoder = av.CodecContext.create(f"pcm_{law}", "r")
    decoder.sample_rate, decoder.layout = 8000, "mono"
    (frame,) = decoder.decode(av.Packet(CODES.tobytes()))
    np.testing.assert_array_equal(g711.decode(CODES, law), frame.to_ndarray().reshape(-1))


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="audioop left the standard library")
@pytest.mark.parametrize("law", ["mulaw", "alaw"])
def test_agrees_with_audioop_for_every_value(law):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import audioop
    name = {"mulaw": "ulaw", "alaw": "alaw"}[law]
    codes = getattr(audioop, f"lin2{name}")(ALL.tobytes(), 2)
    values = getattr(audioop, f"{name}2lin")(CODES.tobytes(), 2)
    np.testing.assert_array_equal(g711.decode(CODES, law), np.frombuffer(values, np.int16))
    np.testing.assert_array_equal(g711.encode(ALL, law), np.frombuffer(codes, np.uint8))


@pytest.mark.parametrize("law", ["mulaw", "alaw"])
def test_a_decoded_value_encodes_to_a_code_of_the_same_value(law):
    values = g711.decode(CODES, law)
    np.testing.assert_array_equal(g711.decode(g711.encode(values, law), law), values)


@pytest.mark.parametrize("law", ["mulaw", "alaw"])
def test_the_error_is_within_half_a_step(law):
    back = g711.decode(g711.encode(ALL, law), law).astype(int)
    louder = np.abs(ALL.astype(int))
    assert np.all(np.abs(back - ALL) <= np.maximum(16, louder / 16 + (1000 * (louder > 32000))))


def test_values_of_the_standard():
    assert g711.encode(np.array([0, -32768, 32767], np.int16), "mulaw").tolist() == [0xFF, 0x00, 0x80]
    assert g711.encode(np.array([0, -32768, 32767], np.int16), "alaw").tolist() == [0xD5, 0x2A, 0xAA]
