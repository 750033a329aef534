"""``antiphon serve --graph talk`` and ``/v1/audio/speech`` on a real server, with models from folders."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from websockets.asyncio.client import connect

from antiphon.apps.cli import main

from .running import server

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
sys.path.insert(0, str(Path(__file__).parents[1] / "transport" / "protocols"))
from serving import clip
from tiny_speech import write

Ran = tuple[int, str, str]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("speech") / "tiny")


@pytest.fixture(scope="module")
def port(speech: Path, checkpoint: Path) -> Iterator[int]:
    models = ("--model", checkpoint, "--speech-model", speech, "--voice", "ada")
    with server("--graph", "talk", *models, "--max-sessions", 2) as number:
        yield number


def test_it_says_back_what_it_understood(port: int) -> None:
    async def run() -> None:
        pcm = np.concatenate((clip(6.0), np.zeros(32000, np.int16)))
        replies: list[str] = []
        heard = b""
        async with connect(f"ws://127.0.0.1:{port}/v1/stream", max_size=None) as ws, asyncio.timeout(120):

            async def speak() -> None:
                for at in range(0, len(pcm), 1600):
                    await ws.send(pcm[at : at + 1600].tobytes())
                    await asyncio.sleep(0.05)  # twice as fast as a microphone

            speaking = asyncio.create_task(speak())
            said = done = False
            async for message in ws:
                if isinstance(message, bytes):
                    heard += message
                    continue
                told = json.loads(message)
                if told["type"] == "audio":
                    assert told["rate"] == 24000
                    done = done or told["final"]
                elif told["type"] in ("partial", "final") and told["reply"]:
                    replies.append(told["text"])
                    said = said or told["type"] == "final"
                if done and said:
                    break
            await speaking
        assert replies[-1].startswith("You said: ")
        assert len(replies[-1].split()) > 3
        assert np.abs(np.frombuffer(heard, "<i2")).max() > 100

    asyncio.run(run())


def test_it_serves_speech_too(port: int) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    with client.audio.speech.with_streaming_response.create(
        model="tiny", voice="ada", input="So be it.", response_format="pcm"
    ) as response:
        sound = b"".join(response.iter_bytes())
    assert len(sound) % 1920 == 0
    assert len(sound) > 24000
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/info") as response:
        info: dict[str, Any] = json.load(response)
    assert (info["speech_model"], info["voices"]) == ("tiny", ["ada"])


@pytest.fixture
def antiphon(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["antiphon", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--graph", "talk", "--llm-url", "http://localhost:1/v1"), "--llm-url and --llm-model go together"),
        (("--graph", "talk", "--llm-url", "localhost", "--llm-model", "m"), "begins with http:// or https://"),
        (("--llm-url", "http://localhost:1/v1", "--llm-model", "m"), "--llm-url goes with --graph talk"),
    ],
)
def test_options_that_cannot_be_are_one_line(
    antiphon: Callable[..., Ran], arguments: tuple[str, ...], message: str
) -> None:
    status, _, err = antiphon("serve", *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_without_a_speech_model_it_fails_with_one_line(
    antiphon: Callable[..., Ran], checkpoint: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    status, _, err = antiphon(
        "serve",
        "--graph",
        "talk",
        "--model",
        checkpoint,
        "--port",
        number,
        "--device",
        "cpu",
        "--speech-model",
        tmp_path / "nowhere",
    )
    assert status == 2
    assert "nowhere'; the published one is FunAudioLLM/CosyVoice2-0.5B" in err
    assert err.count("\n") == 1
