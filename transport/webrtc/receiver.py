"""The audio receive path under aiortc: RTP packets of one receiver through our playout buffer to samples.

aiortc (1.16) plays out of a fixed buffer that throws frames away after a loss and never recovers its delay; it has no
concealment, and its queue of decoded frames grows while nobody reads. ``attach`` takes the packets before all that,
where ``RTCDtlsTransport`` hands them to ``RTCRtpReceiver._handle_rtp_packet``, and keeps what the rest of aiortc reads:
the statistics behind receiver reports (from which senders learn what is lost, and how much FEC to send) and the list of
synchronisation sources. These are private names: ``PRIVATE`` lists them, ``attach`` refuses an aiortc without them, and
aiortc is pinned.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any, Self

from aiortc import RTCRtpReceiver, RTCSessionDescription
from aiortc import clock as aiortc_clock
from aiortc.rtcrtpreceiver import StreamStatistics
from aiortc.rtp import RtpPacket

from ...codecs.opus import decoder as opus_decoder
from ...pipelines.clock import Clock, running_clock
from .pacing import Alarm
from .playout import Played, PlayoutBuffer, PlayoutStats

FRAME = 0.02  # seconds
RATE = 16000
MOST_STREAMS = 31  # SSRCs of one peer: what a receiver report has room for (RFC 3550 section 6.4.2)
BEHIND = 10  # frames that a reader may catch up on; beyond them it goes on from now

PRIVATE = {
    "_enabled",
    "_handle_disconnect",
    "_handle_rtp_packet",
    "_RTCRtpReceiver__active_ssrc",
    "_RTCRtpReceiver__codecs",
    "_RTCRtpReceiver__decoder_thread",
    "_RTCRtpReceiver__kind",
    "_RTCRtpReceiver__remote_streams",
    "_RTCRtpReceiver__stop_decoder",
}
"""What ``attach`` needs of an ``RTCRtpReceiver``."""

_log = logging.getLogger(__name__)


class UnknownAiortc(RuntimeError):
    """The installed aiortc is not built as the one that this was written for."""


class AudioReceiver(AsyncIterator[Played]):
    """What a peer says, mono float32 at 16 kHz, from its first packet until ``close`` or the end of the connection.

    paced: ``Played`` frames of 20 ms, one every 20 ms, as a loudspeaker needs them. Otherwise, as a graph does, each as
    soon as its sound is there, and at the latest when a loudspeaker would; then what is missing is made up. Such frames
    may be longer than 20 ms. ``position`` counts the samples handed out. A reader that pauses loses what exceeds a
    second of packets (see ``stats.overflowed``); nothing grows while nobody reads. One task reads.
    """

    def __init__(self, clock: Clock, rate: int = RATE, *, paced: bool = False) -> None:
        self.clock, self.paced = clock, paced
        self.buffer = PlayoutBuffer(opus_decoder(rate), round(FRAME * rate))
        self.errors = 0  # packets that something unforeseen was wrong with
        self._changed = Alarm(clock)  # a packet came, or the end
        self._closed = False
        self._ssrc: int | None = None
        self._due: float | None = None  # clock time of the next frame

    @property
    def stats(self) -> PlayoutStats:
        """Packets, samples and delay so far."""
        return self.buffer.stats

    @property
    def closed(self) -> bool:
        """No more frames come."""
        return self._closed

    def push(self, packet: RtpPacket) -> None:
        """Take a packet of Opus that arrives now. Another SSRC is another stream, with its own times."""
        if self._closed:
            return
        if packet.ssrc != self._ssrc:
            if self._ssrc is not None:
                self.buffer.restart()
            self._ssrc = packet.ssrc
        self.buffer.push(packet.sequence_number, packet.timestamp, packet.payload, self.clock.now())
        self._changed.ring()

    def close(self) -> None:
        """End the iteration; what waits is not played."""
        self._closed = True
        self._changed.ring()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Played:
        if self._due is None:
            await self._changed.wait()
            begins = None if self.paced else self.buffer.begins()
            self._due = self.clock.now() if begins is None else begins
        if self.paced and not self._closed:
            await self.clock.sleep_until(self._due)
        while not (self.paced or self._closed or self.buffer.complete(self._due)):
            if not await self._changed.wait(self._due, fair=True):
                break
        if self._closed:
            raise StopAsyncIteration
        due, now = self._due, self.clock.now()
        if now - due > BEHIND * FRAME:
            due = now
        played = self.buffer.pull(due, whole=not self.paced)
        self._due = due + len(played.samples) / self.buffer.rate
        return played


def attach(receiver: RTCRtpReceiver, *, clock: Clock | None = None, paced: bool = False) -> AudioReceiver:
    """Take over an audio receiver, before or after it was started; its ``track`` ends for everybody else.

    paced: see ``AudioReceiver``.

    Raises ValueError for a receiver of video and UnknownAiortc where aiortc has changed.
    """
    if missing := sorted(name for name in PRIVATE if not hasattr(receiver, name)):
        raise UnknownAiortc(f"aiortc's RTCRtpReceiver lacks {', '.join(missing)}: install aiortc>=1.16,<1.17")
    kind = _private(receiver, "kind")
    if kind != "audio":
        raise ValueError(f"only audio is received here, got a receiver of {kind}")
    audio = AudioReceiver(clock or running_clock(), paced=paced)
    start, stop, disconnect = receiver.receive, receiver.stop, receiver._handle_disconnect

    async def handle_rtp_packet(packet: RtpPacket, arrival_time_ms: int) -> None:
        try:
            if _is_opus(receiver, packet):
                audio.push(packet)
        except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # raising would close the connection
            audio.errors += 1
            if audio.errors == 1:
                _log.warning("a packet of audio was left out: %s", type(error).__name__)

    async def receive(parameters: Any) -> None:
        await start(parameters)
        _stop_decoder(receiver)

    async def stop_receiver() -> None:
        audio.close()
        await stop()

    def handle_disconnect() -> None:
        audio.close()
        disconnect()

    replacements = {
        "_handle_rtp_packet": handle_rtp_packet,
        "_handle_disconnect": handle_disconnect,
        "receive": receive,
        "stop": stop_receiver,
    }
    for name, replacement in replacements.items():
        setattr(receiver, name, replacement)
    _stop_decoder(receiver)
    return audio


def with_fec(answer: RTCSessionDescription) -> RTCSessionDescription:
    """A description that asks the peer for in-band FEC in every Opus format (RFC 7587 section 6.1).

    aiortc's own never asks, and a browser then sends none. Other parameters stay as they are.
    """
    return RTCSessionDescription(sdp=ask_for_fec(answer.sdp), type=answer.type)


def ask_for_fec(sdp: str) -> str:
    """``useinbandfec=1`` into each Opus ``a=fmtp`` line, with ``minptime=10`` where there was no such line."""
    lines = sdp.splitlines()
    formats = {
        line[len("a=rtpmap:") :].split(" ", 1)[0]
        for line in lines
        if line.startswith("a=rtpmap:") and line.partition(" ")[2].lower().startswith("opus/48000")
    }
    described = {line[len("a=fmtp:") :].split(" ", 1)[0] for line in lines if line.startswith("a=fmtp:")}
    asked = []
    for line in lines:
        name, _, value = line.partition(":")
        payload_type, _, parameters = value.partition(" ")
        if name == "a=fmtp" and payload_type in formats:
            kept = [part for part in map(str.strip, parameters.split(";")) if part.partition("=")[0] != "useinbandfec"]
            line = f"a=fmtp:{payload_type} {';'.join([*filter(None, kept), 'useinbandfec=1'])}"
        asked.append(line)
        if name == "a=rtpmap" and payload_type in formats - described:
            asked.append(f"a=fmtp:{payload_type} minptime=10;useinbandfec=1")
    return "\r\n".join([*asked, ""])


def _is_opus(receiver: RTCRtpReceiver, packet: RtpPacket) -> bool:
    """Note a packet in aiortc's books, as its own handler would; whether it is Opus that is wanted."""
    streams = _private(receiver, "remote_streams")
    if not receiver._enabled or (packet.ssrc not in streams and len(streams) >= MOST_STREAMS):
        return False
    codec = _private(receiver, "codecs").get(packet.payload_type)
    if codec is None:
        return False
    _private(receiver, "active_ssrc")[packet.ssrc] = aiortc_clock.current_datetime()
    if packet.ssrc not in streams:
        streams[packet.ssrc] = StreamStatistics(codec.clockRate)
    streams[packet.ssrc].add(packet)
    return bool(codec.mimeType.lower() == "audio/opus")


def _stop_decoder(receiver: RTCRtpReceiver) -> None:
    """End the thread that would decode for the track."""
    if _private(receiver, "decoder_thread") is not None:
        _private(receiver, "stop_decoder")()


def _private(receiver: RTCRtpReceiver, name: str) -> Any:
    return getattr(receiver, f"_RTCRtpReceiver__{name}")
