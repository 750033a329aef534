"""Sound devices of this computer, through PortAudio: finding one by number or name, and one clear line for whatever
can be wrong with it.

``sounddevice`` (the ``mic`` extra) is imported when a device is first asked for. Its wheels bring PortAudio on macOS
and Windows; on Linux the library is the system's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["input", "output"]

RATES = (8000, 16000, 22050, 24000, 32000, 44100, 48000, 96000)
"""Hertz that are tried to say what a device can do."""


class DeviceError(RuntimeError):
    """A sound device cannot be used; the message is one line and names the remedy."""


@dataclass(frozen=True, slots=True)
class Device:
    """A sound device. inputs, outputs: channels. rate: the hertz it prefers. default: what is used when none is named
    (as an input, as an output)."""

    index: int
    name: str
    api: str
    inputs: int
    outputs: int
    rate: int
    default: tuple[bool, bool]

    def __str__(self) -> str:
        return f"{self.index} {self.name!r}"


def portaudio() -> Any:
    """The ``sounddevice`` module. Raises DeviceError where it or PortAudio is missing."""
    try:
        import sounddevice
    except ImportError as error:
        raise DeviceError("sound devices need sounddevice: pip install 'antiphon[mic]'") from error
    except OSError as error:
        raise DeviceError(
            "the PortAudio library is missing: apt install libportaudio2 (Debian, Ubuntu), dnf install portaudio "
            f"(Fedora), pacman -S portaudio (Arch) [{error}]"
        ) from error
    return sounddevice


def devices() -> list[Device]:
    """All devices, in PortAudio's order. Raises DeviceError where PortAudio is missing."""
    sd = portaudio()
    apis = sd.query_hostapis()
    inputs, outputs = sd.default.device
    return [
        Device(
            index,
            entry["name"],
            apis[entry["hostapi"]]["name"],
            entry["max_input_channels"],
            entry["max_output_channels"],
            round(entry["default_samplerate"]),
            (index == inputs, index == outputs),
        )
        for index, entry in enumerate(sd.query_devices())
    ]


def find(device: int | str | None, kind: Kind) -> Device:
    """The device of that number or part of a name (in any case; a whole name goes first); None for the default.

    A number may be text. Raises DeviceError for one that does not exist, is ambiguous or is of the other kind.
    """
    usable = [one for one in devices() if (one.inputs if kind == "input" else one.outputs)]
    what = "microphone" if kind == "input" else "speaker"
    if not usable:
        raise DeviceError(
            f"there is no {what} here: connect one, or start the sound server (systemctl --user start pipewire-pulse)"
        )
    known = f"known: {'; '.join(map(str, usable))}"
    if device is None:
        found = [one for one in usable if one.default[kind == "output"]] or usable
        return found[0]
    if isinstance(device, int) or device.isdecimal():
        found = [one for one in usable if one.index == int(device)]
        if not found:
            raise DeviceError(f"no {what} has number {device} ({known})")
        return found[0]
    wanted = device.casefold()
    found = [one for one in usable if one.name.casefold() == wanted]
    found = found or [one for one in usable if wanted in one.name.casefold()]
    if not found:
        raise DeviceError(f"no {what} is called {device!r} ({known})")
    if len(found) > 1:
        raise DeviceError(f"{device!r} may be {' or '.join(map(str, found))}: give the number or more of the name")
    return found[0]


def takes(device: Device, kind: Kind, rate: int) -> bool:
    """Whether the device can be opened at ``rate`` hertz, in mono float32."""
    sd = portaudio()
    check = sd.check_input_settings if kind == "input" else sd.check_output_settings
    try:
        check(device=device.index, channels=1, dtype="float32", samplerate=rate)
    except (sd.PortAudioError, ValueError):
        return False
    return True


def rates(device: Device, kind: Kind) -> list[int]:
    """Which of ``RATES`` the device takes."""
    return [rate for rate in RATES if takes(device, kind, rate)]


@contextmanager
def device_errors(device: Device, kind: Kind, rate: int) -> Iterator[None]:
    """PortAudio's errors on opening ``device`` at ``rate`` hertz as DeviceError."""
    sd = portaudio()
    try:
        yield
    except (sd.PortAudioError, ValueError) as error:
        able = rates(device, kind)
        if able and rate not in able:
            raise DeviceError(
                f"{device.name!r} does not take {rate} Hz: use rate {' or '.join(map(str, able))}"
            ) from error
        raise DeviceError(
            f"{device.name!r} cannot be opened: {_reason(error)}; close other programs that use it, or choose another "
            "device (antiphon mic --list)"
        ) from error


def gone(device: Device, seconds: float | None = None) -> DeviceError:
    """The error for a device that stopped on the way, or was silent as no device is for ``seconds``."""
    seen = "has stopped" if seconds is None else f"has given no sign of life for {seconds:g} s"
    return DeviceError(f"{device.name!r} {seen}: connect it again, or choose another device (antiphon mic --list)")


def _reason(error: Exception) -> str:
    """What PortAudio said, on one line."""
    said = error.args[0] if error.args else type(error).__name__
    return " ".join(str(said).split())
