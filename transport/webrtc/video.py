"""The video receive path under aiortc: a peer's newest picture, and bounds on what waits before and after decoding.

aiortc (1.16) decodes every frame in a thread, out of one queue without a bound and into another. ``bound`` puts queues
in their places that have one: at most ``WAITING_FRAMES`` encoded frames wait, and beyond that none is taken until the
next key frame, which is asked for (PLI, RFC 4585 section 6.3.1); of the decoded ones the newest waits. A picture larger
than ``LARGEST`` is refused by its header (VP8: RFC 6386 section 9.1; H.264: section 7.3.2.1.1), before a decoder makes
room for it. The names used are private: ``PRIVATE`` lists them, ``bound`` refuses an aiortc without them.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Self

import av
from aiortc import RTCRtpReceiver
from aiortc.mediastreams import MediaStreamError

from .receiver import UnknownAiortc

WAITING_FRAMES = 30  # encoded: a second of video
LARGEST = 4096 * 2304  # pixels
BASELINE = 66  # the only H.264 profile that answers accept

PRIVATE = {
    "_RTCRtpReceiver__decoder_error",
    "_RTCRtpReceiver__decoder_queue",
    "_RTCRtpReceiver__decoder_thread",
    "_RTCRtpReceiver__kind",
}
"""What ``bound`` needs of an ``RTCRtpReceiver``, besides ``_queue`` of its track."""


@dataclass(slots=True)
class VideoStats:
    """frames: decoded. skipped: of those, overtaken by a newer one. undecoded: frames that came faster than they were
    decoded, and those after them up to a key frame. refused: frames too large. width, height: of the newest taken.
    """

    frames: int = 0
    skipped: int = 0
    undecoded: int = 0
    refused: int = 0
    width: int = 0
    height: int = 0


class VideoReceiver(AsyncIterator[av.VideoFrame]):
    """What a peer shows: the newest frame each time, waiting for one that was not given yet, until the track ends."""

    def __init__(self, track: Any, stats: VideoStats) -> None:
        self._track, self.stats = track, stats

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> av.VideoFrame:
        try:
            frame: av.VideoFrame = await self._track.recv()
        except MediaStreamError:
            raise StopAsyncIteration from None
        self.stats.width, self.stats.height = frame.width, frame.height
        return frame


def bound(receiver: RTCRtpReceiver) -> VideoReceiver:
    """Bound a receiver of video that has not started.

    Raises ValueError for one of audio or one that runs, and UnknownAiortc where aiortc has changed.
    """
    missing = sorted(name for name in PRIVATE if not hasattr(receiver, name))
    if missing or not hasattr(receiver.track, "_queue"):
        raise UnknownAiortc(f"aiortc's RTCRtpReceiver lacks {', '.join(missing)}: install aiortc>=1.16,<1.17")
    kind = _private(receiver, "kind")
    if kind != "video" or _private(receiver, "decoder_thread") is not None:
        raise ValueError(f"only video that has not begun is bounded here, got a receiver of {kind}")
    stats = VideoStats()
    setattr(receiver, "_RTCRtpReceiver__decoder_queue", _Encoded(stats, _private(receiver, "decoder_error")))  # noqa: B010
    receiver.track._queue = _Newest(stats)
    return VideoReceiver(receiver.track, stats)


class _Encoded(queue.Queue[Any]):
    """Frames on their way to the decoder's thread, put there by the event loop; None ends the thread."""

    def __init__(self, stats: VideoStats, wanting: threading.Event) -> None:
        super().__init__()
        self._stats, self._wanting = stats, wanting  # wanting: aiortc is to ask for a key frame
        self._broken = False  # the decoder lacks a frame that the next ones build on

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Never waits."""
        if item is None:
            self._empty()
        else:
            codec, frame = item
            key, pixels = _head(codec.mimeType.lower(), frame.data)
            if pixels > LARGEST:
                self._stats.refused += 1
                self._broken = True
                return
            if self.qsize() >= WAITING_FRAMES or (self._broken and not key):
                self._stats.undecoded += 1
                self._broken = True
                self._wanting.set()
                return
            self._broken = False
        super().put(item)

    def _empty(self) -> None:
        try:
            while True:
                self.get_nowait()
        except queue.Empty:
            return


class _Newest(asyncio.Queue[av.VideoFrame | None]):
    """At most one decoded frame, the newest; None is the end."""

    def __init__(self, stats: VideoStats) -> None:
        super().__init__(1)
        self._stats = stats

    async def put(self, item: av.VideoFrame | None) -> None:
        """Never waits."""
        if self.full():
            self.get_nowait()
            self._stats.skipped += 1
        self._stats.frames += item is not None
        self.put_nowait(item)


def _head(kind: str, data: bytes) -> tuple[bool, int]:
    """Whether an encoded frame needs none before it, and its pixels where it says how large it is (else 0)."""
    return _vp8(data) if kind == "video/vp8" else _h264(data)


def _vp8(data: bytes) -> tuple[bool, int]:
    if len(data) < 10 or data[0] & 1:
        return False, 0
    width, height = int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF
    return True, width * height


def _h264(data: bytes) -> tuple[bool, int]:
    key, pixels = False, 0
    for unit in data.split(b"\0\0\1")[1:]:
        kind = unit[0] & 31 if unit else 0
        if kind == 5:
            key = True
        elif kind == 7:
            pixels = max(pixels, _sequence_pixels(unit[1:64].replace(b"\0\0\3", b"\0\0")))
    return key, pixels


def _sequence_pixels(data: bytes) -> int:
    """Pixels of an H.264 sequence parameter set; more than may be where it is no baseline one, or is cut short."""
    if len(data) < 4 or data[0] != BASELINE:
        return LARGEST + 1
    bits = _Bits(data[3:])
    try:
        bits.golomb()  # seq_parameter_set_id
        bits.golomb()  # log2_max_frame_num_minus4
        order = bits.golomb()  # pic_order_cnt_type
        if order == 0:
            bits.golomb()
        elif order == 1:
            bits.read(1)
            bits.golomb()
            bits.golomb()
            for _ in range(bits.golomb()):
                bits.golomb()
        bits.golomb()  # max_num_ref_frames
        bits.read(1)
        width, height = bits.golomb() + 1, bits.golomb() + 1  # in macroblocks
        return 256 * width * height * (2 - bits.read(1))
    except EOFError:
        return LARGEST + 1


class _Bits:
    """Bits of bytes, first ones first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data), 8 * len(data)

    def read(self, count: int) -> int:
        """Raises EOFError."""
        self._left -= count
        if self._left < 0:
            raise EOFError
        return (self._value >> self._left) & ((1 << count) - 1)

    def golomb(self) -> int:
        """An unsigned Exp-Golomb number (H.264 section 9.1). Raises EOFError."""
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)


def _private(receiver: RTCRtpReceiver, name: str) -> Any:
    return getattr(receiver, f"_RTCRtpReceiver__{name}")
