"""Sessions: interruption, heard position, errors, cancellation, resources."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.pipelines.chunk import Audio, Chunk, Event, Stale, Text
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.edge import Link
from antiphon.pipelines.session import Session
from antiphon.pipelines.stage import Context, Input, StageError, stage


class FakeLease:
    """Steps take a while; a fence refuses what is under way at once, as the engine's does."""

    def __init__(self, log: list[str], seconds: float = 0.05) -> None:
        self.log, self.seconds, self.epoch, self.pending = log, seconds, 0, set()
        log.append("open")

    async def step(self, epoch: int) -> None:
        if epoch < self.epoch:
            raise Stale(f"epoch {epoch}")
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        timer = loop.call_later(self.seconds, lambda: done.done() or done.set_result(None))
        self.pending.add(done)
        try:
            await done
        finally:
            timer.cancel()
            self.pending.discard(done)

    def fence(self, epoch: int) -> None:
        self.epoch = epoch
        for done in self.pending:
            if not done.done():
                done.set_exception(Stale(f"fenced by {epoch}"))

    def close(self) -> None:
        self.log.append("close")


class FakeEngine:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.leases: list[FakeLease] = []

    async def open(self, model: str, **options: float) -> FakeLease:
        self.leases.append(FakeLease(self.log, **options))
        return self.leases[-1]


@stage(lasting=True)
async def talker(ctx: Context, *, chunks: int = 50) -> AsyncIterator[Audio]:
    for i in range(chunks):
        await ctx.sleep(0.02)
        yield Audio(np.full(320, i, np.float32), rate=16000, start=320 * i)


@stage
async def answer(ctx: Context, audio: Input, *, seconds: float = 0.05) -> AsyncIterator[Audio]:
    """Two chunks of speech for each chunk heard, each a step of the engine."""
    lease = await ctx.open("tts", seconds=seconds)
    async for chunk in audio:
        with suppress(Stale):
            for _ in range(2):
                await lease.step(ctx.epoch)
                yield Audio(chunk.samples, rate=16000, start=chunk.start)


@stage
async def work(ctx: Context, chunks: Input, *, seconds: float = 0.0) -> AsyncIterator[Chunk]:
    async for chunk in chunks:
        await asyncio.sleep(seconds)  # takes no notice of interruptions: its stale output is refused at the edge
        yield replace(chunk, seq=-1, epoch=-1)


@dataclass
class Played:
    chunks: list[tuple[float, Chunk]] = field(default_factory=list)
    cut: list[float] = field(default_factory=list)


@stage
async def loudspeaker(ctx: Context, audio: Input, *, log: Played) -> None:
    async for chunk in audio:
        began = ctx.now
        log.chunks.append((began, chunk))
        try:
            await ctx.sleep(chunk.seconds)
            ctx.played(chunk)
        except Stale:
            log.cut.append(ctx.now)
            ctx.played(chunk, ctx.now - began)


def test_an_interruption_reaches_every_edge_the_lease_and_the_sink_at_once() -> None:
    async def main() -> None:
        engine, log = FakeEngine(), Played()
        graph = talker() >> answer() >> Link(items=4) >> loudspeaker(log=log)
        async with graph.session(engine=engine) as session:
            await session.clock.sleep(0.475)
            before = session.clock.now()
            edge = session.edges[graph.connections[1]]
            assert engine.leases[0].pending
            session.interrupt()
            assert engine.leases[0].epoch == 1
            assert all(done.done() for done in engine.leases[0].pending)
            assert all(edge.epoch == 1 for edge in session.edges.values())
            assert len(edge) == 0
            await session.clock.sleep(0)
            await session.clock.sleep(0)
            assert session.clock.now() == before
            await session.run()
        assert log.cut == [before]
        assert all(chunk.epoch == 1 for at, chunk in log.chunks if at >= before)
        assert any(chunk.epoch == 1 for _, chunk in log.chunks)
        heard = [chunk.samples[0] for at, chunk in log.chunks if chunk.epoch == 1]
        assert heard[0] <= 11  # what the talker had queued is not lost: a lasting stage's edge is not fenced

    run_virtual(main())


