"""Time as a value: the wall clock, and a virtual clock whose event loop jumps instead of waiting.

Everything in a session takes time from its clock, so the same code runs live and in a test that covers ten minutes in
milliseconds. ``run_virtual`` runs a coroutine on an event loop whose time stands still while anything can run and
jumps to the next timer when nothing can. Nothing is patched: only that loop's own ``time()`` is virtual.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import selectors
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextvars import Context
from typing import Any, Protocol, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_THREAD_GRACE = 2.0  # real seconds that a loop with nothing scheduled waits for another thread to call in


class Clock(Protocol):
    """Seconds on a monotonic scale, and waiting on it."""

    def now(self) -> float:
        """Seconds since an arbitrary origin."""

    async def sleep(self, seconds: float) -> None:
        """Wait that long; zero or less lets other tasks run once."""

    async def sleep_until(self, when: float) -> None:
        """Wait until ``now() >= when``."""


class WallClock:
    """Real time (``time.monotonic``). May be read from any thread."""

    now = staticmethod(time.monotonic)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def sleep_until(self, when: float) -> None:
        await asyncio.sleep(when - time.monotonic())


class VirtualClock:
    """The time of the running virtual loop. Made inside ``run_virtual``."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        if not isinstance(loop, VirtualLoop):
            raise RuntimeError("VirtualClock needs a virtual event loop: run the coroutine with run_virtual(...)")
        self._loop = loop
        self.now: Callable[[], float] = loop.time

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def sleep_until(self, when: float) -> None:
        await asyncio.sleep(when - self._loop.time())


def running_clock() -> Clock:
    """The clock that matches the running event loop: virtual inside ``run_virtual``, else the wall clock."""
    return VirtualClock() if isinstance(asyncio.get_running_loop(), VirtualLoop) else WallClock()


def run_virtual(main: Coroutine[Any, Any, T], *, start: float = 0.0) -> T:
    """Run ``main`` on virtual time that begins at ``start`` seconds and return its result.

    Timers fire in order of time, and in the order they were set where times are equal to the nanosecond. Work in
    ``run_in_executor`` takes no virtual time. Raises ``Deadlock`` when tasks wait and nothing can wake them.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(start)) as runner:
        return runner.run(main)


class Deadlock(RuntimeError):
    """Every task waits and no timer, file or thread is left that could wake one."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time. Use ``run_virtual``."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._order = itertools.count()
        self._executor_jobs = 0
        super().__init__(_JumpingSelector(self))
        self._clock_resolution = 1e-10

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """As in asyncio, with times rounded to the nanosecond and ties fired in the order they were set."""
        self._check_closed()  # type: ignore[attr-defined]
        timer = _OrderedTimer(round(when, 9), callback, args, self, context)
        timer.order = next(self._order)
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """As in asyncio; virtual time stands still until the job is done."""
        future = super().run_in_executor(executor, func, *args)
        self._executor_jobs += 1
        future.add_done_callback(self._executor_job_done)
        return future

    def _executor_job_done(self, _: asyncio.Future[Any]) -> None:
        self._executor_jobs -= 1

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Join the default executor's threads without a (virtual) timeout."""
        executor = self._default_executor  # type: ignore[attr-defined]
        if executor is not None:
            executor.shutdown(wait=True)

    def jump(self) -> bool:
        """Move time to the next timer; False when there is none."""
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        if not timers:
            return False
        self._now = max(self._now, timers[0].when())
        return True

    def deadlock(self) -> Deadlock:
        """The error that names what waits, and where."""
        waiting = sorted(f"{task.get_name()} ({_where(task)})" for task in asyncio.all_tasks(self))
        return Deadlock(f"at {self._now:.6f} s virtual time nothing can wake: {'; '.join(waiting) or 'no task'}")


class _OrderedTimer(asyncio.TimerHandle):
    """A timer that sorts by time, then by when it was set."""

    order = 0

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, _OrderedTimer):
            return NotImplemented
        return (self.when(), self.order) < (other.when(), other.order)


class _JumpingSelector(selectors.DefaultSelector):
    """Polls real files, and moves virtual time where a real selector would wait."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if self._loop._executor_jobs:
            return super().select(None)
        if self._loop.jump():
            return []
        if threading.active_count() > 1:
            events = super().select(_THREAD_GRACE)
        if not events:
            raise self._loop.deadlock()
        return events


def _where(task: asyncio.Task[Any]) -> str:
    """The innermost suspended frame of a task, as ``file.py:line function``."""
    awaitable: Any = task.get_coro()
    place = "not started"
    while awaitable is not None:
        for prefix in ("cr", "ag", "gi"):
            frame = getattr(awaitable, f"{prefix}_frame", None)
            if frame is not None:
                code = frame.f_code
                place = f"{code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno} {code.co_name}"
                awaitable = getattr(awaitable, f"{prefix}_await", None) or getattr(awaitable, "gi_yieldfrom", None)
                break
        else:
            break
    return place
