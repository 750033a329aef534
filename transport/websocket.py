"""What every websocket protocol here does the same way: send with a time limit, receive with a limit on silence, and
close with a reason that tells the client what to do.

A websocket that vanishes raises ``ConnectionLost`` (the call is kept for its client), one that closes with 1000 ends.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from .service import ConnectionLost

SEND_SECONDS = 2.0  # for a client to take a message, before it counts as gone
NORMAL, GOING_AWAY, UNSUPPORTED, POLICY, TOO_BIG, ERROR, TRY_LATER = 1000, 1001, 1003, 1008, 1009, 1011, 1013


class Socket:
    """A websocket with time limits. Wraps one that is accepted or about to be."""

    def __init__(self, websocket: WebSocket, *, send_seconds: float = SEND_SECONDS) -> None:
        self.websocket, self.send_seconds = websocket, send_seconds
        self._sending = asyncio.Lock()

    async def accept(self, subprotocol: str | None = None) -> None:
        """Answer the handshake."""
        await self.websocket.accept(subprotocol)

    async def send_json(self, message: Any) -> None:
        """Send one message as compact JSON text. Raises ConnectionLost."""
        await self.send_text(json.dumps(message, ensure_ascii=False, separators=(",", ":")))

    async def send_text(self, text: str) -> None:
        """Raises ConnectionLost when the client is gone, or has not taken it in time."""
        await self._send({"type": "websocket.send", "text": text})

    async def send_bytes(self, data: bytes) -> None:
        """Raises ConnectionLost when the client is gone, or has not taken it in time."""
        await self._send({"type": "websocket.send", "bytes": data})

    async def receive(self) -> str | bytes | None:
        """The next message; None when the client has closed in the normal way. Raises ConnectionLost."""
        message = await self.websocket.receive()
        if message["type"] == "websocket.disconnect":
            code = message.get("code")
            if code in (NORMAL, 1005):  # 1005: a close frame without a code
                return None
            raise ConnectionLost(f"the websocket closed with code {code}")
        text: str | None = message.get("text")
        data: bytes = message.get("bytes") or b""
        return data if text is None else text

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Close, if still open; a reason is cut to the 123 bytes a close frame holds."""
        if self.websocket.application_state is WebSocketState.DISCONNECTED:
            return
        try:
            async with asyncio.timeout(self.send_seconds):
                await self.websocket.close(code, reason.encode()[:123].decode(errors="ignore"))
        except (RuntimeError, OSError, TimeoutError, WebSocketDisconnect):
            return  # it is closed already

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self.send_seconds), self._sending:
                await self.websocket.send(message)
        except TimeoutError:
            raise ConnectionLost(f"the client took no message for {self.send_seconds:g} s") from None
        except (WebSocketDisconnect, RuntimeError, OSError) as error:
            raise ConnectionLost(f"the websocket is closed ({type(error).__name__})") from None
