"""``antiphon talk`` with a tiny random model: with a recording, and at a fake microphone and loudspeaker."""

from __future__ import annotations

import asyncio
import importlib
import re
import sys
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from antiphon.codecs import audio_file
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.engine import Engine

from ..transport.fake_portaudio import FakeStream
from . import test_listen
from .test_listen import Antiphon, LoopClock, Talking

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from tiny_duplex import write_persona, write_smallest

RATE, FRAME = 24000, 1920
antiphon = test_listen.antiphon


class Room(Talking):
    """Its loudspeaker plays."""

    said_rate = RATE

    def OutputStream(self, **options: object) -> FakeStream:  # noqa: N802 - sounddevice's name
        stream = super(Talking, self)._open(options)
        self.playing = asyncio.ensure_future(stream.run())
        return stream

    def played(self) -> np.ndarray:
        """All that the loudspeaker took."""
        return np.concatenate([block for stream in self.streams if stream.device == 1 for block in stream.played])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_smallest(tmp_path_factory.mktemp("model"))


@pytest.fixture
def said() -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(20 * FRAME)).astype(np.float32)


@pytest.fixture
def portaudio(monkeypatch: pytest.MonkeyPatch, said: np.ndarray) -> Room:
    fake = Room()
    fake.said = said
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    monkeypatch.setattr(asyncio, "run", run_virtual)
    talk = importlib.import_module("antiphon.apps.cli.talk")
    monkeypatch.setattr(talk, "Engine", partial(Engine, clock=LoopClock(), inline=True))
    return fake


