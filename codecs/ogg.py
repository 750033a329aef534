"""Opus in Ogg as a live stream, both ways: pages (RFC 3533), and what Opus puts into them (RFC 7845).

Data may be cut anywhere. What waits for its rest is bounded: less than a page, and less than the longest Opus packet.
A page that begins a new stream begins anew with a fresh decoder (chained streams). One stream at a time is read.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .opus import CLOCK_RATE, Encoder, OpusError, decoder, encoder, samples_48k
from .resample import Samples

CAPTURE = b"OggS"
HEADER = struct.Struct("<4sBBqIIIB")  # capture, version, flags, granule, serial, sequence, checksum, segments
CONTINUED, FIRST, LAST = 1, 2, 4
HEAD = struct.Struct("<8sBBHIhB")  # magic, version, channels, pre-skip, input rate, gain, mapping family
LONGEST_PACKET = 48 * 1275 + 512  # the longest Opus packet, and room for comments (RFC 7845 section 6)
NO_GRANULE = -1
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class OggError(ValueError):
    """Data that is not Ogg, or not Opus in Ogg."""


@dataclass(frozen=True)
class Page:
    """A page's packets; the first is the rest of one before if ``continued``, the last is cut off if ``open``."""

    serial: int
    sequence: int
    granule: int
    flags: int
    packets: tuple[bytes, ...]
    open: bool

    @property
    def continued(self) -> bool:
        """Whether the first packet is the rest of one."""
        return bool(self.flags & CONTINUED)


def checksum(page: bytes) -> int:
    """Ogg's CRC of a page whose checksum field is zero: polynomial 0x04C11DB7, most significant bit first, from 0.

    It is zlib's on mirrored bits, without the inversions at either end.
    """
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_MIRRORED), "big")


def write_page(packets: Sequence[bytes], serial: int, sequence: int, granule: int, flags: int = 0) -> bytes:
    """A page of whole packets. Raises OggError for more than fit."""
    lacing = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
    if len(lacing) > 255:
        raise OggError(f"{len(packets)} packets of {sum(map(len, packets))} bytes do not fit into a page")
    body = lacing + b"".join(packets)

    def head(check: int) -> bytes:
        return HEADER.pack(CAPTURE, 0, flags, granule, serial, sequence & 0xFFFFFFFF, check, len(lacing))

    return head(checksum(head(0) + body)) + body


