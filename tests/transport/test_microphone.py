"""The microphone and the speaker where things fail, fall behind or are interrupted: over a fake PortAudio, on virtual
time. What a real sound server does is in test_virtual_microphone.py."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antiphon.pipelines.chunk import Audio
from antiphon.pipelines.clock import run_virtual
from antiphon.pipelines.session import Session
from antiphon.pipelines.stage import Context, Stage, StageError
from antiphon.transport.devices import DeviceError, find
from antiphon.transport.microphone import STALL, Microphone, Speaker

from .fake_portaudio import FakePortAudio, FakeStream, entry

RATE = 16000


@pytest.fixture
def portaudio(monkeypatch: pytest.MonkeyPatch) -> FakePortAudio:
    fake = FakePortAudio(
        entry("Built-in Microphone", 2, 0), entry("USB Headset", 1, 2), entry("USB Camera", 1, 0),
        entry("Built-in Speaker", 0, 2),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    return fake


def ramp(start: int, count: int) -> np.ndarray:
    """Samples that name their place."""
    return (np.arange(start, start + count) / 1e6).astype(np.float32)


class Saying(Stage):
    """Gives out chunks of 20 ms, one every ``every`` seconds, until it is interrupted."""

    name = "saying"

    def __init__(self, count: int, *, every: float = 0.0, final: bool = True) -> None:
        self.count, self.every, self.final = count, every, final

    async def run(self, ctx: Context) -> AsyncIterator[Audio]:
        for number in range(self.count):
            if ctx.session.epoch:
                return
            last = self.final and number == self.count - 1
            yield Audio(samples=ramp(1 + 320 * number, 320), rate=RATE, start=320 * number, final=last)
            await ctx.sleep(self.every)


async def settle() -> None:
    """Let everything that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


# Finding devices.


@pytest.mark.parametrize(
    ("wanted", "kind", "found"),
    [
        (None, "input", "Built-in Microphone"),
        (None, "output", "USB Headset"),
        (2, "input", "USB Camera"),
        ("2", "input", "USB Camera"),
        ("camera", "input", "USB Camera"),
        ("usb", "output", "USB Headset"),
        ("USB HEADSET", "input", "USB Headset"),
    ],
)
def test_a_device_is_found(portaudio: FakePortAudio, wanted: Any, kind: Any, found: str) -> None:
    assert find(wanted, kind).name == found


def test_a_whole_name_goes_before_a_part(portaudio: FakePortAudio) -> None:
    portaudio.entries = (entry("Microphone Array", 2, 0), entry("Microphone", 1, 0))
    assert find("microphone", "input").index == 1


@pytest.mark.parametrize(
    ("wanted", "kind", "message"),
    [
        ("usb", "input", "'usb' may be 1 'USB Headset' or 2 'USB Camera': give the number or more of the name"),
        ("nothing", "input", "no microphone is called 'nothing' (known: 0 'Built-in Microphone'; 1 'USB Headset'; "),
        (9, "input", "no microphone has number 9 (known: "),
        (2, "output", "no speaker has number 2 (known: 1 'USB Headset'; 3 'Built-in Speaker')"),
    ],
)
def test_what_is_wrong_with_a_name(portaudio: FakePortAudio, wanted: Any, kind: Any, message: str) -> None:
    with pytest.raises(DeviceError) as caught:
        find(wanted, kind)
    assert str(caught.value).startswith(message)


def test_no_device_at_all(portaudio: FakePortAudio) -> None:
    portaudio.entries = (entry("Built-in Speaker", 0, 2),)
    with pytest.raises(DeviceError, match="there is no microphone here: connect one, or start the sound server"):
        find(None, "input")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("raise OSError('PortAudio library not found')", "apt install libportaudio2"),
        ("raise ImportError('no sounddevice')", r"pip install 'antiphon\[mic\]'"),
    ],
)
def test_missing_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, message: str) -> None:
    (tmp_path / "sounddevice.py").write_text(module)
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DeviceError, match=message) as caught:
        find(None, "input")
    assert "\n" not in str(caught.value)


# Opening them.


@pytest.mark.parametrize("stage", [Microphone(device=1, rate=44100), Saying(1) >> Speaker(device=1, rate=44100)])
def test_a_rate_that_the_device_lacks(portaudio: FakePortAudio, stage: Any) -> None:
    message = "'USB Headset' does not take 44100 Hz: use rate 16000 or 24000 or 48000"
    with pytest.raises(StageError, match=message) as caught:
        run_virtual(stage.session().run())
    assert isinstance(caught.value.__cause__, DeviceError)


