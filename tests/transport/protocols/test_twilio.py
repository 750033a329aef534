"""Twilio media streams: a scripted client message by message, and streamdouble's simulated telephone calls."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient, WebSocketDenialResponse
from streamdouble.api import call as simulated_call
from streamdouble.session import SessionConfig
from websockets.asyncio.client import ClientConnection, connect

from antiphon.codecs.g711 import decode, encode
from antiphon.pipelines.chunk import Audio, Chunk, Event
from antiphon.pipelines.graph import Graph
from antiphon.pipelines.stage import Context, Inlet, Input, stage
from antiphon.transport.guard import Guard, Rules
from antiphon.transport.protocols.twilio import FORMAT, MARK_EVERY, PATH, routes, signature, signed_with
from antiphon.transport.service import Service
from antiphon.transport.websocket import SEND_SECONDS

from .serving import serving

RATE = 8000
SID = "MZ0123456789abcdef0123456789abcdef"
REPLY_RATE = 24000
HEARD = 1600  # samples that are heard before a reply
REPLY = 0.5  # seconds


@stage(name="twilio_test_reply")
async def reply(ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
    """A tone of half a second at 24 kHz after every 200 ms heard, as loud as what was heard."""
    heard: list[Any] = []
    at = 0
    async for chunk in audio:
        if not isinstance(chunk, Audio):
            continue
        heard.extend(chunk.samples)
        while len(heard) >= HEARD:
            loud = float(np.abs(heard[:HEARD]).max())
            del heard[:HEARD]
            tone = (loud * np.sin(2 * np.pi * 440 / REPLY_RATE * np.arange(REPLY * REPLY_RATE))).astype(np.float32)
            for piece in np.split(tone, 25):
                yield Audio(samples=piece, rate=REPLY_RATE, start=at)
                at += len(piece)
            yield Audio(samples=np.zeros(0, np.float32), rate=REPLY_RATE, start=at, final=True)


@stage(name="twilio_test_keys")
async def keys(ctx: Context, control: Input) -> AsyncIterator[Chunk]:
    """Keeps the keys that were pressed with the session's counters."""
    async for chunk in control:
        if isinstance(chunk, Event):
            ctx.count(f"{chunk.name} {chunk.data['digit']}", 1)
            yield Event(name="key", rate=RATE)


def replying(options: Mapping[str, Any]) -> Graph:
    if options.get("language"):
        raise ValueError(f"language={options['language']!r}: English only")
    return (Inlet().named("audio") >> reply()) | (Inlet().named("control") >> keys())


def sound(samples: int, loud: float = 0.5) -> bytes:
    return encode(np.full(samples, round(loud * 32767), np.int16), "mulaw").tobytes()


def media(codes: bytes) -> str:
    held = {"track": "inbound", "chunk": "1", "timestamp": "0", "payload": base64.b64encode(codes).decode()}
    return json.dumps({"event": "media", "sequenceNumber": "2", "media": held, "streamSid": SID})


def start(**changed: Any) -> str:
    held = {
        "streamSid": SID, "accountSid": "AC", "callSid": "CA", "tracks": ["inbound"], "customParameters": {},
        "mediaFormat": FORMAT,
    }  # fmt: skip
    return json.dumps({"event": "start", "sequenceNumber": "1", "start": held | changed, "streamSid": SID})


async def begin(ws: ClientConnection) -> None:
    await ws.send(json.dumps({"event": "connected", "protocol": "Call", "version": "1.0.0"}))
    await ws.send(start())


async def receive(ws: ClientConnection) -> dict[str, Any]:
    async with asyncio.timeout(10):
        message: dict[str, Any] = json.loads(await ws.recv())
    assert message["streamSid"] == SID
    return message


