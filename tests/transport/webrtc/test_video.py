"""Bounds on a peer's video: what waits, what is refused by its header, and that aiortc is still built as it was."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from aiortc import RTCRtpReceiver
from aiortc.mediastreams import MediaStreamError
from aiortc.rtcrtpparameters import RTCRtpCodecParameters, RTCRtpReceiveParameters
from aiortc.rtcrtpreceiver import RemoteStreamTrack

from antiphon.transport.webrtc import video
from antiphon.transport.webrtc.receiver import UnknownAiortc
from antiphon.transport.webrtc.video import LARGEST, PRIVATE, WAITING_FRAMES, VideoReceiver, bound

VP8 = RTCRtpCodecParameters(mimeType="video/VP8", clockRate=90000, payloadType=97)
H264 = RTCRtpCodecParameters(mimeType="video/H264", clockRate=90000, payloadType=99)


class Transport:
    """The part of a DTLS transport that receivers need."""

    state = "new"
    _stats_id = "transport"

    def _register_rtp_receiver(self, receiver: RTCRtpReceiver, parameters: RTCRtpReceiveParameters) -> None: ...

    def _unregister_rtp_receiver(self, receiver: RTCRtpReceiver) -> None: ...


def receiver(kind: str = "video") -> RTCRtpReceiver:
    made = RTCRtpReceiver(kind, Transport())  # type: ignore[arg-type]
    made._track = RemoteStreamTrack(kind=kind)
    return made


def encoded(codec: str, width: int, height: int, count: int) -> list[bytes]:
    """Frames of a moving picture, the first a key frame."""
    context = av.CodecContext.create({"vp8": "libvpx", "h264": "libx264"}[codec], "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.time_base = Fraction(1, 30)
    context.options = {"vp8": {"lag-in-frames": "0"}, "h264": {"profile": "baseline", "tune": "zerolatency"}}[codec]
    found = []
    for number in range(count):
        pixels = np.full((height, width, 3), 8 * number % 256, np.uint8)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts = number
        found += [bytes(packet) for packet in context.encode(frame)]
    return found + [bytes(packet) for packet in context.encode(None)]


def put(one: RTCRtpReceiver, codec: RTCRtpCodecParameters, data: bytes, timestamp: int = 0) -> None:
    """As aiortc does when the packets of a frame are there."""
    one._RTCRtpReceiver__decoder_queue.put((codec, SimpleNamespace(data=data, timestamp=timestamp)))


async def until(holds: Any) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


def test_aiortc_is_built_as_it_was() -> None:
    async def main() -> None:
        one = receiver()
        assert all(hasattr(one, name) for name in PRIVATE)
        frames = bound(one)
        assert isinstance(frames, VideoReceiver)
        waiting, newest = one._RTCRtpReceiver__decoder_queue, one.track._queue
        await one.receive(RTCRtpReceiveParameters(codecs=[VP8]))
        assert one._RTCRtpReceiver__decoder_thread._args[1:3] == (waiting, newest)
        await one.stop()
        assert one._RTCRtpReceiver__decoder_thread is None

    asyncio.run(main())


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_an_aiortc_that_has_changed_is_refused(name: str) -> None:
    async def main() -> None:
        one = receiver()
        delattr(one, name)
        with pytest.raises(UnknownAiortc, match=name):
            bound(one)

    asyncio.run(main())


def test_only_video_that_has_not_begun() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="a receiver of audio"):
            bound(receiver("audio"))
        one = receiver()
        await one.receive(RTCRtpReceiveParameters(codecs=[VP8]))
        with pytest.raises(ValueError, match="not begun"):
            bound(one)
        await one.stop()

    asyncio.run(main())


@pytest.mark.parametrize(("codec", "name"), [(VP8, "vp8"), (H264, "h264")])
def test_the_newest_picture_is_given(codec: RTCRtpCodecParameters, name: str) -> None:
    async def main() -> None:
        one = receiver()
        frames = bound(one)
        await one.receive(RTCRtpReceiveParameters(codecs=[codec]))
        sent = encoded(name, 64, 48, 20)
        for number, data in enumerate(sent):
            put(one, codec, data, 3000 * number)
            await until(lambda number=number: frames.stats.frames == number + 1)
        assert one.track._queue.qsize() == 1
        newest = await anext(frames)
        assert newest.pts == 3000 * 19
        assert abs(int(newest.to_ndarray(format="rgb24").mean()) - 8 * 19) < 6
        stats = frames.stats
        assert (stats.frames, stats.skipped, stats.undecoded, stats.refused) == (20, 19, 0, 0)
        assert (stats.width, stats.height) == (64, 48)
        await one.stop()
        with pytest.raises(StopAsyncIteration):
            await anext(frames)
        with pytest.raises(MediaStreamError):
            await one.track.recv()

    asyncio.run(main())


def test_frames_that_come_too_fast_are_left_out_up_to_a_key_frame_that_is_asked_for() -> None:
    """Nothing decodes here: the thread has not been started."""

    async def main() -> None:
        one = receiver()
        frames = bound(one)
        waiting, wanting = one._RTCRtpReceiver__decoder_queue, one._RTCRtpReceiver__decoder_error
        key, *rest = encoded("vp8", 64, 48, 10)
        for number in range(WAITING_FRAMES):
            put(one, VP8, rest[number % 9] if number else key)
        assert (waiting.qsize(), wanting.is_set()) == (WAITING_FRAMES, False)
        for number in range(1000):
            put(one, VP8, rest[number % 9])
        assert (waiting.qsize(), wanting.is_set(), frames.stats.undecoded) == (WAITING_FRAMES, True, 1000)
        for _ in range(10):
            waiting.get_nowait()
        put(one, VP8, rest[0])
        assert (waiting.qsize(), frames.stats.undecoded) == (WAITING_FRAMES - 10, 1001)
        put(one, VP8, key)
        put(one, VP8, rest[0])
        assert (waiting.qsize(), frames.stats.undecoded) == (WAITING_FRAMES - 8, 1001)
        waiting.put(None)
        assert waiting.get_nowait() is None  # the end waits for nothing

    asyncio.run(main())


def test_a_picture_that_is_too_large_is_refused_by_its_header() -> None:
    async def main() -> None:
        one = receiver()
        frames = bound(one)
        waiting = one._RTCRtpReceiver__decoder_queue
        key, following = encoded("vp8", 64, 48, 2)
        put(one, VP8, key[:6] + b"\xff\x3f\xff\x3f" + key[10:])
        put(one, VP8, following)
        assert (waiting.qsize(), frames.stats.refused, frames.stats.undecoded) == (0, 1, 1)
        put(one, VP8, key)
        assert waiting.qsize() == 1

    asyncio.run(main())


@pytest.mark.parametrize("size", [(64, 48), (1280, 720), (1920, 1088), (640, 360)])
@pytest.mark.parametrize("codec", ["vp8", "h264"])
def test_sizes_are_read_from_headers(codec: str, size: tuple[int, int]) -> None:
    key, following = encoded(codec, *size, 2)
    needs_none, pixels = video._head(f"video/{codec}", key)
    width, height = size
    whole = width * -(-height // 16) * 16 if codec == "h264" else width * height  # H.264 codes whole macroblocks
    assert (needs_none, pixels) == (True, whole)
    assert video._head(f"video/{codec}", following) == (False, 0)


def test_a_sequence_that_is_cut_short_or_of_another_profile_is_too_large() -> None:
    key, _ = encoded("h264", 64, 48, 2)
    units = key.split(b"\0\0\1")
    sequence = next(unit for unit in units if unit and unit[0] & 31 == 7)
    for wrong in (sequence[:1], sequence[:4], sequence[:1] + b"\x64" + sequence[2:], sequence[:4] + b"\0" * 40):
        assert video._h264(b"\0\0\0\1" + wrong) == (False, LARGEST + 1)
    for empty in (b"", b"\0", b"\0\0\1", b"\x01" * 20):
        assert video._h264(empty) == (False, 0)
        assert video._vp8(empty) == (False, 0)
