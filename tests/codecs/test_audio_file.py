"""Audio files: formats, channels, rates, damage, refusal, constant memory."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import wave
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest

from antiphon.codecs import audio_file
from antiphon.codecs.audio_file import AudioError, AudioWarning
from antiphon.codecs.resample import Samples

SECONDS, RATE = 3, 16000


def tone(seconds: float = SECONDS, rate: int = RATE) -> Samples:
    """A chord that swells, so that a shift or a gap shows."""
    t = np.arange(int(seconds * rate)) / rate
    chord = sum(np.sin(2 * np.pi * f * t) for f in (220.0, 523.0, 1310.0))
    return (0.2 * chord * (0.2 + t / seconds)).astype(np.float32)


def make(path: Path, samples: Samples | None = None) -> Path:
    audio_file.write(path, tone() if samples is None else samples, RATE)
    return path


def wav(path: Path, frames: np.ndarray, rate: int, kind: int = 1) -> Path:
    """A WAV file of ``[n, channels]`` frames by hand, so that floats and many channels are possible."""
    data, width = frames.tobytes(), frames.dtype.itemsize
    channels = frames.shape[1]
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * channels * width, channels * width, 8 * width)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


def snr(reference: Samples, got: Samples) -> float:
    n = min(len(reference), len(got))
    return float(10 * np.log10(np.mean(reference[:n] ** 2) / np.mean((reference[:n] - got[:n]) ** 2)))


def heard(source: audio_file.Source) -> tuple[Samples, list[str]]:
    reports: list[str] = []
    return audio_file.read(source, report=reports.append), reports


@pytest.mark.parametrize(
    ("suffix", "least"), [(".wav", 80), (".flac", 80), (".opus", 20), (".ogg", 20), (".mp3", 20), (".m4a", 20)]
)
def test_written_is_read(tmp_path: Path, suffix: str, least: float) -> None:
    path = make(tmp_path / f"a{suffix}")
    samples, reports = heard(path)
    assert reports == []
    assert samples.dtype == np.float32
    assert 0 <= len(samples) - SECONDS * RATE < 1024
    assert snr(tone(), samples) > least
    described = audio_file.info(path)
    assert described.channels == 1
    assert described.duration == pytest.approx(SECONDS, abs=0.05)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_any_rate_becomes_the_one_asked_for(tmp_path: Path, rate: int) -> None:
    frames = np.round(tone(rate=rate) * 32767).astype("<i2")[:, None]
    samples, _ = heard(wav(tmp_path / "a.wav", frames, rate))
    assert abs(len(samples) - SECONDS * RATE) <= 1
    assert snr(tone(), samples) > 55


@pytest.mark.parametrize("channels", [2, 6, 8, 16])
def test_channels_are_averaged(tmp_path: Path, channels: int) -> None:
    frames = np.zeros((SECONDS * RATE, channels), "<i2")
    frames[:, -1] = np.round(tone() * 32767)
    samples, _ = heard(wav(tmp_path / "a.wav", frames, RATE))
    np.testing.assert_allclose(samples, tone() / channels, atol=1e-4)


def test_video_gives_its_audio_track(tmp_path: Path) -> None:
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=RATE)
        audio.layout = "mono"
        for _ in range(SECONDS * 10):
            container.mux(video.encode(av.VideoFrame(64, 64, "yuv420p")))
        frame = av.AudioFrame.from_ndarray(tone()[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
        container.mux(video.encode(None))
    assert snr(tone(), heard(path)[0]) > 60


def test_chunks_are_regular_and_add_up(tmp_path: Path) -> None:
    path = make(tmp_path / "a.flac")
    chunks = list(audio_file.stream(path, RATE, 0.7))
    assert [len(chunk) for chunk in chunks] == [11200] * 4 + [3200]
    assert np.array_equal(np.concatenate(chunks), audio_file.read(path))
    with pytest.raises(ValueError, match=r"at least one sample, got 0\.0 s"):
        audio_file.stream(path, RATE, 0.0)


def test_silence_is_silence(tmp_path: Path) -> None:
    samples, reports = heard(make(tmp_path / "a.flac", np.zeros(RATE, np.float32)))
    assert not samples.any()
    assert (len(samples), reports) == (RATE, [])


def test_what_is_not_a_number_is_replaced_and_counted(tmp_path: Path) -> None:
    frames = tone()[:, None].astype("<f4")
    frames[1000:1100] = np.nan
    frames[2000] = np.inf
    path = wav(tmp_path / "a.wav", frames, RATE, kind=3)
    samples, reports = heard(path)
    assert reports == [f"{path}: 101 samples were not numbers and count as silence"]
    assert np.isfinite(samples).all()
    assert np.array_equal(samples[1100:2000], tone()[1100:2000])
    frames[:] = np.nan
    with pytest.warns(AudioWarning, match="48000 samples were not numbers"):
        assert not audio_file.read(wav(path, frames, RATE, kind=3)).any()


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".opus", ".mp3"])
def test_truncated_is_read_as_far_as_it_goes_and_reported(tmp_path: Path, suffix: str) -> None:
    path = make(tmp_path / f"a{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    samples, reports = heard(path)
    assert 0.4 * SECONDS * RATE < len(samples) < 0.8 * SECONDS * RATE
    (line,) = reports
    assert "cut short; read" in line or "damaged; read" in line
    assert snr(tone()[: len(samples)], samples) > 15


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".opus", ".mp3", ".m4a"])
@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere_is_a_result_or_a_clear_error(tmp_path: Path, suffix: str, seed: int) -> None:
    path, rng = make(tmp_path / f"a{suffix}"), np.random.default_rng(seed)
    broken = bytearray(path.read_bytes())
    for at in rng.integers(0, len(broken), 40).tolist():
        broken[at : at + 8] = rng.bytes(min(8, len(broken) - at))
    path.write_bytes(bytes(broken))
    samples = np.zeros(0)
    with suppress(AudioError):
        samples, _ = heard(path)
    assert np.isfinite(samples).all()


def test_an_mp4_without_its_index_is_an_error(tmp_path: Path) -> None:
    path = make(tmp_path / "a.m4a")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(AudioError, match="cut short"):
        audio_file.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not a recording, just text\n" * 50, "not a recording that FFmpeg can read"),
        (bytes(200_000), "not a recording that FFmpeg can read"),
        (b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80\x3e\0\0\0\x7d\0\0\2\0\x10\0data\0\0\0\0", "holds no audio"),
        (b"\x7fELF" + bytes(range(256)) * 100, "not a recording that FFmpeg can read"),
    ],
)
def test_what_is_no_recording_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=message):
        audio_file.read(path)


def test_a_picture_has_no_audio_track(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with av.open(str(path), "w", format="image2") as container:
        track = container.add_stream("png", rate=1)
        track.width, track.height, track.pix_fmt = 16, 16, "rgb24"
        container.mux(track.encode(av.VideoFrame(16, 16, "rgb24")))
        container.mux(track.encode(None))
    with pytest.raises(AudioError, match="holds no audio track"):
        audio_file.read(path)


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("playlist", [HLS, "ffconcat version 1.0\nfile {}\n"])
def test_a_playlist_opens_no_other_file(tmp_path: Path, playlist: str) -> None:
    secret = make(tmp_path / "secret.wav")
    path = tmp_path / "a.wav"
    path.write_text(playlist.format(secret))
    with pytest.raises(AudioError):
        audio_file.read(path)


def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="no such file"):
        audio_file.read(tmp_path / "missing.wav")
    with pytest.raises(AudioError, match="is a folder"):
        audio_file.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AudioError, match="not a plain file"):
        audio_file.read(tmp_path / "pipe")
    with pytest.raises(AudioError, match="cannot read"):
        audio_file.read("a\0b")


def test_binary_files_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = make(tmp_path / "a.flac").read_bytes()
    assert len(audio_file.read(io.BytesIO(content))) == SECONDS * RATE

    class Pipe:
        """Reads, but cannot seek."""

        def __init__(self) -> None:
            self.read = io.BytesIO(content).read

    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": Pipe()}))
    assert len(audio_file.read("-")) == SECONDS * RATE


def test_unsupported_writes_say_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"cannot write \.xyz; use \.wav"):
        make(tmp_path / "a.xyz")
    with pytest.raises(AudioError, match="no rate of 44100 Hz; use one of 8000"):
        audio_file.write(tmp_path / "a.opus", tone(), 44100)
    with pytest.raises(AudioError, match="cannot write"):
        make(tmp_path / "missing" / "a.wav")
    with pytest.raises(AudioError, match=r"shape \(2, 5\)"):
        make(tmp_path / "a.wav", np.zeros((2, 5), np.float32))


def test_loud_samples_are_clipped_not_wrapped(tmp_path: Path) -> None:
    samples, _ = heard(make(tmp_path / "a.wav", np.array([0.0, 2.0, -2.0, 1.0] * 100, np.float32)))
    np.testing.assert_allclose(samples[:4], [0, 1, -1, 1], atol=1e-4)


MEMORY = """
import resource, sys
from antiphon.codecs import audio_file
pieces = audio_file.stream(sys.argv[1], 16000, 10.0)
next(pieces)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = 160000 + sum(map(len, pieces))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_ten_hours_take_no_more_memory_than_ten_seconds(tmp_path: Path) -> None:
    """A sparse WAV of ten hours at 16 kHz (1.15 GB, none of it on the disk)."""
    path, samples = tmp_path / "long.wav", 36_000 * RATE
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(b"\0\0")
    with path.open("r+b") as raw:
        raw.seek(4)
        raw.write(struct.pack("<I", 36 + 2 * samples))
        raw.seek(40)
        raw.write(struct.pack("<I", 2 * samples))
        raw.truncate(44 + 2 * samples)
    out = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True).stdout
    count, grown = map(int, out.split())
    assert count == samples
    assert grown * (1 if sys.platform == "darwin" else 1024) < 16 * 2**20
