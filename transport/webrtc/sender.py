"""Sound to a peer: reply audio as packets of Opus, 20 ms each, made here and paced (``pacing.py``).

aiortc's own encoder is given 96 kb/s stereo and a level meter in Python that costs more than the encoding; a track that
returns packets goes around both. What leaves is mono at 24 kHz with in-band FEC (RFC 7587). While there is nothing to
say, the last of a few encoded silent frames is sent again and again, which costs nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from aiortc import MediaStreamTrack
from aiortc.mediastreams import MediaStreamError
from numpy.typing import NDArray

from ...codecs.opus import CLOCK_RATE, Encoder
from ...codecs.opus import encoder as opus_encoder
from ...codecs.resample import Resampler
from ...pipelines.clock import Clock, running_clock
from .pacing import FRAME, Alarm, Pace

RATE = 24000
SAMPLES = round(FRAME * RATE)
MOST = 10.0  # seconds that wait before ``write`` does
PLENTY = 0.1  # seconds of sound that need no lead
SETTLED = 25  # silent frames after which the next would be the same
SOON = 1e-4  # seconds: a timer's inexactness
TIME_BASE = Fraction(1, CLOCK_RATE)

Samples = NDArray[np.float32]


@dataclass(slots=True)
class _Piece:
    """Sound at ``RATE`` from media time ``start`` to ``end`` (seconds); a final one is the last of its utterance.

    at: clock time at which it was written.
    """

    samples: Samples
    epoch: int
    start: float
    end: float
    final: bool
    at: float


class AudioSender(MediaStreamTrack):
    """The track to add to a peer connection; ``pace`` says when its packets leave.

    heard: called with (epoch, media seconds) as sound leaves. epoch: the running epoch; sound of earlier ones is
    dropped, whenever it looks. lead: see ``Pace``.
    """

    kind = "audio"

    def __init__(
        self,
        heard: Callable[[int, float], None],
        *,
        epoch: Callable[[], int] | None = None,
        clock: Clock | None = None,
        encoder: Encoder | None = None,
        lead: float = 0.0,
    ) -> None:
        super().__init__()
        self.heard = heard
        self.clock = clock or running_clock()
        self.pace = Pace(self.clock.now(), lead)
        self.encoder = encoder or opus_encoder(RATE, fec=True)
        self.packets = self.dropped = 0  # dropped: samples
        self._epoch_now = epoch
        self._epoch = -1
        self._pieces: deque[_Piece] = deque()
        self._queued = 0  # samples
        self._room = asyncio.Event()  # set at every change of the queue
        self._news = Alarm(self.clock)  # what may change the time of the next packet
        self._resampler: Resampler | None = None
        self._taken = 0.0  # media time up to which sound was written
        self._made = 0.0  # media time up to which it has come out of the resampler
        self._speaking = False
        self._silent = 0  # silent frames sent since the last sound
        self._silence = b""

    @property
    def gaps(self) -> int:
        """Times that the sound ran out before its end."""
        return self.pace.gaps

    @property
    def queued(self) -> float:
        """Seconds that wait to be sent."""
        return self._queued / RATE

    async def write(self, samples: Samples, rate: int, epoch: int, start_seconds: float, final: bool = False) -> None:
        """Sound ``[n]`` or ``[channels, n]`` at ``rate`` to follow what was written; waits while MOST is queued.

        Sound of an epoch that has ended, by ``flush`` or by the clock of epochs, is dropped, also while it waits.
        """
        while self.queued > MOST and not self._stale(epoch) and self.readyState == "live":
            self._room.clear()
            await self._room.wait()
        if self._stale(epoch) or self.readyState != "live":
            self.dropped += samples.shape[-1]
            return
        if epoch > self._epoch:
            self.flush(epoch)
        resampler = self._resampler
        if resampler is None or resampler.source_rate != rate or abs(start_seconds - self._taken) > FRAME / 2:
            self._end_utterance(False)
            resampler = self._resampler = Resampler(rate, RATE)
            self._taken = self._made = start_seconds
        self._taken = start_seconds + samples.shape[-1] / rate
        self._put(resampler.push(samples), False)
        if final:
            self._end_utterance(True)

    def flush(self, epoch: int) -> None:
        """Drop what belongs to epochs before this one."""
        if epoch <= self._epoch:
            return
        self._epoch = epoch
        kept = deque(piece for piece in self._pieces if piece.epoch >= epoch)
        count = sum(len(piece.samples) for piece in kept)
        self.dropped += self._queued - count
        self._pieces, self._queued, self._resampler = kept, count, None
        self._rest()
        self._room.set()

    async def drained(self) -> None:
        """Wait until everything written has left, or the track has ended."""
        while self._pieces and self.readyState == "live":
            self._room.clear()
            await self._room.wait()

    def stop(self) -> None:
        """End the track: whoever waits to write goes on, in vain."""
        super().stop()
        self._room.set()
        self._news.ring()

    async def recv(self) -> av.Packet[Any]:
        """The packet to send now, in time. Raises MediaStreamError after the end."""
        if not self.packets:
            self.pace.due = self.clock.now()
        while self.readyState == "live" and await self._news.wait(self._when(), fair=self._lacks):
            pass
        if self.readyState != "live":
            raise MediaStreamError
        if self._epoch_now is not None:
            self.flush(self._epoch_now())
        now = self.clock.now()
        payload, came = self._next(now)
        packet: av.Packet[Any] = av.Packet(payload)
        packet.pts, packet.time_base = self.pace.send(now, came), TIME_BASE
        self.packets += 1
        return packet

    def _when(self) -> float:
        """The clock time at which to send the next packet, as things are."""
        if self._speaking:
            return self.pace.patient if self._lacks else self.pace.due
        return min(self.pace.due, self._begins())

    def _begins(self) -> float:
        """The clock time at which the sound that waits is to begin."""
        if not self._pieces:
            return float("inf")
        came = self._pieces[0].at
        return came if self._queued >= PLENTY * RATE or self._ended() else came + self.pace.lead

    @property
    def _lacks(self) -> bool:
        """Whether an utterance has begun of which there is not enough for a frame, nor its end."""
        return self._speaking and self._queued < SAMPLES and not self._ended()

    def _ended(self) -> bool:
        return any(piece.final for piece in self._pieces)

    def _next(self, now: float) -> tuple[bytes, float | None]:
        """The payload to send, and when its sound was complete."""
        if not self._speaking and self._begins() <= now + SOON:
            self._speaking = True
            self.pace.begin(now)
            lacking = 0 if self._ended() else max(0, SAMPLES - self._queued)  # a resampler keeps a little back
            return self._sound(lacking)
        if self._lacks:
            self.pace.run_out(now)
            left = self._sound() if self._queued else None
            self._rest()
            return left or (self._silent_frame(), None)
        return self._sound() if self._speaking else (self._silent_frame(), None)

    def _sound(self, lacking: int = 0) -> tuple[bytes, float | None]:
        """The next frame, after ``lacking`` samples of silence, and when its sound was complete."""
        frame, filled, piece = np.zeros(SAMPLES, np.float32), lacking, self._pieces[0]
        while self._pieces and (filled < SAMPLES or not len(self._pieces[0].samples)):
            piece = self._pieces[0]
            count = min(SAMPLES - filled, len(piece.samples))
            frame[filled : filled + count] = piece.samples[:count]
            filled += count
            self._queued -= count
            share = count / len(piece.samples) if len(piece.samples) else 1.0
            piece.start += share * (piece.end - piece.start)
            piece.samples = piece.samples[count:]
            if not len(piece.samples):
                self._pieces.popleft()
                if piece.final:
                    self._rest()
                    break
        self._room.set()
        self._silent = 0
        self.heard(piece.epoch, piece.start)
        return self.encoder.encode(frame), piece.at

    def _rest(self) -> None:
        """Nothing is said any more."""
        if self._speaking:
            self._speaking = False
            self.pace.end()

    def _silent_frame(self) -> bytes:
        if self._silent < SETTLED:
            self._silence = self.encoder.encode(np.zeros(SAMPLES, np.float32))
            self._silent += 1
        return self._silence

    def _stale(self, epoch: int) -> bool:
        return epoch < self._epoch or (self._epoch_now is not None and epoch < self._epoch_now())

    def _end_utterance(self, final: bool) -> None:
        if self._resampler is not None:
            self._put(self._resampler.flush(), final)
            self._resampler = None

    def _put(self, samples: Samples, final: bool) -> None:
        if not len(samples) and not final:
            return
        end = self._taken if final else self._made + len(samples) / RATE
        self._pieces.append(_Piece(samples, self._epoch, self._made, end, final, self.clock.now()))
        self._made = end
        self._queued += len(samples)
        self._news.ring()
