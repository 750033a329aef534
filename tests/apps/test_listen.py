"""``antiphon listen`` and ``antiphon mic`` on a fake microphone, on virtual time."""

from __future__ import annotations

import asyncio
import difflib
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from antiphon.apps.cli import main
from antiphon.apps.cli.level import WIDTH, Level, dbfs
from antiphon.codecs import audio_file
from antiphon.codecs.resample import resample
from antiphon.pipelines import transcription
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.engine import Engine

from ..transport.fake_portaudio import FakePortAudio, FakeStream, entry

SAMPLE = Path(audio_file.__file__).parents[1] / "apps" / "samples" / "two_cities.flac"
RATE = 16000
NUMBER = r"-?\d+(?:\.\d+)?"


@pytest.fixture
def clip() -> np.ndarray:
    """Five seconds of speech, of 16 bits."""
    return audio_file.read(SAMPLE)[9 * RATE : 14 * RATE]


class Talking(FakePortAudio):
    """Its microphone hears ``said``, and then nothing; ``then`` is done at ``at`` seconds."""

    said, said_rate = np.zeros(0, np.float32), RATE
    at = float("inf")

    def __init__(self) -> None:
        super().__init__(entry("Desk Microphone", 1, 0), entry("Speaker", 0, 2))

    def then(self, stream: FakeStream) -> None:
        """Nothing."""

    def _open(self, options: dict[str, object]) -> FakeStream:
        stream = super()._open(options)
        self.talking = asyncio.ensure_future(self._talk(stream))
        return stream

    async def _talk(self, stream: FakeStream) -> None:
        size, done = stream.blocksize, False
        rates = self.said_rate, stream.samplerate
        heard = self.said if rates[0] == rates[1] else resample(self.said, *rates)
        for at in range(0, 10 * stream.samplerate, size):
            await asyncio.sleep(size / stream.samplerate)
            if stream.closed:
                return
            if not done and at / stream.samplerate >= self.at:
                done = True
                self.then(stream)
            piece = heard[at : at + size]
            stream.hear(np.pad(piece, (0, size - len(piece))))


class LoopClock:
    """The time of the running loop: an engine that is made before the loop keeps its time too."""

    def now(self) -> float:
        try:
            return asyncio.get_running_loop().time()
        except RuntimeError:
            return 0.0


@pytest.fixture
def portaudio(monkeypatch: pytest.MonkeyPatch, clip: np.ndarray) -> Talking:
    fake = Talking()
    fake.said = clip
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    monkeypatch.setattr(asyncio, "run", run_virtual)
    monkeypatch.setattr(transcription, "Engine", partial(Engine, clock=LoopClock()))
    return fake


Antiphon = Callable[..., tuple[int, str, str]]