@settings(max_examples=60, deadline=None)
@given(
    delays=st.lists(st.sampled_from([0.0, 0.005, 0.01, 0.02, 0.03, 0.07]), min_size=1, max_size=4),
    interrupts=st.lists(st.integers(0, 700), max_size=6),
    items=st.integers(1, 4),
    policy=st.sampled_from(["block", "drop_oldest", "drop_newest"]),
    lease_seconds=st.sampled_from([0.0, 0.01, 0.05]),
)
def test_nothing_of_an_older_epoch_is_emitted_after_an_interruption(
    delays: list[float], interrupts: list[int], items: int, policy: str, lease_seconds: float
) -> None:
    async def main() -> None:
        engine, log, at = FakeEngine(), Played(), {}
        graph = talker(chunks=30) >> answer(seconds=lease_seconds)
        for seconds in delays:
            graph = graph >> Link(items=items, policy=policy) >> work(seconds=seconds)
        tap = graph.nodes[-1]
        graph = (graph >> loudspeaker(log=log)) | (tap >> work())
        async with graph.session(engine=engine) as session:

            async def interrupt() -> None:
                for millisecond in sorted(interrupts):
                    await session.clock.sleep_until(millisecond / 1000)
                    at[session.interrupt()] = session.clock.now()
                    assert all(
                        chunk.epoch == session.epoch
                        for edge in session.edges.values()
                        if not edge.lasting
                        for chunk, _ in edge.items
                    )

            task = asyncio.create_task(interrupt())
            out = [(session.clock.now(), session.epoch, chunk) async for chunk in session.outputs()]
            await task
        for _, epoch, chunk in out:
            assert chunk.epoch == epoch
        for began, chunk in log.chunks:
            assert all(began <= when for epoch, when in at.items() if epoch > chunk.epoch)
        if not interrupts and policy == "block":
            assert len(out) == 60
        assert engine.log == ["open", "close"]

    run_virtual(main())


def test_a_stage_that_interrupts_goes_on_in_the_new_epoch() -> None:
    @stage(name="barge_in", lasting=True)
    async def barge_in(ctx: Context, audio: Input) -> AsyncIterator[Event]:
        async for chunk in audio:
            if chunk.seq == 5:
                ctx.interrupt()
                yield Event("speech_start", rate=chunk.rate, start=chunk.start)

    async def main() -> None:
        async with (talker(chunks=8) >> barge_in() >> work()).session() as session:
            events = [chunk async for chunk in session.outputs()]
            assert [(event.name, event.epoch) for event in events] == [("speech_start", 1)]
            assert session.trace.marks[0].epoch == 1

    run_virtual(main())


def test_the_heard_position_is_what_was_played_when_interrupted() -> None:
    @stage(name="long_speech")
    async def long_speech(ctx: Context) -> AsyncIterator[Audio]:
        for i in range(3):
            yield Audio(np.zeros(16000, np.float32), rate=16000, start=16000 * i)

    async def main() -> None:
        async with (long_speech() >> loudspeaker(log=Played())).session() as session:
            await session.clock.sleep(1.25)
            assert session.heard.seconds == 1.0
            session.interrupt()
            await session.clock.sleep(0)
            await session.clock.sleep(0)
            assert (session.heard.epoch, session.heard.seconds) == (0, 1.25)

    run_virtual(main())


def test_sound_that_is_left_out_was_not_heard_and_is_not_playing() -> None:
    @stage(name="short_speech")
    async def short_speech(ctx: Context) -> AsyncIterator[Audio]:
        yield Audio(np.zeros(16000, np.float32), rate=16000, start=0, final=True)

    async def main() -> None:
        async with short_speech().session() as session:
            await session.clock.sleep(0.1)
            session.report_heard("client", 0, 0.7)
            assert session.playing
            session.report_heard("client", 0, 0.4, 1.0)
            assert session.heard.seconds == 0.4
            assert not session.playing
            session.report_heard("client", 0, 0.9)  # later than what corrected it
            assert session.heard.seconds == 0.4

    run_virtual(main())


@stage
async def picky(ctx: Context, chunks: Input, *, bad: int = 7) -> AsyncIterator[Chunk]:
    await ctx.open("asr")
    async for chunk in chunks:
        if chunk.seq == bad:
            raise ValueError("cannot digest this")
        yield chunk


def no_tasks() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


def test_an_exception_names_stage_and_chunk_and_frees_everything() -> None:
    async def main() -> None:
        engine = FakeEngine()
        graph = talker() >> answer() >> picky().named("digest") >> work(seconds=0.01)
        with pytest.raises(
            StageError, match=r"stage 'digest' failed on Audio seq 7 at 0.060 s: ValueError: cannot digest this"
        ) as caught:
            await graph.session(engine=engine).run()
        assert isinstance(caught.value.__cause__, ValueError)
        assert caught.value.chunk.seq == 7
        assert engine.log == ["open", "open", "close", "close"]
        assert no_tasks()

    run_virtual(main())


def test_the_error_reaches_whoever_reads_the_outputs_after_what_came_before_it() -> None:
    async def main() -> None:
        seen = []

        async def use() -> None:
            async with (talker() >> picky(bad=3).named("digest")).session(engine=FakeEngine()) as session:
                async for chunk in session.outputs():
                    seen.append(chunk.seq)

        with pytest.raises(StageError, match="digest"):
            await use()
        assert seen == [0, 1, 2]

    run_virtual(main())


