"""WebRTC over HTTP: WHIP (RFC 9725) and WHEP (draft-ietf-wish-whep), OpenAI's ``/v1/realtime/calls``, and the offer of
our own page. Every one takes an SDP offer, answers it with all candidates, and leaves a peer running.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ...pipelines.stage import StageError
from .. import json_text
from ..call import CallError, Item, TakenOver
from ..protocols import plain
from ..protocols.common import refusal
from ..service import ConnectionLost, Full, NoSuchCall, Service
from ..tokens import BadToken
from .peer import Handler, IceRestart, NeverConnected, Peer
from .sdp import LONGEST

SDP, FRAGMENT = "application/sdp", "application/trickle-ice-sdpfrag"
LONGEST_BODY = LONGEST + 64 * 1024  # bytes: an offer, and what comes with it
_CALLS = "/v1/realtime/calls"

_log = logging.getLogger(__name__)


class BadRequest(ValueError):
    """A request that is refused with this HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def routes(service: Service) -> list[BaseRoute]:
    """``/whip``, ``/whep``, ``/v1/realtime/calls`` and ``/rtc/offer``, and the resources that the first three make."""
    peers = _Peers(service)
    found: list[BaseRoute] = [Route("/rtc/offer", peers.offer, methods=["POST"])]
    for path, start in (("/whip", peers.whip), ("/whep", peers.whip), (_CALLS, peers.realtime)):
        found.append(Route(path, start, methods=["POST", "OPTIONS"]))
        found.append(Route(path + "/{id}", peers.hang_up, methods=["DELETE"]))
    found += [Route(path + "/{id}", peers.trickle, methods=["PATCH"]) for path in ("/whip", "/whep")]
    found.append(Route(_CALLS + "/{id}/hangup", peers.hang_up, methods=["POST"]))
    return found


