"""OpenAI's Realtime API: the ``openai`` package with a server, over a websocket."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from antiphon.codecs.resample import resample
from antiphon.models.silero import SileroVAD
from antiphon.pipelines import served
from antiphon.pipelines.chunk import Audio, Chunk
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.stage import Context, Inlet, Input, stage
from antiphon.transport.protocols.realtime import routes
from antiphon.transport.service import Service

from .serving import clip, recognising, serving
from .talking import RATE, SERVER_EVENT, pcm

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with recognising() as engine:
        engine.add("vad", SileroVAD(), slots=4)
        yield engine


def client_of(address: str) -> Any:
    return openai.AsyncOpenAI(
        api_key="unused", base_url=f"http://{address}/v1", websocket_base_url=f"ws://{address}/v1"
    )


async def until(connection: Any, kind: str, seen: list[Any], seconds: float = 30.0) -> Any:
    async with asyncio.timeout(seconds):
        while True:
            event = await connection.recv()
            SERVER_EVENT.validate_python(event.model_dump(exclude_unset=True))
            seen.append(event)
            if event.type == kind:
                return event


async def speak(connection: Any, seconds: float, silence: float) -> None:
    samples = resample(clip(seconds).astype(np.float32) / 32768, 16000, RATE)
    samples = np.concatenate((samples, np.zeros(round(silence * RATE), np.float32)))
    data = (samples * 32767).astype("<i2").tobytes()
    for at in range(0, len(data), 9600):
        await connection.input_audio_buffer.append(audio=base64.b64encode(data[at : at + 9600]).decode())


def test_the_sdk_talks_with_the_parrot(engine: Engine) -> None:
    async def main() -> None:
        service = Service(served.parrot, engine, name="parrot")
        seen: list[Any] = []
        async with serving(routes(service)) as address, client_of(address).realtime.connect(model="any") as connection:
            created = await until(connection, "session.created", seen)
            assert created.session.model == "parrot"
            await connection.session.update(
                session={
                    "type": "realtime",
                    "audio": {
                        "input": {
                            "turn_detection": {
                                "type": "server_vad",
                                "silence_duration_ms": 600,
                                "idle_timeout_ms": None,
                            }
                        }
                    },
                }
            )
            await until(connection, "session.updated", seen)
            await connection.send({"type": "nonsense", "event_id": "mine"})
            assert (await until(connection, "error", seen)).error.event_id == "mine"
            await speak(connection, 3.0, 3.0)
            done = await until(connection, "response.done", seen)
            kinds = [event.type for event in seen]
            if not any(kind.endswith("transcription.completed") for kind in kinds):
                await until(connection, "conversation.item.input_audio_transcription.completed", seen)
            by_type = {event.type: event for event in seen}
            assert done.response.status == "completed"
            sound = (
                sum(len(base64.b64decode(e.delta)) for e in seen if e.type == "response.output_audio.delta") / 2 / RATE
            )
            assert 1.0 < sound < 6.0
            transcript = by_type["conversation.item.input_audio_transcription.completed"].transcript
            assert len(transcript.split()) >= 3
            item = done.response.output[0].id
            await connection.conversation.item.truncate(item_id=item, content_index=0, audio_end_ms=400)
            assert (await until(connection, "conversation.item.truncated", seen)).audio_end_ms == 400

    asyncio.run(main())


def test_push_to_talk_replies_when_asked(engine: Engine) -> None:
    async def main() -> None:
        service, seen = Service(served.parrot, engine), []
        async with serving(routes(service)) as address, client_of(address).realtime.connect(model="any") as connection:
            await connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
            await until(connection, "session.updated", seen)
            await speak(connection, 2.0, 0.0)
            await connection.input_audio_buffer.commit()
            await until(connection, "input_audio_buffer.committed", seen)
            await connection.response.create()
            done = await until(connection, "response.done", seen)
            assert done.response.status == "completed"
            sound = (
                sum(len(base64.b64decode(e.delta)) for e in seen if e.type == "response.output_audio.delta") / 2 / RATE
            )
            assert sound == pytest.approx(2.0, abs=0.02)  # all that was said before the commit

    asyncio.run(main())


def test_a_commit_brings_the_transcript_and_the_reply_without_more_sound(engine: Engine) -> None:
    async def main() -> None:
        service, seen = Service(served.parrot, engine), []
        async with serving(routes(service)) as address, client_of(address).realtime.connect(model="any") as connection:
            await connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
            await connection.response.create()  # nothing was said yet
            done = await until(connection, "response.done", seen)
            assert done.response.status == "completed"
            assert not any(event.type == "response.output_audio.delta" for event in seen)
            for seconds, words in ((2.0001, 3), (0.15004, 0)):  # in all 34402.67 samples at 16 kHz
                seen.clear()
                if words:
                    await speak(connection, seconds, 0.0)
                else:
                    await connection.input_audio_buffer.append(audio=pcm(seconds))
                await connection.input_audio_buffer.commit()
                await connection.response.create()
                kinds: list[str] = []
                while not {"response.done", "conversation.item.input_audio_transcription.completed"} <= set(kinds):
                    seen.append(await asyncio.wait_for(connection.recv(), 20))
                    kinds = [event.type for event in seen]
                by_type = {event.type: event for event in seen}
                transcript = by_type["conversation.item.input_audio_transcription.completed"].transcript
                assert len(transcript.split()) >= words
                assert words or not transcript
                deltas = [event.delta for event in seen if event.type == "response.output_audio.delta"]
                sound = sum(len(base64.b64decode(delta)) for delta in deltas) / 2 / RATE
                assert sound == pytest.approx(seconds, abs=0.02)

    asyncio.run(main())


@stage(name="realtime_test_broken")
async def broken(ctx: Context, audio: Input, control: Input) -> AsyncIterator[Chunk]:
    """Begins to answer, and fails."""
    async for chunk in audio:
        yield Audio(samples=np.zeros(2400, np.float32), rate=RATE, start=0)
        raise ValueError(f"a secret: {chunk}")


def test_a_stage_that_fails_is_named_before_the_close() -> None:
    def graph(options: Any) -> Any:
        made = broken()
        return (Inlet().named("audio") >> made["audio"]) | (Inlet().named("control") >> made["control"])

    async def main() -> None:
        service, seen = Service(graph, None), []
        async with serving(routes(service)) as address, client_of(address).realtime.connect(model="any") as connection:
            await connection.input_audio_buffer.append(audio=pcm(0.1))
            error = (await until(connection, "error", seen)).error
            assert (error.type, error.code) == ("server_error", "server_error")
            assert error.message == "stage 'realtime_test_broken' failed: start a new call"
            assert [event.response.status for event in seen if event.type == "response.done"] == ["failed"]
            with pytest.raises(ConnectionClosed) as closed:
                await connection.recv()
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1011, error.message)

    asyncio.run(main())


def test_a_full_server_says_so_and_a_broken_connection_ends_its_call(engine: Engine) -> None:
    async def main() -> None:
        service = Service(served.parrot, engine, max_calls=1)
        async with serving(routes(service)) as address:
            client = client_of(address)
            async with client.realtime.connect(model="any") as first:
                await until(first, "session.created", [])
                async with client.realtime.connect(model="any") as second:
                    error = await until(second, "error", [])
                    assert error.error.code == "rate_limit_exceeded"
                    with pytest.raises(ConnectionClosed) as closed:
                        await second.recv()
                    assert closed.value.rcvd is not None
                    assert closed.value.rcvd.code == 1013
                first._connection.transport.abort()
                async with asyncio.timeout(5):
                    while service.calls:
                        await asyncio.sleep(0.01)

    asyncio.run(main())
