"""Opus in Ogg: read and written by FFmpeg too, cut anywhere, damaged anywhere."""

from __future__ import annotations

import io
import itertools

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.codecs.ogg import (
    FIRST,
    LONGEST_PACKET,
    OggError,
    OggOpusReader,
    OggOpusWriter,
    Pages,
    checksum,
    write_page,
)

RATE = 24000
TONE = (0.3 * np.sin(2 * np.pi * 300 * np.arange(RATE) / RATE)).astype(np.float32)


def written(pcm: np.ndarray, block: int = 1920, **options: float) -> bytes:
    writer = OggOpusWriter(RATE, **options)  # type: ignore[arg-type]
    return b"".join(writer.push(pcm[at : at + block]) for at in range(0, len(pcm), block))


def read(data: bytes, cuts: list[int] | None = None) -> np.ndarray:
    reader, pieces, ends = OggOpusReader(RATE), [], [0, *sorted(cuts or []), len(data)]
    for start, end in itertools.pairwise(ends):
        pieces += list(reader.push(data[start:end]))
    return np.concatenate(pieces)


def alike(heard: np.ndarray) -> float:
    """The correlation with the tone, at the best of shifts up to 1 ms: Opus' filters delay a little."""
    return max(np.corrcoef(heard[2400:20000], TONE[2400 - lag : 20000 - lag])[0, 1] for lag in range(-24, 25))


def test_the_checksum_is_the_published_one() -> None:
    def slow(data: bytes) -> int:
        register = 0
        for byte in data:
            register ^= byte << 24
            for _ in range(8):
                register = (register << 1 ^ (0x04C11DB7 if register >> 31 else 0)) & 0xFFFFFFFF
        return register

    for length in (0, 1, 27, 300):
        data = np.random.default_rng(length).bytes(length)
        assert checksum(data) == slow(data)


@pytest.mark.parametrize("milliseconds", [20, 40, 60])
def test_what_is_written_is_heard(milliseconds: int) -> None:
    heard = read(written(TONE, milliseconds=milliseconds))
    assert len(TONE) - len(heard) < RATE // 8
    assert alike(heard) > 0.99


def test_live_frames_arrive_whole() -> None:
    writer, reader = OggOpusWriter(RATE), OggOpusReader(RATE, trim=False)
    for frame in TONE[:9600].reshape(5, 1920):
        assert sum(map(len, reader.push(writer.push(frame)))) == 1920


def test_ffmpeg_reads_it() -> None:
    with av.open(io.BytesIO(written(TONE))) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.name in ("opus", "libopus")
        frames = [frame.to_ndarray() for frame in container.decode(stream)]
    heard = np.concatenate(frames, 1)[0][::2]
    assert abs(len(heard) - len(TONE)) < RATE // 8
    assert alike(heard) > 0.98


def test_it_reads_ffmpegs_and_chained_streams() -> None:
    def made(seed: int) -> bytes:
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="ogg") as container:
            stream = container.add_stream("libopus", rate=48000, layout="stereo")
            pcm = np.repeat(np.repeat(TONE, 2)[None], 2, 0).copy()
            frame = av.AudioFrame.from_ndarray(pcm, format="fltp", layout="stereo")
            frame.sample_rate = 48000
            resampler = av.AudioResampler(stream.format, stream.layout, 48000, stream.codec_context.frame_size)
            for part in [*resampler.resample(frame), None]:
                container.mux(stream.encode(part))
        return buffer.getvalue()

    heard = read(made(0))
    assert abs(len(heard) - RATE) < RATE // 20
    assert alike(heard) > 0.98
    assert len(read(made(0) + written(TONE))) > 1.8 * RATE


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9000), max_size=12))
def test_it_may_be_cut_anywhere(cuts: list[int]) -> None:
    data = written(TONE[:12000])
    assert np.array_equal(read(data, [cut % len(data) for cut in cuts]), read(data))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_an_ogg_error(data: st.DataObject) -> None:
    stream = bytearray(written(TONE[:9600]))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    reader = OggOpusReader(RATE)
    try:
        for _ in reader.push(bytes(stream)):
            pass
    except OggError:
        return
    assert len(reader._pages._data) < 65308


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=4), st.integers(0, 7), st.booleans())
def test_pages_that_are_valid_may_hold_anything(packets: list[bytes], flags: int, opus: bool) -> None:
    head = written(TONE[:1920]) if opus else b""
    reader = OggOpusReader(RATE)
    try:
        for _ in reader.push(head + write_page(packets, 1, 9, 0, flags)):
            pass
    except OggError:
        return


def test_what_waits_is_bounded() -> None:
    reader = OggOpusReader(RATE)
    full = bytearray(write_page([b"x" * 254], 1, 0, 0, FIRST))
    assert list(reader.push(written(TONE[:1920])))
    # A packet that never ends: pages of 255 full segments.
    body = b"\xff" * 255 + b"y" * 255 * 255
    for number in range(3):
        header = (
            b"OggS\0" + bytes([0 if number == 0 else 1]) + bytes(8) + (1).to_bytes(4, "little") + bytes(8) + b"\xff"
        )
        page = header + body
        page = page[:22] + checksum(page).to_bytes(4, "little") + page[26:]
        if (number + 1) * 65025 <= LONGEST_PACKET:
            assert not list(reader.push(page))
        else:
            with pytest.raises(OggError, match="not Opus"):
                list(reader.push(page))
            break
    else:
        pytest.fail("an endless packet was taken")
    assert full


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"RIFF", "begins with"),
        (write_page([b"x"], 1, 0, 0), "first page"),
        (write_page([b"nonsense"], 1, 0, 0, FIRST), "OpusHead"),
        (write_page([b"OpusHead" + bytes([1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0])], 1, 0, 0, FIRST), "3 channels"),
    ],
    ids=["no Ogg", "no first page", "no Opus", "channels"],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(OggError, match=message):
        list(OggOpusReader(RATE).push(data))
    with pytest.raises(OggError, match="do not fit"):
        write_page([b"x" * 65026], 1, 0, 0)


def test_pages_keep_what_is_in_them() -> None:
    packets = [b"", b"a" * 254, b"b" * 255, b"c" * 600]
    [page] = Pages().push(write_page(packets, 77, 5, 123, FIRST))
    assert (page.serial, page.sequence, page.granule, page.packets) == (77, 5, 123, tuple(packets))
    assert not page.open
    assert not page.continued