def both(path: Path) -> np.ndarray:
    """The two channels of a file, ``[2, n]``."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
        assert container.streams.audio[0].layout.nb_channels == 2
    sound = np.concatenate([frame.reshape(-1, 2).T for frame in frames], 1)
    return sound.astype(np.float32) / 32768


def test_a_recording_is_talked_with(antiphon: Antiphon, model: Path, said: np.ndarray, tmp_path: Path) -> None:
    audio_file.write(tmp_path / "in.wav", said, RATE)
    command = ("talk", "--model", model, "--file", tmp_path / "in.wav", "--seed", "3")
    status, text, err = antiphon(*command, "-o", tmp_path / "out.wav")
    assert status == 0
    assert re.fullmatch(r"1\.6 s of dialogue in \d+\.\d\d s; real-time factor \d+\.\d+\n", err)
    user, reply = both(tmp_path / "out.wav")
    np.testing.assert_allclose(user[: 20 * FRAME], said, atol=1e-4)
    # Nothing is said to the first frame, and what is said to the second can be heard when it is over.
    assert not reply[: 2 * FRAME].any()
    assert all(reply[frame * FRAME :][:FRAME].any() for frame in range(2, 21))
    assert len(reply) == 21 * FRAME
    assert text.strip()
    assert antiphon(*command, "-o", tmp_path / "again.wav")[1] == text
    np.testing.assert_array_equal(both(tmp_path / "again.wav"), both(tmp_path / "out.wav"))
    antiphon(*command[:-1], "4", "-o", tmp_path / "other.wav")
    assert (both(tmp_path / "other.wav")[1] != reply).any()
    antiphon(*command, "-o", tmp_path / "longer.wav", "--seconds", "2.4")
    longer = both(tmp_path / "longer.wav")
    assert longer.shape[1] == 31 * FRAME
    np.testing.assert_array_equal(longer[1, : 21 * FRAME], reply)


def test_a_model_of_somebodys_voice(portaudio: Room, antiphon: Antiphon, said: np.ndarray, tmp_path: Path) -> None:
    """A text and a voice change what is said, to a recording as at the microphone."""
    persona, clip = write_persona(tmp_path / "model"), tmp_path / "hal.wav"
    audio_file.write(tmp_path / "in.wav", said, RATE)
    audio_file.write(clip, 0.1 * np.random.default_rng(1).standard_normal(RATE).astype(np.float32), RATE)
    chosen = {
        "plain": (),
        "text": ("--text-prompt", "so it goes"),
        "both": ("--text-prompt", "so it goes", "--voice-prompt", clip),
        "voice": ("--voice-prompt", clip),
    }
    replies = {}
    for name, options in chosen.items():
        file = tmp_path / f"{name}.wav"
        common = ("talk", "--model", persona, "--seed", "3", *options)
        status, _, err = antiphon(*common, "--file", tmp_path / "in.wav", "-o", file)
        assert status == 0, err
        replies[name] = both(file)[1].tobytes()
    assert len(set(replies.values())) == len(chosen)
    status, _, err = antiphon(*common, "--seconds", "0.8", "--record", tmp_path / "live.wav")
    assert status == 0, err
    live, offline = both(tmp_path / "live.wav")[1], both(tmp_path / "voice.wav")[1]
    frames = len(live) // FRAME - 1
    assert frames >= 8
    # The first is said to nothing heard yet, the last may be cut.
    np.testing.assert_allclose(live[: (frames - 1) * FRAME], offline[: (frames - 1) * FRAME], atol=1e-4)


def test_at_the_microphone(
    portaudio: Room,
    antiphon: Antiphon,
    model: Path,
    said: np.ndarray,
    tmp_path: Path,
) -> None:
    audio_file.write(tmp_path / "in.wav", said, RATE)
    command = ("talk", "--model", model, "--seed", "3", "--seconds", "1.6")
    _, offline, _ = antiphon(*command, "--file", tmp_path / "in.wav", "-o", tmp_path / "out.wav")
    status, text, err = antiphon(*command, "--record", tmp_path / "talk.wav")
    assert status == 0
    assert re.fullmatch(
        r"listening to Desk Microphone; talk, Ctrl-C ends\n"
        r"1\.6 s of dialogue; the model said \d+ words; level -20 dBFS, peak -\d dBFS\n",
        err,
    )
    (user, reply), (_, expected) = both(tmp_path / "talk.wav"), both(tmp_path / "out.wav")
    np.testing.assert_allclose(user[: 20 * FRAME], said, atol=1e-4)
    length = 20 * FRAME
    np.testing.assert_allclose(reply[:length], expected[:length], atol=1e-3)
    assert text == offline
    played = portaudio.played()
    begun = np.flatnonzero(played)[0]
    spoken = reply[2 * FRAME :]
    heard = played[begun:][: len(spoken)]
    np.testing.assert_allclose(heard, spoken[: len(heard)], atol=1e-3)
    assert len(heard) > 18 * FRAME
    assert all(stream.closed for stream in portaudio.streams)


def test_devices_without_the_models_rate(portaudio: Room, antiphon: Antiphon, model: Path) -> None:
    portaudio.rates = (48000,)
    status, _, _ = antiphon("talk", "--model", model, "--seconds", "1")
    assert status == 0
    assert [stream.samplerate for stream in portaudio.streams] == [48000, 48000]
    assert np.abs(portaudio.played()).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "studio"], "no microphone is called 'studio' (known: 0 'Desk Microphone')"),
        (["--output", "studio"], "no speaker is called 'studio' (known: 1 'Speaker')"),
        (["--echo-cancel", "7"], "no microphone has number 7"),
        (["--file", "in.wav"], "--file and -o go together"),
        (["--file", "none.wav", "-o", "out.wav"], "none.wav"),
        (["--record", "talk.txt"], "cannot write .txt"),
        (["--model", "nonsense"], "no folder or checkpoint 'nonsense'; known are"),
        (["--top-k", "9999"], "audio_top_k is 9999; it goes from 0 to 512"),
        (["--compute", "warp"], "no device 'warp'"),
        (["--voice-prompt", "none.wav"], "--voice-prompt none.wav: no such file"),
        (["--text-prompt", "be wise"], "takes no prompts"),
    ],
)
def test_wrong_use_is_one_line(
    portaudio: Room,
    antiphon: Antiphon,
    model: Path,
    arguments: list[str],
    message: str,
) -> None:
    status, out, err = antiphon("talk", "--model", model, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("antiphon: ")
    assert err.count("\n") == 1
    assert message in err


def test_without_sound_devices(portaudio: Room, antiphon: Antiphon, model: Path) -> None:
    portaudio.entries = ()
    status, _, err = antiphon("talk", "--model", model)
    assert (status, err.count("\n")) == (2, 1)
    assert "there is no microphone here: connect one" in err


def test_its_own_voice_is_taken_out(portaudio: Room, antiphon: Antiphon, model: Path) -> None:
    pytest.importorskip("pywebrtc_audio")
    portaudio.rates = (16000, 48000)
    status, _, err = antiphon("talk", "--model", model, "--seconds", "1", "--echo-cancel", "speaker")
    assert status == 0, err
    assert "1.0 s of dialogue" in err
    # What was said before the end is played to its end, though nobody listens for the echo any more.
    assert np.count_nonzero(portaudio.played()) > 0.8 * 48000