def test_a_device_in_use(portaudio: FakePortAudio) -> None:
    portaudio.refuses = "Error opening InputStream:\nDevice unavailable [PaErrorCode -9985]"
    with pytest.raises(StageError, match=r"'Built-in Microphone' cannot be opened: Error opening InputStream: Device "):
        run_virtual(Microphone().session().run())


def test_streams_are_closed_with_the_session(portaudio: FakePortAudio) -> None:
    async def leave() -> None:
        async with (Microphone() >> Speaker(device="speaker", rate=RATE)).session():
            await settle()
            assert [stream.running for stream in portaudio.streams] == [True, True]
            assert [stream.device for stream in portaudio.streams] == [0, 3]

    run_virtual(leave())
    assert [stream.closed for stream in portaudio.streams] == [True, True]


# Recording.


def heard(portaudio: FakePortAudio, work: Any) -> tuple[list[Audio], dict[str, int]]:
    """What comes out of a microphone on which ``work(stream)`` acts."""

    async def run() -> tuple[list[Audio], dict[str, int]]:
        chunks: list[Audio] = []
        async with Microphone().session() as session:
            await settle()
            acting = asyncio.create_task(work(portaudio.streams[0]))

            async def read() -> None:
                async for chunk in session.outputs():
                    assert isinstance(chunk, Audio)
                    chunks.append(chunk)

            reading = asyncio.create_task(read())
            await acting
            await settle()
            reading.cancel()
            return chunks, dict(session.counters)

    return run_virtual(run())


def test_media_time_counts_samples(portaudio: FakePortAudio) -> None:
    async def work(stream: FakeStream) -> None:
        for number in range(5):
            stream.hear(ramp(320 * number, 320), overflow=number == 3)
            await asyncio.sleep(0.02)

    chunks, counted = heard(portaudio, work)
    assert [(chunk.start, chunk.rate, chunk.samples.dtype) for chunk in chunks] == [
        (320 * number, RATE, np.dtype(np.float32)) for number in range(5)
    ]
    np.testing.assert_array_equal(np.concatenate([chunk.samples for chunk in chunks]), ramp(0, 1600))
    assert counted == {"microphone.xruns": 1}


def test_a_busy_loop_loses_the_oldest_and_knows_how_much(portaudio: FakePortAudio) -> None:
    kept = 50  # the second that waits

    async def work(stream: FakeStream) -> None:
        stream.hear(ramp(0, 320))
        await settle()
        for number in range(1, kept + 8):  # the loop is busy with this
            stream.hear(ramp(320 * number, 320))
        await asyncio.sleep(0.1)

    chunks, counted = heard(portaudio, work)
    assert counted == {"microphone.dropped": 7 * 320}
    assert [chunk.start for chunk in chunks] == [0, *(320 * number for number in range(8, kept + 8))]
    np.testing.assert_array_equal(chunks[1].samples, ramp(8 * 320, 320))


def unplugged(work: Any) -> None:
    async def run() -> None:
        async with Microphone().session() as session:
            await settle()
            await work()
            await session.run()

    run_virtual(run())


def test_a_device_that_stops(portaudio: FakePortAudio) -> None:
    async def work() -> None:
        portaudio.streams[0].hear(ramp(0, 320))
        portaudio.streams[0].finished()

    with pytest.raises(StageError, match="'Built-in Microphone' has stopped: connect it again"):
        unplugged(work)


def test_a_device_that_falls_silent(portaudio: FakePortAudio) -> None:
    async def work() -> None:
        portaudio.streams[0].hear(ramp(0, 320))

    with pytest.raises(StageError, match=f"'Built-in Microphone' has given no sign of life for {STALL:g} s"):
        unplugged(work)


def test_a_busy_loop_is_not_a_device_that_is_gone(portaudio: FakePortAudio) -> None:
    """The loop stands still for longer than a device may: what the device gave meanwhile is there."""

    async def run() -> list[int]:
        async with Microphone().session() as session:
            await settle()
            loop, (stream,) = asyncio.get_running_loop(), portaudio.streams

            def stand_still() -> None:
                loop._now += STALL + 1  # type: ignore[attr-defined]
                stream.hear(ramp(0, 320))

            loop.call_later(0.5, stand_still)
            async for chunk in session.outputs():
                return [chunk.start]
        return []

    assert run_virtual(run()) == [0]


# Playing.


def playing(portaudio: FakePortAudio, graph: Any, work: Any = None) -> tuple[np.ndarray, dict[str, int], Session]:
    """Run the graph to its end on a device that plays at its own pace; returns what it played."""

    async def run() -> tuple[np.ndarray, dict[str, int], Session]:
        async with graph.session() as session:
            await settle()
            (stream,) = portaudio.streams
            device = asyncio.create_task(stream.run())
            if work is not None:
                await work(session, stream)
            await session.run()
            await device
            return np.concatenate(stream.played), dict(session.counters), session

    return run_virtual(run())


