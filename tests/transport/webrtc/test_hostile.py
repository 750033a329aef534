"""Hostile WebRTC clients against the whole application, beside an honest one that must not notice."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import uvicorn
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription

from antiphon.apps.serve import app as application
from antiphon.apps.serve.server import configure
from antiphon.codecs import opus
from antiphon.pipelines.chunk import Chunk, Event
from antiphon.pipelines.graph import Graph
from antiphon.pipelines.stage import Context, Inlet, Input, stage
from antiphon.transport.guard import Rules
from antiphon.transport.service import Service
from antiphon.transport.webrtc import ice, peer, routes, video

OFFER_CPU = 0.1  # seconds that a refusal may take
FLOOD, FLOOD_BYTES = 10_000, 1200
FLOOD_GROWTH = 4 << 20  # bytes that may be held of 12 MB
PICTURES, PICTURE_SIZE = 500, (640, 360)  # 173 MB decoded
PICTURES_GROWTH = 48 << 20  # bytes that may be held of them: the decoder's own pictures, and those on their way
PATIENCE = 20.0  # seconds


@stage(name="hostile_test_hears")
async def hears(ctx: Context, audio: Input) -> AsyncIterator[Event]:
    """An event for each half second of sound."""
    heard = 0
    async for chunk in audio:
        heard += chunk.duration
        if heard >= chunk.rate / 2:
            heard = 0
            yield Event(name="heard", rate=chunk.rate, start=chunk.start)


@stage(name="hostile_test_deaf")
async def deaf(ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
    """Reads nothing."""
    await asyncio.Event().wait()
    async for chunk in audio:
        yield chunk


@stage(name="hostile_test_blind")
async def blind(ctx: Context, video: Input) -> AsyncIterator[Chunk]:
    """Looks at nothing."""
    await asyncio.Event().wait()
    async for chunk in video:
        yield chunk


def made(options: Mapping[str, Any]) -> Graph:
    """A graph that hears, or is deaf; and one that is shown pictures it does not look at, where that is asked for."""
    sound = Inlet().named("audio") >> (deaf() if "deaf" in options else hears())
    return sound | (Inlet().named("video") >> blind()) if "blind" in options else sound


class NoEngine:
    """The stages here need no model."""

    def metrics_text(self) -> str:
        return ""


class Voice(MediaStreamTrack):
    """Opus packets, ``seconds`` apart; ``payload`` may replace one, by its number."""

    kind = "audio"

    def __init__(
        self, seconds: float = 0.02, payload: Callable[[int, bytes], bytes] = lambda number, good: good
    ) -> None:
        super().__init__()
        tone = 0.2 * np.sin(2 * np.pi * 200 * np.arange(960) / 48000)
        self.good = opus.encoder(48000).encode(tone.astype(np.float32))
        self.seconds, self.payload = seconds, payload
        self.sent, self.begin = 0, 0.0

    async def recv(self) -> av.Packet:
        now = asyncio.get_running_loop().time()
        self.begin = self.begin or now
        await asyncio.sleep(self.begin + self.seconds * self.sent - now)
        packet = av.Packet(self.payload(self.sent, self.good))
        packet.pts, packet.time_base = 960 * self.sent, Fraction(1, 48000)
        self.sent += 1
        return packet


class Film(MediaStreamTrack):
    """Frames of VP8, as fast as they are taken."""

    kind = "video"

    def __init__(self) -> None:
        super().__init__()
        context = av.CodecContext.create("libvpx", "w")
        assert isinstance(context, av.VideoCodecContext)
        context.width, context.height = PICTURE_SIZE
        context.pix_fmt, context.time_base = "yuv420p", Fraction(1, 30)
        context.options = {"lag-in-frames": "0", "deadline": "realtime"}
        frame = av.VideoFrame(*PICTURE_SIZE, "yuv420p")
        (key,), (following,) = context.encode(frame), context.encode(frame)
        self.frames = [bytes(key), *[bytes(following)] * 49]
        self.sent = 0

    async def recv(self) -> av.Packet:
        await asyncio.sleep(0.002)
        packet = av.Packet(self.frames[self.sent % 50])
        packet.pts, packet.time_base = 3000 * self.sent, Fraction(1, 90000)
        self.sent += 1
        return packet


@dataclass
class Client:
    """A browser's part, and the server's half of its connection."""

    pc: RTCPeerConnection
    voice: Voice
    there: peer.Peer | None = None
    messages: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)

    async def next(self, kind: str) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE):
            while (message := await self.messages.get())["type"] != kind:
                continue
        return message

    def vanish(self) -> None:
        """Send nothing any more, without a word."""
        for protocol in connection_of(self.pc)._protocols:
            protocol.transport.sendto = lambda data, address=None: None


@dataclass
class World:
    """The application, and everybody who is connected to it."""

    service: Service
    http: httpx.AsyncClient
    peers: list[peer.Peer]
    unseen: list[str]

    @asynccontextmanager
    async def client(
        self, voice: Voice | None = None, options: dict[str, Any] | None = None, film: Film | None = None
    ) -> AsyncIterator[Client]:
        pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        made = Client(pc, voice or Voice())
        pc.addTrack(made.voice)
        if film is not None:
            pc.addTrack(film)
        channel = pc.createDataChannel("events")
        channel.on("message", lambda text: made.messages.put_nowait(json.loads(text)))
        try:
            await pc.setLocalDescription(await pc.createOffer())
            body = {"sdp": pc.localDescription.sdp, "options": options or {}}
            response = await self.http.post("/rtc/offer", json=body)
            assert response.status_code == 201
            made.there = self.peers[-1]
            answer = response.json()["sdp"].replace("a=inactive", "a=recvonly")  # whatever it was told, it sends
            await pc.setRemoteDescription(RTCSessionDescription(answer, "answer"))
            await until(lambda: channel.readyState == "open")
            yield made
        finally:
            await pc.close()

    async def metrics(self) -> str:
        return (await self.http.get("/metrics")).text

    @asynccontextmanager
    async def beside_an_honest_client(self) -> AsyncIterator[None]:
        """Whatever happens inside, an honest client is heard before and after, by the same call, with nothing lost."""
        async with self.client() as honest:
            await honest.next("heard")
            yield
            while not honest.messages.empty():
                honest.messages.get_nowait()
            await honest.next("heard")
            assert honest.there is not None
            assert honest.there.receiver is not None
            assert honest.there.receiver.stats.lost == 0
            assert honest.there.guard.overflowed == 0
            assert honest.there.receiver.errors == 0
        assert self.unseen == []


@asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    peers: list[peer.Peer] = []
    unseen: list[str] = []

    class Noted(peer.Peer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            peers.append(self)

    monkeypatch.setattr(routes, "Peer", Noted)
    monkeypatch.setattr(application, "PROTOCOLS", ("protocols.plain", "webrtc.routes"))
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context["message"]))
    service = Service(made, NoEngine(), max_calls=4)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    app = application.create_app(service, Rules(rate=1000, burst=1000))
    server = uvicorn.Server(configure(app, host="127.0.0.1", port=port))
    running = asyncio.create_task(server.serve([listener]))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            await until(lambda: server.started)
            yield World(service, http, peers, unseen)
    finally:
        await service.close()
        server.should_exit = True
        await running


async def until(holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
    async with asyncio.timeout(seconds):
        while True:
            if holds():
                return
            await asyncio.sleep(0.01)


def connection_of(pc: RTCPeerConnection) -> Any:
    (transport,) = pc._RTCPeerConnection__iceTransports
    return transport._connection


def port_of(there: peer.Peer) -> int:
    """Where the server's half of a connection takes datagrams on loopback."""
    (port,) = {
        candidate.port for candidate in connection_of(there._pc).local_candidates if candidate.host == "127.0.0.1"
    }
    return int(port)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# -- offers ------------------------------------------------------------------------------------------------------------


