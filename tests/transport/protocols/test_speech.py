"""``POST /v1/audio/speech`` over real sockets, with OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))
from tiny_speech import tiny_speech, voice

from antiphon.codecs.audio_file import read
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.speech import PARTS
from antiphon.pipelines.stage import Inlet
from antiphon.pipelines.stages.emit import emit
from antiphon.pipelines.synthesizer import Synthesizer
from antiphon.transport.protocols.speech import routes
from antiphon.transport.service import Service

from .serving import serving

TEXT = "It was the best of times. It was the worst of times, and so on."
RATE = 24000


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    torch.set_num_threads(1)
    with Engine("cpu", limit=1e9) as made:  # no faster than a busy machine
        speech = tiny_speech(tmp_path_factory.mktemp("speech"))
        speech.install(made, slots=2, buckets=dict.fromkeys(PARTS, (4,)), exact=False, budget=20.0)
        speech.register(made, "ada", voice(1))
        speech.register(made, "bob", voice(2, 18, ""))
        yield made


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """What ``TEXT`` sounds like to the driver for files."""
    with Synthesizer(tiny_speech(tmp_path_factory.mktemp("speech"))) as models:
        models.register("bob", voice(2, 18, ""))
        return np.concatenate([piece.samples for piece in models.speak(TEXT, "bob", 7)])


def serve(engine: Engine | None, **options: Any) -> Service:
    return Service(lambda _: Inlet().named("audio") >> emit(), engine, **options)


def client(address: str) -> openai.AsyncOpenAI:
    """Closes its connections after each answer."""
    headers = {"connection": "close"}
    return openai.AsyncOpenAI(
        base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=60, default_headers=headers
    )


@pytest.mark.parametrize("format", ["pcm", "wav", "flac", "mp3", "opus", "aac"])
def test_the_client_of_openai_hears_the_text(engine: Engine, expected: np.ndarray, format: Any) -> None:
    async def main() -> None:
        async with serving(routes(service := serve(engine))) as address:
            async with client(address).audio.speech.with_streaming_response.create(
                model="any", voice="bob", input=TEXT, response_format=format, extra_body={"seed": 7}
            ) as response:
                parts = [part async for part in response.iter_bytes()]
        assert not service.calls
        data = b"".join(parts)
        assert len(parts) > 3
        heard = np.frombuffer(data, "<i2") / 32768 if format == "pcm" else read(io.BytesIO(data), RATE)
        if format in ("pcm", "wav", "flac"):
            assert heard.shape == expected.shape
            assert np.abs(heard - expected).max() < 1e-3
        else:
            assert abs(len(heard) - len(expected)) < 0.1 * RATE
        assert service.counts["opened"] == 1

    asyncio.run(main())


def test_events_carry_the_same_sound(engine: Engine, expected: np.ndarray) -> None:
    async def main() -> None:
        asked = {"model": "m", "voice": {"id": "bob"}, "input": TEXT, "response_format": "pcm", "seed": 7}
        async with serving(routes(serve(engine))) as address, httpx.AsyncClient() as http:
            url = f"http://{address}/v1/audio/speech"
            async with http.stream("POST", url, json={**asked, "stream_format": "sse"}, timeout=60) as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                events = [json.loads(line[6:]) async for line in response.aiter_lines() if line]
        assert [event["type"] for event in events[:-1]] == ["speech.audio.delta"] * (len(events) - 1)
        sound = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
        assert np.abs(np.frombuffer(sound, "<i2") / 32768 - expected).max() < 1e-3
        usage = events[-1]["usage"]
        assert events[-1]["type"] == "speech.audio.done"
        assert usage["output_tokens"] == len(expected) // 960
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("change", "status", "code", "message"),
    [
        ({"speed": 1.5}, 400, None, "speed=1.5: this server speaks at the voice's own pace"),
        ({"speed": 9}, 400, None, "speed: Input should be less than or equal to 4"),
        ({"input": "x" * 5000}, 400, None, "input: String should have at most 4096 characters"),
        ({"input": " \u2026 "}, 400, None, "nothing in it that can be spoken"),
        ({"voice": "bib"}, 400, "voice_not_found", "no voice 'bib'; did you mean 'bob'"),
        ({"response_format": "midi"}, 400, None, "response_format: Input should be 'mp3'"),
        ({"instructions": "Whisper."}, 400, None, "instructions are not followed"),
    ],
)
def test_what_cannot_be_is_told(engine: Engine, change: dict[str, Any], status: int, code: Any, message: str) -> None:
    async def main() -> None:
        asked: dict[str, Any] = {"model": "m", "voice": "bob", "input": "So be it."} | change
        async with serving(routes(service := serve(engine))) as address:
            with pytest.raises(openai.APIStatusError) as told:
                await client(address).audio.speech.create(**asked)
        assert told.value.status_code == status
        assert told.value.code == code
        assert message in str(told.value)
        assert not service.calls

    asyncio.run(main())


def test_a_voice_of_openai_is_the_first(engine: Engine) -> None:
    async def main() -> None:
        async with serving(routes(serve(engine))) as address:
            asked: dict[str, Any] = {"model": "tts-1", "input": TEXT, "response_format": "pcm"}
            asked["extra_body"] = {"seed": 7}
            heard = [(await client(address).audio.speech.create(voice=name, **asked)).content
                     for name in ("default", "alloy", "nova")]  # fmt: skip
        assert heard[0] == heard[1] == heard[2] != b""

    asyncio.run(main())


def test_what_is_not_json_is_told(engine: Engine) -> None:
    async def main() -> None:
        async with serving(routes(serve(engine))) as address, httpx.AsyncClient() as http:
            response = await http.post(f"http://{address}/v1/audio/speech", content=b"{")
            assert response.status_code == 400
            assert "Invalid JSON" in response.json()["error"]["message"]
            assert (await http.get(f"http://{address}/v1/audio/speech")).status_code == 405

    asyncio.run(main())


def test_a_full_or_starting_server_says_when_to_come_back(engine: Engine) -> None:
    async def main() -> None:
        for service in (serve(engine, max_calls=1), serve(engine, max_calls=8), serve(None, starting="loading")):
            async with serving(routes(service)) as address:
                places = [await engine.open("speak.vocoder") for _ in range(2)] if service.max_calls == 8 else []
                if service.max_calls == 1:
                    service.calls["other"] = type("Other", (), {"ended": False})()  # type: ignore[assignment]
                with pytest.raises(openai.InternalServerError) as told:
                    await client(address).audio.speech.create(model="m", voice="bob", input="So be it.")
                assert told.value.status_code == 503
                assert int(told.value.response.headers["retry-after"]) >= 1
                assert service.counts["refused"] == 1
                for lease in places:
                    lease.close()
                service.calls.clear()

    asyncio.run(main())


def test_a_server_without_speech_says_so() -> None:
    async def main() -> None:
        with Engine("cpu") as engine:
            async with serving(routes(serve(engine))) as address:
                with pytest.raises(openai.NotFoundError, match="no speech model is served here"):
                    await client(address).audio.speech.create(model="m", voice="bob", input="So be it.")

    asyncio.run(main())


def test_a_client_that_leaves_frees_its_place(engine: Engine) -> None:
    async def main() -> None:
        async with serving(routes(service := serve(engine))) as address:
            for _ in range(3):
                async with client(address).audio.speech.with_streaming_response.create(
                    model="m", voice="ada", input=TEXT * 20, response_format="pcm"
                ) as response:
                    async for _ in response.iter_bytes():
                        break
            async with asyncio.timeout(30):
                while service.calls:
                    await asyncio.sleep(0.01)
        models = engine.metrics()["models"]
        assert [models[f"speak.{part}"]["used"] for part in ("lm", "flow", "vocoder")] == [0, 0, 0]

    asyncio.run(main())
