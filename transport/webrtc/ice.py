"""What aioice (0.13) leaves open to anybody who can send a datagram, closed; and which addresses it offers.

STUN with an attribute cut short raises ``struct.error`` in the event loop, data is queued without limit until ICE has
finished, and after that one datagram that is too long for libsrtp, whoever sent it, ends the connection. Its host
candidates are those of every interface but 127.0.0.1. All of it belongs to one connection object: ``Guard`` replaces
methods of that object alone.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Awaitable, Callable
from typing import Any

from aioice import Connection

from ...pipelines.clock import Clock

WAITING_DATAGRAMS = 256  # that aiortc has not read yet: 5 s of audio, or a DTLS flight many times over
LONGEST_DATAGRAM = 1500  # bytes: what an Ethernet frame holds, and all that libsrtp is given room for

_log = logging.getLogger(__name__)


class Guard:
    """Counts of one ICE connection. received: datagrams. oversized: of those, longer than ``LONGEST_DATAGRAM`` and left
    out. malformed: STUN that could not be read. overflowed: data that came faster than it was read. last: clock time of
    the newest datagram, None before the first.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.received = self.oversized = self.malformed = self.overflowed = 0
        self.last: float | None = None

    def attach(self, connection: Connection, *, loopback: bool = False) -> None:
        """Guard a connection that has not gathered its candidates yet. loopback: offer 127.0.0.1 too."""
        gather: Callable[..., Awaitable[Any]] = connection.get_component_candidates
        take = connection.data_received

        async def get_component_candidates(component: int, addresses: list[str], **options: Any) -> Any:
            chosen = [*addresses, "127.0.0.1"] if loopback else addresses
            candidates = await gather(component=component, addresses=chosen, **options)
            for protocol in connection._protocols:
                self._watch(connection, protocol)
            return candidates

        def data_received(data: bytes, component: int) -> None:
            if connection._queue.qsize() >= WAITING_DATAGRAMS:
                self.overflowed += 1
            else:
                take(data, component)

        connection.get_component_candidates = get_component_candidates  # type: ignore[method-assign, assignment]
        connection.data_received = data_received  # type: ignore[method-assign]

    def _watch(self, connection: Connection, protocol: Any) -> None:
        receive = protocol.datagram_received

        def datagram_received(data: bytes, address: tuple[Any, ...]) -> None:
            self.received += 1
            if len(data) > LONGEST_DATAGRAM:
                self.oversized += 1
                return
            if any(pair.remote_addr == address[:2] for pair in connection._check_list):  # not a stranger
                self.last = self.clock.now()
            try:
                receive(data, address)
            except (struct.error, LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
                self.malformed += 1
                if self.malformed == 1:
                    _log.warning("a STUN message was left out: %s", type(error).__name__)

        protocol.datagram_received = datagram_received
