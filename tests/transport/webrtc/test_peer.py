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
from antiphon.pipelines.chunk import Audio, Event, Video
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
        await until(lambda: self.channel.readyState == "open")

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
    """How well some second of what was heard fits the clip; on a busy machine others are stretched or have gaps."""
    return max(_likeness(heard[start : start + 16000]) for start in range(0, len(heard) - 15999, 4000))


def _likeness(second: np.ndarray) -> float:
    reference = read(CLIP, 16000)[: 16000 * 4]
    size = 1 << 17
    products = np.fft.irfft(np.fft.rfft(reference, size) * np.conj(np.fft.rfft(second, size)))[: len(reference)]
    total = np.cumsum(np.square(reference, dtype=np.float64))
    energies = np.sqrt(np.append(total[15999:], np.full(15999, total[-1])) - np.append(0.0, total[:-1]))
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
            assert likeness(await hear(browser.pc, 2.5)) > 0.6
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
            assert stats["calls"] == 1
            assert isinstance(stats["depths"], dict)
            assert stats["video"] is None
            assert 0.5 < stats["heard_seconds"] <= server.service.calls[body["call"]].heard_seconds + 1e-4
            browser.send(type="interrupt")
            assert (await browser.next("interrupted"))["data"]["epoch"] == 1
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


def test_whip_answers_and_delete_frees_everything() -> None:
    async def main() -> None:
        async with serving() as server, client(None) as browser:
            headers = {"Content-Type": "application/sdp"}
            response = await server.http.post("/whip", content=await browser.offer(), headers=headers)
            assert response.status_code == 201
            assert response.headers["content-type"].startswith("application/sdp")
            location = response.headers["location"]
            assert location.startswith("/whip/")
            await browser.accept(response.text)
            (call,) = server.service.calls.values()
            await until(lambda: call.heard_seconds > 0.3)
            assert (await server.http.get("/whip")).status_code == 405
            assert (await server.http.put(location, content=b"")).status_code == 405
            assert (await server.http.delete("/whip/other")).status_code == 404
            assert (await server.http.delete(location)).status_code == 200
            assert not server.service.calls
            assert (await server.http.delete(location)).status_code == 404
            await until(lambda: browser.pc.connectionState == "closed")
            assert not [task for task in asyncio.all_tasks() if task.get_name().startswith(("peer", "call"))]

    asyncio.run(main())


