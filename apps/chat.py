"""A language model behind an OpenAI-compatible chat endpoint (Ollama, vLLM, llama.cpp), as ``Respond`` asks one."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx

from ..pipelines.stages.respond import AnswerError, Message

CONNECT_SECONDS = 5.0
PAUSE_SECONDS = 30.0  # between two pieces of a reply
LONGEST = 20_000  # characters of a reply


class Chat:
    """Streamed ``POST {url}/chat/completions``; call it with the dialogue.

    url: up to ``/v1``. model: as the endpoint names it. key: sent as a bearer token. Raises ValueError for another url.
    """

    def __init__(self, url: str, model: str, key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url}: the endpoint's address begins with http:// or https:// and ends with /v1")
        self._url, self._model = f"{url.rstrip('/')}/chat/completions", model
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._timeout = httpx.Timeout(PAUSE_SECONDS, connect=CONNECT_SECONDS)

    async def __call__(self, messages: Sequence[Message]) -> AsyncGenerator[str, None]:
        """The pieces of the reply. Raises AnswerError."""
        asked = {"model": self._model, "messages": list(messages), "stream": True}
        made = 0
        try:
            async with (
                httpx.AsyncClient(timeout=self._timeout, headers=self._headers) as client,
                client.stream("POST", self._url, json=asked) as response,
            ):
                if response.status_code != 200:
                    raise AnswerError(f"the language model's endpoint answers {response.status_code}")
                async for line in response.aiter_lines():
                    piece = _piece(line)
                    if piece is None or made > LONGEST:
                        return
                    made += len(piece)
                    if piece:
                        yield piece
        except httpx.HTTPError as error:
            raise AnswerError(f"the language model's endpoint does not answer ({type(error).__name__})") from error


def _piece(line: str) -> str | None:
    """The text of a server-sent event's line; None at the end. Raises AnswerError."""
    if not line.startswith("data:"):
        return ""
    data = line[5:].strip()
    if data == "[DONE]":
        return None
    try:
        event: Any = json.loads(data)
        choices = event["choices"]
        content = choices[0]["delta"].get("content") if choices else ""
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise AnswerError("the language model's endpoint sends what is no piece of a chat completion") from error
    return content if isinstance(content, str) else ""
