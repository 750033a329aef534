"""Sound encoded as it comes: bytes of a stream that is never rewound, in the formats of OpenAI's speech endpoint."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from .audio_file import AudioError
from .resample import Samples

MEDIA_TYPES = {
    "pcm": "audio/pcm",
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "flac": "audio/flac",
    "aac": "audio/aac",
}
_ENCODERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "wav": ("wav", "pcm_s16le", {}),
    "mp3": ("mp3", "libmp3lame", {"write_xing": "0"}),
    "opus": ("ogg", "libopus", {"page_duration": "100000"}),
    "flac": ("flac", "flac", {}),
    "aac": ("adts", "aac", {}),
}


class AudioStream:
    """Mono float32 samples in, bytes out.

    format: one of ``MEDIA_TYPES``; ``pcm`` is 16-bit little-endian without a header, ``wav`` has one that leaves the
    length open. Raises AudioError for another, and where this FFmpeg lacks the encoder.
    """

    def __init__(self, format: str, rate: int) -> None:
        self.rate = rate
        self._sink = _Sink()
        self._written = 0
        self._container: Any = None
        if format not in MEDIA_TYPES:
            raise AudioError(f"no format {format!r}: use {', '.join(MEDIA_TYPES)}")
        if format == "pcm":
            return
        container, encoder, options = _ENCODERS[format]
        try:
            self._container = av.open(self._sink, "w", format=container, container_options=options)
            self._track: Any = self._container.add_stream(encoder, rate=rate, layout="mono")
            self._track.codec_context.open()
        except (FFmpegError, ValueError) as error:
            raise AudioError(f"{format}: this FFmpeg cannot encode it ({error})") from error

    def push(self, samples: Samples) -> bytes:
        """The bytes that these samples, ``[n]`` in -1 ... 1, complete."""
        if self._container is None:
            data: bytes = np.clip(np.rint(samples * np.float32(32768)), -32768, 32767).astype("<i2").tobytes()
            return data
        piece = np.clip(np.ascontiguousarray(samples, np.float32), -1, 1)
        if len(piece):
            frame = av.AudioFrame.from_ndarray(piece[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = self.rate, self._written, Fraction(1, self.rate)
            self._written += len(piece)
            self._container.mux(self._track.encode(frame))
        return self._sink.take()

    def finish(self) -> bytes:
        """The last bytes."""
        if self._container is not None:
            self._container.mux(self._track.encode(None))
            self._container.close()
        return self._sink.take()


class _Sink:
    """What a container is written to: a file that cannot be sought."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def write(self, data: bytes) -> int:
        self._bytes += data
        return len(data)

    def take(self) -> bytes:
        """What was written since the last call."""
        data = bytes(self._bytes)
        self._bytes.clear()
        return data