class _Peers:
    """The peers of one service, by the secret names of their resources."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.running: dict[str, tuple[Peer, asyncio.Task[None]]] = {}

    # ---------------------------------------------------------------- requests

    async def whip(self, request: Request) -> Response:
        """WHIP and WHEP: an offer, answered; ``?resume=`` takes over a call. See ``Events`` for a data channel."""
        if request.method == "OPTIONS":
            return Response(headers={"Accept-Post": SDP, "Access-Control-Allow-Methods": "POST, PATCH, DELETE"})
        try:
            _accept(request, SDP)
            offer = await _text(request, SDP)
            resume = request.query_params.get("resume")
            id, _, answer = await self._start(request, offer, lambda peer: Events(peer, self.service), resume=resume)
        except _REFUSED as error:
            return _refuse(error)
        headers = {"Location": f"{request.url.path}/{id}", "ETag": _tag(id), "Accept-Patch": FRAGMENT}
        return Response(answer, 201, headers, SDP)

    async def trickle(self, request: Request) -> Response:
        """Candidates after the offer (RFC 9725 section 4.3), on the condition that ``If-Match`` names the ICE session.

        Clients of older drafts send its tag in ``ETag``, which is as good. An ICE restart gets 422.
        """
        try:
            id = request.path_params["id"]
            peer, _ = self._found(id)
            sdp = await _text(request, FRAGMENT)
            condition = request.headers.get("if-match") or request.headers.get("etag")
            if condition is None:
                raise BadRequest(428, "the request has no If-Match: send the ETag of the answer in it")
            if not {"*", _tag(id)} & {tag.strip() for tag in condition.split(",")}:
                raise BadRequest(412, "If-Match is not the ETag of this ICE session")
            await peer.trickle(sdp)
        except _REFUSED as error:
            return _refuse(error)
        return Response(status_code=204)

    async def realtime(self, request: Request) -> Response:
        """OpenAI's: multipart ``sdp`` and ``session`` (JSON), or the offer alone; events on channel ``oai-events``."""
        if request.method == "OPTIONS":
            return Response(headers={"Accept-Post": f"multipart/form-data, {SDP}"})
        from ..protocols.realtime import Realtime  # here, so that only its callers need what it needs

        def speaking(peer: Peer) -> Handler:
            async def send(event: dict[str, Any]) -> None:
                await peer.send(json.dumps(event, ensure_ascii=False, separators=(",", ":")))

            return Realtime(peer.call, send, audio_in_band=False, model=self.service.name)

        try:
            _accept(request, SDP)
            offer, session = await _form(request)
            id, peer, answer = await self._start(request, offer, speaking)
            if session is not None:
                peer.take(json.dumps({"type": "session.update", "session": session}))
        except _REFUSED as error:
            return _refuse(error)
        return Response(answer, 201, {"Location": f"{_CALLS}/{id}"}, SDP)

    async def offer(self, request: Request) -> Response:
        """Our page's: JSON ``{sdp, options?, resume?, after?}`` to ``{sdp, call, resume}``; channel ``events``."""
        try:
            if _media_type(request) != "application/json":
                raise BadRequest(415, f"the body is {_media_type(request)[:40]!r}: send application/json")
            body = _json(await _body(request), "the body")
            offer, options = body.get("sdp"), body.get("options") or {}
            resume, after = body.get("resume"), body.get("after")
            if not isinstance(offer, str) or not isinstance(options, dict):
                raise BadRequest(400, "an offer has sdp (text) and perhaps options (an object)")
            if not isinstance(resume, str | None) or not (after is None or type(after) is int):
                raise BadRequest(400, "resume is the text that the last answer gave, after the number of an item")
            _, peer, answer = await self._start(
                request, offer, lambda peer: Events(peer, self.service), options=options, resume=resume, after=after
            )
        except _REFUSED as error:
            return _refuse(error)
        call = peer.call
        return JSONResponse({"sdp": answer, "call": call.id, "resume": self.service.resume_token(call)}, 201)

    async def hang_up(self, request: Request) -> Response:
        """End a peer and its call."""
        try:
            peer, task = self._found(request.path_params["id"])
        except BadRequest as error:
            return _refuse(error)
        peer.leave()
        await asyncio.wait([task])
        return Response(status_code=200)

    # ---------------------------------------------------------------- peers

    def _found(self, id: str) -> tuple[Peer, asyncio.Task[None]]:
        if id not in self.running:
            raise BadRequest(404, "no such call: it has ended")
        return self.running[id]

    async def _start(
        self,
        request: Request,
        offer: str,
        handler: Callable[[Peer], Handler] | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        resume: str | None = None,
        after: int | None = None,
    ) -> tuple[str, Peer, str]:
        """Answer an offer and leave its peer running: the name of its resource, the peer, the answer."""
        id = secrets.token_urlsafe(16)
        answered: asyncio.Future[tuple[Peer, str]] = asyncio.get_running_loop().create_future()

        async def serve() -> None:
            async with self.service.connect(options, resume=resume) as call:
                peer = Peer(call, handler, loopback=_is_local(request), after=after)
                try:
                    answer = await peer.answer(offer)
                    self.running[id] = peer, task
                    answered.set_result((peer, answer))
                    with self.service.metered(peer.counted):
                        await peer.run()
                except NeverConnected as error:
                    if resume is not None:
                        raise ConnectionLost(str(error)) from error
                    raise
                except TakenOver as error:  # the call goes on with its new connection
                    raise ConnectionLost(str(error)) from error
                finally:
                    self.running.pop(id, None)
                    await peer.close()

        task = asyncio.create_task(serve(), name=f"peer {id[:4]}")
        first: set[asyncio.Future[Any]] = {task, answered}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            await task
            raise ConnectionLost("the peer ended before it was answered")
        task.add_done_callback(_ended)
        peer, answer = answered.result()
        return id, peer, answer


class Events:
    """The plain protocol's JSON on a data channel, and what WebRTC adds: ``ping`` is answered by ``pong`` with the same
    ``t``, ``stats`` by ``Peer.statistics``, ``heard_seconds`` (media time of the sound the graph has taken), ``depths``
    (chunks in its queues that are not empty) and ``calls`` (on the server). Sound goes by the audio track.
    """

    def __init__(self, peer: Peer, service: Service) -> None:
        self.peer, self.service = peer, service

    async def start(self) -> None:
        """See ``Handler``; the answer to the offer has said everything."""

    async def played(self) -> None:
        """See ``Handler``."""

    async def finish(self) -> None:
        """See ``Handler``; the connection's end says it."""

    async def fail(self, error: StageError) -> None:
        """See ``Handler``; told by an ``error``."""
        await self._send(plain.to_error(*refusal(error)[:2]))

    async def handle(self, text: str) -> None:
        """See ``Handler``. What is wrong with a message is answered by an ``error``."""
        try:
            message = _json(text, "a message")
            if message.get("type") == "ping":
                await self._send({"type": "pong", "t": message.get("t")})
            elif message.get("type") == "stats":
                call = self.peer.call
                figures = {
                    **self.peer.statistics(),
                    "heard_seconds": round(call.heard_seconds, 4),
                    "depths": {edge.name: len(edge) for edge in call.session.edges.values() if len(edge)},
                    "calls": len(self.service.calls),
                }
                await self._send({"type": "stats", **figures})
            else:
                await plain.obey(self.peer.call, text)
        except (ValueError, CallError) as error:
            await self._send(plain.to_error("bad_request", str(error)))

    async def item(self, item: Item) -> None:
        """See ``Handler``."""
        message = plain.to_message(item, self.peer.call.replies)
        if message["type"] != "audio":
            await self._send(message)

    async def _send(self, message: Mapping[str, Any]) -> None:
        await self.peer.send(json.dumps(message, ensure_ascii=False, separators=(",", ":")))


