"""``antiphon bench runtime``: what the graph itself costs, beside a plain chain of asyncio queues in the same run.

Each session is six stages: a source that emits a 20 ms chunk whenever its media clock says so, four that pass chunks
on, a sink. Sessions are spread evenly over the 20 ms. The cost is the process's CPU time from the first chunk due to
the last one through, divided by chunks: pacing and making the chunk included, on both sides. Latency runs from the
scheduled moment of a chunk to its arrival at the sink. Both kinds run on the event loop that the server has (uvloop,
where there is one) and on asyncio's own; they take turns, so a busy machine hurts all.
"""

from __future__ import annotations

import asyncio
import gc
import time
from argparse import ArgumentParser
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from ...pipelines.chunk import Audio
from ...pipelines.graph import Chain
from ...pipelines.stage import Context, Input, Stage
from .common import write_result

RATE, SAMPLES, PERIOD = 16000, 320, 0.02
STAGES = 6

Latencies = list[float]
Kind = Callable[[int, int, float, Latencies], list[Awaitable[None]]]


class Source(Stage):
    """A chunk each period from ``begin`` on, never early, whatever became of the last."""

    outputs = ("out",)

    def __init__(self, begin: float, chunks: int) -> None:
        self.begin, self.chunks = begin, chunks

    async def run(self, ctx: Context) -> AsyncIterator[Audio]:
        """See the class."""
        for i in range(self.chunks):
            await ctx.clock.sleep_until(self.begin + i * PERIOD)
            yield _chunk(i)


class Relay(Stage):
    """Passes on what it gets."""

    async def run(self, ctx: Context, audio: Input) -> AsyncIterator[Any]:
        """See the class."""
        async for chunk in audio:
            yield chunk


class Sink(Stage):
    """Notes how late each chunk is."""

    def __init__(self, begin: float, latencies: Latencies) -> None:
        self.begin, self.latencies = begin, latencies

    async def run(self, ctx: Context, audio: Input) -> None:
        """See the class."""
        async for chunk in audio:
            self.latencies.append(time.monotonic() - self.begin - chunk.start / RATE)


def graphs(sessions: int, chunks: int, begin: float, latencies: Latencies) -> list[Awaitable[None]]:
    """Sessions of a six-stage graph."""
    made: list[Awaitable[None]] = []
    for i in range(sessions):
        due = begin + PERIOD * i / sessions
        graph: Chain = Source(due, chunks)
        for _ in range(STAGES - 2):
            graph = graph >> Relay()
        made.append((graph >> Sink(due, latencies)).session().run())
    return made


def queues(sessions: int, chunks: int, begin: float, latencies: Latencies) -> list[Awaitable[None]]:
    """The same with a task a stage and an ``asyncio.Queue`` between each two: no counters, no fences, no trace."""

    async def source(due: float, out: asyncio.Queue[Audio | None]) -> None:
        for i in range(chunks):
            await asyncio.sleep(due + i * PERIOD - time.monotonic())
            await out.put(_chunk(i))
        await out.put(None)

    async def relay(into: asyncio.Queue[Audio | None], out: asyncio.Queue[Audio | None]) -> None:
        while (chunk := await into.get()) is not None:
            await out.put(chunk)
        await out.put(None)

    async def sink(due: float, into: asyncio.Queue[Audio | None]) -> None:
        while (chunk := await into.get()) is not None:
            latencies.append(time.monotonic() - due - chunk.start / RATE)

    made: list[Awaitable[None]] = []
    for i in range(sessions):
        due = begin + PERIOD * i / sessions
        chain: list[asyncio.Queue[Audio | None]] = [asyncio.Queue(32) for _ in range(STAGES - 1)]
        made.append(source(due, chain[0]))
        made += [relay(chain[at], chain[at + 1]) for at in range(STAGES - 2)]
        made.append(sink(due, chain[-1]))
    return made


