"""The service: opens calls of one graph on one engine, up to a limit, and keeps a broken one for its client to resume.

async with service.connect(options) as call:        # a new call, ended when the block is left
    ...
    raise ConnectionLost("...")                      # kept for ``keep`` seconds instead
async with service.connect(resume=token) as call:    # the same call, taken over by this connection
    async for item in call.items(after=number): ...
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from ..pipelines.engine import AtCapacity
from ..pipelines.graph import Graph
from ..pipelines.stage import StageError
from .call import Call, CallError
from .tokens import Signer

_log = logging.getLogger(__name__)

STARTING_SECONDS = 5.0  # for a client to wait before it tries again

Meter = Callable[[], Mapping[tuple[str, str], int]]
"""What a connection has counted so far, by what and how it went: ``("datagrams", "malformed")``."""

GraphMaker = Callable[[Mapping[str, Any]], Graph]


class ConnectionLost(ConnectionError):
    """The client went away without saying goodbye; it may come back."""


class Full(CallError):
    """No room for another call. wait: seconds until a place is expected."""

    def __init__(self, reason: str, wait: float) -> None:
        super().__init__(f"at capacity: {reason}; try again in {wait:.0f} s")
        self.wait = wait


class Starting(Full):
    """The service is not ready yet."""

    def __init__(self, reason: str, wait: float) -> None:
        CallError.__init__(self, f"not ready: {reason}; try again in {wait:.0f} s")
        self.wait = wait


class NoSuchCall(CallError):
    """The call to resume is kept no longer."""


class Service:
    """Calls of one graph.

    graph: makes the graph of a call from the client's options (``language``, ``lookahead_ms``, ``endpoint_ms``, ...,
    whichever the graph knows). keep: seconds that a call outlives its connection, and its last items its end: a client
    with a token that did not get them comes back for them. max_calls: running and kept ones, and as many that have
    ended. max_seconds: of sound in one call. name: what is served, said to clients honestly.

    starting: what is being done before calls can be made, empty once they can; whoever sets it sets ``engine`` too.
    native: the language that the model hears without being told (and is not told); None where it must be told.
    """

    def __init__(
        self,
        graph: GraphMaker,
        engine: Any,
        *,
        name: str = "",
        max_calls: int = 64,
        max_seconds: float = 4 * 3600.0,
        keep: float = 30.0,
        signer: Signer | None = None,
        starting: str = "",
        native: str | None = "en",
    ) -> None:
        if max_calls < 1:
            raise ValueError(f"max_calls={max_calls}: a service has room for at least 1")
        self.graph, self.engine, self.name = graph, engine, name
        self.max_calls, self.max_seconds, self.keep = max_calls, max_seconds, keep
        self.signer = signer or Signer()
        self.calls: dict[str, Call] = {}
        self.counts: Counter[str] = Counter()  # opened, refused, kept, resumed, expired, ended, failed
        self.closing = False
        self.starting, self.native = starting, native
        self._meters: list[Meter] = []
        self._measured: Counter[tuple[str, str]] = Counter()  # by connections that have ended
        self._ended: dict[str, Call] = {}  # kept for their items: nothing of them runs
        self._expiry: dict[str, asyncio.TimerHandle] = {}
        self._holders: Counter[str] = Counter()  # connections of each call; more than one while one takes over
        self._ending: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def connect(
        self, options: Mapping[str, Any] | None = None, *, resume: str | None = None, graph: GraphMaker | None = None
    ) -> AsyncIterator[Call]:
        """A call for one connection: new, or that of a ``resume`` token. graph: another than the service's.

        Leaving the block ends the call, except by ConnectionLost (raised on), which keeps it. Raises Full, NoSuchCall,
        BadToken, and ValueError for options that the graph cannot take.
        """
        call = await self._open(options or {}, graph or self.graph) if resume is None else self._resume(resume)
        self._holders[call.id] += 1
        kept = False
        try:
            yield call
        except ConnectionLost:
            kept = True
            raise
        finally:
            self._holders[call.id] -= 1
            if not self._holders[call.id]:
                del self._holders[call.id]
                if kept and not call.ended and not self.closing:
                    self.counts["kept"] += 1
                    self._later(self._expire, call)
                else:
                    await self._end(call, "ended", keep=call.ended and call.resumable and not self.closing)

    def resume_token(self, call: Call) -> str:
        """What the client shows to come back to this call."""
        call.resumable = True
        return self.signer.issue("resume", call.id, self.max_seconds + self.keep)

    @contextmanager
    def metered(self, meter: Meter) -> Iterator[None]:
        """Count with all others what a connection counts, as long as the block runs and for ever after."""
        self._meters.append(meter)
        try:
            yield
        finally:
            self._meters.remove(meter)
            self._measured.update(meter())

    @property
    def measured(self) -> Counter[tuple[str, str]]:
        """What all connections have counted so far."""
        total = Counter(self._measured)
        for meter in self._meters:
            total.update(meter())
        return total

    @property
    def ended(self) -> int:
        """Calls that have ended and whose items are kept."""
        return len(self._ended)

    async def close(self) -> None:
        """End every call."""
        self.closing = True
        for call in list(self.calls.values()):
            await self._end(call, "ended")
        await asyncio.gather(*self._ending)
        for call in list(self._ended.values()):
            self._forget(call)

    async def _open(self, options: Mapping[str, Any], graph: GraphMaker) -> Call:
        if self.closing:
            raise Full("the server is shutting down", self.keep)
        if self.starting:
            self.counts["refused"] += 1
            raise Starting(self.starting, STARTING_SECONDS)
        if sum(not call.ended for call in self.calls.values()) >= self.max_calls:
            self.counts["refused"] += 1
            raise Full(f"{self.max_calls} calls are running", self.keep)
        call = Call(secrets.token_hex(8), graph(options), self.engine, max_seconds=self.max_seconds)
        self.calls[call.id] = call
        try:
            await call.start()
        except StageError as error:
            del self.calls[call.id]
            if isinstance(error.__cause__, AtCapacity):
                self.counts["refused"] += 1
                raise Full(error.__cause__.reason, error.__cause__.expected_wait) from error
            self.counts["failed"] += 1
            _log.warning("a call could not begin: %s", error)
            raise
        except BaseException:
            del self.calls[call.id]
            await call.close()
            raise
        self.counts["opened"] += 1
        return call

    def _resume(self, token: str) -> Call:
        id = self.signer.check("resume", token)
        call = self.calls.get(id) or self._ended.get(id)
        if call is None:
            raise NoSuchCall(f"the call has ended (calls are kept {self.keep:g} s): start a new one")
        self._never(call)
        self.counts["resumed"] += 1
        return call

    def _later(self, what: Callable[[Call], None], call: Call) -> None:
        self._never(call)
        self._expiry[call.id] = asyncio.get_running_loop().call_later(self.keep, what, call)

    def _never(self, call: Call) -> None:
        timer = self._expiry.pop(call.id, None)
        if timer is not None:
            timer.cancel()

    def _expire(self, call: Call) -> None:
        task = asyncio.create_task(self._end(call, "expired"))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, call: Call, how: str, *, keep: bool = False) -> None:
        """keep: the items of a call that has ended, for a client that comes back."""
        self._never(call)
        if self.calls.get(call.id) is call:
            self.counts["failed" if call.error is not None else how] += 1
            if call.error is not None:  # of which its client is told little
                _log.error("call %s: stage %r failed", call.id, call.error.stage, exc_info=call.error.__cause__)
            await call.close()
            self.calls.pop(call.id, None)
        if keep:
            self._ended.pop(call.id, None)
            self._ended[call.id] = call  # as the newest
            self._later(self._forget, call)
            while len(self._ended) > self.max_calls:
                self._forget(next(iter(self._ended.values())))

    def _forget(self, call: Call) -> None:
        self._never(call)
        self._ended.pop(call.id, None)
