"""Opus (RFC 6716, RTP payload RFC 7587), packet by packet, with what live audio needs and FFmpeg's API does not offer:
concealment of lost packets (PLC), in-band forward error correction (FEC), and decoding straight to 16 or 24 kHz.

``decoder`` and ``encoder`` take libopus by ctypes: the copy bundled with PyAV's wheels, else the system's. Where there
is neither they take FFmpeg's wrapper through PyAV, which cannot conceal (lost packets are silent) and ignores FEC when
decoding. All calls are synchronous and cost tens of microseconds for 20 ms of speech.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from ctypes import POINTER, c_char_p, c_int, c_int32, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import av
import numpy as np

from .resample import Resampler, Samples

RATES = (8000, 12000, 16000, 24000, 48000)
CLOCK_RATE = 48000  # of RTP timestamps, whatever the audio's own rate (RFC 7587 section 4.1)
LONGEST = 120  # milliseconds a packet may hold (RFC 6716 section 3.2.5)
LONGEST_ENCODED = 1275  # bytes of one frame (RFC 6716 section 3.2.1)
SAMPLES_48K = {  # of one frame, by configuration number (RFC 6716 table 2)
    **{config: (480, 960, 1920, 2880)[config % 4] for config in range(12)},
    **{config: (480, 960)[config % 2] for config in range(12, 16)},
    **{config: (120, 240, 480, 960)[config % 4] for config in range(16, 32)},
}

_APPLICATION_VOIP = 2048
_SET_BITRATE, _SET_COMPLEXITY, _SET_INBAND_FEC, _SET_PACKET_LOSS, _SET_DTX = 4002, 4010, 4012, 4014, 4016
_GET_LOOKAHEAD, _RESET_STATE = 4027, 4028


class OpusError(ValueError):
    """A packet that is not Opus, or a setting that Opus does not have."""


class Decoder(Protocol):
    """One stream's packets to mono float32 samples at ``rate`` Hz; ``name`` says whose work it is."""

    rate: int
    name: str

    def decode(self, payload: bytes) -> Samples:
        """A packet -> its samples ``[n]``, 2.5 to 120 ms. Raises OpusError for a malformed one."""

    def recover(self, payload: bytes, count: int) -> Samples:
        """From the packet *after* a lost one: the lost one's last ``count`` samples, coarsely coded (FEC).

        Where the packet carries none (``carries_fec``) it is concealment. Call it before ``decode`` of the same
        packet. ``count`` is a multiple of 2.5 ms, at most 120 ms. Raises OpusError for a malformed packet.
        """

    def conceal(self, count: int) -> Samples:
        """``count`` samples (a multiple of 2.5 ms, at most 120 ms) that continue the sound where nothing came."""

    def reset(self) -> None:
        """Forget the stream: the next packet is the first of another."""


class Encoder(Protocol):
    """Mono float32 samples at ``rate`` Hz to packets, one for each ``encode``; ``lookahead``: samples of delay."""

    rate: int
    name: str
    lookahead: int

    def encode(self, samples: Samples) -> bytes:
        """One frame of 2.5, 5, 10, 20, 40 or 60 ms -> its packet. Raises OpusError for another length."""


def samples_48k(payload: bytes) -> int:
    """Duration of a packet in 1/48000 s, from its first bytes. Raises OpusError for one that cannot be Opus."""
    if not payload:
        raise OpusError("an Opus packet has at least one byte, got none")
    code = payload[0] & 3
    if code < 3:
        frames = 1 if code == 0 else 2
    elif len(payload) > 1:
        frames = payload[1] & 63
    else:
        frames = 0
    count = frames * SAMPLES_48K[payload[0] >> 3]
    if not 0 < count <= CLOCK_RATE * LONGEST // 1000:
        raise OpusError(f"an Opus packet holds 2.5 to {LONGEST} ms of sound, got {count * 1000 / CLOCK_RATE:g} ms")
    return count


