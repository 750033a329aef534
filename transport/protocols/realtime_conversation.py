"""What the parts of OpenAI's Realtime protocol share: the session in effect, the conversation's items, and the server
events on their way to the client.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from .realtime_events import BadEvent, Session, error_event, new_id

KEPT_ITEMS = 1024

Send = Callable[[dict[str, Any]], Awaitable[None]]


class Conversation:
    """Items in their order, the newest ``KEPT_ITEMS`` of them. send: takes each server event."""

    def __init__(self, send: Send, session: Session) -> None:
        self._send, self.session = send, session
        self._items: dict[str, dict[str, Any]] = {}
        self._outbox: deque[dict[str, Any]] = deque()
        self._sending = asyncio.Lock()

    # ---------------------------------------------------------------- events to the client

    def say(self, type: str, **fields: Any) -> None:
        """Queue a server event, with the fields as they are now."""
        self._outbox.append(copy.deepcopy({"type": type, "event_id": new_id("event"), **fields}))

    def error(self, message: str, code: str, param: str | None = None, event_id: str | None = None) -> None:
        """Queue an event ``error``. event_id: the client's, of what was wrong."""
        self._outbox.append(error_event(message, code, param, event_id))

    async def flush(self) -> None:
        """Send what is queued; whoever calls, events leave in the order in which they were queued."""
        async with self._sending:
            while self._outbox:
                await self._send(self._outbox.popleft())

    # ---------------------------------------------------------------- items

    def __contains__(self, id: str) -> bool:
        return id in self._items

    @property
    def last(self) -> str | None:
        """Id of the last item."""
        return next(reversed(self._items), None)

    def item(self, id: str) -> dict[str, Any]:
        """Raises BadEvent."""
        if id not in self._items:
            raise BadEvent(f"there is no item {id!r} in the conversation", "item_not_found", "item_id")
        return self._items[id]

    def add(self, item: dict[str, Any], previous: str | None = None) -> None:
        """Put an item after ``previous`` (None: at the end, "root": at the beginning)."""
        order = list(self._items)
        at = len(order) if previous is None else 0 if previous == "root" else order.index(previous) + 1
        kept = [*order[:at], item["id"], *order[at:]]
        self._items = {id: item if id == item["id"] else self._items[id] for id in kept[-KEPT_ITEMS:]}
        self.say("conversation.item.added", item=item, previous_item_id=self._before(item["id"]))

    def done(self, item: dict[str, Any]) -> None:
        """The item is whole."""
        self.say("conversation.item.done", item=item, previous_item_id=self._before(item["id"]))

    def delete(self, id: str) -> None:
        """Raises BadEvent."""
        self.item(id)
        del self._items[id]
        self.say("conversation.item.deleted", item_id=id)

    def transcribed(self, id: str, transcript: str | None) -> None:
        """Set the transcript of an item's sound, if the item is still kept."""
        if id in self._items and self._items[id]["content"]:
            self._items[id]["content"][0]["transcript"] = transcript

    def truncated(self, id: str, milliseconds: int) -> None:
        """Of a reply's sound the client has heard only so much: its transcript says more than that."""
        self.transcribed(id, None)
        self.say("conversation.item.truncated", item_id=id, content_index=0, audio_end_ms=milliseconds)

    def _before(self, id: str) -> str | None:
        previous = None
        for one in self._items:
            if one == id:
                return previous
            previous = one
        return None