async def good_offer() -> str:
    pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    pc.addTransceiver("audio")
    await pc.setLocalDescription(await pc.createOffer())
    sdp: str = pc.localDescription.sdp
    await pc.close()
    return sdp


def without(name: str) -> Callable[[str], str]:
    return lambda offer: "".join(line for line in offer.splitlines(True) if not line.startswith(f"a={name}"))


def candidates(count: int, line: str) -> Callable[[str], str]:
    return lambda offer: offer + count * f"a=candidate:{line}\r\n"


BAD_OFFERS: dict[str, Callable[[str], str]] = {
    "5,000 candidates": candidates(5000, "1 1 udp 2130706431 192.0.2.1 9 typ host"),
    "1,200 candidates within 64 KiB": candidates(1200, "1 1 udp 1 192.0.2.1 9 typ host"),
    "500 m-lines": lambda offer: offer[: offer.index("m=")] + 500 * offer[offer.index("m=") :],
    "500 short m-lines": lambda offer: offer + 500 * "m=audio 9 UDP/TLS/RTP/SAVPF 0\r\n",
    "no fingerprint": without("fingerprint"),
    "no ufrag": without("ice-ufrag"),
    "no password": without("ice-pwd"),
    "nothing but a head": lambda offer: "v=0\r\n",
    "bytes of no meaning": lambda offer: "\x00\x01\xff" * 2000,
}