def first_frame(payload: bytes) -> int:
    """Where a packet's first compressed frame begins (RFC 6716 section 3.2); past the end where it is empty."""
    code, nothing = payload[0] & 3, len(payload)
    if code < 2:
        return 1
    at, varying = 1, True
    if code == 3:
        if len(payload) < 2:
            return nothing
        at, varying = 2, bool(payload[1] & 0x80)
        if payload[1] & 0x40:  # padding: its length takes a byte for every 254
            while at < len(payload) and payload[at] == 255:
                at += 1
            at += 1
    lengths = (1 if code == 2 else (payload[1] & 63) - 1) if varying else 0
    for index in range(lengths):
        if at >= len(payload) or (index == 0 and payload[at] == 0):
            return nothing
        at += 1 if payload[at] < 252 else 2
    return at


def carries_fec(payload: bytes) -> bool:
    """Whether a packet holds a coarse copy of the one before it (LBRR, RFC 6716 section 4.2.4).

    The first bits of a SILK frame are, for each channel, a voice-activity flag a 20 ms and then the LBRR flag.
    """
    if not payload or payload[0] >= 0x80:  # configurations 16 to 31 are CELT alone, which has none
        return False
    at = first_frame(payload)
    if at >= len(payload):
        return False
    pieces = max(1, SAMPLES_48K[payload[0] >> 3] // 960)
    bits = payload[at]
    found = bits >> (7 - pieces) & 1
    if payload[0] & 4:
        found |= bits >> max(0, 6 - 2 * pieces) & 1
    return bool(found)


def decoder(rate: int = 16000) -> Decoder:
    """The best decoder there is. Raises OpusError for a rate that is not one of ``RATES``."""
    return LibopusDecoder(rate, library) if (library := find_libopus()) else AvDecoder(rate)


def encoder(
    rate: int = 24000,
    *,
    bitrate: int = 24000,
    complexity: int = 5,
    fec: bool = True,
    loss: int = 5,
    dtx: bool = False,
) -> Encoder:
    """The best encoder there is, for mono speech.

    bitrate: bits a second. complexity: 0 to 10, quality for CPU time. fec: put a coarse copy of each packet into the
    next, as much as ``loss`` (the percentage of packets expected to get lost) is worth. dtx: send next to nothing
    while nobody speaks (packets of one or two bytes, which need not be sent). Raises OpusError for what Opus lacks.
    """
    if library := find_libopus():
        return LibopusEncoder(rate, library, bitrate=bitrate, complexity=complexity, fec=fec, loss=loss, dtx=dtx)
    return AvEncoder(rate, bitrate=bitrate, complexity=complexity, fec=fec, loss=loss, dtx=dtx)


@lru_cache(maxsize=1)
def find_libopus() -> ctypes.CDLL | None:
    """libopus, the first that loads: PyAV's own copy, then the system's; None where there is none."""
    for path in (*bundled_libraries(), *system_libraries()):
        try:
            return load_libopus(path)
        except (OSError, AttributeError):  # not loadable, or too old to have a function that we call
            continue
    return None


def bundled_libraries() -> list[str]:
    """Where PyAV's wheels keep libopus: beside the package on Linux and Windows, inside it on macOS."""
    package = Path(av.__file__).parent
    folders = (package.with_name("av.libs"), package / ".dylibs")
    return [str(path) for folder in folders for path in sorted(folder.glob("*opus*")) if "opusfile" not in path.name]


def system_libraries() -> list[str]:
    """Names by which a system's libopus may load."""
    found = ctypes.util.find_library("opus")
    return ["libopus.so.0", "libopus.0.dylib", *([found] if found else [])]


def load_libopus(path: str) -> ctypes.CDLL:
    """A libopus with the types of the functions used here. Raises OSError or AttributeError where it is none."""
    library = ctypes.CDLL(path)
    for name, result, *arguments in (
        ("opus_decoder_create", c_void_p, c_int32, c_int, POINTER(c_int)),
        ("opus_decode_float", c_int, c_void_p, c_char_p, c_int32, c_void_p, c_int, c_int),
        ("opus_decoder_ctl", c_int, c_void_p, c_int),
        ("opus_decoder_destroy", None, c_void_p),
        ("opus_encoder_create", c_void_p, c_int32, c_int, c_int, POINTER(c_int)),
        ("opus_encode_float", c_int32, c_void_p, c_void_p, c_int, c_void_p, c_int32),
        ("opus_encoder_ctl", c_int, c_void_p, c_int),
        ("opus_encoder_destroy", None, c_void_p),
        ("opus_strerror", c_char_p, c_int),
        ("opus_get_version_string", c_char_p),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class _Handle:
    """A libopus object and its destruction."""

    def __init__(self, library: ctypes.CDLL, kind: str, *arguments: int) -> None:
        self._library = library
        error = c_int()
        self._state: int | None = getattr(library, f"opus_{kind}_create")(*arguments, ctypes.byref(error))
        if not self._state:
            raise OpusError(f"libopus makes no {kind} for {arguments}: {self._why(error.value)}")
        self._control = getattr(library, f"opus_{kind}_ctl")
        self._destroy = getattr(library, f"opus_{kind}_destroy")
        self.name: str = library.opus_get_version_string().decode()

    def _set(self, request: int, value: int) -> None:
        if code := self._control(self._state, request, c_int32(value)):
            raise OpusError(f"libopus refuses setting {request} = {value}: {self._why(code)}")

    def _why(self, code: int) -> str:
        text: bytes = self._library.opus_strerror(code)
        return text.decode()

    def __del__(self) -> None:
        if getattr(self, "_destroy", None) is not None and self._state:
            self._destroy(self._state)
            self._state = None


class LibopusDecoder(_Handle):
    """See ``Decoder``."""

    def __init__(self, rate: int, library: ctypes.CDLL) -> None:
        self.rate = _checked(rate)
        super().__init__(library, "decoder", rate, 1)
        self._decode = library.opus_decode_float
        self._most = rate * LONGEST // 1000
        self._out = np.empty(self._most, np.float32)
        self._address = self._out.ctypes.data

    def decode(self, payload: bytes) -> Samples:
        """See ``Decoder``."""
        if not payload:
            raise OpusError("an Opus packet has at least one byte, got none")
        return self._run(payload, self._most, 0)

    def recover(self, payload: bytes, count: int) -> Samples:
        """See ``Decoder``."""
        if not payload:
            raise OpusError("an Opus packet has at least one byte, got none")
        return self._run(payload, self._fitting(count), 1)

    def conceal(self, count: int) -> Samples:
        """See ``Decoder``."""
        return self._run(None, self._fitting(count), 0)

    def reset(self) -> None:
        """See ``Decoder``."""
        self._control(self._state, _RESET_STATE)

    def _run(self, payload: bytes | None, count: int, fec: int) -> Samples:
        size = 0 if payload is None else len(payload)
        made = self._decode(self._state, payload, size, self._address, count, fec)
        if made < 0:
            raise OpusError(f"a packet of {size} bytes is not Opus: {self._why(made)}")
        return self._out[:made].copy()

    def _fitting(self, count: int) -> int:
        if not 0 < count <= self._most or count % (self.rate // 400):
            raise OpusError(f"Opus fills gaps of multiples of 2.5 ms up to {LONGEST} ms, got {count} samples")
        return count


class LibopusEncoder(_Handle):
    """See ``Encoder``; the settings are those of ``encoder``."""

    def __init__(
        self, rate: int, library: ctypes.CDLL, *, bitrate: int, complexity: int, fec: bool, loss: int, dtx: bool
    ) -> None:
        self.rate = _checked(rate)
        super().__init__(library, "encoder", rate, 1, _APPLICATION_VOIP)
        self._encode = library.opus_encode_float
        for request, value in (
            (_SET_BITRATE, bitrate),
            (_SET_COMPLEXITY, complexity),
            (_SET_INBAND_FEC, int(fec)),
            (_SET_PACKET_LOSS, loss),
            (_SET_DTX, int(dtx)),
        ):
            self._set(request, value)
        lookahead = c_int32()
        self._control(self._state, _GET_LOOKAHEAD, ctypes.byref(lookahead))
        self.lookahead = lookahead.value
        self._out = ctypes.create_string_buffer(LONGEST_ENCODED * 3)

    def set_loss(self, percent: int) -> None:
        """What receiver reports say is lost: the more, the more bits go into FEC. Raises OpusError beyond 0..100."""
        self._set(_SET_PACKET_LOSS, percent)

    def encode(self, samples: Samples) -> bytes:
        """See ``Encoder``."""
        samples = np.ascontiguousarray(samples, np.float32)
        _checked_frame(len(samples), self.rate)
        made = self._encode(self._state, samples.ctypes.data, len(samples), self._out, len(self._out))
        if made < 0:
            raise OpusError(f"libopus does not encode {len(samples)} samples: {self._why(made)}")
        return ctypes.string_at(self._out, made)


class AvDecoder:
    """FFmpeg's decoder, where there is no libopus: no concealment, a millisecond more delay. See ``Decoder``."""

    name = "PyAV"
    _ready: Samples

    def __init__(self, rate: int) -> None:
        self.rate = _checked(rate)
        self.reset()

    def decode(self, payload: bytes) -> Samples:
        """See ``Decoder``."""
        count = samples_48k(payload) * self.rate // CLOCK_RATE
        try:
            frames = self._codec.decode(av.Packet(payload))
        except av.FFmpegError as error:
            raise OpusError(f"a packet of {len(payload)} bytes is not Opus: {error.strerror}") from error
        for frame in frames:
            self._hold(frame.to_ndarray().astype(np.float32, copy=False))
        return self._take(count)

    def recover(self, payload: bytes, count: int) -> Samples:
        """Silence, see ``Decoder``."""
        return self.conceal(count)

    def conceal(self, count: int) -> Samples:
        """What the resampler still holds, then silence; see ``Decoder``."""
        self._hold(np.zeros(count * CLOCK_RATE // self.rate, np.float32))
        return self._take(count)

    def reset(self) -> None:
        """See ``Decoder``."""
        self._codec = av.CodecContext.create("libopus" if "libopus" in av.codecs_available else "opus", "r")
        self._codec.format, self._codec.layout, self._codec.sample_rate = "fltp", "mono", CLOCK_RATE
        self._resampler = Resampler(CLOCK_RATE, self.rate)
        self._ready = np.zeros(self.rate // 500, np.float32)  # more than the resampler holds back

    def _hold(self, samples: Samples) -> None:
        self._ready = np.concatenate([self._ready, self._resampler.push(samples)])

    def _take(self, count: int) -> Samples:
        lacking = max(0, count - len(self._ready))
        taken, self._ready = self._ready[:count], self._ready[count:]
        return np.concatenate([taken, np.zeros(lacking, np.float32)]) if lacking else taken


class AvEncoder:
    """FFmpeg's wrapper of libopus, where libopus itself cannot be loaded. See ``Encoder``."""

    name = "PyAV"

    def __init__(self, rate: int, *, bitrate: int, complexity: int, fec: bool, loss: int, dtx: bool) -> None:
        self.rate = _checked(rate)
        self._options = {
            "application": "voip",
            "compression_level": str(complexity),
            "fec": str(int(fec)),
            "packet_loss": str(loss),
            "dtx": str(int(dtx)),
        }
        self._bitrate = bitrate
        self._codec: av.AudioCodecContext | None = None
        self._frame = 0
        self.lookahead = rate * 13 // 2000  # 6.5 ms, libopus' own for speech

    def encode(self, samples: Samples) -> bytes:
        """See ``Encoder``. All frames of a stream have the length of its first."""
        count = _checked_frame(len(samples), self.rate)
        if self._codec is None:
            self._frame, self._codec = count, self._open(count)
        if count != self._frame:
            raise OpusError(f"PyAV's encoder began with frames of {self._frame} samples and got one of {count}")
        pcm = np.ascontiguousarray(samples, np.float32)[None]
        frame = av.AudioFrame.from_ndarray(pcm, format="flt", layout="mono")
        frame.sample_rate = self.rate
        return b"".join(bytes(packet) for packet in self._codec.encode(frame))

    def _open(self, count: int) -> av.AudioCodecContext:
        codec = av.CodecContext.create("libopus", "w")
        codec.format, codec.layout, codec.sample_rate = "flt", "mono", self.rate
        codec.bit_rate = self._bitrate
        codec.options = {**self._options, "frame_duration": f"{1000 * count / self.rate:g}"}
        codec.open()
        return codec


def _checked(rate: int) -> int:
    if rate not in RATES:
        raise OpusError(f"Opus has the sample rates {', '.join(map(str, RATES))} Hz, got {rate}")
    return rate


def _checked_frame(count: int, rate: int) -> int:
    lengths = [rate * tenths // 10000 for tenths in (25, 50, 100, 200, 400, 600)]
    if count not in lengths:
        raise OpusError(f"an Opus frame at {rate} Hz has {', '.join(map(str, lengths))} samples, got {count}")
    return count
