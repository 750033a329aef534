"""Replies streamed from an OpenAI-compatible endpoint over real sockets."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

sys.path.insert(0, str(Path(__file__).parents[1] / "transport" / "protocols"))
from serving import serving

from antiphon.apps.chat import Chat
from antiphon.pipelines.stages.respond import AnswerError

ASKED = [{"role": "user", "content": "hello"}]


def event(content: Any) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': content}]})}\n\n"


class Endpoint:
    """What a server of language models does. lines: of its answer."""

    def __init__(self, lines: list[str], status: int = 200) -> None:
        self.lines, self.status = lines, status
        self.asked: list[Any] = []
        self.keys: list[str | None] = []
        self.left = asyncio.Event()

    async def answer(self, request: Request) -> Response:
        self.asked.append(await request.json())
        self.keys.append(request.headers.get("authorization"))
        return StreamingResponse(self._stream(), self.status, media_type="text/event-stream")

    async def _stream(self) -> AsyncIterator[str]:
        try:
            for line in self.lines:
                yield line
                if line == "wait":
                    await asyncio.sleep(3600)
        finally:
            self.left.set()

    @property
    def routes(self) -> list[Route]:
        return [Route("/v1/chat/completions", self.answer, methods=["POST"])]


def replies(endpoint: Endpoint, key: str | None = None) -> list[str]:
    async def main() -> list[str]:
        async with serving(endpoint.routes) as address:
            return [piece async for piece in Chat(f"http://{address}/v1/", "tiny", key)(ASKED)]

    return asyncio.run(main())


def test_pieces_come_as_they_are_sent() -> None:
    endpoint = Endpoint([
        ": a comment\n\n", event({"role": "assistant"}), event({"content": "Hel"}), event({"content": None}),
        event({"content": "lo \u4f60"}), 'data: {"choices": [], "usage": {}}\n\n', "data: [DONE]\n\n",
        event({"content": "no"}),
    ])  # fmt: skip
    assert replies(endpoint, "secret") == ["Hel", "lo \u4f60"]
    assert endpoint.asked == [{"model": "tiny", "messages": ASKED, "stream": True}]
    assert endpoint.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("lines", "status", "message"),
    [
        (["data: {}\n\n"], 200, "no piece of a chat completion"),
        (["data: nonsense\n\n"], 200, "no piece of a chat completion"),
        (["secret"], 401, "answers 401"),
        (["secret"], 500, "answers 500"),
    ],
)
def test_what_goes_wrong_is_told_without_what_was_said(lines: list[str], status: int, message: str) -> None:
    with pytest.raises(AnswerError, match=message) as told:
        replies(Endpoint(lines, status))
    assert "secret" not in str(told.value)
    assert "hello" not in str(told.value)


def test_nobody_there() -> None:
    async def main() -> None:
        async with serving([]) as address:
            pass
        with pytest.raises(AnswerError, match="does not answer"):
            _ = [piece async for piece in Chat(f"http://{address}/v1", "tiny")(ASKED)]

    asyncio.run(main())
    with pytest.raises(ValueError, match="begins with http"):
        Chat("localhost:11434", "tiny")


def test_a_reply_that_is_not_wanted_is_hung_up_on() -> None:
    async def main() -> None:
        endpoint = Endpoint([event({"content": "Well"}), "wait"])
        async with serving(endpoint.routes) as address:
            pieces = Chat(f"http://{address}/v1", "tiny")(ASKED)
            assert await anext(pieces) == "Well"
            await pieces.aclose()
            async with asyncio.timeout(10):
                await endpoint.left.wait()

    asyncio.run(main())
