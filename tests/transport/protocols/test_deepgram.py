"""Deepgram's live transcription with its own SDK: results, events, Finalize, and what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from deepgram import AsyncDeepgramClient
from deepgram.core.api_error import ApiError
from deepgram.environment import DeepgramClientEnvironment
from deepgram.listen.v1.types import (
    ListenV1CloseStream,
    ListenV1Error,
    ListenV1Finalize,
    ListenV1KeepAlive,
    ListenV1Metadata,
    ListenV1Results,
    ListenV1SpeechStarted,
    ListenV1UtteranceEnd,
)
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from antiphon.codecs.g711 import encode
from antiphon.codecs.resample import Resampler
from antiphon.pipelines.chunk import Audio, Chunk, Event
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.graph import Graph
from antiphon.pipelines.stage import Context, Inlet, Input, stage
from antiphon.pipelines.stages.transcribe import Transcribe
from antiphon.transport.protocols import deepgram
from antiphon.transport.protocols.deepgram import routes
from antiphon.transport.service import Service

from .serving import clip, recognising, serving


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with recognising() as engine:
        yield engine


@stage(name="deepgram_test_onset")
async def onset(ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
    """Speech starts 100 ms into the sound."""
    told = False
    async for chunk in audio:
        if isinstance(chunk, Audio) and not told:
            told = True
            yield Event(name="speech_start", rate=16000, start=1600)


def graph(options: Any) -> Graph:
    audio = Inlet().named("audio")
    return (audio >> Transcribe(endpoint=options["endpoint_ms"] / 1000, language=options.get("language"))) | (
        audio >> onset()
    )


@asynccontextmanager
async def listening(engine: Engine, **query: Any) -> AsyncIterator[tuple[Any, Service]]:
    """The SDK's connection to a server."""
    service = Service(graph, engine, name="embedded-en", max_calls=1)
    async with serving(routes(service)) as host:
        environment = DeepgramClientEnvironment(
            base=f"http://{host}", production=f"ws://{host}", agent=f"ws://{host}", agent_rest=f"http://{host}"
        )
        client = AsyncDeepgramClient(api_key="none", environment=environment)
        options = {"model": "nova-3", "encoding": "linear16", "sample_rate": 16000} | query
        async with client.listen.v1.connect(**options) as connection:
            yield connection, service
    await service.close()


async def say(connection: Any, pcm: bytes, size: int = 3200) -> None:
    for at in range(0, len(pcm), size):
        await connection.send_media(pcm[at : at + size])


async def until(connection: Any, kind: type, into: list[Any]) -> None:
    async with asyncio.timeout(20):
        while True:
            message = await connection.recv()
            into.append(message)
            if isinstance(message, kind):
                return


def text(messages: list[Any]) -> str:
    finals = [m for m in messages if isinstance(m, ListenV1Results) and m.is_final]
    return " ".join(filter(None, (m.channel.alternatives[0].transcript for m in finals)))


def test_results_words_and_metadata(engine: Engine) -> None:
    async def run() -> None:
        pcm = clip(6.0).tobytes()
        async with listening(engine, interim_results="true", vad_events="true", language="en-US") as (connection, _):
            await connection.send_keep_alive(ListenV1KeepAlive(type="KeepAlive"))
            await say(connection, pcm)
            await connection.send_close_stream(ListenV1CloseStream(type="CloseStream"))
            got: list[Any] = []
            await until(connection, ListenV1Metadata, got)
        assert "best of times" in text(got).lower()
        results = [message for message in got if isinstance(message, ListenV1Results)]
        assert any(not result.is_final for result in results)
        assert not any(result.from_finalize for result in results)
        for result in results:
            words = result.channel.alternatives[0].words
            assert [word.punctuated_word for word in words] == result.channel.alternatives[0].transcript.split()
            assert result.start == pytest.approx(words[0].start, abs=2e-3)
            assert result.start + result.duration == pytest.approx(words[-1].end, abs=2e-3)
            assert all(word.confidence == 0.0 for word in words)
            assert result.metadata.model_info.name == "embedded-en"
        assert [m.timestamp for m in got if isinstance(m, ListenV1SpeechStarted)] == [0.1]
        metadata = got[-1]
        assert metadata.duration == 6.0
        assert metadata.sha256 == hashlib.sha256(pcm).hexdigest()
        assert metadata.request_id == results[0].metadata.request_id

    asyncio.run(run())