def test_whep_sends_sound_to_one_who_only_listens() -> None:
    @stage
    async def talk(ctx: Context) -> AsyncIterator[Audio]:
        for i in range(0, len(SPEECH), 480):
            yield Audio(SPEECH[i : i + 480], rate=24000, start=i)

    async def main() -> None:
        async with serving(lambda options: talk() | (Inlet().named("control") >> told())) as server:
            pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
            pc.addTransceiver("audio", direction="recvonly")
            browser = Client(pc)
            headers = {"Content-Type": "application/sdp"}
            response = await server.http.post("/whep", content=await browser.offer(), headers=headers)
            assert response.status_code == 201
            assert response.headers["location"].startswith("/whep/")
            await browser.accept(response.text)
            assert likeness(await hear(pc, 2.0)) > 0.6
            await pc.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        ("/whip", {"Content-Type": "application/sdp"}, b"", 400),
        ("/whip", {"Content-Type": "application/sdp"}, b"v=0", 400),
        ("/whip", {"Content-Type": "application/sdp"}, b"\xff\xfe", 400),
        ("/whip", {"Content-Type": "text/plain"}, b"v=0", 415),
        ("/whip", {"Content-Type": "application/sdp", "Accept": "text/html"}, b"v=0", 406),
        ("/whep", {"Content-Type": "application/sdp"}, b"x" * 200_000, 413),
        ("/whip?resume=nonsense", {"Content-Type": "application/sdp"}, b"v=0", 401),
        ("/rtc/offer", {"Content-Type": "application/sdp"}, b"v=0", 415),
        ("/rtc/offer", {"Content-Type": "application/json"}, b"[]", 400),
        ("/rtc/offer", {"Content-Type": "application/json"}, b"{", 400),
        ("/rtc/offer", {"Content-Type": "application/json"}, b'{"sdp": 5}', 400),
        ("/rtc/offer", {"Content-Type": "application/json"}, b'{"sdp": "v=0"}', 400),
        ("/rtc/offer", {"Content-Type": "application/json"}, b'{"sdp": "v=0", "options": {"unknown": 1}}', 400),
        ("/rtc/offer", {"Content-Type": "application/json"}, b'{"sdp": "v=0", "after": true}', 400),
    ],
)
def test_what_is_wrong_is_refused_and_leaves_nothing(
    path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    async def main() -> None:
        async with serving() as server:
            response = await server.http.post(path, headers=headers, content=body)
            assert response.status_code == status
            assert response.json()["error"]["message"]
            assert not server.service.calls

    asyncio.run(main())


def test_sound_is_opus_and_nothing_else() -> None:
    async def main() -> None:
        async with serving() as server, client(None) as browser:
            offer, headers = await browser.offer(), {"Content-Type": "application/sdp"}
            other = offer.replace(" opus/48000/2", " speex/48000/2")
            response = await server.http.post("/whip", content=other, headers=headers)
            assert response.status_code == 400
            assert "offer Opus" in response.json()["error"]["message"]
            assert not server.service.calls
            first, rest = offer.split("m=audio", 1)
            line, rest = rest.split("\r\n", 1)
            port, profile, *formats = line.split()
            last = f"m=audio {port} {profile} {' '.join(reversed(formats))}\r\n"
            response = await server.http.post("/whip", content=first + last + rest, headers=headers)
            assert response.status_code == 201
            named = [line for line in response.text.splitlines() if line.startswith("a=rtpmap")]
            assert [line.split()[1] for line in named] == ["opus/48000/2"]

    asyncio.run(main())


def test_openai_calls_get_their_session_and_speak_on_their_channel() -> None:
    async def main() -> None:
        async with serving() as server, client("oai-events") as browser, client("oai-events") as bare:
            session = {"type": "realtime", "instructions": "be kind"}
            parts = {
                "sdp": (None, await browser.offer(), "application/sdp"),
                "session": (None, json.dumps(session), "application/json"),
            }
            response = await server.http.post("/v1/realtime/calls", files=parts)
            assert response.status_code == 201
            location = response.headers["location"]
            assert location.startswith("/v1/realtime/calls/")
            await browser.accept(response.text)
            assert (await browser.next("session.created"))["session"]["object"] == "realtime.session"
            assert (await browser.next("session.updated"))["session"]["instructions"] == "be kind"
            browser.send(type="input_audio_buffer.append", event_id="mine", audio="!")
            assert (await browser.next("error"))["error"]["event_id"] == "mine"
            assert likeness(await hear(browser.pc, 2.0)) > 0.6
            assert (await server.http.post(location + "/hangup")).status_code == 200
            assert not server.service.calls
            headers = {"Content-Type": "application/sdp"}
            response = await server.http.post("/v1/realtime/calls", content=await bare.offer(), headers=headers)
            assert response.status_code == 201
            for wrong in (
                {"sdp": (None, "v=0")},
                {"session": (None, "{}")},
                {"sdp": (None, "v=0"), "session": (None, "[")},
            ):
                assert (await server.http.post("/v1/realtime/calls", files=wrong)).status_code == 400

    asyncio.run(main())


def test_a_full_service_says_when_to_come_back() -> None:
    async def main() -> None:
        async with serving(max_calls=1, keep=7.0) as server, client(None) as first, client(None) as second:
            headers = {"Content-Type": "application/sdp"}
            response = await server.http.post("/whip", content=await first.offer(), headers=headers)
            assert response.status_code == 201
            await first.accept(response.text)
            response = await server.http.post("/whip", content=await second.offer(), headers=headers)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "7"

    asyncio.run(main())


def test_a_client_that_vanishes_is_noticed_and_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.1)

    async def main() -> None:
        async with serving() as server, client() as browser, client() as again:
            body = (await server.http.post("/rtc/offer", json={"sdp": await browser.offer()})).json()
            await browser.accept(body["sdp"])
            await browser.opened()
            call = server.service.calls[body["call"]]
            await until(lambda: call.heard_seconds > 0.3)
            browser.send(type="control", name="before", data={})
            last = (await browser.next("told"))["id"]
            for protocol in browser.pc.getSenders()[0].transport.transport._connection._protocols:
                monkeypatch.setattr(protocol.transport, "sendto", lambda data, address: None)
            await until(lambda: server.service.counts["kept"] == 1)
            offer = {"sdp": await again.offer(), "resume": body["resume"], "after": last}
            response = await server.http.post("/rtc/offer", json=offer)
            assert response.status_code == 201
            assert response.json()["call"] == body["call"]
            await again.accept(response.json()["sdp"])
            await again.opened()
            again.send(type="control", name="after", data={})
            message = await again.next("told")
            assert message["data"]["name"] == "after"
            assert message["id"] > last

    asyncio.run(main())


