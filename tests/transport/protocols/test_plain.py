"""The plain protocol over real sockets: what comes out, coming back after a cut, taking over, and what is refused."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from antiphon.pipelines.chunk import Audio, Chunk, Event
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.served import converse
from antiphon.pipelines.stage import Context, Inlet, Input, select, stage
from antiphon.transport.protocols.plain import routes
from antiphon.transport.service import Service

from .serving import clip, recognising, serving, transcribing

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))
from tiny_duplex import smallest_duplex

Message = dict[str, Any]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with recognising() as engine:
        yield engine


@stage(name="plain_test_echo")
async def echo(ctx: Context, audio: Input, control: Input) -> AsyncIterator[Chunk]:
    """Sound as it came, and control events by their name."""
    while ready := await select(control, audio):
        chunk = ready.get_nowait()
        if isinstance(chunk, Audio):
            yield Audio(samples=chunk.samples, rate=chunk.rate, start=chunk.start)
        elif isinstance(chunk, Event):
            yield Event(name=chunk.name, data=chunk.data, rate=chunk.rate, start=chunk.start)


@stage(name="plain_test_failing")
async def failing(ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
    """Fails once it has heard something."""
    async for chunk in audio:
        yield Event(name="heard", rate=chunk.rate, start=chunk.start)
        raise ValueError(f"a secret: {chunk}")


def captioned(engine: Engine, **options: Any) -> Service:
    return Service(lambda _: transcribing(), engine, name="embedded", **options)


def echoing() -> Service:
    def graph(options: Any) -> Any:
        stage = echo()
        return (Inlet().named("audio") >> stage["audio"]) | (Inlet().named("control") >> stage["control"])

    return Service(graph, None)


async def heard(ws: ClientConnection) -> Message:
    async with asyncio.timeout(10):
        message: Message = json.loads(await ws.recv())
        return message


async def rest(ws: ClientConnection, into: list[Message]) -> None:
    """Every message until the socket closes."""
    with suppress(ConnectionClosed):
        async for message in ws:
            into.append(json.loads(message))


async def speak(ws: ClientConnection, pcm: Any, start: int, stop: int, size: int = 320) -> None:
    for at in range(start, stop, size):
        await ws.send(pcm[at : min(at + size, stop)].tobytes())


async def unbroken(url: str, pcm: Any) -> list[Message]:
    events: list[Message] = []
    async with connect(url) as ws:
        assert (await heard(ws))["type"] == "session"
        reading = asyncio.create_task(rest(ws, events))
        await speak(ws, pcm, 0, len(pcm))
        await ws.send('{"type":"finish"}')
        async with asyncio.timeout(30):
            await reading
    assert ws.close_code == 1000
    return events


async def broken(url: str, pcm: Any, seed: int) -> tuple[list[Message], int]:
    """The same, on a line that is cut at random points, with random amounts still on their way."""
    rng = random.Random(seed)
    events: list[Message] = []
    cuts, address = 0, url
    while True:
        ws = await connect(address)
        first = await heard(ws)
        reading = asyncio.create_task(rest(ws, events))
        at = first.get("received", 0)
        assert first["type"] == ("resumed" if cuts else "session")
        stop = min(len(pcm), at + rng.randrange(2000, 30000))
        await speak(ws, pcm, at, stop, rng.choice((160, 320, 777)))
        if cuts >= 6:
            await speak(ws, pcm, stop, len(pcm))
            await ws.send('{"type":"finish"}')
            async with asyncio.timeout(30):
                await reading
            return events, cuts
        if rng.random() < 0.5 and events:
            known = len(events)
            while len(events) == known and ws.close_code is None and stop < len(pcm):
                await speak(ws, pcm, stop, stop + 320)
                stop += 320
                await asyncio.sleep(0)
        ws.transport.abort()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        cuts += 1
        address = f"{url}?resume={first['resume']}&after={events[-1]['id'] if events else 0}"


def test_a_stage_that_fails_is_named_before_the_close() -> None:
    async def main() -> None:
        service = Service(lambda _: Inlet().named("audio") >> failing(), None)
        async with serving(routes(service)) as address, connect(f"ws://{address}/v1/stream") as ws:
            await ws.send(bytes(640))
            messages: list[Message] = []
            await rest(ws, messages)
            told = "stage 'plain_test_failing' failed: start a new call"
            assert [message["type"] for message in messages] == ["session", "heard", "error"]
            assert messages[-1] == {"type": "error", "code": "failed", "message": told}
            assert (ws.close_code, ws.close_reason) == (1011, told)

    asyncio.run(main())


def test_a_broken_line_changes_nothing(engine: Engine) -> None:
    async def run() -> None:
        pcm = clip(9.0)
        service = captioned(engine)
        async with serving(routes(service)) as host:
            url = f"ws://{host}/v1/stream"
            expected = await unbroken(url, pcm)
            assert [event["id"] for event in expected] == list(range(1, len(expected) + 1))
            assert sum(event["type"] == "final" for event in expected) >= 1
            assert "best of times" in " ".join(e["text"].lower() for e in expected if e["type"] == "final")
            for seed in (1, 2, 3):
                events, cuts = await broken(url, pcm, seed)
                assert events == expected
                assert cuts == 6
            assert service.counts["resumed"] == 18
        await service.close()

    asyncio.run(run())


@pytest.mark.parametrize("after_end", [False, True])
def test_a_line_cut_after_the_end_loses_nothing(engine: Engine, after_end: bool) -> None:
    """Cut while the last events come out, and when all of them have been sent but the client read none."""

    async def run() -> None:
        pcm = clip(6.0)
        service = captioned(engine)
        async with serving(routes(service)) as host:
            url = f"ws://{host}/v1/stream"
            expected = await unbroken(url, pcm)
            ws = await connect(url)
            resume = (await heard(ws))["resume"]
            (call,) = service.calls.values()
            await speak(ws, pcm, 0, len(pcm))
            await ws.send('{"type":"finish"}')
            async with asyncio.timeout(30):
                while service.calls if after_end else not call._finished:
                    await asyncio.sleep(0.005)
            ws.transport.abort()
            events: list[Message] = []
            for seen in (2, len(expected) - 1):  # and once more, for the last one
                async with connect(f"{url}?resume={resume}&after={seen}") as late:
                    assert (await heard(late))["received"] == len(pcm)
                    events = []
                    await rest(late, events)
                    assert late.close_code == 1000
                    assert events == expected[seen:]
            assert not service.calls
        await service.close()

    asyncio.run(run())


def test_sound_and_events_come_back() -> None:
    async def run() -> None:
        service = echoing()
        pcm = np.array([0, 1, -1, 32767, -32768, 12345], "<i2")
        async with serving(routes(service)) as host, connect(f"ws://{host}/v1/stream?rate=24000") as ws:
            assert (await heard(ws))["rate"] == 24000
            await ws.send(pcm.tobytes())
            header = await heard(ws)
            assert header == {
                "type": "audio", "id": 1, "rate": 24000, "epoch": 0, "start": 0.0, "final": False, "bytes": 12
            }  # fmt: skip
            assert await ws.recv() == pcm.tobytes()
            await ws.send(json.dumps({"type": "control", "name": "turns", "data": {"mode": "manual"}}))
            event = await heard(ws)
            assert (event["type"], event["id"], event["data"]) == ("turns", 2, {"mode": "manual"})
            await ws.send('{"type":"played","epoch":0,"seconds":0.0001}')
            await ws.send('{"type":"interrupt"}')
            event = await heard(ws)
            assert event["type"] == "interrupted"
            assert event["data"] == {"epoch": 1, "heard_seconds": 0.0001, "heard_epoch": 0}
        await service.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("message", "code", "says"),
    [
        (b"\0\0\0", "bad_request", "3 bytes"),
        ("{", "bad_request", "not JSON"),
        ("[" * 100_000, "bad_request", "not JSON"),
        ("[]", "bad_request", "known are control"),
        ('{"type":"played","epoch":true,"seconds":1}', "bad_request", "epoch"),
        ('{"type":"played","epoch":0,"seconds":NaN}', "bad_request", "seconds"),
        ('{"type":"control","name":3}', "bad_request", "name"),
        ('{"type":"control","name":"commit"}', "no_inlet", "takes no control"),
    ],
)
def test_a_bad_message_is_told_and_the_call_goes_on(engine: Engine, message: Any, code: str, says: str) -> None:
    async def run() -> None:
        service = captioned(engine)
        async with serving(routes(service)) as host, connect(f"ws://{host}/v1/stream") as ws:
            await heard(ws)
            await ws.send(message)
            told = await heard(ws)
            assert (told["type"], told["code"]) == ("error", code)
            assert says in told["message"]
            await ws.send('{"type":"finish"}')
            events: list[Message] = []
            await rest(ws, events)
            assert (events, ws.close_code) == ([], 1000)
        await service.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("rate=7999", "bad_request"),
        ("rate=%C2%B2", "bad_request"),
        ("lookahead_ms=-1", "bad_request"),
        ("resume=x&after=0", "bad_token"),
    ],
)
def test_what_cannot_be_is_refused(engine: Engine, query: str, code: str) -> None:
    async def run() -> None:
        service = captioned(engine)
        async with serving(routes(service)) as host, connect(f"ws://{host}/v1/stream?{query}") as ws:
            told = await heard(ws)
            assert (told["type"], told["code"]) == ("error", code)
            with pytest.raises(ConnectionClosed):
                await ws.recv()
            assert ws.close_code == 1008
            assert not service.calls
        await service.close()

    asyncio.run(run())


def test_a_full_service_says_when_to_come_back(engine: Engine) -> None:
    async def run() -> None:
        service = captioned(engine, max_calls=1)
        async with serving(routes(service)) as host, connect(f"ws://{host}/v1/stream") as first:
            await heard(first)
            async with connect(f"ws://{host}/v1/stream") as second:
                told = await heard(second)
                assert told["code"] == "full"
                assert "try again in 30 s" in told["message"]
                with pytest.raises(ConnectionClosed):
                    await second.recv()
                assert second.close_code == 1013
        await service.close()

    asyncio.run(run())


def test_a_second_connection_takes_over(engine: Engine) -> None:
    async def run() -> None:
        service = captioned(engine)
        async with serving(routes(service)) as host, connect(f"ws://{host}/v1/stream") as old:
            session = await heard(old)
            await old.send(bytes(640))
            async with connect(f"ws://{host}/v1/stream?resume={session['resume']}&after=0") as new:
                resumed = await heard(new)
                assert resumed["call"] == session["call"]
                assert resumed["received"] in (0, 320)
                told = await heard(old)
                assert told["code"] == "taken_over"
                await new.send('{"type":"finish"}')
                events: list[Message] = []
                await rest(new, events)
                assert new.close_code == 1000
            async with connect(f"ws://{host}/v1/stream?resume={session['resume']}&after=0") as late:
                assert (await heard(late))["type"] == "resumed"
                again: list[Message] = []
                await rest(late, again)
                assert (again, late.close_code) == (events, 1000)
        await service.close()

    asyncio.run(run())


def test_words_for_a_dialogue_model_to_say() -> None:
    model = smallest_duplex()

    async def run(engine: Engine) -> None:
        service = Service(converse, engine, name="dialogue")
        async with serving(routes(service)) as host, connect(f"ws://{host}/v1/stream?rate=24000") as ws:
            assert (await heard(ws))["type"] == "session"
            for text in ("so it goes", 7):
                await ws.send(json.dumps({"type": "control", "name": "say", "data": {"text": text}}))
            sound = np.zeros(model.frame, np.int16).tobytes()
            for _ in range(40):
                await ws.send(sound)
            await ws.send('{"type":"finish"}')
            (call,) = service.calls.values()
            said = ""
            async with asyncio.timeout(30):
                with suppress(ConnectionClosed):
                    async for message in ws:
                        event = json.loads(message) if isinstance(message, str) else {}
                        said += event["text"] if event.get("type") == "final" else ""
            assert "so it goes" in " ".join(said.split())
            assert call.session.counters["converse.says_refused"] == 1
            assert ws.close_code == 1000
        await service.close()

    with Engine("cpu") as made:
        made.add("converse", model, slots=1)
        asyncio.run(run(made))