def test_finalize_brings_out_what_is_inside_and_times_go_on(engine: Engine) -> None:
    async def run() -> None:
        pcm = clip(8.0).tobytes()
        async with listening(engine) as (connection, service):
            got: list[Any] = []
            await say(connection, pcm[: 32000 * 4])
            await connection.send_finalize(ListenV1Finalize(type="Finalize"))
            while not (got and got[-1].from_finalize):
                await until(connection, ListenV1Results, got)
            first = len(got)
            assert text(got)
            await connection.send_finalize(ListenV1Finalize(type="Finalize"))
            await until(connection, ListenV1Results, got)
            assert (got[-1].from_finalize, got[-1].is_final, text(got[-1:])) == (True, True, "")
            await say(connection, pcm[32000 * 4 :])
            await connection.send_close_stream(ListenV1CloseStream(type="CloseStream"))
            await until(connection, ListenV1Metadata, got)
            later = [word for result in got[first + 1 : -1] for word in result.channel.alternatives[0].words]
            assert later
            assert all(4.0 <= word.start < word.end <= 8.1 for word in later)
            assert got[-1].duration == 8.0
            assert service.counts["opened"] == 3

    asyncio.run(run())


def test_mulaw_is_heard_and_the_end_of_an_utterance_is_told(engine: Engine) -> None:
    async def run() -> None:
        speech = Resampler(16000, 8000).push(clip(4.0).astype(np.float32) / 32768)
        pcm = np.concatenate((np.rint(speech * 32767).astype(np.int16), np.zeros(8000 * 3, np.int16)))
        sound = encode(pcm, "mulaw").tobytes()
        options = {"encoding": "mulaw", "sample_rate": 8000, "interim_results": "true", "endpointing": 500}
        async with listening(engine, utterance_end_ms="1000", **options) as (connection, _):
            got: list[Any] = []
            await say(connection, sound, 800)
            while not (got and got[-1].is_final and got[-1].start + got[-1].duration > 3.0):
                await until(connection, ListenV1Results, got)
            paused = got[-1]
            assert paused.speech_final
            await say(connection, sound[:160])
            await until(connection, ListenV1UtteranceEnd, got)
            assert got[-1].last_word_end == pytest.approx(paused.start + paused.duration, abs=2e-3)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"encoding": None}, "containers"),
        ({"encoding": "opus"}, "encoding='opus'"),
        ({"sample_rate": 4000}, "sample_rate='4000'"),
        ({"channels": 2}, "channels='2'"),
        ({"diarize": "true"}, "diarize='true'"),
        ({"endpointing": "soon"}, "endpointing='soon'"),
        ({"language": "fr"}, "no choice of language"),
    ],
)
def test_what_is_not_served_is_refused_at_the_handshake(engine: Engine, query: dict[str, Any], says: str) -> None:
    async def run() -> None:
        with pytest.raises(ApiError) as refused:
            async with listening(engine, **query):
                pass
        assert refused.value.status_code == 400

        service = Service(graph, engine)
        options = {"encoding": "linear16", "sample_rate": 16000} | query
        given = "&".join(f"{name}={value}" for name, value in options.items() if value is not None)
        async with serving(routes(service)) as host:
            with pytest.raises(InvalidStatus) as status:
                await connect(f"ws://{host}/v1/listen?{given}")
            assert says in status.value.response.headers["dg-error"]
        await service.close()

    asyncio.run(run())


def test_a_model_of_many_languages_is_told_each(engine: Engine) -> None:
    """This one knows none, and says so when it is told one."""

    async def run() -> None:
        service = Service(graph, engine, native=None)
        async with serving(routes(service)) as host:
            with pytest.raises(InvalidStatus) as status:
                await connect(f"ws://{host}/v1/listen?encoding=linear16&sample_rate=16000&language=en")
            assert "no choice of language, got 'en'" in status.value.response.headers["dg-error"]
        await service.close()

    asyncio.run(run())


def test_a_full_service_and_a_bad_message(engine: Engine) -> None:
    async def run() -> None:
        service = Service(graph, engine, max_calls=1)
        async with serving(routes(service)) as host:
            url = f"ws://{host}/v1/listen?encoding=linear16&sample_rate=16000"
            async with connect(url) as ws:
                with pytest.raises(InvalidStatus) as status:
                    await connect(url)
                assert status.value.response.status_code == 503
                await ws.send('{"type":"Configure"}')
                error = ListenV1Error(**json.loads(await ws.recv()))
                assert "Configure" in error.description
        assert not service.calls
        await service.close()

    asyncio.run(run())


def test_silence_without_keep_alive_closes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepgram, "SILENCE_SECONDS", 0.05)

    async def run() -> None:
        service = Service(graph, engine)
        async with (
            serving(routes(service)) as host,
            connect(f"ws://{host}/v1/listen?encoding=linear16&sample_rate=16000") as ws,
        ):
            async with asyncio.timeout(10):
                await ws.wait_closed()
            assert ws.close_code == 1011
            assert ws.close_reason is not None
            assert "NET-0001" in ws.close_reason
        await service.close()

    asyncio.run(run())