@pytest.mark.parametrize("name", BAD_OFFERS)
def test_a_bad_offer_is_refused_before_it_costs_anything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(monkeypatch) as world, world.beside_an_honest_client():
            offer = BAD_OFFERS[name](await good_offer())
            await world.http.get("/healthz")
            began = time.process_time()
            response = await world.http.post("/whip", content=offer, headers={"content-type": "application/sdp"})
            spent = time.process_time() - began
            assert response.status_code in (400, 413)
            assert spent < OFFER_CPU
            assert len(world.service.calls) == 1

    asyncio.run(main())


# -- datagrams ---------------------------------------------------------------------------------------------------------


def stun(*attributes: bytes) -> bytes:
    body = b"".join(attributes)
    return struct.pack("!HHI12s", 1, len(body), 0x2112A442, b"transaction!") + body


CUT_SHORT = (
    stun(struct.pack("!HHH2x", 0x24, 2, 1)),  # PRIORITY
    stun(struct.pack("!HHI", 0x8029, 4, 1)),  # ICE-CONTROLLED
    stun(struct.pack("!HHI", 0x802A, 4, 1)),  # ICE-CONTROLLING
    stun(struct.pack("!HHH2x", 0x8028, 2, 1)),  # FINGERPRINT
)


def test_malformed_stun_from_a_stranger_is_counted_and_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(monkeypatch) as world, world.beside_an_honest_client(), world.client() as attacked:
            there = attacked.there
            assert there is not None
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                for datagram in CUT_SHORT * 25:
                    stranger.sendto(datagram, ("127.0.0.1", port_of(there)))
                    await asyncio.sleep(0)
            await until(lambda: there.guard.malformed == 100)
            assert 'antiphon_webrtc_datagrams_total{outcome="malformed"} 100' in await world.metrics()
            while not attacked.messages.empty():
                attacked.messages.get_nowait()
            await attacked.next("heard")

    asyncio.run(main())


def test_a_flood_before_ice_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(monkeypatch) as world, world.beside_an_honest_client():
            response = await world.http.post("/rtc/offer", json={"sdp": await good_offer()})
            assert response.status_code == 201
            there = world.peers[-1]
            address, guard = ("127.0.0.1", port_of(there)), there.guard
            before = resident()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                for number in range(0, FLOOD, 50):
                    for _ in range(50):
                        stranger.sendto(b"\x80" * FLOOD_BYTES, address)
                    await until(lambda sent=number + 50: guard.received >= sent)
            assert guard.overflowed == FLOOD - ice.WAITING_DATAGRAMS
            overflowed = f'antiphon_webrtc_datagrams_total{{outcome="overflowed"}} {guard.overflowed}'
            assert overflowed in await world.metrics()
            assert connection_of(there._pc)._queue.qsize() == ice.WAITING_DATAGRAMS
            assert resident() - before < FLOOD_GROWTH

    asyncio.run(main())


def test_datagrams_longer_than_a_peer_sends_are_left_out_before_ice_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(monkeypatch) as world, world.beside_an_honest_client(), world.client() as attacked:
            response = await world.http.post("/rtc/offer", json={"sdp": await good_offer()})
            assert response.status_code == 201
            before_ice, connected = world.peers[-1], attacked.there
            assert connected is not None
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                for there in (before_ice, connected):
                    address, guard = ("127.0.0.1", port_of(there)), there.guard
                    for size in (ice.LONGEST_DATAGRAM, ice.LONGEST_DATAGRAM + 1, 60_000):
                        for _ in range(10):
                            received = guard.received
                            stranger.sendto(b"\x80" * size, address)
                            await until(lambda guard=guard, received=received: guard.received > received)
                    assert guard.oversized == 20
            queue = connection_of(before_ice._pc)._queue
            assert queue.qsize() == 10
            assert {len(queue.get_nowait()[0]) for _ in range(10)} == {ice.LONGEST_DATAGRAM}
            while not attacked.messages.empty():
                attacked.messages.get_nowait()
            await attacked.next("heard")

    asyncio.run(main())


