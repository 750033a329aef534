"""A private PulseAudio daemon with a virtual microphone and a virtual loudspeaker: no hardware, no D-Bus, also as root.

``virtual_microphone`` hears what is played into the sink ``mouth`` (16 kHz), ``virtual_speaker`` (24 kHz) is heard by
``virtual_ear``. Both carry 16-bit samples unchanged. All files of the daemon lie in its own folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MOUTH_RATE, SPEAKER_RATE = 16000, 24000

_DEVICES = {"virtual_microphone": "voice", "virtual_speaker": "speaker", "virtual_ear": "speaker.monitor"}
_MODULES = (
    "module-null-sink sink_name=mouth rate=16000 channels=1 format=s16le norewinds=1",
    "module-null-sink sink_name=speaker rate=24000 channels=1 format=s16le norewinds=1",
    "module-remap-source source_name=voice master=mouth.monitor",
)


def missing() -> str:
    """What is not installed here that these tests need; empty when all is there."""
    there = {
        "apt install pulseaudio": shutil.which("pulseaudio"),
        "apt install pulseaudio-utils": shutil.which("paplay"),
        "apt install libportaudio2": find_library("portaudio"),
        "apt install libasound2-plugins": _alsa_plugin(),
        "pip install sounddevice": find_spec("sounddevice"),
    }
    return ", ".join(remedy for remedy, found in there.items() if not found)


def _alsa_plugin() -> bool:
    return any(Path("/usr/lib").glob("*/alsa-lib/libasound_module_pcm_pulse.so"))


class Pulse:
    """A running daemon. environment: what a program needs to see only its devices."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o700)
        self._listeners: list[subprocess.Popen[bytes]] = []
        self.environment = {
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": str(folder),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "PULSE_RUNTIME_PATH": str(folder / "runtime"),
            "PULSE_STATE_PATH": str(folder / "state"),
            "PULSE_COOKIE": str(folder / "cookie"),
            "PULSE_SERVER": f"unix:{folder / 'native'}",
            "ALSA_CONFIG_PATH": str(folder / "asound.conf"),
        }
        entries = [f'pcm.{name} {{ type pulse device "{device}" }}' for name, device in _DEVICES.items()]
        entries.append('pcm.!default { type pulse device "voice" }')
        (folder / "asound.conf").write_text("\n".join(entries) + "\n")
        modules = (f"module-native-protocol-unix auth-anonymous=1 socket={folder / 'native'}", *_MODULES)
        self._daemon = subprocess.Popen(
            [
                "pulseaudio", "-n", "--daemonize=no", "--exit-idle-time=-1", "--disable-shm=yes",
                f"--log-target=file:{folder / 'log'}", *(word for module in modules for word in ("-L", module)),
            ],
            env={**os.environ, **self.environment},
        )  # fmt: skip
        try:
            self._wait_until_up(folder)
        except BaseException:
            self.close()
            raise

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """A program that sees only this daemon's devices; its output is thrown away."""
        return subprocess.Popen(command, env={**os.environ, **self.environment}, stdout=subprocess.DEVNULL)

    def play(self, path: Path | str) -> subprocess.Popen[bytes]:
        """Say a file into the virtual microphone."""
        return self.start("paplay", "--device=mouth", str(path))

    def kill(self) -> None:
        """End the daemon at once, as if its devices were unplugged."""
        self._daemon.kill()
        self._daemon.wait()

    def close(self) -> None:
        """End everything that was started."""
        for listener in self._listeners:
            listener.kill()
            listener.wait()
        self._daemon.terminate()
        self._daemon.wait(timeout=10)

    def _wait_until_up(self, folder: Path) -> None:
        """Until the last module is loaded and both sinks are listened to: else they work in large blocks."""

        def loaded() -> bool:
            shown = subprocess.run(
                ["pactl", "list", "short", "sources"],
                env={**os.environ, **self.environment}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            return "\tvoice\t" in shown.stdout

        self._wait(loaded, folder / "log")
        recordings = {source: folder / f"{source}.wav" for source in ("voice", "speaker.monitor")}
        for source, path in recordings.items():
            self._listeners.append(self.start("parec", f"--device={source}", "--latency-msec=10", str(path)))
        self._wait(
            lambda: all(path.exists() and path.stat().st_size > 1000 for path in recordings.values()), folder / "log"
        )

    def _wait(self, until: Callable[[], bool], log: Path) -> None:
        deadline = time.monotonic() + 10
        while not until():
            if time.monotonic() > deadline or self._daemon.poll() is not None:
                raise RuntimeError(f"pulseaudio did not start: {log.read_text() if log.is_file() else 'no log'}")
            time.sleep(0.02)


@contextmanager
def pulse(folder: Path) -> Iterator[Pulse]:
    """A daemon in ``folder``; this process's PortAudio sees its devices, and no others, inside the block."""
    running = Pulse(folder)
    before = {name: os.environ.get(name) for name in running.environment}
    os.environ.update(running.environment)
    try:
        _look_again()
        yield running
    finally:
        running.close()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _look_again()


def _look_again() -> None:
    """PortAudio lists devices once, when it starts."""
    if "sounddevice" in sys.modules:
        import sounddevice

        sounddevice._terminate()
        sounddevice._initialize()


def offset_of(part: NDArray[np.float32], whole: NDArray[np.float32]) -> int:
    """Where in ``whole`` ``part`` begins, by the peak of their cross-correlation."""
    size = 1 << (len(part) + len(whole) - 1).bit_length()
    product = np.fft.irfft(np.fft.rfft(whole, size) * np.conj(np.fft.rfft(part, size)), size)
    return int(np.argmax(product[: len(whole)]))