class Pages:
    """Cuts data into pages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def push(self, data: bytes) -> Iterator[Page]:
        """The pages that ``data`` completes; go through all of them. Raises OggError for what is not Ogg."""
        self._data += data
        while (size := self._size()) is not None:
            page = bytes(self._data[:size])
            del self._data[:size]
            yield self._parsed(page)

    def _size(self) -> int | None:
        """Of the first page, if it is there."""
        data = self._data
        if not CAPTURE.startswith(data[:4]) and not data.startswith(CAPTURE):
            raise OggError(f"an Ogg page begins with {CAPTURE!r}, not {bytes(data[:4])!r}")
        if len(data) < HEADER.size or len(data) < HEADER.size + data[HEADER.size - 1]:
            return None
        segments = data[HEADER.size - 1]
        size = HEADER.size + segments + sum(data[HEADER.size : HEADER.size + segments])
        return size if len(data) >= size else None

    def _parsed(self, page: bytes) -> Page:
        _, version, flags, granule, serial, sequence, check, segments = HEADER.unpack_from(page)
        if version != 0:
            raise OggError(f"an Ogg page of version {version}: there is only version 0")
        if checksum(page[:22] + bytes(4) + page[26:]) != check:
            raise OggError(f"page {sequence} is damaged: its checksum does not match")
        packets, at, start = [], HEADER.size + segments, HEADER.size + segments
        lacing = page[HEADER.size : at]
        for length in lacing:
            at += length
            if length < 255:
                packets.append(page[start:at])
                start = at
        unfinished = bool(lacing) and lacing[-1] == 255
        if unfinished:
            packets.append(page[start:at])
        return Page(serial, sequence, granule, flags, tuple(packets), unfinished)


class OggOpusReader:
    """Ogg/Opus to mono sound at ``rate`` Hz, one of ``opus.RATES``.

    trim: leave out the encoder's lead-in (pre-skip). Live, keeping it costs nothing, and what the sender cuts into
    frames arrives in the same frames.
    """

    def __init__(self, rate: int, *, trim: bool = True) -> None:
        self.rate, self._trim = rate, trim
        self._pages = Pages()
        self._serial: int | None = None
        self._headers = 0  # of the stream, that have come
        self._part = b""  # of a packet that goes on in the next page
        self._skip = 0  # samples still to be left out
        self._gain = 1.0
        self._decoder = decoder(rate)

    def push(self, data: bytes) -> Iterator[Samples]:
        """The sound of each page that ``data`` completes; go through all of it.

        Raises OggError for what is not Opus in Ogg: the stream cannot go on then.
        """
        for page in self._pages.push(data):
            if page.flags & FIRST:
                self._serial, self._headers, self._part = page.serial, 0, b""
            if self._serial is None:
                raise OggError("the stream does not begin with its first page")
            if page.serial != self._serial:
                raise OggError(f"page of stream {page.serial} in stream {self._serial}: send one stream at a time")
            pieces = [pcm for packet in self._packets(page) if (pcm := self._take(packet)) is not None and pcm.size]
            if pieces:
                yield np.concatenate(pieces)

    def _packets(self, page: Page) -> Iterator[bytes]:
        packets = list(page.packets)
        if page.continued and packets:
            packets[0] = self._part + packets[0]
        self._part = packets.pop() if page.open else b""
        if len(self._part) > LONGEST_PACKET:
            raise OggError(f"a packet of more than {LONGEST_PACKET} bytes is not Opus")
        yield from packets

    def _take(self, packet: bytes) -> Samples | None:
        if self._headers < 2:
            self._header(packet)
            return None
        if not packet:
            return None
        try:
            samples_48k(packet)
            pcm = self._decoder.decode(packet)
        except OpusError as error:
            raise OggError(str(error)) from error
        skipped = min(self._skip, len(pcm))
        self._skip -= skipped
        return pcm[skipped:] * np.float32(self._gain) if self._gain != 1.0 else pcm[skipped:]

    def _header(self, packet: bytes) -> None:
        self._headers += 1
        if self._headers == 2:
            if not packet.startswith(b"OpusTags"):
                raise OggError("the second packet of Opus in Ogg is OpusTags")
            return
        if len(packet) < HEAD.size or not packet.startswith(b"OpusHead"):
            raise OggError("the first packet of Opus in Ogg is OpusHead")
        _, version, channels, skip, _, gain, family = HEAD.unpack_from(packet)
        if version >> 4 or family or channels not in (1, 2):
            raise OggError(f"version {version}, {channels} channels, family {family}: send mono or stereo of family 0")
        self._decoder = decoder(self.rate)
        self._skip = skip * self.rate // CLOCK_RATE if self._trim else 0
        self._gain = 10 ** (gain / 256 / 20)


class OggOpusWriter:
    """Mono sound at ``rate`` Hz to Ogg/Opus; packets of ``milliseconds``, 2.5 to 60."""

    def __init__(
        self, rate: int = 24000, *, milliseconds: float = 40, serial: int = 1, coder: Encoder | None = None
    ) -> None:
        self._encoder = coder or encoder(rate, bitrate=32000, fec=False)
        self.rate, self._serial = rate, serial
        self._frame = round(rate * milliseconds / 1000)
        self._pending = np.zeros(0, np.float32)
        self._sequence = 0
        self._granule = 0
        self._skip = self._encoder.lookahead * CLOCK_RATE // rate

    def push(self, samples: Samples) -> bytes:
        """The pages that float32 samples ``[n]`` complete, with the headers before the first; may be empty."""
        joined = np.concatenate((self._pending, samples))
        count = len(joined) // self._frame
        self._pending = joined[count * self._frame :]
        data = self._headers() if count and not self._sequence else b""
        frames = joined[: count * self._frame].reshape(count, self._frame)
        for first in range(0, count, 32):  # packets a page: of at most 1275 bytes, 6 segments each
            part = frames[first : first + 32]
            self._granule += part.size * CLOCK_RATE // self.rate
            data += self._page([self._encoder.encode(frame) for frame in part], self._granule)
        return data

    def _headers(self) -> bytes:
        head = HEAD.pack(b"OpusHead", 1, 1, self._skip, self.rate, 0, 0)
        vendor = b"antiphon"
        tags = b"OpusTags" + struct.pack("<I", len(vendor)) + vendor + struct.pack("<I", 0)
        return self._page([head], 0, FIRST) + self._page([tags], 0)

    def _page(self, packets: Sequence[bytes], granule: int, flags: int = 0) -> bytes:
        page = write_page(packets, self._serial, self._sequence, granule, flags)
        self._sequence += 1
        return page
