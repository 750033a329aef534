"""Audio files: any container and codec that FFmpeg reads, as mono float32 at the rate asked for; and writing some.

Reading takes constant memory whatever the length. FFmpeg is handed an open file and never a name, with every protocol
switched off, so that a playlist posing as a recording opens no other file and no network connection.

A damaged file is read as far as it goes, and what was wrong is reported: through ``report`` where one is given, else
as an ``AudioWarning``. Where nothing can be read there is an ``AudioError`` that says why.
"""

from __future__ import annotations

import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Self

import av
import numpy as np
from av.error import EOFError as EndOfFile
from av.error import FFmpegError

from .resample import FileResampler, Samples, mono

STDIN = "-"
Source = str | os.PathLike[str] | BinaryIO
Report = Callable[[str], None]

_ENCODERS = {
    ".wav": "pcm_s16le",
    ".flac": "flac",
    ".opus": "libopus",
    ".ogg": "libopus",
    ".mp3": "libmp3lame",
    ".m4a": "aac",
}
_GUESS_DURATION = {"aac", "ac3", "eac3", "mpeg", "mpegts"}  # from the first bit rate and the file's size
_OPUS_RATES = (8000, 12000, 16000, 24000, 48000)


class AudioError(Exception):
    """Audio that cannot be read or written; the message names the file and the reason."""


class AudioWarning(UserWarning):
    """Audio that was read with something missing or replaced."""


@dataclass(frozen=True)
class AudioInfo:
    """What a file says about itself. ``duration`` is in seconds, None where the container does not say."""

    container: str
    codec: str
    sample_rate: int
    channels: int
    duration: float | None


def info(source: Source) -> AudioInfo:
    """Raises AudioError for what cannot be opened."""
    with _binary(source) as file, _open(file, _name(source)) as (container, track):
        duration = None
        if track.duration is not None:
            duration = float(track.duration * track.time_base)
        elif container.duration is not None:
            duration = container.duration / av.time_base
        codec = track.codec_context
        return AudioInfo(container.format.name, codec.name, codec.sample_rate, codec.layout.nb_channels, duration)


def read(source: Source, sample_rate: int = 16000, *, report: Report | None = None) -> Samples:
    """The whole of ``source`` (a path, ``"-"`` for standard input, or a binary file) as mono float32 ``[n]``.

    Raises AudioError for what cannot be read. Channels are averaged; values that are not numbers become zeros.
    """
    return np.concatenate(list(stream(source, sample_rate, report=report)))


def stream(
    source: Source, sample_rate: int = 16000, chunk_seconds: float = 1.0, *, report: Report | None = None
) -> Iterator[Samples]:
    """As ``read``, in pieces of ``chunk_seconds`` (the last is shorter) and constant memory."""
    size = round(chunk_seconds * sample_rate)
    if size < 1:
        raise ValueError(f"a chunk needs at least one sample, got {chunk_seconds} s at {sample_rate} Hz")
    return _regular(_samples(source, sample_rate, report or _warn), size)


def write(path: str | os.PathLike[str], samples: Samples, sample_rate: int, *, bit_rate: int | None = None) -> None:
    """Write a whole recording; see ``AudioWriter``."""
    with AudioWriter(path, sample_rate, bit_rate=bit_rate) as writer:
        for start in range(0, len(samples), sample_rate):
            writer.write(samples[start : start + sample_rate])


class AudioWriter:
    """A file being written, in the format that the suffix names: 16-bit wav, flac, opus, ogg, mp3, m4a.

    Mono unless ``stereo``. ``bit_rate`` is in bits a second, for the lossy ones. Raises AudioError for another suffix,
    a rate that the format does not have, or a file that cannot be written. Close it, or use it in a ``with`` block.
    """

    def __init__(
        self, path: str | os.PathLike[str], sample_rate: int, *, stereo: bool = False, bit_rate: int | None = None
    ) -> None:
        self.path, self.sample_rate = Path(path), sample_rate
        self._layout = "stereo" if stereo else "mono"
        suffix = self.path.suffix.lower()
        encoder = _ENCODERS.get(suffix)
        if encoder is None:
            raise AudioError(f"{path}: cannot write {suffix or 'without a suffix'}; use {', '.join(_ENCODERS)}")
        if encoder == "libopus" and sample_rate not in _OPUS_RATES:
            rates = ", ".join(map(str, _OPUS_RATES))
            raise AudioError(f"{path}: Opus has no rate of {sample_rate} Hz; use one of {rates}")
        self._written = 0
        with self._named_errors():
            self._container: Any = av.open(str(path), "w")
            options: dict[str, Any] = {} if bit_rate is None else {"bit_rate": bit_rate}
            self._track: Any = self._container.add_stream(encoder, rate=sample_rate, layout=self._layout, **options)

    def write(self, samples: Samples) -> None:
        """Append ``[n]`` samples in -1 ... 1, or ``[2, n]``, left and right; louder ones are clipped."""
        shape = (samples.shape[-1],) if self._layout == "mono" else (2, samples.shape[-1])
        if samples.shape != shape:
            can = "[n]" if self._layout == "mono" else "[2, n]"
            raise AudioError(f"{self.path}: can write {self._layout} samples {can}, got shape {samples.shape}")
        if not samples.size:
            return
        piece = np.clip(np.ascontiguousarray(samples, np.float32), -1, 1).reshape(-1, shape[-1])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts, frame.time_base = self.sample_rate, self._written, Fraction(1, self.sample_rate)
        self._written += samples.shape[-1]
        with self._named_errors():
            self._container.mux(self._track.encode(frame))

    def close(self) -> None:
        """Write what the encoder still holds. May be called twice."""
        if self._container is not None:
            with self._named_errors():
                container, self._container = self._container, None
                try:
                    container.mux(self._track.encode(None))
                finally:
                    container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (FFmpegError, OSError, ValueError) as error:
            raise AudioError(f"{self.path}: cannot write: {_reason(error)}") from error