async def whole_reply(ws: ClientConnection) -> tuple[bytes, list[str]]:
    """Its codes, and the names of the marks within it."""
    codes: bytes = b""
    marks: list[str] = []
    while True:
        message = await receive(ws)
        if message["event"] == "media":
            codes += base64.b64decode(message["media"]["payload"])
            continue
        assert message["event"] == "mark"
        marks.append(message["mark"]["name"])
        if len(codes) >= REPLY * RATE:
            return codes, marks


async def settled(check: Any) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        while not check():
            await asyncio.sleep(0.005)


def test_a_reply_is_marked_and_what_was_heard_of_it_is_known() -> None:
    async def run() -> None:
        service = Service(replying, None)
        async with serving(routes(service)) as host, connect(f"ws://{host}/twilio/media") as ws:
            await begin(ws)
            for _ in range(10):
                await ws.send(media(sound(160)))
            codes, marks = await whole_reply(ws)
            pcm = decode(np.frombuffer(codes, np.uint8), "mulaw") / 32768
            assert len(pcm) == REPLY * RATE
            expected = 0.5 * np.sin(2 * np.pi * 440 / RATE * np.arange(len(pcm)))
            assert np.abs(pcm - expected)[80:-80].max() < 0.03
            assert len(marks) == REPLY / MARK_EVERY + 1
            assert len(set(marks)) == len(marks)

            (call,) = service.calls.values()
            session = call.session
            assert session.playing
            await ws.send(json.dumps({"event": "mark", "mark": {"name": marks[1]}, "streamSid": SID}))
            await settled(lambda: session.heard is not None and session.heard.seconds == pytest.approx(2 * MARK_EVERY))
            assert session.playing
            await ws.send(json.dumps({"event": "mark", "mark": {"name": marks[-1]}, "streamSid": SID}))
            await settled(lambda: not session.playing)

            await ws.send(json.dumps({"event": "dtmf", "dtmf": {"track": "inbound_track", "digit": "7"}}))
            await settled(lambda: any("dtmf 7" in name for name in session.counters))
            await ws.send(json.dumps({"event": "stop", "stop": {"accountSid": "AC", "callSid": "CA"}}))
            async with asyncio.timeout(10):
                await ws.wait_closed()
            assert ws.close_code == 1000
        assert not service.calls
        await service.close()

    asyncio.run(run())


def test_an_interruption_clears_what_waits_and_its_marks_count_for_nothing() -> None:
    async def run() -> None:
        service = Service(replying, None)
        async with serving(routes(service)) as host, connect(f"ws://{host}/twilio/media") as ws:
            await begin(ws)
            await ws.send(media(sound(HEARD)))
            _, marks = await whole_reply(ws)
            (call,) = service.calls.values()
            await ws.send(json.dumps({"event": "mark", "mark": {"name": marks[0]}}))
            await settled(lambda: call.session.heard is not None)
            call.interrupt()
            assert await receive(ws) == {"event": "clear", "streamSid": SID}
            for mark in marks[1:]:  # as Twilio does when it clears
                await ws.send(json.dumps({"event": "mark", "mark": {"name": mark}}))
            await ws.send(media(sound(HEARD)))
            codes, later = await whole_reply(ws)
            assert len(codes) == REPLY * RATE
            assert not set(later) & set(marks)
            assert call.session.heard is not None
            assert (call.session.heard.epoch, call.session.heard.seconds) == (0, pytest.approx(MARK_EVERY))
            await ws.send(json.dumps({"event": "mark", "mark": {"name": later[0]}}))
            await settled(lambda: call.session.heard.epoch == 1)
        await service.close()

    asyncio.run(run())