@pytest.mark.parametrize("after", [0.0, 0.001, 0.13, 0.5])
def test_a_cancelled_session_leaves_no_task_and_no_lease(after: float) -> None:
    async def main() -> None:
        engine = FakeEngine()

        async def use() -> None:
            graph = talker() >> answer() >> (work(seconds=0.03), loudspeaker(log=Played()))
            async with graph.session(engine=engine) as session:
                async for _ in session.outputs():
                    pass

        user = asyncio.create_task(use())
        await asyncio.sleep(after)
        user.cancel()
        with pytest.raises(asyncio.CancelledError):
            await user
        assert no_tasks()
        assert engine.log.count("open") == engine.log.count("close")

    run_virtual(main())


def test_leaving_the_block_early_ends_the_session() -> None:
    async def main() -> Session:
        engine = FakeEngine()
        async with (talker(chunks=10**6) >> answer()).session(engine=engine) as session:
            async for chunk in session.outputs():
                assert chunk.seq == 0
                break
        assert no_tasks()
        assert engine.log == ["open", "close"]
        with pytest.raises(RuntimeError, match="a session runs once"):
            await session.__aenter__()
        return session

    run_virtual(main())


def test_resources_close_in_reverse_order_even_when_one_fails_to() -> None:
    log: list[str] = []

    class Resource:
        def __init__(self, name: str, fails: bool = False) -> None:
            self.name, self.fails = name, fails

        def close(self) -> None:
            log.append(self.name)
            if self.fails:
                raise OSError(f"{self.name} stuck")

    class AsyncResource(Resource):
        async def aclose(self) -> None:
            await asyncio.sleep(0.01)
            log.append(self.name)

    @stage(name="holder")
    async def holder(ctx: Context) -> AsyncIterator[Chunk]:
        ctx.own(Resource("first"))
        ctx.own(Resource("second", fails=True))
        ctx.own(AsyncResource("third"))
        yield Text("x", rate=1)

    async def main() -> None:
        with pytest.raises(OSError, match="second stuck"):
            await holder().session().run()
        assert log == ["third", "second", "first"]
        assert no_tasks()

    run_virtual(main())


def test_a_stale_lease_that_a_stage_does_not_expect_says_what_to_write() -> None:
    @stage(name="forgetful")
    async def forgetful(ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
        lease = await ctx.open("tts")
        async for chunk in audio:
            await lease.step(ctx.epoch)
            yield chunk

    async def main() -> None:
        async with (talker() >> forgetful()).session(engine=FakeEngine()) as session:
            await session.clock.sleep(0.1)
            session.interrupt()
            await session.clock.sleep(1)

    with pytest.raises(StageError, match=r"'forgetful' failed on Audio seq 1 .*with suppress\(Stale\).*lasting"):
        run_virtual(main())


def test_a_helper_task_ends_with_the_session_and_its_failure_ends_it() -> None:
    @stage(name="helped")
    async def helped(ctx: Context, *, fails: bool) -> AsyncIterator[Chunk]:
        async def help() -> None:
            await ctx.sleep(0.05)
            if fails:
                raise KeyError("helper")
            await asyncio.Event().wait()

        ctx.spawn(help())
        for _ in range(10):
            await ctx.sleep(0.02)
            yield Text("x", rate=1)

    async def main() -> None:
        with pytest.raises(StageError, match="'helped' failed: KeyError"):
            await helped(fails=True).session().run()
        async with helped(fails=False).session() as session:
            assert (await anext(aiter(session.outputs()))).text == "x"
        assert no_tasks()

    run_virtual(main())


def test_a_stage_that_needs_an_engine_says_so() -> None:
    with pytest.raises(StageError, match=r"stage 'picky' needs an engine: pass one"):
        run_virtual((talker() >> picky()).session().run())


def test_a_stage_that_yields_something_else_says_so() -> None:
    @stage(name="wrong")
    async def wrong(ctx: Context) -> AsyncIterator[object]:
        yield 3

    with pytest.raises(StageError, match=r"'wrong' failed: TypeError: it yielded 3: yield a chunk"):
        run_virtual(wrong().session().run())


def test_the_trace_times_each_chunk_through_each_stage_and_is_bounded() -> None:
    async def main() -> None:
        session = (talker(chunks=30) >> work(seconds=0.01) >> work()).session(trace=12)
        await session.run()
        spans = session.trace.spans
        assert [span.seq for span in spans if span.stage == "work"] == list(range(18, 30))
        assert len(spans) == 3 * 12
        assert spans == sorted(spans, key=lambda span: span.emitted)
        assert {span.stage for span in spans} == {"talker", "work", "work-2"}
        assert {round(span.latency, 6) for span in spans if span.stage == "work"} == {0.01}
        assert "<svg" in session.trace.draw()

    run_virtual(main())
