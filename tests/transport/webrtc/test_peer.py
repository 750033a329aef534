"""Peers over loopback: aiortc's client against the real routes under uvicorn."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
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
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription, VideoStreamTrack
from starlette.applications import Starlette

import antiphon
from antiphon.codecs import opus
from antiphon.codecs.audio_file import read
from antiphon.pipelines.chunk import Audio, Chunk, Event, Video
from antiphon.pipelines.stage import Context, Inlet, Input, stage
from antiphon.pipelines.stages.parrot import Echo
from antiphon.transport.service import Service
from antiphon.transport.webrtc import peer as module
from antiphon.transport.webrtc.receiver import attach
from antiphon.transport.webrtc.routes import routes

CLIP = Path(antiphon.__file__).parent / "apps" / "samples" / "two_cities.flac"
SPEECH = read(CLIP, 24000)[: 24000 * 4]


class Talk(MediaStreamTrack):
    """The clip as packets of Opus, over and over."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        encoder = opus.encoder(24000)
        self.packets = [encoder.encode(SPEECH[i : i + 480]) for i in range(0, len(SPEECH) - 479, 480)]
        self.sent, self.begin = 0, 0.0

    async def recv(self) -> av.Packet:
        now = asyncio.get_running_loop().time()
        self.begin = self.begin or now
        await asyncio.sleep(self.begin + 0.02 * self.sent - now)
        packet = av.Packet(self.packets[self.sent % len(self.packets)])
        packet.pts, packet.time_base = 960 * self.sent, Fraction(1, 48000)
        self.sent += 1
        return packet


@stage
async def told(ctx: Context, control: Input) -> AsyncIterator[Event]:
    """Says what it was told."""
    async for event in control:
        assert isinstance(event, Event)
        yield Event(name="told", data={"name": event.name, **event.data}, rate=event.rate, start=event.start)


@stage(lasting=True)
async def seen(ctx: Context, video: Input) -> AsyncIterator[Event]:
    """Says how large and how bright the pictures are."""
    async for chunk in video:
        assert isinstance(chunk, Video)
        data = {"shape": list(chunk.pixels.shape), "green": float(chunk.pixels[..., 1].mean())}
        yield Event(name="seen", data=data, rate=chunk.rate, start=chunk.start)


def echoing(options: Any) -> Any:
    if options.get("unknown"):
        raise ValueError(f"unknown={options['unknown']!r}: there is no such option")
    return (Inlet().named("audio") >> Echo()) | (Inlet().named("control") >> told())


def watching(options: Any) -> Any:
    return (Inlet().named("audio") >> Echo()) | (Inlet().named("video") >> seen())


@dataclass
class Server:
    service: Service
    http: httpx.AsyncClient


@asynccontextmanager
async def serving(graph: Callable[[Any], Any] = echoing, **options: Any) -> AsyncIterator[Server]:
    service = Service(graph, None, **options)
    app = Starlette(routes=routes(service))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve([listening]))
    base = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=base, trust_env=False) as http:
            yield Server(service, http)
    finally:
        await service.close()
        server.should_exit = True
        await task


@dataclass
class Client:
    """A browser's part: a connection with a microphone, perhaps a camera and a data channel."""

    pc: RTCPeerConnection
    channel: Any = None
    messages: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)

    async def offer(self) -> str:
        await self.pc.setLocalDescription(await self.pc.createOffer())
        sdp: str = self.pc.localDescription.sdp
        return sdp

    async def accept(self, answer: str) -> None:
        await self.pc.setRemoteDescription(RTCSessionDescription(answer, "answer"))

    async def next(self, kind: str, seconds: float = 10.0) -> dict[str, Any]:
        async with asyncio.timeout(seconds):
            while (message := await self.messages.get())["type"] != kind:
                continue
        return message

    async def opened(self) -> None:
        async with asyncio.timeout(10):
            while self.channel.readyState != "open":
                await asyncio.sleep(0.01)

    def send(self, **message: Any) -> None:
        self.channel.send(json.dumps(message))


@asynccontextmanager
async def client(label: str | None = "events", *, camera: bool = False) -> AsyncIterator[Client]:
    pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    pc.addTrack(Talk())
    if camera:
        pc.addTrack(VideoStreamTrack())
    made = Client(pc)
    if label is not None:
        made.channel = pc.createDataChannel(label)
        made.channel.on("message", lambda text: made.messages.put_nowait(json.loads(text)))
    try:
        yield made
    finally:
        await pc.close()


async def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.02)


async def hear(pc: RTCPeerConnection, seconds: float) -> np.ndarray:
    audio, heard = attach(pc.getReceivers()[0]), []
    async with asyncio.timeout(20):
        async for frame in audio:
            heard.append(frame.samples)
            if len(heard) >= seconds / 0.02:
                break
    return np.concatenate(heard)


def likeness(heard: np.ndarray) -> float:
    """How well the last second of what was heard fits the clip."""
    reference, second = read(CLIP, 16000)[: 16000 * 4], heard[-16000:]
    size = 1 << 17
    products = np.fft.irfft(np.fft.rfft(reference, size) * np.conj(np.fft.rfft(second, size)))[: len(reference)]
    energies = np.sqrt(np.convolve(np.square(reference), np.ones(16000), "full")[15999:])
    return float((products / (energies * np.linalg.norm(second) + 1e-9)).max())


def test_what_is_said_comes_back_and_the_channel_speaks() -> None:
    async def main() -> None:
        async with serving() as server, client() as browser:
            response = await server.http.post("/rtc/offer", json={"sdp": await browser.offer()})
            assert response.status_code == 201
            body = response.json()
            assert "useinbandfec=1" in body["sdp"]
            assert set(body) == {"sdp", "call", "resume"}
            await browser.accept(body["sdp"])
            assert likeness(await hear(browser.pc, 2.5)) > 0.8
            await browser.opened()
            browser.send(type="ping", t=7)
            assert await browser.next("pong") == {"type": "pong", "t": 7}
            browser.send(type="control", name="hello", data={"there": 1})
            assert (await browser.next("told"))["data"] == {"name": "hello", "there": 1}
            browser.send(type="stats")
            stats = await browser.next("stats")
            assert stats["receiver"]["received"] > 50
            assert stats["sender"]["packets"] > 50
            assert stats["datagrams"]["malformed"] == 0
            browser.send(type="nonsense")
            assert "nonsense" in (await browser.next("error"))["message"]
            call = server.service.calls[body["call"]]
            heard = call.session.heard
            assert heard is not None
            assert 0.5 < heard.seconds < call.heard_seconds
            await browser.pc.close()
            await until(lambda: not server.service.calls)
            assert server.service.counts["ended"] == 1

    asyncio.run(main())
