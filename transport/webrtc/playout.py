"""The adaptive playout buffer: RTP packets of Opus in, whenever they arrive; a steady stream of samples out.

A pure object: it reads no clock and knows no network. ``push`` takes a packet and the time it arrived; ``pull`` is
called once a frame with the time at which that frame is due, and always returns one; whoever has no loudspeaker may
call it sooner, as soon as the frame is ``complete``. In between:

- The buffer plays so far behind the sender that most of the last packets would have been in time (``jitter.py``), and
  no further. It moves there by cutting out or repeating whole periods of the sound (``codecs/timescale.py``), and at
  once where there is silence.
- A packet that is lost is decoded from the copy in the next one (FEC) or concealed. While losses are frequent and
  packets carry such copies the buffer plays one packet later, so that the next packet is there when it is needed.
- A packet that is merely late makes the buffer wait (concealing) and is then played, not thrown away; only when a
  later one has taken its place it is too late.
- Senders that send nothing while nobody speaks (DTX) leave no loss; comfort noise fills the time.

Media time is counted in samples at the decoder's rate. At any moment ``end`` is the media time after the last sample
that waits to be played and ``end - len(samples)`` that of the first: concealing, cutting and repeating keep to it.
The ideas are those of WebRTC's NetEQ; RFC 3550 for sequence numbers, RFC 7587 for Opus.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from ...codecs import timescale
from ...codecs.opus import CLOCK_RATE, SAMPLES_48K, Decoder, OpusError, carries_fec, samples_48k
from ...codecs.resample import Samples
from .jitter import Transits

CAPACITY = 1.0  # seconds of media that wait at most
MOST_PACKETS = 512  # that wait at most, however short
LONGEST_WAIT = 0.4  # seconds behind the fastest packet that the buffer chooses to play at most
START_MARGIN, START_PACKETS = 0.04, 50  # seconds more while fewer packets than this have shown their jitter
SLACK = (-0.005, 0.01)  # seconds from the target that are left alone
HASTE = 0.04  # seconds from the target beyond which every frame may be stretched, not one in three
LIKENESS = 0.9  # of a splice near the target; less is asked for farther away
HUSH, LOUDNESS_KEPT = 0.1, 0.995  # pauses: below this share of the loudness, which falls by this factor a frame
OUTAGE = 0.12  # seconds of concealment after which there is silence
JUMP = 2.0  # seconds that a timestamp may be out of step with its arrival, or it belongs to another stream
JUMP_PACKETS = 1000  # likewise for sequence numbers
DTX_BYTES = 2  # a packet this small says that nobody speaks
FEC_MEMORY = 100  # packets: two losses within them are reason to wait for FEC

_MISSING_KEPT = 512
_ROUNDING = 1e-6  # seconds


class Kind(IntEnum):
    """What a frame is made of; of several, the highest."""

    SILENCE = 0  # nothing was sent, or nothing came for long
    DECODED = 1
    STRETCHED = 2  # decoded, a period cut out or repeated
    FEC = 3  # at least in part from the copy in the next packet
    CONCEALED = 4  # at least in part made up


class Played(NamedTuple):
    """samples: float32 mono. position: samples played before these, without gaps. kind: what they are."""

    samples: Samples
    position: int
    kind: Kind


@dataclass(slots=True)
class PlayoutStats:
    """Counts since the beginning, and the present delay.

    Packets: received; of these duplicate, late (their place had been filled), empty, malformed, strays (out of step
    with the stream), overflowed (the reader was too slow). lost: never came.
    Samples put in by what they are: decoded, fec, concealed, silence; inserted and removed by stretching.
    delay_ms: how far the buffer plays behind the fastest packet; target_ms: how far it should. restarts: of the stream.
    """

    received: int = 0
    duplicate: int = 0
    late: int = 0
    lost: int = 0
    empty: int = 0
    malformed: int = 0
    strays: int = 0
    overflowed: int = 0
    restarts: int = 0
    decoded: int = 0
    fec: int = 0
    concealed: int = 0
    silence: int = 0
    inserted: int = 0
    removed: int = 0
    delay_ms: float = 0.0
    target_ms: float = 0.0


@dataclass(frozen=True, slots=True, order=True)
class _Packet:
    """position, count, frame: samples of media, where it begins, how much it is, and one of its Opus frames."""

    position: int
    sequence: int = field(compare=False)
    count: int = field(compare=False)
    frame: int = field(compare=False)
    payload: bytes = field(compare=False)


class PlayoutBuffer:
    """See the module. ``frame``: samples that ``pull`` returns, at the decoder's rate."""

    def __init__(self, decoder: Decoder, frame: int) -> None:
        self.rate, self.frame = decoder.rate, frame
        self._decoder = decoder
        self._step = self.rate // 400  # Opus fills gaps in multiples of 2.5 ms
        self._needed = timescale.needed(self.rate)
        self._overlap = round(timescale.OVERLAP * self.rate)
        self._longest_lag = round(timescale.LONGEST_LAG * self.rate)
        self._stats = PlayoutStats()
        self._transits = Transits()
        self._packets: list[_Packet] = []
        self._samples: Samples = np.zeros(0, np.float32)
        self._runs: deque[tuple[Kind, int]] = deque()  # what self._samples are, in order
        self._position = 0
        self._loudness = 0.0  # root mean square of the loudest frame, falling
        self._unspliced = 0  # samples played since the last splice
        self._stray: int | None = None
        self._forget()

    def _forget(self) -> None:
        """What belongs to one stream, as if nothing had come yet."""
        self._packets.clear()
        self._transits.clear()
        self._started = False
        self._newest: tuple[int, int] | None = None  # sequence number and timestamp, unwrapped
        self._last = -1  # sequence number of the last packet decoded
        self._missing: set[int] = set()  # sequence numbers counted as lost
        self._tardy: set[int] = set()  # those after the last decoded that came too late
        self._gaps: deque[int] = deque(maxlen=2)  # sequence numbers after the last two losses
        self._copied = -FEC_MEMORY  # sequence number of the last packet that carried a copy (FEC)
        self._end = 0
        self._behind = 0.0  # seconds that what was played last is behind the sender, on the scale of transits
        self._held = 0  # samples made up while nothing had come: their place may still be taken
        self._made = 0  # samples concealed in a row
        self._resting = False  # the sender sends nothing, or nothing has come for long
        self._packet = self.rate // 50

    # -- in ----------------------------------------------------------------------------------------------------------

    def push(self, sequence: int, timestamp: int, payload: bytes, arrival: float) -> None:
        """Take a packet: RTP sequence number (16 bits) and timestamp (32 bits, 48 kHz), and seconds on pull's clock.

        Never raises for what a sender may do: a packet of no use is counted.
        """
        self._stats.received += 1
        if not payload:
            self._stats.empty += 1
            return
        try:
            count = self._media(samples_48k(payload))
        except OpusError:
            self._stats.malformed += 1
            return
        sequence, timestamp = self._unwrap(sequence, timestamp)
        transit = arrival - timestamp / CLOCK_RATE
        if self._out_of_step(sequence, transit):
            if self._stray is None or (sequence - self._stray) & 0xFFFF != 1:
                self._stray = sequence & 0xFFFF
                self._stats.strays += 1
                return
            self.restart()
            sequence, timestamp = sequence & 0xFFFF, timestamp & 0xFFFFFFFF
            transit = arrival - timestamp / CLOCK_RATE
        self._stray = None
        if self._newest is None or sequence > self._newest[0]:
            self._newest = sequence, timestamp
        frame = self._media(SAMPLES_48K[payload[0] >> 3])
        if self._insert(_Packet(self._media(timestamp), sequence, count, frame, payload)):
            self._transits.add(transit)

    def restart(self) -> None:
        """Another stream begins: forget this one. What was decoded is still played."""
        self._stats.restarts += 1
        self._decoder.reset()
        self._forget()

    def _media(self, ticks: int) -> int:
        return ticks * self.rate // CLOCK_RATE

    def _unwrap(self, sequence: int, timestamp: int) -> tuple[int, int]:
        """The numbers nearest to the newest that end in these bits."""
        if self._newest is None:
            return sequence, timestamp
        newest, newest_timestamp = self._newest
        sequence = newest + ((sequence - newest + 0x8000) & 0xFFFF) - 0x8000
        timestamp = newest_timestamp + ((timestamp - newest_timestamp + 0x80000000) & 0xFFFFFFFF) - 0x80000000
        return sequence, timestamp

    def _out_of_step(self, sequence: int, transit: float) -> bool:
        if self._newest is None:
            return False
        return abs(sequence - self._newest[0]) > JUMP_PACKETS or abs(transit - self._transits.median) > JUMP

    def _insert(self, packet: _Packet) -> bool:
        """Let a packet wait for its turn, or count it as late or duplicate; False if it has been here before."""
        if self._started and packet.position + self._step <= self._end - self._held:
            if packet.sequence in self._missing:
                self._missing.discard(packet.sequence)
                self._stats.lost -= 1
                self._stats.late += 1
                return True
            if packet.sequence > self._last and packet.sequence not in self._tardy:
                self._tardy.add(packet.sequence)
                self._stats.late += 1
                return True
            self._stats.duplicate += 1
            return False
        if any(packet.sequence == other.sequence or packet.position == other.position for other in self._packets):
            self._stats.duplicate += 1
            return False
        insort(self._packets, packet)
        last = self._packets[-1]
        while len(self._packets) > 1 and (
            last.position + last.count - self._packets[0].position > CAPACITY * self.rate
            or len(self._packets) > MOST_PACKETS
        ):
            self._last = self._packets.pop(0).sequence
            self._stats.overflowed += 1
        return True

    # -- out ---------------------------------------------------------------------------------------------------------

    def begins(self) -> float | None:
        """When the stream that waits to begin is due; None before its first packet, and once it plays."""
        if self._started or not self._packets:
            return None
        return self._packets[0].position / self.rate + self._target() + _ROUNDING

    def complete(self, due: float) -> bool:
        """Whether all sound of the frame due then has come, and that of a splice where one is wanted."""
        if not self._started or self._resting:
            return bool(self._packets) and self._due(self._packets[0], due)
        there, end = len(self._samples), self._end
        for packet in self._packets:
            if abs(packet.position - end) >= self._step:
                break
            there += packet.count
            end += packet.count
            if there >= self.frame + self._longest_lag:
                return True
        return there >= self.frame and due - self.media_position / self.rate - self._target() <= SLACK[1]

    def pull(self, now: float, *, whole: bool = False) -> Played:
        """The frame that is due at ``now``; ``whole``: with what was decoded beyond it."""
        self._fill(now, self.frame)
        spliced = False
        if self._started and not self._resting:
            self._behind = now - self.media_position / self.rate
            if spliced := self._steer(self._behind - self._target()):
                self._fill(now, self.frame)
                self._unspliced = 0
        count = len(self._samples) if whole and not self._held and not self._made else self.frame
        self._unspliced += count
        samples, self._samples = self._samples[:count], self._samples[count:]
        kind = self._take_runs(count)
        if spliced and kind is Kind.DECODED:
            kind = Kind.STRETCHED
        position = self._position
        self._position += count
        self._loudness = max(_loudness(samples), LOUDNESS_KEPT * self._loudness)
        return Played(samples, position, kind)

    @property
    def stats(self) -> PlayoutStats:
        """A copy of the counts, and the delay of what was played last."""
        if not self._started:
            return replace(self._stats)
        fastest = self._transits.fastest
        return replace(
            self._stats, delay_ms=1000 * (self._behind - fastest), target_ms=1000 * (self._target() - fastest)
        )

    @property
    def media_position(self) -> int:
        """Media time of the sample to be played next, in samples: RTP timestamp, unwrapped, at the decoder's rate."""
        return self._end - len(self._samples)

    @property
    def waiting(self) -> int:
        """Packets that wait to be decoded."""
        return len(self._packets)

    @property
    def ready(self) -> int:
        """Samples that wait to be played."""
        return len(self._samples)

    def _target(self) -> float:
        """How far behind the sender to play, in seconds on the scale of transits."""
        wait = self._transits.punctual - self._transits.fastest + self.frame / self.rate
        if len(self._transits) < START_PACKETS:
            wait += START_MARGIN
        if len(self._gaps) == 2 and self._last - min(self._gaps[0], self._copied) < FEC_MEMORY:
            wait += self._packet / self.rate
        return self._transits.fastest + min(wait, LONGEST_WAIT)

    def _due(self, packet: _Packet, now: float) -> bool:
        return now - packet.position / self.rate >= self._target()

    def _fill(self, now: float, count: int) -> None:
        """Make at least ``count`` samples wait to be played."""
        while (lacking := count - len(self._samples)) > 0:
            packet = self._packets[0] if self._packets else None
            if not self._started:
                if packet is None or not self._due(packet, now):
                    self._append(np.zeros(lacking, np.float32), Kind.SILENCE)
                    continue
                self._started, self._end, self._last = True, packet.position, packet.sequence - 1
            if packet is None:
                self._wait(lacking)
            elif self._resting or (packet.position - self._end >= self._step and packet.sequence - 1 == self._last):
                if self._due(packet, now):
                    self._join(packet)
                else:
                    self._rest(lacking)
            elif packet.position - self._end >= self._step:
                self._bridge(packet, lacking)
            elif self._end - packet.position >= self._step:
                self._join(packet)
            else:
                self._decode(packet)

    def _decode(self, packet: _Packet, tail: Samples | None = None) -> None:
        """Play a packet next; ``tail`` is what would have followed instead."""
        del self._packets[0]
        if packet.sequence - self._last > 1:
            missing = {*range(self._last + 1, packet.sequence)} - self._tardy
            self._tardy.clear()
            self._stats.lost += len(missing)
            self._gaps.append(packet.sequence)
            self._missing |= missing
            if len(self._missing) > _MISSING_KEPT:
                self._missing = {number for number in self._missing if packet.sequence - number <= JUMP_PACKETS // 4}
        kind = Kind.SILENCE if len(packet.payload) <= DTX_BYTES else Kind.DECODED
        try:
            samples = self._decoder.decode(packet.payload)
        except OpusError:
            self._stats.malformed += 1
            samples, kind = self._decoder.conceal(packet.count), Kind.CONCEALED
        if tail is not None and len(tail) <= len(samples):
            cut = timescale.align(tail, samples, self._longest_lag)
            self._stats.removed += cut
            self._count(kind, cut)
            samples = timescale.merge(tail, samples[cut:])
        self._last, self._packet = packet.sequence, packet.count
        if carries_fec(packet.payload):
            self._copied = packet.sequence
        self._end, self._held, self._made = packet.position + packet.count, 0, 0
        self._resting = kind is Kind.SILENCE
        self._append(samples, kind)

    def _join(self, packet: _Packet) -> None:
        """Play a packet that does not follow what was played: fade from what was made up and not played yet."""
        tail = self._withdraw(min(self._held, len(self._samples)))
        if len(tail) < self._overlap:
            tail = np.concatenate([tail, self._decoder.conceal(4 * self._step)])
        self._decode(packet, tail[: self._overlap])

    def _bridge(self, packet: _Packet, lacking: int) -> None:
        """Fill the gap before a packet: its predecessors are lost."""
        if self._made >= OUTAGE * self.rate:
            self._rest(lacking)
            return
        gap = packet.position - self._end
        gap -= gap % self._step
        copied = packet.frame if carries_fec(packet.payload) else 0
        self._held = 0
        if gap == copied:
            try:
                samples, kind = self._decoder.recover(packet.payload, gap), Kind.FEC
            except OpusError:  # counted when its turn comes
                samples, kind = self._decoder.conceal(gap), Kind.CONCEALED
            self._end += gap
            self._append(samples, kind)
            return
        room = gap - copied if gap > copied else gap
        self._conceal(min(room, max(self._rounded(lacking), self._packet)), Kind.CONCEALED)

    def _wait(self, lacking: int) -> None:
        """Nothing is there: make something up, and leave its place open."""
        if self._resting or self._made >= OUTAGE * self.rate:
            self._rest(lacking)
            return
        count = max(self._rounded(lacking), min(self._packet, 8 * self._step))  # whole packets sound best
        self._conceal(count, Kind.CONCEALED)
        self._held += count

    def _rest(self, lacking: int) -> None:
        """Nobody speaks: comfort noise, for as long as it takes."""
        self._resting = True
        count = self._rounded(lacking)
        self._conceal(count, Kind.SILENCE)
        self._held += count

    def _conceal(self, count: int, kind: Kind) -> None:
        self._end += count
        self._made += count
        self._append(self._decoder.conceal(count), kind)

    def _rounded(self, count: int) -> int:
        """Up to 10 or 20 ms: of less, SILK makes 10 ms and keeps the rest, and what follows would be out of step."""
        return min(-(-count // (4 * self._step)), 2) * 4 * self._step

    # -- time-scaling and accounts -----------------------------------------------------------------------------------

    def _steer(self, away: float) -> bool:
        """One splice towards the target, ``away`` seconds from here, where one is wanted and would not be heard."""
        if SLACK[0] <= away <= SLACK[1]:
            return False
        if abs(away) < HASTE and self._unspliced < 3 * self.frame:
            return False
        least = self.frame + self._longest_lag if away > 0 else self._needed
        while len(self._samples) < least:  # only what is there anyway: making something up would defeat the purpose
            if not self._packets or abs(self._packets[0].position - self._end) >= self._step:
                break
            self._decode(self._packets[0])
        if len(self._samples) < max(least, self._needed):
            return False
        splice = timescale.find_splice(self._samples, self.rate)
        pausing = _loudness(self._samples[: self._needed]) < HUSH * self._loudness
        if not pausing and splice.likeness < LIKENESS - 8 * (abs(away) - SLACK[1]):
            return False
        if away > 0:
            self._samples = timescale.shorten(self._samples, splice)
            self._take_runs(splice.lag)
            self._stats.removed += splice.lag
        else:
            self._samples = timescale.lengthen(self._samples, splice)
            kind, count = self._runs[0]
            self._runs[0] = kind, count + splice.lag
            self._stats.inserted += splice.lag
        return True

    def _append(self, samples: Samples, kind: Kind) -> None:
        self._samples = np.concatenate([self._samples, samples]) if len(self._samples) else samples
        self._runs.append((kind, len(samples)))
        self._count(kind, len(samples))

    def _count(self, kind: Kind, count: int) -> None:
        name = kind.name.lower()
        setattr(self._stats, name, getattr(self._stats, name) + count)

    def _withdraw(self, count: int) -> Samples:
        """Take the last ``count`` samples back."""
        kept = len(self._samples) - count
        samples, self._samples = self._samples[kept:], self._samples[:kept]
        while count:
            kind, size = self._runs.pop()
            if size > count:
                self._runs.append((kind, size - count))
            self._count(kind, -min(size, count))
            count -= min(size, count)
        return samples

    def _take_runs(self, count: int) -> Kind:
        """Account for samples leaving; the highest of what they are."""
        highest = Kind.SILENCE
        while count:
            kind, size = self._runs.popleft()
            highest = max(highest, kind)
            if size > count:
                self._runs.appendleft((kind, size - count))
            count -= min(size, count)
        return highest


def _loudness(samples: Samples) -> float:
    return float(np.sqrt(samples @ samples / len(samples)))
