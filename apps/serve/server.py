"""How the application is put on a socket: uvicorn, with the limits that keep one client from holding up the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

T = TypeVar("T")

MESSAGE_BYTES = 256 * 1024  # of a websocket: 2.7 s of 48 kHz sound, base64
HEADER_SECONDS = 10.0  # for a client to say what it wants
PING_SECONDS = 10.0  # between pings of a websocket, and for the answer


class Impatient(H11Protocol):
    """HTTP/1.1 that closes a connection which has sent no whole request head in time (slowloris)."""

    header_seconds = HEADER_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self.loop.call_later(self.header_seconds, self._waited, transport)

    def _waited(self, transport: asyncio.Transport) -> None:
        if cast("object", self.cycle) is None and transport.get_protocol() is self:
            transport.close()


def configure(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    proxies: Sequence[str] = (),
) -> uvicorn.Config:
    """Settings to make a ``uvicorn.Server`` of. Websockets without compression: no message grows on arrival.

    proxies: addresses or networks whose ``X-Forwarded-For`` and ``X-Forwarded-Proto`` are believed.
    """
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Impatient,
        ws="websockets-sansio",
        ws_max_size=MESSAGE_BYTES,
        ws_per_message_deflate=False,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PING_SECONDS,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
        timeout_graceful_shutdown=5,
    )


async def apart(work: Callable[[], T]) -> T:
    """What ``work`` returns or raises, from a thread of its own that the end of the process does not wait for."""
    answer: Future[T] = Future()

    def run() -> None:
        answer.set_running_or_notify_cancel()
        try:
            answer.set_result(work())
        except BaseException as error:  # noqa: BLE001 - the one who waits gets it
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(answer)