def test_one_who_never_connects_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.3)

    async def main() -> None:
        async with serving() as server, client(None) as browser:
            headers = {"Content-Type": "application/sdp"}
            response = await server.http.post("/whip", content=await browser.offer(), headers=headers)
            assert response.status_code == 201
            assert server.service.calls
            await until(lambda: not server.service.calls)
            assert server.service.counts["kept"] == 0

    asyncio.run(main())


def test_the_camera_is_looked_at_now_and_then_where_the_graph_takes_pictures() -> None:
    async def main() -> None:
        async with serving(watching) as server, client(camera=True) as browser:
            body = (await server.http.post("/rtc/offer", json={"sdp": await browser.offer()})).json()
            await browser.accept(body["sdp"])
            first, second = await browser.next("seen"), await browser.next("seen")
            assert first["data"]["shape"] == [480, 640, 3]
            assert first["data"]["green"] == pytest.approx(135, abs=10)
            assert second["start"] - first["start"] >= 0.45
            await browser.opened()
            browser.send(type="stats")
            video = (await browser.next("stats"))["video"]
            assert (video["width"], video["height"]) == (640, 480)
            assert video["frames"] > video["skipped"] > 0
            assert (video["undecoded"], video["refused"]) == (0, 0)

    asyncio.run(main())


def test_pictures_that_no_one_takes_are_refused_in_the_answer() -> None:
    async def main() -> None:
        async with serving() as server, client(camera=True) as browser:
            body = (await server.http.post("/rtc/offer", json={"sdp": await browser.offer()})).json()
            audio, video = body["sdp"].split("m=audio")[1].split("m=video")
            assert "a=sendrecv" in audio
            assert "a=inactive" in video

    asyncio.run(main())


def test_strangers_datagrams_neither_raise_nor_pile_up() -> None:
    async def main() -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
        async with serving() as server, client() as browser:
            body = (await server.http.post("/rtc/offer", json={"sdp": await browser.offer()})).json()
            ports = [
                int(line.split()[5])
                for line in body["sdp"].splitlines()
                if line.startswith("a=candidate:") and " 127.0.0.1 " in line
            ]
            short_priority = bytes.fromhex("00010008 2112a442") + bytes(12) + bytes.fromhex("0024000200000000")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                for _ in range(20):
                    stranger.sendto(short_priority, ("127.0.0.1", ports[0]))
                for _ in range(1000):
                    stranger.sendto(b"\x80" + bytes(100), ("127.0.0.1", ports[0]))
                    await asyncio.sleep(0)  # one turn of the loop reads one datagram
            await browser.accept(body["sdp"])
            await browser.opened()
            browser.send(type="stats")
            datagrams = (await browser.next("stats"))["datagrams"]
            assert datagrams["malformed"] == 20
            assert datagrams["overflowed"] > 100
            assert not failures

    asyncio.run(main())


def test_a_large_picture_is_made_smaller_in_proportion() -> None:
    frame = av.VideoFrame.from_ndarray(np.full((1080, 1920, 3), 200, np.uint8), format="rgb24")
    assert module.picture(frame).shape == (432, 768, 3)
    assert module.picture(frame, 4000).shape == (1080, 1920, 3)
    assert abs(int(module.picture(frame).mean()) - 200) <= 2