_REFUSED = (ValueError, CallError)  # BadRequest, BadOffer and BadToken; Full and NoSuchCall


def _refuse(error: Exception) -> Response:
    status, headers = 400, {}
    if isinstance(error, BadRequest):
        status = error.status
    elif isinstance(error, IceRestart):
        status = 422
    elif isinstance(error, Full):
        status, headers = 503, {"Retry-After": str(max(1, math.ceil(error.wait)))}
    elif isinstance(error, BadToken):
        status = 401
    elif isinstance(error, NoSuchCall):
        status = 404
    return JSONResponse({"error": {"type": type(error).__name__, "message": str(error)}}, status, headers)


def _ended(task: asyncio.Task[None]) -> None:
    """Note how a peer ended; its client is not there any more to be told."""
    if not task.cancelled() and (error := task.exception()) is not None:
        known = isinstance(error, ConnectionError | CallError)
        _log.log(logging.INFO if known else logging.ERROR, "a peer ended: %s", type(error).__name__)


def _tag(id: str) -> str:
    """The entity tag of a resource's ICE session, of which there is one."""
    return f'"{hashlib.sha256(id.encode()).hexdigest()[:16]}"'


def _is_local(request: Request) -> bool:
    """Whether the client is on this host."""
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _accept(request: Request, kind: str) -> None:
    accepted = [part.partition(";")[0].strip() for part in request.headers.get("accept", "*/*").lower().split(",")]
    if not {kind, "application/*", "*/*", ""} & set(accepted):
        raise BadRequest(406, f"the answer is {kind}: accept that")


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST_BODY:
            raise BadRequest(413, f"the body has more than {LONGEST_BODY} bytes, which is the most")
    return bytes(body)


async def _text(request: Request, kind: str) -> str:
    if _media_type(request) != kind:
        raise BadRequest(415, f"the body is {_media_type(request)[:40]!r}: send {kind}")
    body = await _body(request)
    if not body:
        raise BadRequest(400, "the body is empty: send the offer" if kind == SDP else "the body is empty")
    return body.decode()


async def _form(request: Request) -> tuple[str, dict[str, Any] | None]:
    """The offer, and the session that came with it."""
    if _media_type(request) != "multipart/form-data":
        return await _text(request, SDP), None
    length = request.headers.get("content-length")
    if length is None:
        raise BadRequest(411, "the form came without a Content-Length: send one")
    if int(length) > LONGEST_BODY:
        raise BadRequest(413, f"the form has {length} bytes: {LONGEST_BODY} is the most")
    try:
        form = await request.form(max_files=2, max_fields=8, max_part_size=LONGEST)
    except (MultiPartException, HTTPException) as error:
        raise BadRequest(400, "not well-formed multipart/form-data: send parts sdp and session") from error
    parts: dict[str, str] = {}
    for name, value in form.items():
        parts[name] = (await value.read()).decode() if isinstance(value, UploadFile) else value
    await form.close()
    if "sdp" not in parts:
        raise BadRequest(400, "the form has no part sdp: send the offer in it")
    return parts["sdp"], _json(parts["session"], "session") if "session" in parts else None


def _json(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        value = json_text.parse(text)
    except ValueError:
        raise BadRequest(400, f"{name} is not JSON: send an object") from None
    if not isinstance(value, dict):
        raise BadRequest(400, f"{name} is not a JSON object")
    return value
