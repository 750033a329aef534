"""Kyutai's moshi-server messages over real sockets, with clients that do what those of delayed-streams-modeling and
Unmute do with each message."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from antiphon.codecs.ogg import OggOpusReader, OggOpusWriter
from antiphon.codecs.resample import resample
from antiphon.pipelines.chunk import Audio, Text
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.graph import Graph
from antiphon.pipelines.served import captions, converse, dictate, listening, speaking
from antiphon.pipelines.speech import PARTS
from antiphon.transport.protocols import moshi_server
from antiphon.transport.protocols.moshi_server import ASR, FORMATS, HEARD, TTS, routes, unpack
from antiphon.transport.service import Service

from .serving import clip, recognising, serving

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))
from test_dictate import SPEECH_TO_TEXT
from tiny_duplex import tiny_duplex
from tiny_speech import tiny_speech, voice

RATE, FRAME = 24000, 1920
HEADERS = {"kyutai-api-key": "public_token"}
TEXT = "It was the best of times. And so on."
Samples = NDArray[np.float32]


@asynccontextmanager
async def served(graph: Any, engine: Engine | None, **options: Any) -> AsyncIterator[tuple[Service, str]]:
    """A service, and where it is."""
    service = Service(graph, engine, **options)
    async with serving(routes(service)) as host:
        yield service, host
        await service.close()


async def until_free(service: Service) -> None:
    async with asyncio.timeout(20):
        while service.calls:
            await asyncio.sleep(0.01)


# ---------------------------------------------------------------- speech to text


@pytest.fixture(scope="module")
def writer() -> Iterator[Engine]:
    torch.set_num_threads(1)
    with Engine("cpu", limit=1e9) as made:
        made.add("dictate", tiny_duplex(**SPEECH_TO_TEXT), slots=4)
        yield made


@pytest.fixture(scope="module")
def recogniser() -> Iterator[Engine]:
    with recognising() as made:
        yield made


@dataclass
class Transcriber:
    """What Kyutai's script and Unmute's class make of a server's messages, in the order of their coming."""

    ws: ClientConnection
    words: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)

    async def ready(self) -> None:
        assert (await self.message())["type"] == "Ready"

    async def message(self) -> dict[str, Any]:
        async with asyncio.timeout(30):
            data = await self.ws.recv()
        assert isinstance(data, bytes)
        message: dict[str, Any] = msgpack.unpackb(data, raw=False)
        return message

    async def audio(self, samples: Samples) -> None:
        pcm = [float(x) for x in samples]
        await self.ws.send(msgpack.packb({"type": "Audio", "pcm": pcm}, use_single_float=True))

    async def marker(self, id: int) -> None:
        await self.ws.send(msgpack.packb({"type": "Marker", "id": id}, use_single_float=True))

    async def until_marker(self, id: int) -> None:
        while True:
            message = await self.message()
            kind = message["type"]
            self.seen.append(kind)
            if kind == "Step":
                assert isinstance(message["step_idx"], int)
                assert isinstance(message["buffered_pcm"], int)
                assert 0.0 <= message["prs"][2] <= 1.0
                self.steps.append(message)
            elif kind == "Word":
                self.words.append({"text": message["text"], "timestamp": [message["start_time"]] * 2})
            elif kind == "EndWord":
                self.words[-1]["timestamp"][1] = message["stop_time"]
            elif kind == "Marker":
                assert message["id"] == id
                return
            else:
                raise AssertionError(message)


