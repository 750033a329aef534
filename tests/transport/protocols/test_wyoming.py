"""Wyoming with its own client: what is served, transcripts as they settle, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from wyoming.asr import Transcribe, Transcript, TranscriptChunk, TranscriptStart, TranscriptStop
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import Describe, Info
from wyoming.ping import Ping, Pong

from antiphon.pipelines.engine import Engine
from antiphon.transport.protocols.wyoming import CONNECTIONS, DATA_BYTES, LINE_BYTES, PAYLOAD_BYTES, serve
from antiphon.transport.service import Service

from .serving import clip, recognising, transcribing


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with recognising() as engine:
        yield engine


@asynccontextmanager
async def talking(
    engine: Engine, most: int = CONNECTIONS, **options: Any
) -> AsyncIterator[tuple[AsyncTcpClient, Service, int]]:
    service = Service(
        lambda given: transcribing(language=given.get("language")), engine, name="embedded-en", **options
    )  # fmt: skip
    server = await serve(service, port=0, most=most)
    port = server.sockets[0].getsockname()[1]
    client = AsyncTcpClient("127.0.0.1", port, connect_timeout=5, read_timeout=20)
    try:
        async with client:
            yield client, service, port
    finally:
        server.close()
        await server.wait_closed()
        await service.close()


async def say(client: AsyncTcpClient, seconds: float) -> list[Event]:
    pcm = clip(seconds).tobytes()
    await client.write_event(AudioStart(rate=16000, width=2, channels=1).event())
    for at in range(0, len(pcm), 2048):
        await client.write_event(AudioChunk(rate=16000, width=2, channels=1, audio=pcm[at : at + 2048]).event())
    await client.write_event(AudioStop().event())
    events = []
    while (event := await client.read_event()) is not None:
        events.append(event)
        if TranscriptStop.is_type(event.type):
            return events
    raise AssertionError(f"the connection ended after {events}")


def test_the_client_is_told_what_is_served(engine: Engine) -> None:
    async def run() -> None:
        async with talking(engine) as (client, _, _):
            await client.write_event(Describe().event())
            event = await client.read_event()
            assert event is not None
            info = Info.from_event(event)
            assert [model.name for model in info.asr[0].models] == ["embedded-en"]
            assert info.asr[0].models[0].languages == ["en"]
            assert info.asr[0].supports_transcript_streaming
            await client.write_event(Ping(text="there?").event())
            event = await client.read_event()
            assert event is not None
            assert Pong.from_event(event).text == "there?"

    asyncio.run(run())


def test_words_come_as_they_settle_and_then_the_whole(engine: Engine) -> None:
    async def run() -> None:
        async with talking(engine) as (client, service, _):
            texts = []
            for _ in range(2):
                await client.write_event(Transcribe(language="en").event())
                events = await say(client, 5.0)
                assert TranscriptStart.is_type(events[0].type)
                chunks = [TranscriptChunk.from_event(e).text for e in events if TranscriptChunk.is_type(e.type)]
                assert Transcript.is_type(events[-2].type)
                texts.append(Transcript.from_event(events[-2]).text)
                assert "".join(chunks) == texts[-1]
                assert len(chunks) == len(texts[-1].split()) > 5
            assert texts[0] == texts[1]
            assert "best of times" in texts[0].lower()
            assert service.counts["ended"] == service.counts["opened"] == 2
            assert not service.calls

    asyncio.run(run())


@pytest.mark.parametrize(
    ("events", "code", "says"),
    [
        ([AudioStart(rate=16000, width=4, channels=1).event()], "bad_request", "width=4"),
        ([AudioStart(rate=1000, width=2, channels=1).event()], "bad_request", "rate='1000'"),
        (
            [AudioStart(rate=16000, width=2, channels=1).event(), AudioChunk(8000, 2, 1, b"\0\0").event()],
            "bad_request",
            "8000 Hz",
        ),
        (
            [AudioStart(rate=16000, width=2, channels=1).event(), AudioChunk(16000, 2, 1, b"\0\0\0").event()],
            "bad_request",
            "3 bytes",
        ),
        (
            [Transcribe(language="fr").event(), AudioStart(16000, 2, 1).event(), AudioStop().event()],
            "failed",
            "no choice of language",
        ),
    ],
)
def test_what_cannot_be_is_an_error_event(engine: Engine, events: list[Event], code: str, says: str) -> None:
    async def run() -> None:
        async with talking(engine) as (client, service, _):
            for event in events:
                await client.write_event(event)
            answers = []
            while (answer := await client.read_event()) is not None:
                answers.append(answer)
            error = Error.from_event(answers[-1])
            assert error.code == code
            assert says in error.text
            assert not service.calls

    asyncio.run(run())


def test_a_full_service_says_so(engine: Engine) -> None:
    async def run() -> None:
        async with talking(engine, max_calls=1) as (client, _, port):
            await client.write_event(AudioStart(rate=16000, width=2, channels=1).event())
            event = await client.read_event()
            assert event is not None
            assert TranscriptStart.is_type(event.type)
            async with AsyncTcpClient("127.0.0.1", port, read_timeout=20) as second:
                await second.write_event(AudioStart(rate=16000, width=2, channels=1).event())
                event = await second.read_event()
                assert event is not None
                assert Error.from_event(event).code == "full"

    asyncio.run(run())


def test_a_model_of_many_languages_is_told_each(engine: Engine) -> None:
    """This one knows none, and says so when it is told one."""

    async def run() -> None:
        async with talking(engine, native=None) as (client, _, _):
            await client.write_event(Describe().event())
            event = await client.read_event()
            assert event is not None
            assert Info.from_event(event).asr[0].models[0].languages == []
            await client.write_event(Transcribe(language="en").event())
            await client.write_event(AudioStart(rate=16000, width=2, channels=1).event())
            event = await client.read_event()
            assert event is not None
            assert "no choice of language, got 'en'" in Error.from_event(event).text

    asyncio.run(run())


def test_no_more_connections_than_allowed_are_open_at_a_time(engine: Engine) -> None:
    async def run() -> None:
        async with talking(engine, most=2) as (first, service, port):
            async with AsyncTcpClient("127.0.0.1", port, read_timeout=20) as second:
                for client in (first, second):
                    await client.write_event(Ping().event())
                    assert await client.read_event() is not None
                async with AsyncTcpClient("127.0.0.1", port, read_timeout=20) as third:
                    event = await third.read_event()
                    assert event is not None
                    assert Error.from_event(event).code == "full"
                    assert await third.read_event() is None
                assert service.counts["refused"] == 1
            async with asyncio.timeout(10):
                answer = None
                while answer is None or not Pong.is_type(answer.type):  # once the second has left, there is room
                    async with AsyncTcpClient("127.0.0.1", port, read_timeout=20) as another:
                        await another.write_event(Ping().event())
                        answer = await another.read_event()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"x" * (LINE_BYTES + 2), "longer than"),
        (b"{\n", "not JSON"),
        (b"[]\n", "not a JSON object"),
        (b'{"type": 3}\n', "has a type"),
        (json.dumps({"type": "audio-chunk", "payload_length": PAYLOAD_BYTES + 1}).encode() + b"\n", "payload_length"),
        (json.dumps({"type": "audio-chunk", "data_length": DATA_BYTES + 1}).encode() + b"\n", "data_length"),
        (b'{"type": "ping", "data_length": -1}\n', "data_length"),
    ],
)
def test_bytes_beyond_the_bounds_are_refused(engine: Engine, raw: bytes, says: str) -> None:
    async def run() -> None:
        async with talking(engine) as (_, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(raw)
            async with asyncio.timeout(10):
                answer = json.loads(await reader.readline())
                assert answer["type"] == "error"
                assert says in answer["data"]["text"]
            writer.close()

    asyncio.run(run())


def test_a_client_that_leaves_within_its_audio_ends_the_call(engine: Engine) -> None:
    async def run() -> None:
        async with talking(engine) as (client, service, _):
            await client.write_event(AudioStart(rate=16000, width=2, channels=1).event())
            assert await client.read_event() is not None
            assert len(service.calls) == 1
            await client.disconnect()
            async with asyncio.timeout(10):
                while service.counts["ended"] == 0:
                    await asyncio.sleep(0.01)
            assert not service.calls

    asyncio.run(run())