def test_a_caller_who_vanishes_ends_the_call() -> None:
    async def run() -> None:
        service = Service(replying, None)
        async with serving(routes(service)) as host:
            ws = await connect(f"ws://{host}/twilio/media")
            await begin(ws)
            await settled(lambda: len(service.calls) == 1)
            ws.transport.abort()
            await settled(lambda: not service.calls)
            assert service.counts["kept"] == 0
        await service.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("messages", "code", "says"),
    [
        (["nonsense"], 1003, "not JSON"),
        (["[1]"], 1003, "no event"),
        ([media(b"")], 1003, "before start"),
        ([start(mediaFormat=FORMAT | {"sampleRate": 16000})], 1003, "'sampleRate': 8000"),
        ([start(), json.dumps({"event": "media", "media": {"payload": "?"}})], 1003, "base64"),
        ([start(customParameters={"language": "fr"})], 1008, "English only"),
    ],
)
def test_what_twilio_does_not_send_is_refused(messages: list[str], code: int, says: str) -> None:
    async def run() -> None:
        service = Service(replying, None)
        async with serving(routes(service)) as host, connect(f"ws://{host}/twilio/media") as ws:
            for message in messages:
                await ws.send(message)
            async with asyncio.timeout(10):
                await ws.wait_closed()
            assert ws.close_code == code
            assert says in (ws.close_reason or "")
        assert not service.calls
        await service.close()

    asyncio.run(run())


@pytest.mark.parametrize(("native", "code"), [("en", 1000), (None, 1008)])
def test_a_model_of_many_languages_is_told_each(native: str | None, code: int) -> None:
    async def run() -> None:
        service = Service(replying, None, native=native)
        async with serving(routes(service)) as host, connect(f"ws://{host}/twilio/media") as ws:
            await ws.send(start(customParameters={"language": "en-US"}))
            await ws.send(json.dumps({"event": "stop", "stop": {"accountSid": "AC", "callSid": "CA"}}))
            async with asyncio.timeout(10):
                await ws.wait_closed()
            assert ws.close_code == code
        await service.close()

    asyncio.run(run())


def test_signatures_are_those_of_twilio() -> None:
    """The example of its documentation, whose form is signed after the address: sorted, and without separators."""
    form = "CallSidCA1234567890ABCDECaller+14158675309Digits1234From+14158675309To+18005551212"
    assert signature("12345", "https://mycompany.com/myapp.php?foo=1&bar=2" + form) == "RSOYDt4T1cUTdK1PDd93/VVr8B8="


@pytest.mark.parametrize(
    ("host", "path", "url", "holds"),
    [
        ("a.example", PATH, "wss://a.example/twilio/media", True),
        ("a.example", PATH, "wss://a.example:443/twilio/media", True),
        ("a.example:443", PATH, "wss://a.example/twilio/media", True),
        ("a.example:8443", PATH, "wss://a.example:8443/twilio/media", True),
        ("a.example", f"{PATH}?a=b", "wss://a.example/twilio/media?a=b", True),
        ("a.example", PATH, "wss://b.example/twilio/media", False),
        ("a.example", PATH, "https://a.example/twilio/media", False),
        ("a.example", PATH, None, False),
    ],
)
def test_only_what_twilio_signed_comes_in(host: str, path: str, url: str | None, holds: bool) -> None:
    rules = Rules(loopback=False, secret="s" * 32, signed={PATH: signed_with("token")})
    app: Any = Guard(Starlette(routes=routes(Service(replying, None))), rules)
    headers = {"host": host} | ({"x-twilio-signature": signature("token", url)} if url else {})
    client = TestClient(app, base_url=f"http://{host}")
    if holds:
        with client.websocket_connect(path, headers=headers) as websocket:
            websocket.send_text("nonsense")
            assert websocket.receive()["code"] == 1003
    else:
        with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect(path, headers=headers):
            pass
        assert denied.value.status_code == 403


def test_a_simulated_telephone_call_finds_no_violation() -> None:
    async def run() -> None:
        service = Service(replying, None)
        async with serving(routes(service)) as host:
            config = SessionConfig(quiet_period_s=0.7, max_call_s=10.0)
            report = await simulated_call(f"ws://{host}/twilio/media", frames=[sound(160)] * 25, config=config)
        assert report.violations == []
        assert report.passed
        assert len(report.audio_received) == 2 * REPLY * RATE
        assert service.counts["ended"] == 1
        await service.close()

    asyncio.run(run())