# -- sound -------------------------------------------------------------------------------------------------------------


def test_empty_opus_payloads_do_not_stop_the_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        def payload(number: int, good: bytes) -> bytes:
            return b"" if 25 <= number < 75 or number % 10 == 0 else good

        voice = Voice(payload=payload)
        async with serving(monkeypatch) as world, world.beside_an_honest_client(), world.client(voice) as hostile:
            assert hostile.there is not None
            assert hostile.there.receiver is not None
            await until(lambda: hostile.voice.sent > 80)
            stats = hostile.there.receiver.stats
            assert stats.empty > 40
            await until(lambda: hostile.there.receiver.stats.decoded > stats.decoded + 8000)
            await hostile.next("heard")

    asyncio.run(main())


def test_tracks_that_nobody_reads_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        client = Voice(seconds=0.002), {"deaf": True}
        async with serving(monkeypatch) as world, world.beside_an_honest_client(), world.client(*client) as fast:
            assert fast.there is not None
            receiver = fast.there.receiver
            assert receiver is not None
            await until(lambda: receiver.stats.received > 1000)
            stats = receiver.stats
            assert stats.overflowed + stats.strays + stats.restarts > 0
            assert len(receiver.buffer._packets) <= 51
            assert len(receiver.buffer._samples) < receiver.buffer.rate
            (transceiver,) = fast.there._pc.getTransceivers()
            assert transceiver.receiver.track._queue.qsize() <= 1

    asyncio.run(main())


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_pictures_that_no_one_asked_for_are_not_even_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(monkeypatch) as world, world.beside_an_honest_client():
            before, film = resident(), Film()
            async with world.client(film=film) as hostile:
                await until(lambda: film.sent > PICTURES)
                assert hostile.there is not None
                assert hostile.there.camera is None
                assert hostile.there.guard.received > PICTURES
                assert not [one for one in threading.enumerate() if one.name == "video-decoder"]
                await hostile.next("heard")
                assert resident() - before < PICTURES_GROWTH

    asyncio.run(main())


def test_pictures_that_no_one_looks_at_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(monkeypatch) as world, world.beside_an_honest_client():
            film = Film()
            async with world.client(options={"blind": True}, film=film) as hostile:
                assert hostile.there is not None
                camera = hostile.there.camera
                assert camera is not None
                await until(lambda: camera.stats.frames > 50)
                before, decoded = resident(), camera.stats.frames
                await until(lambda: camera.stats.frames + camera.stats.undecoded > decoded + PICTURES, 30)
                assert camera.stats.skipped >= camera.stats.frames - 40
                shown = await world.metrics()
                assert re.search(r'antiphon_webrtc_video_frames_total{outcome="skipped"} [1-9]', shown)
                assert camera._track._queue.qsize() <= 1
                (_, receiver) = hostile.there._pc.getReceivers()
                assert receiver._RTCRtpReceiver__decoder_queue.qsize() <= video.WAITING_FRAMES
                await hostile.next("heard")
                assert resident() - before < PICTURES_GROWTH

    asyncio.run(main())


# -- leaving -----------------------------------------------------------------------------------------------------------


def test_five_seconds_are_the_limit() -> None:
    assert peer.SILENT_SECONDS <= 5


def test_a_client_that_vanished_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(peer, "SILENT_SECONDS", 1.0)
        async with serving(monkeypatch) as world, world.beside_an_honest_client(), world.client() as gone:
            await gone.next("heard")
            gone.vanish()
            began = time.monotonic()
            await until(lambda: world.service.counts["kept"] == 1)
            assert 0.9 < time.monotonic() - began < 1 + 3 * peer.LOOK_SECONDS

    asyncio.run(main())


def test_a_stranger_does_not_stand_in_for_a_client_that_vanished(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(peer, "SILENT_SECONDS", 1.0)
        async with serving(monkeypatch) as world, world.beside_an_honest_client(), world.client() as gone:
            await gone.next("heard")
            gone.vanish()
            assert gone.there is not None
            address = "127.0.0.1", port_of(gone.there)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:

                def noticed() -> bool:
                    stranger.sendto(b"\x80" * 20, address)
                    return world.service.counts["kept"] == 1

                await until(noticed, 5)

    asyncio.run(main())