def test_what_is_played_is_what_was_sent_at_the_pace_of_the_device(portaudio: FakePortAudio) -> None:
    ended = 0.0

    async def work(session: Session, stream: FakeStream) -> None:
        nonlocal ended
        await session.run()
        ended = session.clock.now()

    sound, counted, session = playing(portaudio, Saying(20) >> Speaker(), work)
    begin = int(np.flatnonzero(sound)[0])
    np.testing.assert_array_equal(sound[begin : begin + 6400], ramp(1, 6400))
    assert not np.any(sound[begin + 6400 :])
    assert counted == {}
    assert session.heard is not None
    assert session.heard.seconds == pytest.approx(0.4)
    assert ended == pytest.approx(0.4 + 0.03, abs=0.011)  # the device's latency, and a block


def test_the_heard_position_is_what_has_left_the_device(portaudio: FakePortAudio) -> None:
    async def work(session: Session, stream: FakeStream) -> None:
        for _ in range(12):
            await asyncio.sleep(0.01)
            gone = session.clock.now() - stream.latency
            reported = 0.0 if session.heard is None else session.heard.seconds
            assert gone - 0.021 <= reported <= max(gone, 0.0) + 1e-6  # told in blocks of 10 ms, when the next is taken

    playing(portaudio, Saying(20) >> Speaker(latency_ms=50), work)


def test_the_lead_is_bounded(portaudio: FakePortAudio) -> None:
    """What waits is never more than the lead and the chunk that reached it."""

    async def sent() -> int:
        async with (Saying(1000) >> Speaker(lead_ms=60)).session() as session:
            await settle()
            assert portaudio.streams
            edge = session.stats()["saying -> speaker"]
            return edge.passed

    assert run_virtual(sent()) <= 5  # 60 ms, the chunk that passes it and the one that waits


def test_an_interruption_empties_the_lead_and_fades(portaudio: FakePortAudio) -> None:
    silent_from = 0

    async def work(session: Session, stream: FakeStream) -> None:
        nonlocal silent_from
        await asyncio.sleep(0.1)
        session.interrupt()
        silent_from = sum(map(len, stream.played)) + RATE // 200

    sound, counted, session = playing(portaudio, Saying(1000) >> Speaker(), work)
    assert not np.any(sound[silent_from:])
    fading = sound[silent_from - RATE // 200 : silent_from]
    begin = int(np.flatnonzero(sound)[0])
    whole = ramp(1, silent_from)[silent_from - RATE // 200 - begin : silent_from - begin]
    np.testing.assert_allclose(fading, whole * np.linspace(1, 0, len(whole)), atol=1e-8)
    assert counted["speaker.flushed"] >= RATE * 0.04
    assert session.heard is not None
    assert session.heard.seconds == pytest.approx((silent_from - begin) / RATE, abs=0.001)


def test_audio_that_comes_late_is_counted(portaudio: FakePortAudio) -> None:
    _, counted, _ = playing(portaudio, Saying(3, every=0.05) >> Speaker())
    assert counted == {"speaker.dry": 2}


def test_a_reference_holds_all_the_device_was_given(portaudio: FakePortAudio) -> None:
    async def run() -> tuple[np.ndarray, np.ndarray]:
        async with (Saying(10) >> Speaker(rate=RATE, reference=True)).session() as session:
            await settle()
            (stream,) = portaudio.streams
            device = asyncio.create_task(stream.run())
            given = [chunk async for chunk in session.outputs("speaker")]
            await device
            assert [chunk.start for chunk in given] == [160 * number for number in range(len(given))]
            assert all(isinstance(chunk, Audio) for chunk in given)
            return np.concatenate([chunk.samples for chunk in given]), np.concatenate(stream.played)  # type: ignore[attr-defined]

    given, played = run_virtual(run())
    assert len(given) > 3200
    np.testing.assert_array_equal(given, played[: len(given)])


def test_a_rate_that_changes_is_refused(portaudio: FakePortAudio) -> None:
    message = "the speaker is open at 24000 Hz, got 16000 Hz; resample it"
    with pytest.raises(StageError, match=message):
        run_virtual((Saying(1) >> Speaker(rate=24000)).session().run())


def test_nothing_to_say_opens_no_device(portaudio: FakePortAudio) -> None:
    work: Coroutine[Any, Any, None] = (Saying(0) >> Speaker()).session().run()
    run_virtual(work)
    assert portaudio.streams == []
