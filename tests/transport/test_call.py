"""Calls and the service: numbered items, coming back, taking over, limits. On the virtual clock."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress

import numpy as np
import pytest

from antiphon.pipelines.chunk import Audio, Chunk, Event
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.engine import AtCapacity
from antiphon.pipelines.graph import Graph
from antiphon.pipelines.stage import Context, Inlet, Input, StageError, stage
from antiphon.pipelines.stages.emit import emit
from antiphon.transport.call import KEPT_ITEMS, UNREAD_ITEMS, Call, ItemsLost, NoInlet, TakenOver
from antiphon.transport.service import ConnectionLost, Full, NoSuchCall, Service
from antiphon.transport.tokens import BadToken, Signer

BLOCK = np.zeros(160, np.float32)


@stage(name="call_test_number")
async def number(ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
    """An event for each chunk of sound, numbered from 0."""
    count = 0
    async for chunk in audio:
        yield Event(name="n", data={"n": count}, rate=chunk.rate, start=chunk.start)
        count += 1


@stage(name="call_test_reply")
async def reply(ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
    """Sound straight back, as a reply that an interruption ends."""
    async for chunk in audio:
        yield Audio(samples=chunk.samples, rate=chunk.rate, start=chunk.start)


@stage(name="call_test_input", lasting=True)
async def echo_of_input(ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
    """Something about the input, that an interruption does not end."""
    async for chunk in audio:
        yield Audio(samples=chunk.samples, rate=chunk.rate, start=chunk.start)


@stage(name="call_test_full")
async def full(ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
    """Leases from an engine that is full."""
    await ctx.open("asr")
    async for chunk in audio:
        yield chunk


@stage(name="call_test_broken")
async def broken(ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
    """Fails on the first chunk."""
    async for chunk in audio:
        raise OverflowError(str(chunk))
        yield chunk


class FullEngine:
    """An engine without room."""

    async def open(self, name: str) -> None:
        raise AtCapacity("no room", 1.0, 7.0)


def numbering(options: object = None) -> Graph:
    return Inlet().named("audio") >> number()


def service(**options: object) -> Service:
    return Service(numbering, None, **options)  # type: ignore[arg-type]


async def numbers(call: Call, count: int, after: int | None = None) -> list[int]:
    found: list[int] = []
    async for item in call.items(after):
        found.append(item.chunk.data["n"])
        if len(found) == count:
            break
    return found


async def lose(host: Service, count: int) -> tuple[Call, str]:
    """A call whose client goes away after so many items; and its token."""
    with suppress(ConnectionLost):
        async with host.connect() as call:
            for _ in range(count):
                await call.hear(BLOCK, 16000)
            if count:
                await numbers(call, count)
            raise ConnectionLost("gone")
    return call, host.resume_token(call)


def test_items_are_numbered_from_one_and_end_with_the_call() -> None:
    async def main() -> None:
        async with service().connect() as call:
            for _ in range(5):
                await call.hear(BLOCK, 16000)
            call.finish()
            items = [item async for item in call.items()]
            assert [item.id for item in items] == [1, 2, 3, 4, 5]
            assert [item.chunk.start for item in items] == [0, 160, 320, 480, 640]
            assert call.received == 800

    run_virtual(main())


@pytest.mark.parametrize("seen", [0, 3, 5, 9])
def test_a_client_that_comes_back_gets_what_it_missed_once(seen: int) -> None:
    async def main() -> None:
        host = service()
        call, token = await lose(host, 9)
        await asyncio.sleep(host.keep - 1)
        async with host.connect(resume=token) as again:
            assert again is call
            assert again.received == 9 * 160
            await again.hear(BLOCK, 16000)
            again.finish()
            assert [item.id async for item in again.items(after=seen)] == list(range(seen + 1, 11))
        assert host.counts == {"opened": 1, "kept": 1, "resumed": 1, "ended": 1}
        assert not host.calls

    run_virtual(main())


def test_a_call_that_nobody_resumes_ends() -> None:
    async def main() -> None:
        host = service(keep=30.0)
        _, token = await lose(host, 0)
        await asyncio.sleep(29)
        assert host.calls
        await asyncio.sleep(2)
        assert not host.calls
        assert host.counts["expired"] == 1
        with pytest.raises(NoSuchCall, match="start a new one"):
            async with host.connect(resume=token):
                pass

    run_virtual(main())


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("seen", [0, 3, 6])
def test_the_last_items_of_a_call_that_has_ended_are_kept_for_its_client(seen: int, cut: bool) -> None:
    """It may not have got them, though they were sent and the call closed in the normal way."""

    async def main() -> None:
        host = service(max_calls=1)
        with suppress(ConnectionLost):
            async with host.connect() as call:
                token = host.resume_token(call)
                for _ in range(6):
                    await call.hear(BLOCK, 16000)
                call.finish()
                assert [item.id async for item in call.items()] == [1, 2, 3, 4, 5, 6]
                if cut:
                    raise ConnectionLost("gone")
        assert not host.calls  # its place is free at once
        for _ in range(2):  # it may be cut again
            await asyncio.sleep(host.keep - 1)
            async with host.connect(resume=token) as again:
                await again.hear(BLOCK, 16000)  # changes nothing
                assert [item.id async for item in again.items(after=seen)] == list(range(seen + 1, 7))
        await asyncio.sleep(host.keep + 1)
        with pytest.raises(NoSuchCall):
            async with host.connect(resume=token):
                pass
        assert host.counts == {"opened": 1, "ended": 1, "resumed": 2}

    run_virtual(main())


def test_a_call_that_ends_while_it_is_kept_takes_no_place_and_can_be_read_to_its_end() -> None:
    async def main() -> None:
        host = service(max_calls=1)
        with suppress(ConnectionLost):
            async with host.connect() as call:
                token = host.resume_token(call)
                await call.hear(BLOCK, 16000)
                call.finish()
                raise ConnectionLost("gone")
        await asyncio.sleep(1)
        async with host.connect(), host.connect(resume=token) as again:
            assert [item.id async for item in again.items(after=0)] == [1]
        assert not host.calls

    run_virtual(main())


def test_no_more_ended_calls_are_kept_than_may_run_and_none_without_a_token() -> None:
    async def main() -> None:
        host = service(max_calls=2)
        tokens = []
        for number in range(5):
            async with host.connect() as call:
                if number != 4:
                    tokens.append(host.resume_token(call))
                call.finish()
                assert not [item async for item in call.items()]
        assert host.ended == 2
        for token in tokens[:2]:
            with pytest.raises(NoSuchCall):
                async with host.connect(resume=token):
                    pass
        for token in tokens[2:]:
            async with host.connect(resume=token):
                pass
        await host.close()
        assert host.ended == 0
        assert not host._expiry

    run_virtual(main())


def test_a_second_connection_takes_over_and_the_call_lives_until_the_last_leaves() -> None:
    async def main() -> None:
        host = service()
        async with host.connect() as call:
            token = host.resume_token(call)

            async def first() -> None:
                async for _ in call.items():
                    pass

            reading = asyncio.create_task(first())
            await asyncio.sleep(0)
            async with host.connect(resume=token) as again:
                await again.hear(BLOCK, 16000)
                assert await numbers(again, 1) == [0]
                with pytest.raises(TakenOver):
                    await reading
            assert host.calls
        assert not host.calls

    run_virtual(main())


def test_what_is_no_longer_kept_cannot_be_asked_for() -> None:
    async def main() -> None:
        async with service().connect() as call:

            async def feed() -> None:
                for _ in range(KEPT_ITEMS + 100):
                    await call.hear(BLOCK, 16000)

            feeding = asyncio.create_task(feed())
            await numbers(call, KEPT_ITEMS + 100)
            await feeding
            with pytest.raises(ItemsLost, match="keeps items 101 to"):
                await numbers(call, 1, after=50)
            with pytest.raises(ItemsLost):
                await numbers(call, 1, after=KEPT_ITEMS + 101)
            assert (await numbers(call, 1, after=100)) == [100]

    run_virtual(main())


def test_a_client_that_does_not_read_makes_the_sound_wait_and_memory_stays_bounded() -> None:
    async def main() -> None:
        async with service().connect() as call:
            sent = 0

            async def feed() -> None:
                nonlocal sent
                while True:
                    await call.hear(BLOCK, 16000)
                    sent += 1

            feeding = asyncio.create_task(feed())
            await asyncio.sleep(600)
            held = sent
            await asyncio.sleep(600)
            assert sent == held < UNREAD_ITEMS + 300  # with what the edges hold
            assert await numbers(call, UNREAD_ITEMS) == list(range(UNREAD_ITEMS))
            await asyncio.sleep(1)
            assert sent > held
            feeding.cancel()

    run_virtual(main())


def test_an_interruption_leaves_out_old_sound_and_says_what_was_heard() -> None:
    async def main() -> None:
        host = Service(lambda options: Inlet().named("audio") >> reply(), None)
        async with host.connect() as call:
            for _ in range(3):
                await call.hear(BLOCK, 16000)
            await asyncio.sleep(1)
            call.played(0, 0.01)
            epoch = call.interrupt()
            await call.hear(BLOCK, 16000)
            call.finish()
            chunks = [item.chunk async for item in call.items()]
            assert [type(chunk).__name__ for chunk in chunks] == ["Event", "Audio"]
            assert chunks[0].data == {"epoch": epoch, "heard_seconds": 0.01, "heard_epoch": 0}
            assert chunks[1].epoch == epoch

    run_virtual(main())


def test_no_more_calls_than_there_is_room_for() -> None:
    async def main() -> None:
        host = service(max_calls=1)
        async with host.connect():
            with pytest.raises(Full, match="1 calls are running"):
                async with host.connect():
                    pass
        async with host.connect():
            pass
        assert host.counts == {"opened": 2, "ended": 2, "refused": 1}
        await host.close()
        with pytest.raises(Full, match="shutting down"):
            async with host.connect():
                pass

    run_virtual(main())


def test_a_full_engine_refuses_the_call_with_its_waiting_time() -> None:
    async def main() -> None:
        host = Service(lambda options: Inlet().named("audio") >> full(), FullEngine())
        with pytest.raises(Full) as refused:
            async with host.connect():
                pass
        assert refused.value.wait == 7.0
        assert not host.calls

    run_virtual(main())


def test_a_control_event_is_never_later_than_the_sound_before_it() -> None:
    async def main() -> None:
        def graph(options: object) -> Graph:
            return (Inlet().named("audio") >> number()) | (Inlet().named("control") >> emit())

        for samples, rate in ((100, 24000), (1, 44100), (7, 48000)):  # 66.7, 0.4 and 2.3 samples at 16 kHz
            async with Service(graph, None).connect() as call:
                await call.hear(np.zeros(samples, np.float32), rate)
                await call.tell("commit")
                told = await anext(item.chunk async for item in call.items() if item.chunk.name == "commit")
                assert 0 <= call.heard_seconds - told.start_seconds < 1 / 16000

    run_virtual(main())


def test_a_failing_stage_reaches_the_reader(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        host = Service(lambda options: Inlet().named("audio") >> broken(), None)
        async with host.connect() as call:
            await call.hear(BLOCK, 16000)
            with pytest.raises(StageError, match="call_test_broken"):
                await numbers(call, 1)
        assert host.counts["failed"] == 1
        assert "'call_test_broken' failed" in caplog.text

    run_virtual(main())


def test_limits_and_inputs_that_the_graph_has_not() -> None:
    async def main() -> None:
        async with service(max_seconds=0.02).connect() as call:
            with pytest.raises(NoInlet, match="control"):
                await call.tell("commit")
            assert not call.takes("video")
            for _ in range(5):
                await call.hear(BLOCK, 16000)
            names = [item.chunk.name async for item in call.items()]
            assert sorted(names) == ["limit", "n", "n"]
            with pytest.raises(ValueError, match="keeps its first rate"):
                await call.hear(BLOCK, 8000)

    run_virtual(main())


def test_what_connections_count_is_added_up_and_never_falls() -> None:
    host = service()
    seen: Counter[str] = Counter()
    with host.metered(lambda: {("datagrams", name): count for name, count in seen.items()}):
        seen.update(good=2, bad=1)
        with host.metered(lambda: {("datagrams", "good"): 5}):
            assert host.measured == {("datagrams", "good"): 7, ("datagrams", "bad"): 1}
        assert host.measured == {("datagrams", "good"): 7, ("datagrams", "bad"): 1}
        seen.update(good=1)
    assert host.measured == {("datagrams", "good"): 8, ("datagrams", "bad"): 1}


def test_tokens() -> None:
    signer = Signer()
    token = signer.issue("resume", "abc", 5)
    assert signer.check("resume", token) == "abc"
    for other, purpose in ((Signer(), "resume"), (signer, "join")):
        with pytest.raises(BadToken) as error:
            other.check(purpose, token)
        assert token not in str(error.value)
    with pytest.raises(BadToken, match="expired"):
        signer.check("resume", signer.issue("resume", "abc", -1))
    with pytest.raises(BadToken):
        signer.check("resume", token[:-2] + "xx")
    with pytest.raises(BadToken):
        signer.check("resume", "")
    with pytest.raises(ValueError, match="32 or more"):
        Signer("short")


def test_items_name_their_output_and_the_call_knows_which_outputs_are_replies() -> None:
    def graph(options: object) -> Graph:
        audio = Inlet().named("audio")
        return (audio >> echo_of_input().named("captions")) | (audio >> reply().named("reply"))

    async def main() -> None:
        async with Service(graph, None).connect() as call:
            await call.hear(BLOCK, 16000)
            call.finish()
            kinds = {item.source: type(item.chunk) async for item in call.items()}
            assert kinds == {"captions": Audio, "reply": Audio}
            assert call.replies == {"reply"}

    run_virtual(main())