def run(sessions: int = 200, seconds: float = 5.0, repeats: int = 3, write: bool = True) -> dict[str, Any]:
    """Measure; returns (and writes to ``results/runtime.json``) CPU microseconds a chunk and latencies of both kinds.

    The figure of a kind is the median of its repeats; all are kept. ``loops`` has them per event loop, the top level
    repeats those of the server's.
    """
    kinds: dict[str, Kind] = {"antiphon": graphs, "asyncio_queue": queues}
    loops = event_loops()
    runs: dict[tuple[str, str], list[dict[str, float]]] = {(loop, kind): [] for loop in loops for kind in kinds}
    for _ in range(repeats):
        for (loop, kind), results in runs.items():
            with asyncio.Runner(loop_factory=loops[loop]) as runner:
                results.append(runner.run(_measure(kinds[kind], sessions, round(seconds / PERIOD))))
    figures: dict[str, dict[str, Any]] = {loop: {} for loop in loops}
    for (loop, kind), results in runs.items():
        middle = {key: round(median(one[key] for one in results), 3) for key in results[0]}
        figures[loop][kind] = middle | {"runs": results}
    for one in figures.values():
        one["ratio"] = round(one["antiphon"]["cpu_us_per_chunk"] / one["asyncio_queue"]["cpu_us_per_chunk"], 3)
    loop = next(iter(loops))
    numbers = {"sessions": sessions, "stages": STAGES, "chunk_ms": PERIOD * 1e3, "seconds": seconds, "loop": loop}
    numbers |= figures[loop] | {"loops": figures}
    if write:
        command = f"antiphon bench runtime --sessions {sessions} --seconds {seconds:g} --repeats {repeats}"
        write_result("runtime", command, numbers)
    return numbers


def event_loops() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The server's first."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    try:
        import uvloop
    except ImportError:
        return loops
    return {"uvloop": uvloop.new_event_loop, **loops}


def main(arguments: Sequence[str] = ()) -> None:
    """``antiphon bench runtime``."""
    parser = ArgumentParser(prog="antiphon bench runtime", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5.0, help="of media, per repeat (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-write", dest="write", action="store_false", help="leave results/runtime.json as it is")
    numbers = run(**vars(parser.parse_args(arguments)))
    print(f"{numbers['sessions']} sessions, {STAGES} stages, a chunk each {PERIOD * 1e3:g} ms")
    for loop, kind in ((loop, kind) for loop in numbers["loops"] for kind in ("antiphon", "asyncio_queue")):
        one = numbers["loops"][loop][kind]
        print(
            f"{loop:<8} {kind:<14}{one['cpu_us_per_chunk']:7.1f} us of CPU a chunk, {one['core_share']:.0%} of a core, "
            f"latency p50 {one['latency_ms_p50']:.2f} ms, p99 {one['latency_ms_p99']:.2f} ms"
        )


async def _measure(make: Kind, sessions: int, chunks: int) -> dict[str, float]:
    latencies: Latencies = []
    begin = time.monotonic() + 0.5 + sessions * 2e-3  # until every session is built
    tasks = [asyncio.ensure_future(one) for one in make(sessions, chunks, begin, latencies)]
    await asyncio.sleep(begin - 0.2 - time.monotonic())
    gc.collect()
    gc.freeze()  # as a server does once it is up: what was loaded and built is no garbage
    before = time.process_time()
    await asyncio.gather(*tasks)
    spent = time.process_time() - before
    gc.unfreeze()
    if len(latencies) != sessions * chunks:
        raise RuntimeError(f"{len(latencies)} of {sessions * chunks} chunks arrived")
    latencies.sort()
    return {
        "cpu_us_per_chunk": round(spent / len(latencies) * 1e6, 3),
        "core_share": round(spent / (chunks * PERIOD), 4),
        "latency_ms_p50": round(latencies[len(latencies) // 2] * 1e3, 3),
        "latency_ms_p99": round(latencies[int(len(latencies) * 0.99)] * 1e3, 3),
    }


def _chunk(i: int) -> Audio:
    return Audio(_SILENCE, rate=RATE, start=i * SAMPLES)


_SILENCE = np.zeros(SAMPLES, np.float32)