async def transcribed(client: Transcriber, sound: Samples, *, after: float) -> None:
    """As ``transcribe_from_file_via_rust_server.py`` does it, with shorter silences."""

    async def send() -> None:
        await client.audio(np.zeros(RATE // 2, np.float32))
        for start in range(0, len(sound), FRAME):
            await client.audio(sound[start : start + FRAME])
        await client.audio(np.zeros(RATE, np.float32))
        await client.marker(7)
        await client.audio(np.zeros(round(after * RATE), np.float32))

    _, _ = await asyncio.gather(send(), client.until_marker(7))


async def written(graph: Graph, engine: Engine, sound: Samples) -> list[Any]:
    """What a graph writes down by itself."""
    async with graph.session(engine=engine) as session:

        async def send() -> None:
            for start in range(0, len(sound), FRAME):
                await session.send(Audio(samples=sound[start : start + FRAME], rate=RATE, start=start), "audio")
            session.finish()

        sending = asyncio.create_task(send())
        texts = [chunk async for chunk in session.outputs() if isinstance(chunk, Text) and chunk.final]
        await sending
    return [word for text in texts for word in text.words]


def test_a_model_that_writes_streams_words_steps_and_markers(writer: Engine) -> None:
    noise = (0.1 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)
    sound = np.concatenate((np.zeros(RATE // 2), noise, np.zeros(RATE))).astype(np.float32)

    async def run() -> None:
        async with served(dictate, writer) as (service, host):
            async with connect(f"ws://{host}{ASR}", additional_headers=HEADERS) as ws:
                await (client := Transcriber(ws)).ready()
                await transcribed(client, noise, after=1.0)
            await until_free(service)
        # The same words as without a server; the marker came when what was said before it had been written.
        expected = [word for word in await written(listening(dictate({})), writer, sound) if word.text]
        assert len(client.words) > 5
        got = [(word["text"], *word["timestamp"]) for word in client.words]
        settled = [(word.text, word.start, word.end) for word in expected]
        assert got == settled[: len(got)]
        assert all(word.start >= 2.3 for word in expected[len(got) :])
        marked = 2.5 + 0.4
        assert [step["step_idx"] for step in client.steps] == list(range(1, len(client.steps) + 1))
        assert marked <= len(client.steps) * 0.08 <= marked + 0.08
        # The pauses are the model's own.
        assert len({step["prs"][2] for step in client.steps}) > 10
        assert all(len(step["prs"]) == 4 for step in client.steps)
        assert {step["buffered_pcm"] % FRAME for step in client.steps} <= set(range(FRAME))

    asyncio.run(run())


def test_ogg_opus_is_heard_too(writer: Engine) -> None:
    async def run() -> None:
        async with served(dictate, writer) as (_, host), connect(f"ws://{host}{ASR}?auth_id=x") as ws:
            await (client := Transcriber(ws)).ready()
            await ws.send(msgpack.packb({"type": "Init"}))
            ogg = OggOpusWriter(RATE, milliseconds=20)
            noise = (0.1 * np.random.default_rng(0).standard_normal((20, FRAME))).astype(np.float32)
            for number, frame in enumerate(noise):
                data = ogg.push(frame)
                await ws.send(msgpack.packb({"type": "OggOpus", "data": data if number % 2 else list(data)}))
                if number == 9:
                    await client.marker(3)
            await client.until_marker(3)
            assert 14 <= len(client.steps) <= 16

    asyncio.run(run())


def test_any_recogniser_is_served(recogniser: Engine) -> None:
    speech = resample(clip(4.0).astype(np.float32) / 32768, 16000, RATE).astype(np.float32)

    async def run() -> None:
        async with served(captions, recogniser) as (service, host):
            async with connect(f"ws://{host}{ASR}", additional_headers=HEADERS) as ws:
                await (client := Transcriber(ws)).ready()
                await transcribed(client, speech, after=1.5)
            await until_free(service)
        text = " ".join(word["text"] for word in client.words)
        assert "best of times" in text.lower()
        assert all(start < end for start, end in (word["timestamp"] for word in client.words))
        assert client.words[0]["timestamp"][0] > 0.4  # silence came first
        # Every frame until the marker's has its step, and the recogniser had closed the last caption by then.
        assert [step["step_idx"] for step in client.steps] == list(range(1, len(client.steps) + 1))
        assert 5.5 - 0.08 <= len(client.steps) * 0.08 <= 5.5 + 0.5
        assert client.steps[0]["prs"][2] == 1.0
        assert client.steps[-1]["prs"][2] == 1.0
        assert 0.0 in [step["prs"][2] for step in client.steps]

    asyncio.run(run())


def test_a_full_server_says_so(writer: Engine) -> None:
    async def run() -> None:
        async with served(dictate, writer, max_calls=1) as (service, host):
            async with connect(f"ws://{host}{ASR}") as first:
                await Transcriber(first).ready()
                async with connect(f"ws://{host}{ASR}") as second:
                    message = await Transcriber(second).message()
                    assert message["type"] == "Error"
                    assert "at capacity" in message["message"]
                    assert await closing(second) == 1013
                modules = await asyncio.to_thread(get, f"http://{host}/api/modules_info")
                assert modules == [{"type": "batched_asr", "path": ASR, "used_slots": "1", "total_slots": "1"}]
            await until_free(service)
            assert service.counts["refused"] == 1
        assert (await starting())["type"] == "Error"

    async def starting() -> dict[str, Any]:
        async with served(dictate, None, starting="loading") as (_, host), connect(f"ws://{host}{ASR}") as ws:
            return await Transcriber(ws).message()

    asyncio.run(run())


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


async def closing(ws: ClientConnection) -> int:
    with pytest.raises(ConnectionClosed) as closed:
        async with asyncio.timeout(20):
            await ws.recv()
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (b"\xc1", "one MessagePack map"),
        (b"", "one MessagePack map"),
        ("text", "a message is binary"),
        (msgpack.packb([1]), "a map with type Init, Audio"),
        (msgpack.packb({"type": "Video"}), "got 'Video'"),
        (msgpack.packb({"type": "Audio"}), "has pcm, of type list"),
        (msgpack.packb({"type": "Audio", "pcm": ["a"]}), "list of numbers"),
        (msgpack.packb({"type": "Audio", "pcm": [[0.0]]}), "list of numbers"),
        (msgpack.packb({"type": "Audio", "pcm": [float("nan")]}), "list of numbers"),
        (msgpack.packb({"type": "OggOpus"}), "has data"),
        (msgpack.packb({"type": "OggOpus", "data": [300]}), "numbers from 0 to 255"),
        (msgpack.packb({"type": "OggOpus", "data": b"RIFF"}), "Ogg page"),
        (msgpack.packb({"type": "Marker", "id": "x"}), "has id, of type int"),
    ],
)
def test_bad_messages_are_told(writer: Engine, message: bytes | str, told: str) -> None:
    async def run() -> None:
        async with served(dictate, writer) as (service, host), connect(f"ws://{host}{ASR}") as ws:
            await (client := Transcriber(ws)).ready()
            await ws.send(message)
            answer = await client.message()
            assert answer["type"] == "Error"
            assert told in answer["message"]
            assert await closing(ws) == 1008
            await until_free(service)

    asyncio.run(run())


def test_graphs_without_words_and_silent_clients(writer: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with served(converse, writer) as (_, host):
            async with connect(f"ws://{host}{ASR}") as ws:
                assert "writes down nothing" in (await Transcriber(ws).message())["message"]
            assert await asyncio.to_thread(get, f"http://{host}/api/modules_info") == []
            assert (await asyncio.to_thread(get, f"http://{host}/api/build_info"))["name"] == "antiphon"
        monkeypatch.setattr(moshi_server, "IDLE_SECONDS", 0.2)
        async with served(dictate, writer) as (_, host), connect(f"ws://{host}{ASR}") as ws:
            await (client := Transcriber(ws)).ready()
            assert "no message for 0.2 s" in (await client.message())["message"]

    asyncio.run(run())


def test_any_bytes_are_a_message_or_told() -> None:
    shuffle = random.Random(5)
    good = msgpack.packb({"type": "Marker", "id": 3, "more": {"a": [1, b"2", None]}})
    accepted = 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(shuffle.randrange(3)):
            data[shuffle.randrange(len(data))] = shuffle.randrange(256)
        with suppress(ValueError):
            accepted += unpack(bytes(data), HEARD)["type"] == "Marker"
    assert 1000 < accepted < 3000
    with pytest.raises(ValueError, match="one MessagePack map"):
        unpack(b"\x91" * 5000, {})


# ---------------------------------------------------------------- text to speech


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    torch.set_num_threads(1)
    with Engine("cpu", limit=1e9) as made:  # no faster than a busy machine
        speech = tiny_speech(tmp_path_factory.mktemp("speech"))
        speech.install(made, slots=2, buckets=dict.fromkeys(PARTS, (4,)), exact=False, budget=20.0)
        speech.register(made, "ada", voice(1))
        speech.register(made, "bob", voice(2, 18, ""))
        yield made


async def said(engine: Engine, **options: Any) -> tuple[Samples, Text]:
    """What ``TEXT`` sounds like without a server, and its words."""
    made: list[Any] = []
    async with speaking({"arriving": True, **options}).session(engine=engine) as session:
        await session.send(Text(text=f"{TEXT} ", rate=16000), "text")
        session.finish()
        made = [chunk async for chunk in session.outputs()]
    sound = np.concatenate([chunk.samples for chunk in made if isinstance(chunk, Audio)])
    return sound, [chunk for chunk in made if isinstance(chunk, Text)][-1]


async def heard(ws: ClientConnection, format: str) -> tuple[Samples, list[dict[str, Any]]]:
    """Sound and words until the server closes, as ``tts_rust_server.py`` takes them."""
    frames: list[Samples] = []
    words: list[dict[str, Any]] = []
    reader = OggOpusReader(RATE)
    async with asyncio.timeout(120):
        async for data in ws:
            assert isinstance(data, bytes)
            if format == "Pcm":
                frames.append(np.frombuffer(data, "<f4"))
            elif format == "OggOpus":
                frames += reader.push(data)
            else:
                message = msgpack.unpackb(data)
                if message["type"] == "Audio":
                    assert len(message["pcm"]) == FRAME
                    frames.append(np.array(message["pcm"]).astype(np.float32))
                elif message["type"] == "OggOpus":
                    frames += reader.push(bytes(message["data"]))
                elif message["type"] == "Text":
                    words.append(message)
                else:
                    assert message == {"type": "Ready"}
    assert ws.close_code == 1000
    return np.concatenate(frames), words


@pytest.mark.parametrize("format", FORMATS)
def test_text_is_spoken_in_every_format(speaker: Engine, format: str) -> None:
    async def run() -> None:
        expected, told = await said(speaker, voice="bob", seed=7)
        async with served(captions, speaker) as (service, host):
            url = f"ws://{host}{TTS}?voice=bob&seed=7&format={format}&cfg_alpha=1.5"
            async with connect(url, additional_headers=HEADERS) as ws:
                if format.endswith("MessagePack"):  # as a language model writes it, and whole as plain text
                    for word in TEXT.split():
                        await ws.send(msgpack.packb({"type": "Text", "text": word}))
                    await ws.send(msgpack.packb({"type": "Eos"}))
                else:
                    await ws.send(TEXT.replace(". And", '.<break time="0.5s"/>And'))
                    await ws.send(b"\0")
                sound, words = await heard(ws, format)
            await until_free(service)
        assert len(sound) >= len(expected)
        if format.startswith("Pcm"):
            assert len(sound) % FRAME == 0
            assert np.abs(sound[: len(expected)] - expected).max() < 1e-6
            assert not sound[len(expected) :].any()
        else:
            assert len(sound) - len(expected) <= 2 * FRAME
            assert np.abs(sound).max() > 1e-3
        if format.endswith("MessagePack"):
            assert [word["text"] for word in words] == TEXT.split() == [word.text for word in told.words]
            assert all(word["start_s"] < word["stop_s"] for word in words)
            assert words[-1]["stop_s"] <= len(sound) / RATE

    asyncio.run(run())


def test_a_voice_that_only_kyutai_has_is_the_first(speaker: Engine) -> None:
    async def run() -> None:
        expected, _ = await said(speaker, voice="ada", seed=1)
        async with served(captions, speaker) as (_, host):
            url = f"ws://{host}{TTS}?voice=expresso/ex03-ex01_happy_001_channel1_334s.wav&format=PcmMessagePack&seed=1"
            async with connect(url) as ws:
                await ws.send(msgpack.packb({"type": "Text", "text": TEXT}))
                await ws.send(msgpack.packb({"type": "Eos"}))
                sound, _ = await heard(ws, "PcmMessagePack")
            assert np.abs(sound[: len(expected)] - expected).max() < 1e-6
            modules = await asyncio.to_thread(get, f"http://{host}/api/modules_info")
            assert [module["path"] for module in modules] == [ASR, TTS]
            async with connect(f"{url}&seed=1") as ws:  # nothing to say
                await ws.send(msgpack.packb({"type": "Eos"}))
                assert msgpack.unpackb(await ws.recv()) == {"type": "Ready"}
                assert await closing(ws) == 1000

    asyncio.run(run())


@pytest.mark.parametrize(
    ("query", "message", "told"),
    [
        ("format=PcmMessagePack", {"type": "Voice", "embeddings": [0.0], "shape": [1]}, "a voice cannot be sent"),
        ("format=PcmMessagePack", {"type": "Text", "text": 5}, "has text, of type str"),
        ("format=PcmMessagePack", {"type": "Audio"}, "type Text, Eos, Voice"),
        ("format=PcmMessagePack&seed=x", None, "seed='x'"),
        ("format=Wav", None, "one of Pcm, PcmMessagePack"),
    ],
)
def test_what_cannot_be_spoken_is_told(speaker: Engine, query: str, message: dict[str, Any] | None, told: str) -> None:
    async def run() -> None:
        async with served(captions, speaker) as (service, host), connect(f"ws://{host}{TTS}?{query}") as ws:
            if message is not None:
                assert msgpack.unpackb(await ws.recv()) == {"type": "Ready"}
                await ws.send(msgpack.packb(message))
            if "MessagePack" in query:
                answer = msgpack.unpackb(await ws.recv())
                assert answer["type"] == "Error"
                assert told in answer["message"]
            with pytest.raises(ConnectionClosed) as closed:
                await ws.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008
            assert told in closed.value.rcvd.reason
            await until_free(service)

    asyncio.run(run())


def test_a_full_server_does_not_speak_and_neither_does_one_without_speech(speaker: Engine, writer: Engine) -> None:
    async def run() -> None:
        url = f"{TTS}?format=PcmMessagePack"
        async with served(captions, speaker, max_calls=1) as (_, host), connect(f"ws://{host}{url}") as first:
            await first.recv()
            async with connect(f"ws://{host}{url}") as second:
                assert "at capacity" in msgpack.unpackb(await second.recv())["message"]
                assert await closing(second) == 1013
        async with served(dictate, writer) as (_, host), connect(f"ws://{host}{url}") as ws:
            assert "no speech model is served here" in msgpack.unpackb(await ws.recv())["message"]

    asyncio.run(run())