@pytest.fixture
def antiphon(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Antiphon:
    """Run the command in this process; returns its status and what it wrote."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["antiphon", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err
        assert "Traceback" not in shown.err
        return int(ended.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture
def offline(antiphon: Antiphon, checkpoint: Path, clip: np.ndarray, tmp_path: Path) -> str:
    """What ``antiphon transcribe`` makes of the clip."""
    audio_file.write(tmp_path / "clip.wav", clip, RATE)
    _, out, _ = antiphon("transcribe", tmp_path / "clip.wav", "--model", checkpoint, "--lookahead", "80")
    assert out.strip()
    return out


def test_what_is_said_is_captioned_as_a_file_would_be(
    portaudio: Talking, antiphon: Antiphon, checkpoint: Path, offline: str
) -> None:
    status, out, err = antiphon("listen", "--model", checkpoint, "--lookahead", "80", "--seconds", "5")
    assert (status, out) == (0, offline)
    assert re.fullmatch(
        r"listening to Desk Microphone; Ctrl-C ends\n"
        rf"5\.0 s of audio; first partial {NUMBER} s after its word began(, final {NUMBER} s after its last word)?; "
        rf"level {NUMBER} dBFS, peak {NUMBER} dBFS\n",
        err,
    )
    assert portaudio.streams[0].closed


def test_sound_and_captions_are_kept(
    portaudio: Talking, antiphon: Antiphon, checkpoint: Path, clip: np.ndarray, offline: str, tmp_path: Path
) -> None:
    recording, captions = tmp_path / "talk.flac", tmp_path / "talk.json"
    options = ("--model", checkpoint, "--lookahead", "80", "--seconds", "5", "--record", recording)
    status, out, _ = antiphon("listen", *options, "-f", "json", "-o", captions)
    assert (status, out) == (0, "")
    kept = json.loads(captions.read_text())
    assert (kept["audio"], kept["seconds"]) == (str(recording), 5.0)
    assert "\n".join(caption["text"] for caption in kept["captions"]) + "\n" == offline
    np.testing.assert_array_equal(audio_file.read(recording), clip)


def test_ctrl_c_ends_with_the_last_caption(
    portaudio: Talking, antiphon: Antiphon, checkpoint: Path, tmp_path: Path
) -> None:
    portaudio.at, portaudio.then = 2.5, lambda _: os.kill(os.getpid(), signal.SIGINT)  # type: ignore[method-assign]
    recording = tmp_path / "talk.wav"
    status, out, err = antiphon("listen", "--model", checkpoint, "--lookahead", "80", "--record", recording)
    assert status == 0
    assert re.search(r"^2\.\d s of audio; ", err, re.M)
    assert audio_file.info(recording).duration == pytest.approx(2.52, abs=0.03)
    _, again, _ = antiphon("transcribe", recording, "--model", checkpoint, "--lookahead", "80")
    assert out == again != ""


def test_a_microphone_that_is_unplugged_keeps_what_was_said(
    portaudio: Talking, antiphon: Antiphon, checkpoint: Path, tmp_path: Path
) -> None:
    portaudio.at, portaudio.then = 2.5, lambda stream: stream.finished()  # type: ignore[method-assign]
    recording = tmp_path / "talk.wav"
    status, out, err = antiphon("listen", "--model", checkpoint, "--lookahead", "80", "--record", recording)
    assert status == 2
    assert out.strip()
    assert err.splitlines()[1:] == [
        "antiphon: 'Desk Microphone' has stopped: connect it again, or choose another device (antiphon mic --list)"
    ]
    assert audio_file.info(recording).duration == pytest.approx(2.5, abs=0.05)


def test_a_microphone_without_16_khz_is_resampled(
    portaudio: Talking, antiphon: Antiphon, checkpoint: Path, offline: str
) -> None:
    portaudio.rates = (44100, 48000)
    status, out, _ = antiphon("listen", "--model", checkpoint, "--lookahead", "80", "--seconds", "5")
    assert status == 0
    assert portaudio.streams[0].samplerate == 48000
    assert difflib.SequenceMatcher(None, out, offline).ratio() > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["listen", "--device", "studio"], "no microphone is called 'studio' (known: 0 'Desk Microphone')"),
        (["listen", "--echo-cancel", "7"], "no microphone has number 7"),
        (["listen", "--record", "talk.txt"], "cannot write .txt"),
        (["listen", "--compute", "warp"], "no device 'warp'"),
        (["listen", "--seconds", "0"], "'--seconds'"),
        (["mic", "--device", "studio"], "no microphone is called 'studio'"),
    ],
)
def test_wrong_use_is_one_line(
    portaudio: Talking, antiphon: Antiphon, checkpoint: Path, arguments: list[str], message: str
) -> None:
    status, out, err = antiphon(*arguments, *(["--model", checkpoint] if arguments[0] == "listen" else []))
    assert (status, out) == (2, "")
    assert err.startswith("antiphon: ")
    assert err.count("\n") == 1
    assert message in err


def test_no_sound_devices(portaudio: Talking, antiphon: Antiphon) -> None:
    portaudio.entries = ()
    status, _, err = antiphon("mic", "--list")
    assert (status, err) == (2, "antiphon: there are no sound devices here: connect one, or start the sound server\n")


def test_devices_are_listed(portaudio: Talking, antiphon: Antiphon) -> None:
    assert antiphon("mic", "--list") == (
        0,
        "0\tDesk Microphone\t1\t0\t16 24 48\tinput\n1\tSpeaker\t0\t2\t16 24 48\toutput\n",
        "",
    )


def test_a_microphone_is_tested(portaudio: Talking, antiphon: Antiphon) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 250 * np.arange(RATE) / RATE)
    portaudio.said = tone.astype(np.float32)
    status, out, err = antiphon("mic", "--seconds", "0.9")
    assert (status, err) == (0, "listening to Desk Microphone for 0.9 s\n")
    assert out == "level -9 dBFS, peak -6 dBFS\n"
    portaudio.said = np.zeros(RATE, np.float32)
    _, out, _ = antiphon("mic", "--seconds", "0.9")
    assert out.startswith("nothing but silence: is the microphone muted")


def test_levels() -> None:
    assert dbfs(1.0) == 0
    assert dbfs(0.5) == pytest.approx(-6.02, abs=0.01)
    assert dbfs(0.0) == -np.inf
    level = Level()
    assert level.bar().plain == " " * WIDTH + "   silence"
    level.add(np.full(320, 10 ** (-29.99 / 20), np.float32))
    assert level.bar().plain == "█" * (WIDTH // 2) + " " * (WIDTH // 2) + "  -30 dBFS"
    level.add(np.ones(320, np.float32))
    assert level.bar().plain == "█" * WIDTH + "    0 dBFS"
    assert level.summary == "level -3 dBFS, peak 0 dBFS, 320 samples clipped: turn the input down"
