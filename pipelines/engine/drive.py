"""What turns the engine's crank: a thread of its own, or the event loop itself.

Both feed the ``Core`` and run it in exactly one thread at a time.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from .answers import Command
from .core import Core
from .errors import EngineError
from .runner import Flight
from .scheduler import Barrier, Batch, Work

Item = Work | Barrier | Command[Any]

NAP = 2e-4  # seconds between looks at several streams: nothing can be waited for on all of them


class Driver(Protocol):
    """Runs the core."""

    def post(self, item: Item, not_before: float = -math.inf) -> None:
        """Hand an item to the core, from any thread; nothing can start on its account before ``not_before``."""

    def wait_for(self, answers: list[Future[Any]]) -> None:
        """Block until all are done."""

    def close(self) -> None:
        """Stop; everything unanswered is answered with an error."""


class ThreadDriver:
    """Runs the core in one thread. Items are handed over by a deque; the thread is woken only when that matters."""

    def __init__(self, core: Core, name: str) -> None:
        self._core = core
        self._items: deque[Item] = deque()
        self._wake = threading.Event()
        self._sleeps_until = -math.inf  # while the thread sleeps, when it wakes by itself; else -inf
        self._stopping = False
        self._stopped = False
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        if self._ready.exception() is not None:
            self._thread.join()
        self._ready.result()

    def post(self, item: Item, not_before: float = -math.inf) -> None:
        self._items.append(item)
        if not_before < self._sleeps_until:
            self._wake.set()
        if self._stopped:
            self._refuse(None)

    def wait_for(self, answers: list[Future[Any]]) -> None:
        for answer in answers:
            answer.exception()

    def close(self) -> None:
        self._stopping = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._core.setup()
        except BaseException as error:  # noqa: BLE001 - whoever makes the engine gets it
            self._stopped = True
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        cause: BaseException | None = None
        try:
            self._loop()
        except BaseException as error:
            cause = error
            raise
        finally:
            self._stopped = True
            self._refuse(cause)

    def _refuse(self, cause: BaseException | None) -> None:
        """Answer what nobody will run. Once the thread has stopped, any thread may."""
        items: list[Item] = []
        while self._items:
            items.append(self._items.popleft())
        self._core.abandon(items, cause)

    def _loop(self) -> None:
        core, items = self._core, self._items
        flights: deque[tuple[Batch, Flight]] = deque()  # of all streams, in the order of their starts
        while not self._stopping:
            while items:
                core.take(items.popleft())
            for landed in _arrived(flights):
                flights.remove(landed)
                core.land(*landed)
            flying = Counter(batch.lane.stream for batch, _ in flights)
            room = [stream for stream in core.streams if flying[stream] < core.depth]
            decision = core.decide(core.now(), room) if room else None
            if isinstance(decision, Batch):
                flight = core.launch(decision)
                if flight is not None:
                    flights.append((decision, flight))
            elif not flights:
                self._sleep(decision)
            elif len(core.streams) == 1:
                core.land(*flights.popleft())
            else:
                self._sleep(core.now() + NAP)
        while flights:
            core.land(*flights.popleft())

    def _sleep(self, until: float | None) -> None:
        self._wake.clear()
        self._sleeps_until = math.inf if until is None else until
        # Whoever appends after this look sees _sleeps_until and sets the event.
        if not self._items and not self._stopping:
            self._wake.wait(None if until is None else max(0.0, until - self._core.now()))
        self._sleeps_until = -math.inf


def _arrived(flights: Iterable[tuple[Batch, Flight]]) -> list[tuple[Batch, Flight]]:
    """Those that have landed, of each stream in the order of their starts: one that lands while this looks waits for
    the one before it, whose buffers are the next to be used again."""
    flying: set[str] = set()
    found: list[tuple[Batch, Flight]] = []
    for batch, flight in flights:
        stream = batch.lane.stream
        if stream not in flying and flight.ready():
            found.append((batch, flight))
        else:
            flying.add(stream)
    return found


class InlineDriver:
    """Runs the core on the event loop that calls it, or without a loop in ``wait_for``: no thread, same order of
    events every time. On a virtual loop a step takes ``Core.cost`` of virtual time, and each stream is as busy."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._timer: asyncio.Handle | None = None
        self._soon = False
        self._flights: dict[str, tuple[Batch, Flight, asyncio.Handle]] = {}  # of each stream
        self._blocking = False
        core.setup()

    def post(self, item: Item, not_before: float = -math.inf) -> None:
        self._core.take(item)
        if not self._blocking:
            self._crank_soon()

    def wait_for(self, answers: list[Future[Any]]) -> None:
        if all(answer.done() for answer in answers):
            return
        if self._flights:
            raise EngineError("a batch is in flight on the event loop; use the awaitable calls there")
        self._blocking = True
        core = self._core
        try:
            while not all(answer.done() for answer in answers):
                decision = core.decide(core.now())
                if isinstance(decision, float):
                    decision = core.decide(decision)
                if not isinstance(decision, Batch):
                    raise EngineError("nothing is left to run, yet results are awaited")
                flight = core.launch(decision)
                if flight is not None:
                    core.land(decision, flight)
        except BaseException as error:
            core.abandon([], error)
            raise
        finally:
            self._blocking = False

    def close(self) -> None:
        self._cancel_timer()
        while self._flights:
            batch, flight, landing = self._flights.pop(next(iter(self._flights)))
            landing.cancel()
            self._core.land(batch, flight)
        self._core.abandon([], None)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _crank_soon(self) -> None:
        if self._soon or self._flights.keys() >= self._core.streams:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no loop runs here: wait_for will turn the crank
            return
        self._cancel_timer()
        self._soon = True
        self._timer = loop.call_soon(self._guarded, self._turn)

    def _guarded(self, act: Callable[[], None]) -> None:
        """Act; whatever goes wrong ends everything."""
        try:
            act()
        except BaseException as error:
            self._core.abandon([], error)
            raise

    def _land(self, stream: str) -> None:
        """The time of a stream's batch is over."""
        batch, flight, _ = self._flights.pop(stream)
        self._core.land(batch, flight)
        self._crank_soon()

    def _turn(self) -> None:
        """Start a batch, or set a timer for when one may start."""
        core = self._core
        self._soon, self._timer = False, None
        loop = asyncio.get_running_loop()
        now = core.now()
        decision = core.decide(now, core.streams - self._flights.keys())
        if isinstance(decision, Batch):
            stream = decision.lane.stream
            flight = core.launch(decision)
            seconds = 0.0 if flight is None else core.cost(decision, beside=bool(self._flights))
            if flight is not None and seconds > 0:
                landing = loop.call_later(seconds, self._guarded, partial(self._land, stream))
                self._flights[stream] = (decision, flight, landing)
            elif flight is not None:
                core.land(decision, flight)
            self._crank_soon()
        elif decision is not None:
            # A loop may round its timers: never ask for less than it can tell apart.
            self._timer = loop.call_later(max(decision - now, 1e-6), self._guarded, self._turn)
