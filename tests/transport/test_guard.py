"""Who may come in: origins, hosts, tokens, rates and sizes, over ASGI without a network."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket

from antiphon.transport.guard import Guard, Rules
from antiphon.transport.tokens import Signer

SECRET = "s" * 32


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{len(await request.body())}")


async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


def client(host: str = "localhost:8000", address: str = "127.0.0.1", **rules: Any) -> TestClient:
    routes = [
        Route("/x", echo, methods=["GET", "POST"]),
        Route("/healthz", echo),
        Route("/page/a", echo, methods=["GET", "POST"]),
        WebSocketRoute("/ws", socket),
    ]
    guard: Any = Guard(Starlette(routes=routes), Rules(**rules))
    return TestClient(guard, base_url=f"http://{host}", client=(address, 50000))


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://localhost:8000", 200),
        ("http://127.0.0.1:5173", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://localhost.evil.example", 403),
        ("http://[", 403),
        ("https://app.example", 200),
    ],
)
def test_origins_on_loopback(origin: str | None, status: int) -> None:
    headers = {} if origin is None else {"origin": origin}
    assert client(origins=["https://app.example"]).get("/x", headers=headers).status_code == status


def test_off_loopback_only_the_same_origin() -> None:
    one = client("a.example", loopback=False)
    assert one.get("/x", headers={"origin": "https://a.example"}).status_code == 200
    assert one.get("/x", headers={"origin": "http://localhost"}).status_code == 403


@pytest.mark.parametrize(("host", "status"), [("localhost:1", 200), ("127.0.0.1", 200), ("evil.example", 400)])
def test_names_that_mean_loopback(host: str, status: int) -> None:
    assert client(host).get("/x").status_code == status


def test_a_websocket_from_another_origin_is_refused_in_its_handshake() -> None:
    with (
        pytest.raises(WebSocketDenialResponse),
        client().websocket_connect("ws://localhost:8000/ws", headers={"origin": "https://e.example"}),
    ):
        pass
    with client().websocket_connect("ws://localhost:8000/ws") as websocket:
        assert websocket.receive_text() == "hello"


def test_tokens_where_a_secret_is_set() -> None:
    signer = Signer(SECRET)
    one = client(secret=SECRET, signer=signer, public=["/page/"])
    assert one.get("/x").status_code == 401
    assert one.get("/healthz").status_code == 200
    assert one.get("/page/a").status_code == 200
    assert one.post("/page/a").status_code == 401
    for good in (SECRET, signer.issue("join", "me", 60)):
        assert one.get("/x", headers={"authorization": f"Bearer {good}"}).status_code == 200
        assert one.get("/x", headers={"authorization": f"Token {good}"}).status_code == 200
        assert one.get("/x", params={"token": good}).status_code == 200
        assert one.get("/x", headers={"kyutai-api-key": good}).status_code == 200
        assert one.get("/x", params={"auth_id": good}).status_code == 200
        with one.websocket_connect(
            "ws://localhost:8000/ws", subprotocols=["realtime", f"openai-insecure-api-key.{good}"]
        ) as websocket:
            assert websocket.receive_text() == "hello"
    for bad in (
        "x",
        signer.issue("join", "me", -1),
        signer.issue("resume", "me", 60),
        Signer().issue("join", "me", 60),
    ):
        answer = one.get("/x", headers={"authorization": f"Bearer {bad}"})
        assert answer.status_code == 401
        assert one.get("/x", headers={"kyutai-api-key": bad}).status_code == 401
        assert bad == "x" or bad not in answer.text


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded"])
def test_a_proxy_that_the_server_was_not_told_of_is_refused(header: str) -> None:
    """Everybody would count as a client on this host."""
    refused = client().get("/x", headers={header: "203.0.113.9"})
    assert refused.status_code == 400
    assert "--behind-proxy" in refused.text


def test_a_proxy_says_for_whom_it_asks() -> None:
    rules = {"loopback": False, "proxies": ["127.0.0.1", "10.0.0.0/8"]}
    for proxy in ("127.0.0.1", "10.1.2.3"):
        behind = client("a.example", proxy, **rules)
        silent = behind.get("/x")
        assert silent.status_code == 400
        assert "X-Forwarded-For" in silent.text
        assert behind.get("/healthz").status_code == 200
        assert behind.get("/x", headers={"x-forwarded-for": proxy}).status_code == 200  # one on the proxy's own host
    assert client("a.example", "203.0.113.9", **rules).get("/x").status_code == 200  # as the proxy's word is taken
    with pytest.raises(ValueError, match="nonsense"):
        client(proxies=["nonsense"])


def test_a_path_whose_clients_sign_needs_that_and_no_token() -> None:
    def check(scope: Any) -> bool:
        return dict(scope["headers"]).get(b"x-signed") == b"yes"

    one = client(secret=SECRET, signed={"/x": check})
    assert one.get("/x", headers={"x-signed": "yes"}).status_code == 200
    assert one.get("/x", headers={"x-signed": "no"}).status_code == 403
    assert one.get("/x", headers={"authorization": f"Bearer {SECRET}"}).status_code == 403
    assert one.get("/page/a", headers={"x-signed": "yes"}).status_code == 401


def test_too_many_requests() -> None:
    one = client(rate=0.001, burst=3)
    assert [one.get("/x").status_code for _ in range(5)] == [200, 200, 200, 429, 429]


def test_bodies() -> None:
    one = client(body=100)
    assert one.post("/x", content=b"a" * 100).text == "100"
    assert one.post("/x", content=b"a" * 101).status_code == 413
    assert one.post("/x", content=(b"a" * 60 for _ in range(2))).status_code == 413
    assert one.post("/x", content=(b"a" * 30 for _ in range(3))).text == "90"


def test_a_body_that_never_comes() -> None:
    rules = Rules(body_seconds=0.05)
    sent: list[Any] = []

    async def main() -> None:
        async def never() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-length", b"5")]
        scope = {"type": "http", "method": "POST", "path": "/x", "headers": headers, "client": ("127.0.0.1", 1)}
        await Guard(Starlette(), rules)(scope, never, send)

    asyncio.run(main())
    assert sent[0]["status"] == 408
    assert rules.refused == {408: 1}


def test_headers_of_pages() -> None:
    headers = client().get("/x").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
