"""The virtual clock: jumps, ties, threads, deadlocks."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from antiphon.pipelines.clock import Deadlock, VirtualClock, WallClock, run_virtual, running_clock


def test_ten_minutes_pass_in_no_time() -> None:
    async def main() -> tuple[float, float]:
        clock = VirtualClock()
        await clock.sleep(300.0)
        await clock.sleep_until(600.0)
        await clock.sleep_until(10.0)
        return clock.now(), asyncio.get_running_loop().time()

    began = time.monotonic()
    assert run_virtual(main()) == (600.0, 600.0)
    assert time.monotonic() - began < 5


def test_timers_fire_in_order_and_ties_in_the_order_they_were_set() -> None:
    async def main() -> list[tuple[float, int]]:
        clock, fired = VirtualClock(), []

        async def wait(name: int, *steps: float) -> None:
            for step in steps:
                await clock.sleep(step)
            fired.append((round(clock.now(), 9), name))

        # 0.1 + 0.2 and 0.3 differ as floats; both mean the same nanosecond.
        await asyncio.gather(wait(0, 0.1, 0.2), *(wait(i, 0.3) for i in range(1, 20)), wait(20, 0.05))
        return fired

    assert run_virtual(main()) == [(0.05, 20), *((0.3, i) for i in range(1, 20)), (0.3, 0)]


def test_time_stands_still_for_executor_jobs_and_threads() -> None:
    async def main() -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        release = threading.Event()
        job = loop.run_in_executor(None, release.wait, 30)
        timer = loop.call_later(1000.0, lambda: None)
        loop.call_later(0.0, release.set)
        assert await job
        at = loop.time()
        timer.cancel()

        called = asyncio.Event()
        thread = threading.Thread(target=lambda: loop.call_soon_threadsafe(called.set))
        thread.start()
        await called.wait()
        thread.join()
        return at, 7

    assert run_virtual(main()) == (0.0, 7)


def test_a_deadlock_names_what_waits_and_where() -> None:
    async def stuck_here() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        await asyncio.create_task(stuck_here(), name="stage speak")

    with pytest.raises(Deadlock, match=r"stage speak \(locks.py:\d+ wait\)"):
        run_virtual(main())


def test_the_running_clock_is_the_loop_s_own() -> None:
    async def kind() -> type:
        return type(running_clock())

    assert run_virtual(kind()) is VirtualClock
    assert asyncio.run(kind()) is WallClock


def test_a_virtual_clock_outside_its_loop_is_refused() -> None:
    async def main() -> None:
        VirtualClock()

    with pytest.raises(RuntimeError, match="run_virtual"):
        asyncio.run(main())
