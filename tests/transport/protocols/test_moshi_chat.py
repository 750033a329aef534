"""Moshi's ``/api/chat``: message by message, and many conversations at once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from antiphon.codecs.ogg import OggOpusReader, OggOpusWriter
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.served import converse
from antiphon.transport.protocols import moshi_chat
from antiphon.transport.protocols.moshi_chat import ERROR, PING, RATE, SOUND, TEXT, options_of, routes
from antiphon.transport.service import Service

from .serving import serving

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))
from conversing import persona
from tiny_duplex import smallest_duplex

FRAME = 1920


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("cpu") as made:
        made.add("converse", smallest_duplex(), slots=8)
        yield made


@asynccontextmanager
async def chatting(engine: Engine, query: str = "", **options: Any) -> AsyncIterator[tuple[Service, str]]:
    """A service, and the address of its ``/api/chat``."""
    service = Service(converse, engine, **options)
    async with serving(routes(service)) as host:
        yield service, f"ws://{host}/api/chat{query}"
        await service.close()


def speech(frames: int, seed: int = 0) -> NDArray[np.float32]:
    return (0.2 * np.random.default_rng(seed).standard_normal(frames * FRAME)).astype(np.float32)


async def receive(ws: ClientConnection) -> bytes:
    async with asyncio.timeout(20):
        message = await ws.recv()
    assert isinstance(message, bytes)
    return message


async def talk(ws: ClientConnection, pcm: NDArray[np.float32], frames: int) -> tuple[NDArray[np.float32], str]:
    """Say something, and listen until ``frames`` have come back: sound and text."""
    writer, reader = OggOpusWriter(RATE, milliseconds=20, serial=77), OggOpusReader(RATE)
    for part in np.split(pcm, len(pcm) // FRAME):
        await ws.send(bytes([SOUND]) + writer.push(part))
    heard, text = np.zeros(0, np.float32), ""
    async with asyncio.timeout(60):
        while len(heard) < frames * FRAME - RATE // 50:
            message = await receive(ws)
            if message[0] == SOUND:
                heard = np.concatenate([heard, *reader.push(message[1:])])
            elif message[0] == TEXT:
                text += message[1:].decode()
            else:
                assert message == bytes([PING])
    return heard, text


def test_a_conversation(engine: Engine) -> None:
    async def run() -> None:
        async with chatting(engine, "?text_seed=1&audio_seed=2&text_temperature=2&email=x") as (service, url):
            async with connect(url) as ws:
                assert await receive(ws) == b"\0"
                heard, text = await talk(ws, speech(40), 39)
            assert np.abs(heard).max() > 1e-3
            assert text
            async with asyncio.timeout(10):
                while service.calls:
                    await asyncio.sleep(0.01)
            # The same seeds and sound give the same words; other seeds other ones.
            async with connect(url) as ws:
                await receive(ws)
                assert (await talk(ws, speech(40), 39))[1] == text
            async with connect(url.replace("text_seed=1", "text_seed=5")) as ws:
                await receive(ws)
                assert (await talk(ws, speech(40), 39))[1] != text

    asyncio.run(run())


def test_eight_at_once_and_the_ninth_is_told(engine: Engine) -> None:
    async def run() -> None:
        async with chatting(engine) as (_, url):

            async def one(seed: int) -> int:
                async with connect(f"{url}?text_seed={seed}") as ws:
                    assert await receive(ws) == b"\0"
                    opened.append(seed)
                    await all_open.wait()
                    return len((await talk(ws, speech(12, seed), 11))[0])

            opened: list[int] = []
            all_open = asyncio.Event()
            calls = [asyncio.create_task(one(seed)) for seed in range(8)]
            async with asyncio.timeout(20):
                while len(opened) < 8:
                    await asyncio.sleep(0.01)
            async with connect(url) as ws:
                refusal = await receive(ws)
                assert refusal[0] == ERROR
                assert b"at capacity" in refusal
                with pytest.raises(ConnectionClosed) as closed:
                    await ws.recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1013
            all_open.set()
            assert min(await asyncio.gather(*calls)) >= 11 * FRAME - RATE // 50

    asyncio.run(run())


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (b"", "its first byte"),
        ("text", "its first byte"),
        (b"\x0fwhat", "kind 15"),
        (b"\x03\x09", "control message"),
        (b"\x01RIFF", "Ogg page"),
        (b"\x01" + bytes(1 << 17), "Ogg page"),
    ],
    ids=["empty", "text", "kind", "control", "no Ogg", "long"],
)
def test_bad_messages_are_told(engine: Engine, message: bytes | str, told: str) -> None:
    async def run() -> None:
        async with chatting(engine) as (service, url), connect(url) as ws:
            assert await receive(ws) == b"\0"
            await ws.send(message)
            answer = await receive(ws)
            assert answer[0] == ERROR
            assert told in answer.decode()
            with pytest.raises(ConnectionClosed):
                await ws.recv()
            async with asyncio.timeout(10):
                while service.calls:
                    await asyncio.sleep(0.01)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("?text_temperature=hot", "text_temperature='hot'"),
        ("?audio_topk=9999", "audio_top_k is 9999"),
        ("?text_seed=-4", "text_seed is -4"),
    ],
)
def test_bad_queries_are_told(engine: Engine, query: str, told: str) -> None:
    async def run() -> None:
        async with chatting(engine, query) as (_, url), connect(url) as ws:
            answer = await receive(ws)
            assert answer[0] == ERROR
            assert told in answer.decode()

    asyncio.run(run())


def test_kyutais_query_parameters() -> None:
    query = {"text_topk": "25", "pad_mult": "-0.5", "repetition_penalty": "1.1", "worker_auth_id": "1"}
    assert options_of(query) == {"text_top_k": 25, "padding_bonus": -0.5, "penalty": 1.1}
    assert options_of({"voice_prompt": "NATF2.pt"}) == {"voice": "NATF2.pt"}
    assert options_of({"text_prompt": "You are wise. " * 20}) == {"prompt": "You are wise. " * 20}


def test_a_voice_for_each_call() -> None:
    """By the names that PersonaPlex's page sends; an unknown one is told which there are."""
    model = persona(context=64)
    for seed, name in enumerate(("NATF2", "NATM1")):
        model.add_voice(name, (0.1 * np.random.default_rng(seed).standard_normal(RATE)).astype(np.float32))

    async def run(engine: Engine) -> None:
        async with chatting(engine) as (service, url):

            async def one(voice: str) -> bytes:
                async with connect(f"{url}?text_seed=1&audio_seed=1&text_prompt=yes{voice}") as ws:
                    assert await receive(ws) == b"\0"
                    return (await talk(ws, speech(6), 5))[0].tobytes()

            voices = ("&voice_prompt=NATF2.pt", "&voice_prompt=NATM1.pt", "", "&voice_prompt=NATF2")
            said = await asyncio.gather(*map(one, voices))
            assert len({*said}) == 3
            assert said[0] == said[3] == await one("&voice_prompt=NATF2.wav")
            async with connect(f"{url}?voice_prompt=VARF0.pt") as ws:
                refusal = await receive(ws)
                assert refusal[0] == ERROR
                assert b"no voice 'VARF0.pt'" in refusal
                assert b"(known: NATF2, NATM1)" in refusal
            assert service.counts["failed"] == 1

    with Engine("cpu") as made:
        made.add("converse", model, slots=4)
        asyncio.run(run(made))


def test_pause_restart_and_pings(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moshi_chat, "PING_SECONDS", 0.2)

    async def run() -> None:
        async with chatting(engine) as (service, url), connect(url) as ws:
            assert await receive(ws) == b"\0"
            assert await receive(ws) == bytes([PING])
            await ws.send(b"\x03\x02")
            writer = OggOpusWriter(RATE)
            await ws.send(bytes([SOUND]) + writer.push(speech(10)))
            (call,) = service.calls.values()
            async with asyncio.timeout(10):
                while not call.session.counters["converse.samples_paused"]:
                    await asyncio.sleep(0.01)
            assert await receive(ws) == bytes([PING])
            await ws.send(b"\x03\x03")
            await ws.send(b"\x06")
            await ws.send(bytes([SOUND]) + writer.push(speech(3)))
            while (message := await receive(ws))[0] != SOUND:
                assert message[0] in (PING, TEXT)

    asyncio.run(run())
