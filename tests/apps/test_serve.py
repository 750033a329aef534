"""``antiphon serve``: what it refuses to start, the routes it has, and hostile clients beside an honest one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
import websockets
from aiortc import RTCConfiguration, RTCPeerConnection

from antiphon.apps.cli import main
from antiphon.apps.serve.app import create_app
from antiphon.apps.serve.server import Impatient, configure
from antiphon.pipelines.chunk import Chunk, Text
from antiphon.pipelines.stage import Context, Inlet, Input, stage
from antiphon.transport.guard import Rules
from antiphon.transport.service import Service


@stage(name="serve_test_counter")
async def counter(ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
    """A final caption for each second of sound: how many there were."""
    heard = said = 0
    async for chunk in audio:
        heard += chunk.duration
        while heard >= (said + 1) * chunk.rate:
            said += 1
            yield Text(text=str(said), rate=chunk.rate, start=(said - 1) * chunk.rate, duration=chunk.rate, final=True)


class NoEngine:
    """The counter needs no model."""

    def metrics_text(self) -> str:
        return ""


@dataclass
class Serving:
    """A running server."""

    port: int
    service: Service
    rules: Rules

    def url(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.port}{path}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """The whole application on a free port, impatient with slow clients."""
    monkeypatch.setattr(Impatient, "header_seconds", 0.3)
    service = Service(lambda options: Inlet().named("audio") >> counter(), NoEngine(), name="counter", max_calls=2)
    rules = Rules(rate=1000, burst=1000)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    running = uvicorn.Server(configure(create_app(service, rules, info={"model": "none"}), host="127.0.0.1", port=port))
    thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield Serving(port, service, rules)
    running.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
    assert not service.calls


async def counted(server: Serving, seconds: int) -> list[str]:
    """What an honest client of the plain protocol is told."""
    said = []
    async with websockets.connect(server.url("/v1/stream?rate=16000", "ws")) as client:
        for _ in range(seconds):
            await client.send(np.zeros(16000, "<i2").tobytes())
        await client.send(json.dumps({"type": "finish"}))
        async for message in client:
            event = json.loads(message)
            if event["type"] == "final":
                said.append(event["text"])
    return said


def test_routes(server: Serving) -> None:
    with httpx.Client(base_url=server.url("")) as client:
        assert client.get("/healthz").text == "ok\n"
        assert client.get("/readyz").status_code == 200
        assert client.get("/info").json() | {"since": 0} == {
            "model": "none",
            "name": "counter",
            "takes": ["audio"],
            "starting": "",
            "calls": 0,
            "max_calls": 2,
            "since": 0,
        }
        assert client.get("/graph.svg").text.startswith("<svg")
        page = client.get("/")
        assert "<html" in page.text
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert client.get("/metrics").text.count("antiphon_calls 0") == 1


def test_behind_a_proxy_clients_are_who_it_says() -> None:
    """One of another machine is not offered the loopback address, nor may it name one; it has its own rate."""

    async def main() -> None:
        service = Service(lambda options: Inlet().named("audio") >> counter(), NoEngine(), name="behind")
        rules = Rules(loopback=False, proxies=("127.0.0.1",), rate=0.001, burst=5)
        listener = socket.create_server(("127.0.0.1", 0))
        config = configure(create_app(service, rules), host="127.0.0.1", port=0, proxies=rules.proxies)
        running = uvicorn.Server(config)
        task = asyncio.create_task(running.serve([listener]))
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        pc.addTransceiver("audio")
        await pc.setLocalDescription(await pc.createOffer())
        offer = {"sdp": pc.localDescription.sdp}
        try:
            async with httpx.AsyncClient(base_url=base, trust_env=False) as client, asyncio.timeout(20):
                while not running.started:
                    await asyncio.sleep(0.01)

                async def answer(told: str | None) -> httpx.Response:
                    headers = {"host": "a.example"} | ({"x-forwarded-for": told} if told is not None else {})
                    return await client.post("/rtc/offer", json=offer, headers=headers)

                assert (await answer(None)).status_code == 400
                near, far = await answer("127.0.0.1"), await answer("127.0.0.1, 203.0.113.9")
                assert (near.status_code, far.status_code) == (201, 201)
                assert " 127.0.0.1 " in near.json()["sdp"]
                assert " 127.0.0.1 " not in far.json()["sdp"]
                codes = [(await answer("203.0.113.7")).status_code for _ in range(6)]
                assert codes == [201] * 5 + [429]
                assert (await answer("203.0.113.8")).status_code == 201
        finally:
            await pc.close()
            await service.close()
            running.should_exit = True
            await task

    asyncio.run(main())


def test_while_models_load_it_says_so_and_refuses_calls() -> None:
    """The engine comes from another thread, as late as the test wants."""
    loaded = threading.Event()
    service = Service(
        lambda options: Inlet().named("audio") >> counter(), None, name="slow", starting="loading the models"
    )
    info: dict[str, Any] = {}

    async def start() -> None:
        await asyncio.to_thread(loaded.wait)
        service.engine, service.starting = NoEngine(), ""
        info["model"] = "here"

    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        app = create_app(service, Rules(rate=1000, burst=1000), info=info, start=start)
        running = uvicorn.Server(configure(app, host="127.0.0.1", port=0))
        task = asyncio.create_task(running.serve([listener]))
        served = Serving(listener.getsockname()[1], service, Rules())
        try:
            async with httpx.AsyncClient(base_url=served.url(""), trust_env=False) as client, asyncio.timeout(20):
                while not running.started:
                    await asyncio.sleep(0.01)
                assert (await client.get("/healthz")).status_code == 200
                waiting = await client.get("/readyz")
                assert (waiting.status_code, waiting.text) == (503, "loading the models\n")
                assert waiting.headers["retry-after"] == "5"
                said = (await client.get("/info")).json()
                assert (said["starting"], "model" in said) == ("loading the models", False)
                assert "antiphon_ready 0" in (await client.get("/metrics")).text
                assert (await client.get("/graph.svg")).text.startswith("<svg")
                refused = await client.post("/rtc/offer", json={"sdp": "v=0"})
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
                assert "loading the models" in refused.json()["error"]["message"]
                async with websockets.connect(served.url("/v1/stream", "ws")) as early:
                    assert "not ready: loading the models" in json.loads(await early.recv())["message"]
                    await early.wait_closed()
                    assert early.close_code == 1013
                loaded.set()
                while (await client.get("/readyz")).status_code != 200:
                    await asyncio.sleep(0.01)
                assert "antiphon_ready 1" in (await client.get("/metrics")).text
                assert (await client.get("/info")).json()["model"] == "here"
                assert await counted(served, 2) == ["1", "2"]
        finally:
            loaded.set()
            running.should_exit = True
            await task

    asyncio.run(main())


@pytest.mark.parametrize(
    "path", ["/../app.py", "/..%2fapp.py", "/%2e%2e/%2e%2e/pyproject.toml", "//etc/passwd", "/js/../../cli/serve.py"]
)
def test_paths_outside_the_page_are_not_served(server: Serving, path: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while data := raw.recv(65536):
            answer += data
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 405", b"HTTP/1.1 400"))


def test_an_honest_client_is_served_while_others_misbehave(server: Serving) -> None:
    async def main() -> None:
        slow = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(50)]
        for _, writer in slow:
            writer.write(b"GET / HTTP/1.1\r\nHost: loc")
        async with websockets.connect(server.url("/v1/stream?rate=16000", "ws"), compression=None) as big:
            honest = asyncio.create_task(counted(server, 20))
            with contextlib.suppress(websockets.ConnectionClosed):
                await big.send(b"\0" * (1 << 20))
            await big.wait_closed()
            assert big.close_code == 1009
            assert await honest == [str(n + 1) for n in range(20)]
        for reader, writer in slow:
            async with asyncio.timeout(5):
                while await reader.read(4096):
                    pass
            writer.close()

    asyncio.run(main())


def test_a_bomb_cannot_be_sent_because_nothing_is_compressed(server: Serving) -> None:
    async def main() -> None:
        async with websockets.connect(server.url("/v1/stream", "ws"), compression="deflate") as client:
            assert not client.protocol.extensions

    asyncio.run(main())


def test_beyond_the_limit_a_call_is_refused_and_the_others_go_on(server: Serving) -> None:
    async def main() -> None:
        url = server.url("/v1/stream?rate=16000", "ws")
        async with websockets.connect(url) as one, websockets.connect(url) as two:
            assert json.loads(await one.recv())["type"] == "session"
            assert json.loads(await two.recv())["type"] == "session"
            async with websockets.connect(url) as third:
                event = json.loads(await third.recv())
                assert event["type"] == "error"
                assert event["code"] == "full"
                with pytest.raises(websockets.ConnectionClosed) as closed:
                    await third.recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1013
            await one.send(np.zeros(16000, "<i2").tobytes())
            assert json.loads(await one.recv())["text"] == "1"

    asyncio.run(main())
    assert server.service.counts["refused"] == 1


def test_a_client_that_never_reads_holds_nothing_up(server: Serving) -> None:
    async def main() -> None:
        async with websockets.connect(server.url("/v1/stream?rate=8000", "ws"), max_queue=1) as deaf:
            for _ in range(50):
                await deaf.send(np.zeros(80000, "<i2").tobytes())
            assert await counted(server, 5) == ["1", "2", "3", "4", "5"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("arguments", "secret", "message"),
    [
        (["--host", "0.0.0.0"], None, "ANTIPHON_SECRET"),
        (["--host", "0.0.0.0"], "x", "32 or more"),
        (["--host", "0.0.0.0"], "x" * 32, "--tls-cert"),
        (["--tls-cert", "a.pem"], None, "go together"),
        (["--tls-cert", "a.pem", "--tls-key", "b.pem"], None, "no file a.pem"),
        (
            ["--behind-proxy", "127.0.0.1"],
            None,
            "behind a proxy can be reached from other machines: set ANTIPHON_SECRET",
        ),
        (["--behind-proxy", "nginx"], None, "--behind-proxy nginx"),
        (["--graph", "capshuns"], None, "captions"),
        (["--model", "no/such/file.nemo"], None, "no/such/file.nemo"),
        (["--port", "70000"], None, "65535"),
    ],
)
def test_what_cannot_be_served(
    arguments: list[str],
    secret: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("ANTIPHON_SECRET", raising=False)
    if secret is not None:
        monkeypatch.setenv("ANTIPHON_SECRET", secret)
    monkeypatch.setattr(sys, "argv", ["antiphon", "serve", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    shown: Any = capsys.readouterr()
    assert ended.value.code == 2
    assert message in " ".join(shown.err.split())
    assert len(shown.err.strip().splitlines()) == 1


def test_a_token_for_joining(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from antiphon.transport.tokens import Signer

    monkeypatch.setenv("ANTIPHON_SECRET", "k" * 40)
    monkeypatch.setattr(sys, "argv", ["antiphon", "token"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert Signer("k" * 40).check("join", capsys.readouterr().out.strip()) == "cli"


def test_the_page_is_in_the_package() -> None:
    assert (Path(__file__).parents[2] / "apps" / "web" / "index.html").is_file()
