"""What stands before every route: who may come in, from which page, how often, and with how much.

An ASGI middleware for HTTP and websockets alike (OWASP WebSocket Security cheat sheet; ASVS 4.4.2). A refused request
gets 400, 401, 403, 413 or 429 with one line of text, a refused websocket is refused in its handshake; each is counted.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .tokens import BadToken, Signer

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/healthz", "/readyz")  # need no token
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "microphone=(self), camera=(self), display-capture=(self)",
}
_CLIENTS = 4096  # addresses whose rates are remembered


@dataclass
class Rules:
    """Who may come in.

    loopback: the server listens on loopback only, so only its own names are taken as ``Host`` (against DNS rebinding).
    secret, signer: where a secret is set, every request needs it, or a ``join`` token signed with it. origins: pages of
    other origins that may connect. public: paths, and beginnings of paths ending in ``/``, that need no token. rate,
    burst: requests a second for each address. body, body_seconds: the largest request, and the time to send it.
    """

    loopback: bool = True
    secret: str | None = None
    signer: Signer | None = None
    origins: Sequence[str] = ()
    public: Sequence[str] = ()
    signed: Mapping[str, Callable[[Scope], bool]] = field(default_factory=dict)
    proxies: Sequence[str] = ()
    rate: float = 20.0
    burst: int = 60
    body: int = 256 * 1024
    body_seconds: float = 10.0
    refused: Counter[int] = field(default_factory=Counter)


class Refused(Exception):
    """A request that may not pass. status: HTTP's."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Guard:
    """The middleware: ``app = Guard(app, rules)``."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules
        self._proxies = [ipaddress.ip_network(one) for one in rules.proxies]
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
            if scope["type"] == "http":
                receive = await self._body(scope, receive)
        except Refused as refused:
            self.rules.refused[refused.status] += 1
            headers = {"retry-after": "1"} if refused.status == 429 else None
            await PlainTextResponse(f"{refused}\n", refused.status, headers)(scope, receive, send)
            return
        await self.app(scope, receive, _with_headers(send) if scope["type"] == "http" else send)

    def _check(self, scope: Scope) -> None:
        headers, rules = Headers(scope=scope), self.rules
        client = (scope.get("client") or ("", 0))[0]
        self._count(client)
        self._know(scope, client, headers)
        host = headers.get("host", "")
        if rules.loopback and _name(f"//{host}") not in LOOPBACK:
            raise Refused(400, "this server listens on loopback only: open it as localhost")
        origin = headers.get("origin")
        if origin is not None and not self._same(origin, host):
            raise Refused(403, "pages of this origin may not connect: start the server with --origin for it")
        if scope["path"] in rules.signed:
            if not rules.signed[scope["path"]](scope):
                raise Refused(403, "the request's signature is missing or wrong")
        elif rules.secret is not None and not self._public(scope):
            self._identify(scope, headers)

    def _know(self, scope: Scope, client: str, headers: Headers) -> None:
        """Whom a proxy asks for is known, or clients from anywhere would count as clients of its host."""
        told = "x-forwarded-for" in headers
        if self._proxies:
            if not told and scope["path"] not in OPEN_PATHS and any(_is_in(client, one) for one in self._proxies):
                raise Refused(400, "the proxy in front does not say for whom it asks: let it set X-Forwarded-For")
        elif told or "forwarded" in headers:
            raise Refused(400, "this came through a proxy: start the server with --behind-proxy and its address")

    def _public(self, scope: Scope) -> bool:
        path = scope["path"]
        listed = any(path == one or (one.endswith("/") and path.startswith(one)) for one in self.rules.public)
        return path in OPEN_PATHS or (scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and listed)

    def _same(self, origin: str, host: str) -> bool:
        name = _name(origin)
        if origin in self.rules.origins:
            return True
        return name is not None and (urlsplit(origin).netloc == host or (self.rules.loopback and name in LOOPBACK))

    def _identify(self, scope: Scope, headers: Headers) -> None:
        token = _token(scope, headers)
        if token is None:
            raise Refused(401, "a token is needed: Authorization: Bearer TOKEN (antiphon token makes one)")
        if hmac.compare_digest(token.encode(), (self.rules.secret or "").encode()):
            return
        try:
            if self.rules.signer is None:
                raise BadToken("not a valid token")
            self.rules.signer.check("join", token)
        except BadToken as error:
            raise Refused(401, str(error)) from None

    def _count(self, address: str) -> None:
        now, rules = time.monotonic(), self.rules
        tokens, since = self._buckets.pop(address, (float(rules.burst), now))
        tokens = min(rules.burst, tokens + (now - since) * rules.rate)
        self._buckets[address] = (max(tokens - 1, 0), now)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        if tokens < 1:
            raise Refused(429, f"more than {rules.rate:g} requests a second from this address")

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, read within its limits before the application sees the request."""
        limit, headers = self.rules.body, Headers(scope=scope)
        stated = headers.get("content-length", "0")
        if not stated.isdecimal() or int(stated) > limit:
            raise Refused(413, f"the request has {stated[:20]} bytes: the limit is {limit}")
        if scope["method"] in ("GET", "HEAD", "DELETE", "OPTIONS") and stated == "0":
            return receive
        body = bytearray()
        try:
            async with asyncio.timeout(self.rules.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return _once(message, receive)
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise Refused(413, f"the request is longer than {limit} bytes")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Refused(408, f"the request took longer than {self.rules.body_seconds:g} s") from None
        return _once({"type": "http.request", "body": bytes(body), "more_body": False}, receive)


def _once(first: Message, receive: Receive) -> Receive:
    waiting = [first]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message


def _is_in(address: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    try:
        return ipaddress.ip_address(address) in network
    except ValueError:
        return False


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _token(scope: Scope, headers: Headers) -> str | None:
    """From ``Authorization`` (Bearer, or Deepgram's Token), Kyutai's header, a websocket subprotocol (browsers), or the
    query: ``token``, or Kyutai's ``auth_id``."""
    if key := headers.get("kyutai-api-key"):
        return key
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() in ("bearer", "token") and value:
        return value.strip()
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        for prefix in ("openai-insecure-api-key.", "token."):
            if protocol.strip().startswith(prefix):
                return protocol.strip()[len(prefix) :]
    given = parse_qs(scope.get("query_string", b"").decode("latin-1"))
    return next((given[name][0] for name in ("token", "auth_id") if name in given), None)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending
