"""Our receive path under aiortc: the names it depends on, its manners, and a call over loopback."""

from __future__ import annotations

import asyncio
import inspect
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aioice.ice
import av
import numpy as np
import pytest
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCRtpReceiver, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from aiortc.rtcrtpparameters import RTCRtpCodecParameters
from aiortc.rtcrtpreceiver import StreamStatistics
from aiortc.rtp import RtpPacket

import antiphon
from antiphon.codecs import opus
from antiphon.codecs.audio_file import read
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.transport.webrtc import receiver as module
from antiphon.transport.webrtc.playout import Kind, Played
from antiphon.transport.webrtc.receiver import AudioReceiver, UnknownAiortc, ask_for_fec, attach, with_fec

CLIP = Path(antiphon.__file__).parent / "apps" / "samples" / "two_cities.flac"
SPEECH = read(CLIP, 24000)[: 24000 * 6]


def encoded() -> list[bytes]:
    encoder = opus.encoder(24000, loss=10)
    return [encoder.encode(SPEECH[i : i + 480]) for i in range(0, len(SPEECH) - 479, 480)]


class Talk(MediaStreamTrack):
    """The clip as packets of Opus, 20 ms each; then the end."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self.packets = encoded()
        self.sent = 0
        self.begin = 0.0

    async def recv(self) -> av.Packet:
        if self.sent == len(self.packets):
            raise MediaStreamError
        now = asyncio.get_running_loop().time()
        self.begin = self.begin or now
        await asyncio.sleep(self.begin + 0.02 * self.sent - now)
        packet = av.Packet(self.packets[self.sent])
        packet.pts, packet.time_base = 960 * self.sent, Fraction(1, 48000)
        self.sent += 1
        return packet


@dataclass
class Call:
    """Two peers of aiortc in one process; ``listener`` loses what ``drop`` says."""

    talker: RTCPeerConnection
    listener: RTCPeerConnection
    talk: Talk
    answer: RTCSessionDescription
    receiver: RTCRtpReceiver
    audio: AudioReceiver
    dropped: list[int] = field(default_factory=list)


@asynccontextmanager
async def call(monkeypatch: pytest.MonkeyPatch, *, loss: float = 0.0, late: bool = False) -> AsyncIterator[Call]:
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda **_: ["127.0.0.1"])
    talker, listener = (RTCPeerConnection(RTCConfiguration(iceServers=[])) for _ in range(2))
    talk = Talk()
    talker.addTrack(talk)
    found: list[AudioReceiver] = []
    if not late:
        listener.on("track", lambda track: found.append(attach(listener.getReceivers()[0], paced=True)))
    connected = asyncio.Event()
    listener.on("connectionstatechange", lambda: listener.connectionState == "connected" and connected.set())
    await talker.setLocalDescription(await talker.createOffer())
    await listener.setRemoteDescription(talker.localDescription)
    await listener.setLocalDescription(await listener.createAnswer())
    answer = with_fec(listener.localDescription)
    receiver = listener.getReceivers()[0]
    dropped: list[int] = []
    handle, rng = receiver.transport._handle_rtp_data, random.Random(5)

    async def lossy(data: bytes, arrival_time_ms: int) -> None:
        if rng.random() < loss:
            dropped.append(int.from_bytes(data[2:4], "big"))
        else:
            await handle(data, arrival_time_ms)

    receiver.transport._handle_rtp_data = lossy
    await talker.setRemoteDescription(answer)
    await asyncio.wait_for(connected.wait(), 10)
    if late:
        found.append(attach(receiver, paced=True))
    try:
        yield Call(talker, listener, talk, answer, receiver, found[0], dropped)
    finally:
        await asyncio.gather(talker.close(), listener.close())


async def listen(audio: AudioReceiver, count: int) -> list[Played]:
    frames = []
    async for frame in audio:
        frames.append(frame)
        if len(frames) == count:
            break
    return frames


def likeness(heard: np.ndarray) -> float:
    """How well the best second of what was heard fits the clip."""
    reference = read(CLIP, 16000)[: 16000 * 6]
    second = heard[len(heard) - 16000 :]
    size = 1 << 18
    products = np.fft.irfft(np.fft.rfft(reference, size) * np.conj(np.fft.rfft(second, size)))[: len(reference)]
    total = np.cumsum(np.square(reference, dtype=np.float64))
    energies = np.sqrt(np.append(total[15999:], np.full(15999, total[-1])) - np.append(0.0, total[:-1]))
    return float((products / (energies * np.linalg.norm(second) + 1e-9)).max())


def test_aiortc_is_the_one_this_was_written_for() -> None:
    assert version("aiortc").startswith("1.16."), "read rtcrtpreceiver.py of the new aiortc, then raise the pin"
    assert list(inspect.signature(RTCRtpReceiver._handle_rtp_packet).parameters) == [
        "self",
        "packet",
        "arrival_time_ms",
    ]
    assert inspect.iscoroutinefunction(RTCRtpReceiver._handle_rtp_packet)
    for name in ("receive", "stop"):
        assert inspect.iscoroutinefunction(getattr(RTCRtpReceiver, name))
    for name in ("_handle_disconnect", "_RTCRtpReceiver__stop_decoder"):
        assert list(inspect.signature(getattr(RTCRtpReceiver, name)).parameters) == ["self"]
    statistics = StreamStatistics(48000)
    statistics.add(RtpPacket(payload_type=96, sequence_number=5, timestamp=960, ssrc=1))
    assert (statistics.packets_received, statistics.packets_lost, statistics.fraction_lost) == (1, 0, 0)
    source = inspect.getsource(RTCRtpReceiver._handle_rtp_packet)
    for name in ("active_ssrc", "codecs", "remote_streams", "StreamStatistics(codec.clockRate)"):
        assert name in source


def test_an_aiortc_without_the_hook_is_refused() -> None:
    class Changed:
        pass

    with pytest.raises(UnknownAiortc, match=r"_handle_rtp_packet.*aiortc>=1\.16,<1\.17"):
        attach(Changed())


def test_a_call_under_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with call(monkeypatch, loss=0.1) as made:
            frames = await asyncio.wait_for(listen(made.audio, 200), 15)
            stats = made.audio.stats
            assert [frame.position for frame in frames] == list(range(0, 200 * 320, 320))
            kinds = [frame.kind for frame in frames]
            began = next(i for i, kind in enumerate(kinds) if kind is not Kind.SILENCE)
            assert began < 12
            assert kinds[began:].count(Kind.SILENCE) < 10  # none, unless this machine stalls
            assert Kind.FEC in kinds
            assert likeness(np.concatenate([frame.samples for frame in frames])) > 0.6
            assert made.audio.errors == 0
            assert stats.received + len(made.dropped) == pytest.approx(made.talk.sent, abs=5)

            inbound = [s for s in (await made.receiver.getStats()).values() if s.type == "inbound-rtp"]
            assert inbound[0].packetsReceived == pytest.approx(stats.received, abs=2)
            assert 0 < len(made.dropped) - inbound[0].packetsLost <= 2 or inbound[0].packetsLost == len(made.dropped)
            sender = made.talker.getSenders()[0]
            told = [s for s in (await sender.getStats()).values() if s.type == "remote-inbound-rtp"]
            assert told
            assert 0 < told[0].packetsLost <= len(made.dropped)
            assert made.receiver.getSynchronizationSources()

            assert made.receiver.track._queue.qsize() <= 1
            assert not [thread for thread in threading.enumerate() if thread.name == "audio-decoder"]
            assert "useinbandfec=1" in made.answer.sdp
            await made.listener.close()
            assert made.audio.closed
            assert await asyncio.wait_for(listen(made.audio, 1), 2) == []

    asyncio.run(run())


def test_a_started_receiver_is_taken_over_and_a_vanished_peer_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with call(monkeypatch, late=True) as made:
            assert not [thread for thread in threading.enumerate() if thread.name == "audio-decoder"]
            frames = await asyncio.wait_for(listen(made.audio, 30), 5)
            assert any(frame.kind is Kind.DECODED for frame in frames)
            await made.talker.close()
            rest = await asyncio.wait_for(listen(made.audio, 1000), 10)
            assert len(rest) < 500
            assert made.audio.closed

    asyncio.run(run())


class Transport:
    """Stands in for a DTLS transport that is up."""

    state = "connected"
    _stats_id = "transport"

    def _get_stats(self) -> dict[str, Any]:
        return {}


def bare_receiver(kind: str = "audio") -> RTCRtpReceiver:
    """A receiver that knows Opus as 96 and PCMU as 0."""
    receiver = RTCRtpReceiver(kind, Transport())
    receiver._RTCRtpReceiver__codecs[96] = RTCRtpCodecParameters("audio/opus", 48000, 2, 96)
    receiver._RTCRtpReceiver__codecs[0] = RTCRtpCodecParameters("audio/PCMU", 8000, 1, 0)
    return receiver


def rtp(i: int, payload: bytes, payload_type: int = 96, ssrc: int = 1) -> RtpPacket:
    packet = RtpPacket(payload_type=payload_type, sequence_number=i & 0xFFFF, timestamp=960 * i, ssrc=ssrc)
    packet.payload = payload
    return packet


def test_only_audio_is_taken() -> None:
    async def run() -> None:
        with pytest.raises(ValueError, match="video"):
            attach(bare_receiver("video"))

    asyncio.run(run())


def test_a_lost_connection_ends_it_at_once() -> None:
    async def run() -> None:
        receiver = bare_receiver()
        audio = attach(receiver)
        reading = asyncio.create_task(listen(audio, 1))
        await asyncio.sleep(0)
        receiver._handle_disconnect()
        assert await reading == []

    run_virtual(run())


def test_no_packet_raises_or_grows_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        receiver = bare_receiver()
        audio = attach(receiver)
        handle, rng = receiver._handle_rtp_packet, random.Random(6)
        for i in range(3000):
            await handle(rtp(rng.choice([i, rng.randrange(2**16)]), rng.randbytes(rng.randrange(40))), 0)
        await handle(rtp(0, b""), 0)
        await handle(rtp(0, b"abc", payload_type=0), 0)
        await handle(rtp(0, b"abc", payload_type=111), 0)
        for ssrc in range(100, 300):
            await handle(rtp(ssrc, b"\x48\x00", ssrc=ssrc), 0)
        assert audio.errors == 0
        assert audio.stats.empty > 0
        assert audio.buffer.waiting <= 512
        assert len(receiver._RTCRtpReceiver__remote_streams) == module.MOST_STREAMS
        assert len(receiver._RTCRtpReceiver__active_ssrc) == module.MOST_STREAMS
        assert receiver._RTCRtpReceiver__remote_streams[1].packets_received == 3003 - 1
        for _ in range(50):
            assert np.isfinite((await anext(audio)).samples).all()

        received = audio.stats.received
        receiver._enabled = False
        await handle(rtp(1, b"\x48\x00"), 0)
        assert audio.stats.received == received

        receiver._enabled = True
        monkeypatch.setattr(audio.buffer, "push", lambda *_: {}["nothing"])
        await handle(rtp(1, b"\x48\x00"), 0)
        assert audio.errors == 1

    run_virtual(run())


def test_frames_are_paced_by_the_clock_and_a_slow_reader_goes_on_from_now() -> None:
    async def run() -> None:
        clock, packets = VirtualClock(), encoded()
        audio = AudioReceiver(clock, paced=True)

        async def send() -> None:
            for i, payload in enumerate(packets):
                await clock.sleep_until(1 + 0.02 * i)
                audio.push(rtp(i, payload))
            audio.close()

        sending = asyncio.create_task(send())
        times = []
        for _ in range(100):
            await anext(audio)
            times.append(clock.now())
        assert times == pytest.approx([1 + 0.02 * i for i in range(100)])

        await clock.sleep(0.1)  # within what is caught up on, at once
        for _ in range(6):
            await anext(audio)
        assert clock.now() == pytest.approx(1 + 0.02 * 105)

        await clock.sleep(1.5)  # beyond it
        await anext(audio)
        stopped = clock.now()
        await anext(audio)
        assert clock.now() == pytest.approx(stopped + 0.02)
        assert audio.stats.overflowed > 20
        rest = [frame async for frame in audio]
        assert audio.closed
        assert rest[-1].position == (len(rest) + 107) * 320
        assert audio.stats.delay_ms < 60
        await sending

    run_virtual(run())


def test_a_new_ssrc_is_a_new_stream() -> None:
    async def run() -> None:
        clock, packets = VirtualClock(), encoded()
        audio = AudioReceiver(clock, paced=True)
        for i, payload in enumerate(packets):
            audio.push(rtp(i if i < 150 else i + 5000, payload, ssrc=1 + (i >= 150)))
            await anext(audio)
        assert audio.stats.restarts == 1
        assert audio.stats.lost == audio.stats.strays == 0
        assert audio.stats.silence < 0.25 * 16000

    run_virtual(run())


def test_closing_wakes_a_waiting_reader() -> None:
    async def run() -> None:
        audio = AudioReceiver(VirtualClock(), paced=True)
        reading = asyncio.create_task(listen(audio, 1))
        await asyncio.sleep(0)
        audio.close()
        assert await reading == []
        audio.push(rtp(0, b"\x48\x00"))
        assert audio.stats.received == 0

    run_virtual(run())


def test_fec_is_asked_for_in_every_opus_format_and_nothing_else_changes() -> None:
    lines = [
        "m=audio 9 UDP/TLS/RTP/SAVPF 96 111 0",
        "a=rtpmap:96 opus/48000/2",
        "a=rtpmap:111 OPUS/48000/2",
        "a=fmtp:111 maxaveragebitrate=20000; useinbandfec=0",
        "a=rtpmap:0 PCMU/8000",
        "a=rtpmap:97 VP8/90000",
        "a=fmtp:97 x=1",
    ]
    asked = ask_for_fec("\r\n".join([*lines, ""])).split("\r\n")
    assert asked == [
        *lines[:2],
        "a=fmtp:96 minptime=10;useinbandfec=1",
        lines[2],
        "a=fmtp:111 maxaveragebitrate=20000;useinbandfec=1",
        *lines[4:],
        "",
    ]
    again = "\r\n".join(asked)
    assert ask_for_fec(again) == again
