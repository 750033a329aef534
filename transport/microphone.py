"""The microphone and the speaker of this computer as the ends of a graph.

    Microphone() >> Transcribe()
    Microphone(device="headset") >> Converse() >> Speak() >> Speaker(device="headset")

Each has its own PortAudio stream: one stream for both directions has to meet both deadlines with one callback, and runs
dry where two do not. PortAudio calls from its own thread; what crosses to the event loop is bounded and counted.

Times that PortAudio gives (``inputBufferAdcTime``, ``outputBufferDacTime``, ``stream.time``) are on the stream's clock:
https://portaudio.com/docs/v19-doxydocs/structPaStreamCallbackTimeInfo.html
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from ..codecs.resample import Samples
from ..pipelines.chunk import Audio
from ..pipelines.stage import Context, Input, Stage, stage
from .devices import Device, device_errors, find, gone, portaudio

STALL = 3.0  # seconds without a callback after which a device counts as gone; a Bluetooth headset takes two to wake
BLOCK = 0.01  # seconds that the speaker asks for at a time
FADE = 0.005  # seconds in which interrupted speech fades: a cut would click


@stage(lasting=True)
class Microphone(Stage):
    """What a microphone hears, as mono ``Audio`` chunks of ``chunk_ms`` milliseconds, until the session ends.

    device: number or part of the name; None for the default. rate: hertz, which the device must take (``rates``).
    buffer_ms: how far the consumer may fall behind. Beyond it the oldest sound is dropped: the chunks' ``start`` jumps
    and ``dropped`` counts the samples.

    Media time counts the samples that the device gave. ``xruns`` counts the times that sound was lost before it got
    here. Opens the device on the event loop, which takes some milliseconds.
    Raises DeviceError (as the cause of the session's StageError), also where the device goes away.
    """

    name = "microphone"

    def __init__(
        self,
        *,
        device: int | str | None = None,
        rate: int = 16000,
        chunk_ms: float = 20.0,
        buffer_ms: float = 1000.0,
    ) -> None:
        self.device, self.rate = device, rate
        self.size = round(rate * chunk_ms / 1000)
        if self.size < 1:
            raise ValueError(f"a chunk needs at least one sample, got {chunk_ms} ms at {rate} Hz")
        self.kept = max(2, round(buffer_ms / chunk_ms))

    async def run(self, ctx: Context) -> AsyncIterator[Audio]:
        """See the class."""
        device = find(self.device, "input")
        capture = ctx.own(_Capture(device, self.rate, self.size, self.kept, ctx.loop))
        position = xruns = 0
        while True:
            await capture.wait()
            if capture.xruns > xruns:
                ctx.count("xruns", capture.xruns - xruns)
                xruns = capture.xruns
            while capture.blocks:
                start, samples = capture.blocks.popleft()
                if start > position:
                    ctx.count("dropped", start - position)
                position = start + len(samples)
                yield Audio(samples=samples, rate=self.rate, start=start)


@stage
class Speaker(Stage):
    """Plays audio, at the pace of the device.

    device: number or part of the name; None for the default. rate: hertz at which to open the device at once; None:
    that of the first chunk, when it comes. lead_ms: how much may wait here for the device. latency_ms: what the device
    may hold itself, which an interruption cannot take back. reference: give out, through the port ``played``, all that
    the device is given, silence included, in its sample time: what ``EchoCancel`` needs.

    Channels are averaged. An interruption empties the lead at once, with a short fade; what was in it is counted as
    ``flushed`` samples. What was heard is reported as it leaves the loudspeaker, the device's latency included. ``dry``
    counts the times that audio was not there in time (but for the end of a final chunk), ``xruns`` those that the
    device reports. Raises DeviceError, and ValueError where the rate changes on the way.
    """

    name = "speaker"
    outputs: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        device: int | str | None = None,
        rate: int | None = None,
        lead_ms: float = 60.0,
        latency_ms: float = 30.0,
        reference: bool = False,
    ) -> None:
        self.device, self.rate, self.lead_ms, self.latency_ms = device, rate, lead_ms, latency_ms
        self.outputs = ("played",) if reference else ()

    async def run(self, ctx: Context, audio: Input) -> AsyncIterator[Audio]:
        """See the class."""
        opened: asyncio.Future[_Playback | None] = ctx.loop.create_future()
        if self.rate is not None:
            opened.set_result(self._open(ctx, self.rate))
        ctx.spawn(self._feed(ctx, audio, opened))
        playback = await opened
        position = 0
        while playback is not None and not playback.done:
            await playback.wait()
            playback.report()
            while playback.rendered:
                start, samples = playback.rendered.popleft()
                if start > position:
                    ctx.count("reference_dropped", start - position)
                position = start + len(samples)
                try:
                    yield Audio(samples=samples, rate=playback.rate, start=start, epoch=ctx.session.epoch)
                except GeneratorExit:  # nobody wants the reference any more, but the rest is still to be heard
                    while not playback.done:
                        await playback.wait()
                        playback.report()
                    raise

    def _open(self, ctx: Context, rate: int) -> _Playback:
        device = find(self.device, "output")
        playback = _Playback(ctx, device, rate, self.latency_ms / 1000, keep=bool(self.outputs))
        return ctx.own(playback)

    async def _feed(self, ctx: Context, audio: Input, opened: asyncio.Future[_Playback | None]) -> None:
        """Hand the input to the device's side as it has room, and wait until the last of it was heard."""
        lead = self.lead_ms / 1000
        async for chunk in audio:
            if not isinstance(chunk, Audio):
                raise TypeError(f"a speaker takes audio, got {chunk}")
            if not opened.done():
                opened.set_result(self._open(ctx, chunk.rate))
            playback = opened.result()
            assert playback is not None
            if playback.rate != chunk.rate:
                raise ValueError(f"the speaker is open at {playback.rate} Hz, got {chunk.rate} Hz; resample it")
            while playback.waiting > lead and not ctx.stale:
                await playback.room()
            playback.write(chunk)
        if not opened.done():
            opened.set_result(None)
        playback = opened.result()
        if playback is not None:
            await playback.drain()


class _Stream:
    """A PortAudio stream whose callback, on a thread of PortAudio's, wakes the event loop."""

    stream: Any

    def __init__(self, device: Device, loop: asyncio.AbstractEventLoop) -> None:
        self.xruns = 0
        self._device, self._loop = device, loop
        self._wake = asyncio.Event()
        self._calls = 0
        self._stopped = False

    def start(self, stream: Any) -> None:
        """Run the stream that the subclass has opened."""
        self.stream = stream
        stream.start()

    def close(self) -> None:
        """Stop and free the device."""
        self.stream.close()

    async def wait(self) -> None:
        """Until the callback has run again. Raises DeviceError where it will not."""
        while not self._wake.is_set():
            before = self._calls
            try:
                async with asyncio.timeout(STALL):
                    await self._wake.wait()
            except TimeoutError:
                if self._calls == before:  # else it was the event loop that stood still
                    raise gone(self._device, STALL) from None
        self._wake.clear()
        if self._stopped:
            raise gone(self._device)

    def notify(self) -> None:
        """From the callback's thread."""
        self._calls += 1
        self._loop.call_soon_threadsafe(self._wake.set)

    def stopped(self) -> None:
        """From a thread of PortAudio's: the stream has ended, which it does by itself only when the device is gone."""
        self._stopped = True
        self.notify()


class _Capture(_Stream):
    """A running input stream.

    blocks: ``(start, samples)``, at most ``kept``; the oldest make room, which shows in ``start``.
    """

    def __init__(self, device: Device, rate: int, size: int, kept: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(device, loop)
        self.blocks: deque[tuple[int, Samples]] = deque(maxlen=kept)
        self._position = 0
        with device_errors(device, "input", rate):
            self.start(
                portaudio().InputStream(
                    device=device.index,
                    samplerate=rate,
                    channels=1,
                    dtype="float32",
                    blocksize=size,
                    latency="high",
                    callback=self._take,
                    finished_callback=self.stopped,
                )
            )

    def _take(self, sound: Samples, count: int, _: Any, status: Any) -> None:
        self.xruns += bool(status.input_overflow)
        self.blocks.append((self._position, sound[:, 0].copy()))
        self._position += count
        self.notify()


class _Playback(_Stream):
    """A running output stream, and what waits for it. A resource of the session: ``fence`` empties it.

    rendered: ``(start, samples)`` that the device was given, silence included, where they are to be kept.
    """

    def __init__(self, ctx: Context, device: Device, rate: int, latency: float, *, keep: bool) -> None:
        super().__init__(device, ctx.loop)
        self.rate = rate
        self.done = False  # the last of the input was heard
        self.rendered: deque[tuple[int, Samples]] = deque(maxlen=round(1 / BLOCK))
        self._ctx, self._keep = ctx, keep
        self._lock = threading.Lock()
        self._queue: deque[tuple[Audio, int, Samples]] = deque()  # a chunk, and from which sample on what is left of it
        self._queued = 0  # samples
        self._given: deque[tuple[float, Audio, int]] = deque()  # the device plays a chunk to that sample at that time
        self._epoch = ctx.session.epoch
        self._speaking = False  # inside audio that is to go on
        self._ending = False  # nothing more will be written
        self._position = self._dry = 0
        self._room = asyncio.Event()
        with device_errors(device, "output", rate):
            self.start(
                portaudio().OutputStream(
                    device=device.index,
                    samplerate=rate,
                    channels=1,
                    dtype="float32",
                    blocksize=round(rate * BLOCK),
                    latency=latency,
                    callback=self._give,
                    finished_callback=self.stopped,
                )
            )

    @property
    def waiting(self) -> float:
        """Seconds of sound that the device has not taken yet."""
        return self._queued / self.rate

    def write(self, chunk: Audio) -> None:
        """Queue a chunk, unless an interruption has overtaken it."""
        samples = chunk.samples if chunk.samples.ndim == 1 else chunk.samples.mean(axis=0)
        with self._lock:
            if chunk.epoch >= self._epoch:
                self._queue.append((chunk, 0, samples))
                self._queued += len(samples)
            else:
                self._ctx.count("flushed", len(samples))

    def fence(self, epoch: int) -> None:
        """Drop what is of an older epoch, but for ``FADE`` seconds of what is being said."""
        with self._lock:
            self._epoch = epoch
            kept = self._queue.popleft() if self._queue else None
            dropped = self._queued
            self._queue.clear()
            self._queued = 0
            self._speaking = False
            if kept is not None:
                chunk, at, samples = kept
                fading = samples[: round(FADE * self.rate)]
                self._queue.append((chunk, at, fading * np.linspace(1, 0, len(fading), dtype=np.float32)))
                self._queued = len(fading)
            self._ctx.count("flushed", dropped - self._queued)
        self._room.set()

    async def room(self) -> None:
        """Until the device has taken more."""
        self._room.clear()
        await self._room.wait()

    async def drain(self) -> None:
        """Until the last that was written was heard."""
        self._ending = True
        while self._queued or self._given:
            await self.room()
        self.done = True
        self._wake.set()

    def report(self) -> None:
        """Say what was heard by now, and what went wrong since the last time."""
        now = self.stream.time
        with self._lock:
            while self._given and self._given[0][0] <= now:
                _, chunk, end = self._given.popleft()
                self._ctx.played(chunk, end / self.rate)
            dry, xruns, self._dry, self.xruns = self._dry, self.xruns, 0, 0
        for what, number in (("dry", dry), ("xruns", xruns)):
            if number:
                self._ctx.count(what, number)
        self._room.set()

    def _give(self, sound: Samples, count: int, time: Any, status: Any) -> None:
        heard_at = time.outputBufferDacTime
        if heard_at <= 0:  # an interface that does not say
            heard_at = time.currentTime + self.stream.latency
        filled = 0
        with self._lock:
            self.xruns += bool(status.output_underflow)
            while filled < count and self._queue:
                chunk, at, samples = self._queue.popleft()
                piece = samples[: count - filled]
                sound[filled : filled + len(piece), 0] = piece
                filled += len(piece)
                self._given.append((heard_at + filled / self.rate, chunk, at + len(piece)))
                if len(piece) < len(samples):
                    self._queue.appendleft((chunk, at + len(piece), samples[len(piece) :]))
                self._speaking = not chunk.final and chunk.epoch >= self._epoch
            self._queued -= filled
            if filled < count and self._speaking:
                self._speaking = False
                self._dry += not self._ending
        sound[filled:] = 0
        if self._keep:
            self.rendered.append((self._position, sound[:, 0].copy()))
        self._position += count
        self.notify()
