"""Answers from the engine's thread to those who wait: in an event loop, or blocked in another thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from .runner import Row

T = TypeVar("T")
Waiter = asyncio.Future[Any] | Future[Any]

# What a model's step may raise without taking the engine down. Anything else ends the engine and is reported.
STEP_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, NameError,
    OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


class Command(Generic[T]):
    """Something to do in the engine's thread, and who waits for its result.

    joined: after all that was launched and before all that will be, on whatever stream.
    """

    __slots__ = ("_call", "_waiter", "joined")

    def __init__(self, call: Callable[[], T], waiter: Waiter | None, *, joined: bool = True) -> None:
        self._call = call
        self._waiter = waiter
        self.joined = joined

    def __call__(self) -> None:
        if self._waiter is None:
            self._call()
            return
        try:
            result = self._call()
        except STEP_ERRORS as error:
            self.fail(error)
        else:
            _give(self._waiter, result, None)

    def fail(self, error: Exception) -> None:
        """Answer with an error instead."""
        if self._waiter is not None:
            _give(self._waiter, None, error)


def settle(waiter: Waiter, outcome: Row | Exception) -> None:
    """Answer the waiter of a chunk, in its own event loop or thread."""
    if isinstance(outcome, Row):
        waiter.set_result(outcome)
    else:
        waiter.set_exception(outcome)


def _give(waiter: Waiter, result: object, error: Exception | None) -> None:
    """Settle the waiter of a command, from any thread."""

    def settle_once() -> None:
        if waiter.done():
            return
        if error is None:
            waiter.set_result(result)
        else:
            waiter.set_exception(error)

    if isinstance(waiter, Future) or waiter.get_loop() is running_loop():
        settle_once()
        return
    if not waiter.get_loop().is_closed():
        waiter.get_loop().call_soon_threadsafe(settle_once)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
