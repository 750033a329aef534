"""The server as one ASGI application: the web page, WebRTC signalling, the websocket protocols, health and metrics."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from importlib.resources import files
from itertools import groupby
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from ...transport.call import inlets
from ...transport.guard import Guard, Rules
from ...transport.service import STARTING_SECONDS, Service

PROTOCOLS = (
    "protocols.plain",
    "protocols.realtime",
    "protocols.deepgram",
    "protocols.twilio",
    "protocols.moshi_chat",
    "protocols.moshi_server",
    "protocols.speech",
    "webrtc.routes",
)
PAGE = ("/", "/info", "/graph.svg", "/style.css", "/favicon.ico")
LAG_SECONDS = 0.05  # between looks at how late the event loop runs


class LoopLag:
    """How late the event loop runs what is due: the last minute of looks."""

    def __init__(self) -> None:
        self._late: deque[float] = deque(maxlen=round(60 / LAG_SECONDS))

    async def watch(self) -> None:
        """Look for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self._late.append(loop.time() - due)

    def quantile(self, share: float) -> float:
        """Seconds; 0 before the first look."""
        late = sorted(self._late)
        return late[min(int(share * len(late)), len(late) - 1)] if late else 0.0


def create_app(
    service: Service,
    rules: Rules,
    *,
    info: dict[str, Any] | None = None,
    start: Callable[[], Awaitable[None]] | None = None,
    beside: Callable[[], Any] | None = None,
) -> ASGIApp:
    """The application.

    info: what ``/info`` says of the models; read at each request. start: makes the service ready, while requests are
    answered already. beside: an async context manager to run with it.
    """
    lag, began = LoopLag(), time.time()

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        if service.closing or service.starting:
            reason = "shutting down" if service.closing else service.starting
            return PlainTextResponse(f"{reason}\n", 503, {"retry-after": f"{STARTING_SECONDS:.0f}"})
        return PlainTextResponse("ready\n")

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(metrics_text(service, rules, lag), media_type="text/plain; version=0.0.4")

    async def about(request: Request) -> Response:
        said = {
            "name": service.name,
            "takes": sorted(inlets(service.graph({}))),
            "starting": service.starting,
            "calls": len(service.calls),
            "max_calls": service.max_calls,
            "since": began,
        }
        return JSONResponse({**(info or {}), **said})

    async def graph(request: Request) -> Response:
        call = service.calls.get(request.query_params.get("call", ""))
        svg = service.graph({}).draw("svg") if call is None else call.session.graph.draw("svg", call.session)
        return Response(svg, media_type="image/svg+xml", headers={"cache-control": "no-store"})

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(lag.watch(), name="loop lag")]
        if start is not None:
            tasks.append(asyncio.ensure_future(start()))
        try:
            async with AsyncExitStack() as stack:
                if beside is not None:
                    await stack.enter_async_context(beside())
                yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await service.close()

    routes: list[BaseRoute] = [
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", metrics),
        Route("/info", about),
        Route("/graph.svg", graph),
    ]
    for name in PROTOCOLS:
        routes += import_module(f"....transport.{name}", __name__).routes(service)
    page = str(files(__package__.rpartition(".")[0]).joinpath("web"))
    routes.append(Mount("/", StaticFiles(directory=page, html=True)))
    return Guard(Starlette(routes=routes, lifespan=life), rules)


def metrics_text(service: Service, rules: Rules, lag: LoopLag) -> str:
    """Prometheus text: the engine's numbers, then the service's."""
    lines = ["# TYPE antiphon_ready gauge", f"antiphon_ready {int(not (service.closing or service.starting))}"]
    lines += ["# TYPE antiphon_calls gauge", f"antiphon_calls {len(service.calls)}"]
    lines += ["# TYPE antiphon_calls_ended_kept gauge", f"antiphon_calls_ended_kept {service.ended}"]
    lines += ["# TYPE antiphon_calls_limit gauge", f"antiphon_calls_limit {service.max_calls}"]
    lines.append("# TYPE antiphon_calls_total counter")
    lines += [f'antiphon_calls_total{{outcome="{name}"}} {count}' for name, count in sorted(service.counts.items())]
    lines.append("# TYPE antiphon_requests_refused_total counter")
    lines += [
        f'antiphon_requests_refused_total{{status="{status}"}} {count}'
        for status, count in sorted(rules.refused.items())
    ]
    for family, counts in groupby(sorted(service.measured.items()), key=lambda one: one[0][0]):
        lines.append(f"# TYPE antiphon_webrtc_{family}_total counter")
        lines += [f'antiphon_webrtc_{family}_total{{outcome="{what}"}} {count}' for (_, what), count in counts]
    stats = [edge for call in service.calls.values() for edge in call.session.stats().values()]
    lines.append("# TYPE antiphon_edge_depth gauge")
    lines.append(f"antiphon_edge_depth {sum(edge.depth for edge in stats)}")
    lines.append("# TYPE antiphon_loop_lag_seconds gauge")
    lines += [f'antiphon_loop_lag_seconds{{quantile="{share}"}} {lag.quantile(share):.6f}' for share in (0.5, 0.99)]
    engine = service.engine.metrics_text() if service.engine is not None else ""
    return engine + "\n".join(lines) + "\n"