def _samples(source: Source, sample_rate: int, report: Report) -> Iterator[Samples]:
    """Decode, mix down and resample, in pieces as they come; then report what was wrong."""
    name = _name(source)
    bad, seconds, rate = 0, 0.0, 0
    resampling: FileResampler | None = None
    with _binary(source) as file, _open(file, name) as (container, track):
        cut_short = _cut_short(file)
        declared = 0.0
        if track.duration is not None and container.format.name not in _GUESS_DURATION:
            declared = float(track.duration * track.time_base)
        for frame in (decoder := _Decoder(container, track)):
            if resampling is None or frame.sample_rate != rate:
                if resampling is not None:
                    yield resampling.flush()
                rate = frame.sample_rate
                resampling = FileResampler(rate, sample_rate)
            samples, not_numbers = mono(frame)
            bad += not_numbers
            seconds += len(samples) / rate
            yield resampling.push(samples)
        if resampling is not None:
            yield resampling.flush()
    if not seconds:
        raise AudioError(f"{name}: holds no audio{' that can be decoded' if decoder.broken else ''}")
    extent = f"read {seconds:.1f} s" + (f" of {declared:.1f} s" if declared - seconds > 0.1 else "")
    if decoder.broken:
        report(f"{name}: damaged; {extent}")
    elif cut_short or declared - seconds > max(0.2, 0.01 * declared):
        report(f"{name}: cut short; {extent}")
    if bad:
        report(f"{name}: {bad} samples were not numbers and count as silence")


class _Decoder:
    """The frames of a track; ``broken`` counts the packets that gave none."""

    def __init__(self, container: Any, track: Any) -> None:
        self._container, self._track = container, track
        self.broken = 0

    def __iter__(self) -> Iterator[Any]:
        for packet in self._packets():
            try:
                yield from packet.decode()
            except EndOfFile:
                return
            except FFmpegError:
                self.broken += 1

    def _packets(self) -> Iterator[Any]:
        try:
            yield from self._container.demux(self._track)
        except FFmpegError:
            self.broken += 1


def _regular(pieces: Iterator[Samples], size: int) -> Iterator[Samples]:
    """Pieces of any length to pieces of ``size`` samples."""
    held: list[Samples] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        if count >= size:
            joined = np.concatenate(held)
            whole = count - count % size
            for start in range(0, whole, size):
                yield joined[start : start + size]
            held, count = [joined[whole:].copy()], count - whole
    if count:
        yield np.concatenate(held)


@contextmanager
def _open(file: BinaryIO, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its best audio track."""
    try:
        container = av.open(file, metadata_errors="replace", options={"protocol_whitelist": "none"})
    except FFmpegError as error:
        raise AudioError(f"{name}: not a recording that FFmpeg can read, or cut short ({_reason(error)})") from error
    with container:
        track = container.streams.best("audio")
        if track is None:
            raise AudioError(f"{name}: holds no audio track")
        if track.codec_context is None:
            raise AudioError(f"{name}: its audio is in a codec that this FFmpeg does not have")
        yield container, track


@contextmanager
def _binary(source: Source) -> Iterator[BinaryIO]:
    """An open file; what is not a plain file with content is refused before anything could block on it."""
    if source == STDIN:
        yield sys.stdin.buffer
        return
    if not isinstance(source, str | os.PathLike):
        yield source
        return
    path = Path(source)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise AudioError(f"{path}: is a folder, not a recording")
        if not stat.S_ISREG(status.st_mode):
            raise AudioError(f"{path}: is not a plain file; pipe it in and read '-' instead")
        if status.st_size == 0:
            raise AudioError(f"{path}: is empty")
        file = path.open("rb")
    except FileNotFoundError as error:
        raise AudioError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise AudioError(f"{path}: cannot read: {_reason(error)}") from error
    with file:
        yield file


def _cut_short(file: BinaryIO) -> bool:
    """Whether a seekable file is shorter than its RIFF header says, or an Ogg file without its last page."""
    with suppress(OSError, AttributeError):
        at = file.tell()
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(8)
        file.seek(max(0, size - (1 << 16)))
        tail = file.read(1 << 16)
        file.seek(at)
        if head[:4] == b"RIFF":
            stated = int.from_bytes(head[4:8], "little")
            return size < stated + 8 and stated < 0xFFFF_FF00
        if head[:4] == b"OggS":
            page = tail.rfind(b"OggS")
            return page < 0 or len(tail) < page + 6 or not tail[page + 5] & 4
    return False


def _name(source: Source) -> str:
    if source == STDIN:
        return "standard input"
    return str(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "audio"))


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).strip().rstrip(".")


def _warn(message: str) -> None:
    warnings.warn(message, AudioWarning, stacklevel=3)
