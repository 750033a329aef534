"""A ``sounddevice`` module without sound: devices as told, streams whose callbacks a test or the event loop runs."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np


class PortAudioError(Exception):
    """As sounddevice's."""


def entry(name: str, inputs: int, outputs: int, rate: float = 48000.0) -> dict[str, Any]:
    return {
        "name": name,
        "hostapi": 0,
        "max_input_channels": inputs,
        "max_output_channels": outputs,
        "default_samplerate": rate,
    }


class FakePortAudio:
    """What the transport uses of ``sounddevice``. streams: all that were opened.

    rates: that every device takes. refuses: what PortAudio says where a device cannot be opened.
    """

    PortAudioError = PortAudioError

    def __init__(self, *entries: dict[str, Any], rates: tuple[int, ...] = (16000, 24000, 48000)) -> None:
        self.entries, self.rates = entries, rates
        self.refuses = ""
        inputs = [i for i, one in enumerate(entries) if one["max_input_channels"]]
        outputs = [i for i, one in enumerate(entries) if one["max_output_channels"]]
        self.default = SimpleNamespace(device=[inputs[0] if inputs else -1, outputs[0] if outputs else -1])
        self.streams: list[FakeStream] = []

    def query_devices(self) -> list[dict[str, Any]]:
        return list(self.entries)

    def query_hostapis(self) -> list[dict[str, Any]]:
        return [{"name": "Fake"}]

    def check_input_settings(self, *, samplerate: int, **_: Any) -> None:
        if samplerate not in self.rates:
            raise PortAudioError("Invalid sample rate", -9997)

    check_output_settings = check_input_settings

    def InputStream(self, **options: Any) -> FakeStream:  # noqa: N802 - sounddevice's name
        return self._open(options)

    OutputStream = InputStream

    def _open(self, options: dict[str, Any]) -> FakeStream:
        self.check_input_settings(**options)
        if self.refuses:
            raise PortAudioError(self.refuses)
        self.streams.append(FakeStream(**options))
        return self.streams[-1]


class FakeStream:
    """A stream on the time of the running loop. Output leaves ``latency`` seconds after it was taken."""

    def __init__(
        self, *, device: int, samplerate: int, blocksize: int, latency: Any, callback: Any, finished_callback: Any,
        **_: Any,
    ) -> None:  # fmt: skip
        self.device, self.samplerate, self.blocksize, self.finished = device, samplerate, blocksize, finished_callback
        self.latency = latency if isinstance(latency, float) else 0.02
        self.played: list[np.ndarray] = []
        self.running = self.closed = False
        self._callback = callback

    @property
    def time(self) -> float:
        return asyncio.get_running_loop().time()

    def start(self) -> None:
        self.running = True

    def close(self) -> None:
        self.running, self.closed = False, True

    def hear(self, samples: np.ndarray, *, overflow: bool = False) -> None:
        """The device has recorded these."""
        self._callback(samples[:, None].copy(), len(samples), None, SimpleNamespace(input_overflow=overflow))

    def take(self, *, underflow: bool = False) -> np.ndarray:
        """The device takes the next block."""
        sound = np.full((self.blocksize, 1), np.nan, np.float32)
        now = self.time
        times = SimpleNamespace(currentTime=now, outputBufferDacTime=now + self.latency)
        self._callback(sound, self.blocksize, times, SimpleNamespace(output_underflow=underflow))
        self.played.append(sound[:, 0])
        return sound[:, 0]

    async def run(self) -> None:
        """Take a block whenever one has been played."""
        while not self.closed:
            self.take()
            await asyncio.sleep(self.blocksize / self.samplerate)
