"""Acoustic echo cancellation: what the loudspeaker plays, taken out of what the microphone hears.

    clean, speaker = EchoCancel(), Speaker(reference=True)
    graph = Microphone() >> clean["audio"] | clean >> Transcribe() >> Converse() >> Speak() >> speaker["audio"]
    graph |= speaker["played"] >> Link(feedback=True, policy="drop_oldest") >> clean["reference"]

    [Microphone(), Microphone(device="monitor")] >> EchoCancel() >> Transcribe()     # what other programs play

The canceller is WebRTC's AEC3 (``pywebrtc-audio``, the ``aec`` extra). It adapts to the room and to a delay of up to a
few hundred milliseconds, as long as that delay keeps still: so the two streams are aligned by their own samples, and
``Alignment`` only says which samples belong to one moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from ..codecs.resample import Resampler, Samples
from ..pipelines.chunk import Audio
from ..pipelines.stage import Context, Input, Stage, select, stage
from .devices import DeviceError

WINDOW = 5.0  # seconds in which the promptest chunk says how late the others are
STEADY = 0.01  # seconds that the clocks may drift apart before the alignment follows: each step costs a convergence
PATIENCE = 0.06  # seconds that the microphone's sound waits for the reference
KEPT = 2.0  # seconds of the reference


@stage(lasting=True)
class EchoCancel(Stage):
    """The microphone (``audio``) without the echo of what is played (``reference``), as mono ``Audio``.

    Any rates from 8 kHz; the reference is resampled to the microphone's. Sounds come 8 ms later in the result, and
    its chunks when the reference is there too, at most ``PATIENCE`` late. ``unreferenced`` counts samples for whose
    time none had come: their echo stays. Raises DeviceError without ``pywebrtc-audio``.
    """

    name = "echo_cancel"

    async def run(self, ctx: Context, audio: Input, reference: Input) -> AsyncIterator[Audio]:
        """See the class."""
        make = _processor()
        canceller: _Canceller | None = None
        while not audio.ended:
            port = await select(reference, audio)
            chunk = None if port is None else port.get_nowait()
            if chunk is None:
                break
            if not isinstance(chunk, Audio):
                raise TypeError(f"echo cancellation takes audio, got {chunk}")
            if canceller is None:
                if port is reference:
                    continue
                processor = make(sample_rate=chunk.rate, echo_cancellation=True)
                canceller = _Canceller(processor, chunk.rate, chunk.start)
            take = canceller.played if port is reference else canceller.heard
            take(chunk, ctx.now)
            if made := canceller.clean():
                yield made
            if canceller.unreferenced:
                ctx.count("unreferenced", canceller.unreferenced)
                canceller.unreferenced = 0
        if canceller is not None and (made := canceller.clean(last=True)):
            yield made


class Alignment:
    """Which sample of one live stream belongs to the moment of a sample of another, from when their chunks arrive.

    A chunk arrives when its last sample was made, and some more: delays only ever add. The promptest chunk of the last
    seconds therefore tells when a stream's sample 0 was made, whatever jitter the others had.
    """

    def __init__(self) -> None:
        self._origins: dict[str, deque[tuple[float, float]]] = {"near": deque(), "far": deque()}
        self._lead: float | None = None

    def arrived(self, stream: str, end: float, now: float) -> None:
        """A chunk of ``near`` or ``far`` that ends at ``end`` seconds of its media has arrived at ``now``."""
        recent = self._origins[stream]
        origin = now - end
        while recent and recent[-1][1] >= origin:
            recent.pop()
        recent.append((now, origin))
        while recent[0][0] < now - WINDOW:
            recent.popleft()

    @property
    def lead(self) -> float | None:
        """Seconds to add to a time of ``near`` to have that of ``far``; None until both have arrived."""
        near, far = self._origins["near"], self._origins["far"]
        if not near or not far:
            return None
        measured = near[0][1] - far[0][1]
        if self._lead is None or abs(measured - self._lead) > STEADY:
            self._lead = measured
        return self._lead


class _Canceller:
    """One session's canceller: ``heard`` and ``played`` take the streams, ``clean`` gives out what is ready."""

    def __init__(self, processor: Any, rate: int, start: int) -> None:
        self.unreferenced = 0
        self._processor, self._rate, self._frame = processor, rate, rate // 100
        self._alignment = Alignment()
        self._near: Samples = np.zeros(0, np.float32)  # from ``_position`` on
        self._position = start
        self._far: Samples = np.zeros(0, np.float32)  # up to ``_far_end``, in samples of the reference at our rate
        self._far_end = 0
        self._next = 0  # sample of the reference, at its own rate
        self._resampler: Resampler | None = None

    def heard(self, chunk: Audio, now: float) -> None:
        """Take the microphone's next chunk."""
        if chunk.start > self._position + len(self._near):  # sound was lost, and the unfinished frame with it
            self._near, self._position = self._near[:0], chunk.start
        self._near = np.concatenate([self._near, _mono(chunk)])
        self._alignment.arrived("near", chunk.end_seconds, now)

    def played(self, chunk: Audio, now: float) -> None:
        """Take the reference's next chunk, and keep ``KEPT`` seconds; a gap is silence."""
        samples = _mono(chunk)
        if self._resampler is None or self._resampler.source_rate != chunk.rate:
            self._resampler = Resampler(chunk.rate, self._rate)
            self._far_end = round(chunk.start_seconds * self._rate)
        elif chunk.start > self._next:
            gap = np.zeros(min(chunk.start - self._next, round(KEPT * chunk.rate)), np.float32)
            self._far_end += round((chunk.start - self._next - len(gap)) * self._rate / chunk.rate)
            samples = np.concatenate([gap, samples])
        self._next = chunk.end
        self._alignment.arrived("far", chunk.end_seconds, now)
        made = self._resampler.push(samples)
        self._far = np.concatenate([self._far, made])[-round(KEPT * self._rate) :]
        self._far_end += len(made)

    def clean(self, *, last: bool = False) -> Audio | None:
        """The whole frames of 10 ms whose reference is there or has had its time, without the echo."""
        count = len(self._near)
        lead = self._alignment.lead
        far = self._position if lead is None else self._position + round(lead * self._rate)
        if not last:
            if lead is not None:
                count = min(count, max(self._far_end - far, count - round(PATIENCE * self._rate)))
            count = count // self._frame * self._frame
        if count <= 0:
            return None
        near, self._near = self._near[:count], self._near[count:]
        start, self._position = self._position, self._position + count
        reference = np.zeros(count, np.float32)
        if lead is not None:
            at = far - (self._far_end - len(self._far))
            known = self._far[max(at, 0) : max(at + count, 0)]
            reference[max(-at, 0) : max(-at, 0) + len(known)] = known
            self.unreferenced += count - len(known)
        else:
            self.unreferenced += count
        clean: Samples = self._processor.process(near, reference)
        return Audio(samples=clean, rate=self._rate, start=start)


def _mono(chunk: Audio) -> Samples:
    return chunk.samples if chunk.samples.ndim == 1 else chunk.samples.mean(axis=0)


def _processor() -> Any:
    """The class of WebRTC's audio processing. Raises DeviceError where the package is missing."""
    try:
        from pywebrtc_audio import AudioProcessor
    except ImportError as error:
        raise DeviceError("echo cancellation needs pywebrtc-audio: pip install 'antiphon[aec]'") from error
    return AudioProcessor
