"""Sound to a peer: what a decoder gets from it, when, and what the call is told was heard. On virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiortc.mediastreams import MediaStreamError
from hypothesis import given, settings
from hypothesis import strategies as st

import antiphon
from antiphon.codecs import opus
from antiphon.codecs.audio_file import read
from antiphon.pipelines.clock import run_virtual
from antiphon.transport.webrtc.pacing import FRAME, LEAD_STEP, LONGEST_LEAD, PATIENCE
from antiphon.transport.webrtc.sender import MOST, AudioSender

CLIP = Path(antiphon.__file__).parent / "apps" / "samples" / "two_cities.flac"
SPEECH = read(CLIP, 24000)[: 24000 * 3]


class Peer:
    """Takes packets as aiortc does, and decodes them."""

    def __init__(self, sender: AudioSender) -> None:
        self.sender, self.decoder = sender, opus.decoder(24000)
        self.times: list[float] = []
        self.pts: list[int] = []
        self.sizes: list[int] = []
        self.sound: list[np.ndarray] = []

    async def take(self, count: int) -> np.ndarray:
        for _ in range(count):
            packet = await self.sender.recv()
            self.times.append(asyncio.get_running_loop().time())
            self.pts.append(packet.pts)
            self.sizes.append(packet.size)
            self.sound.append(self.decoder.decode(bytes(packet)))
        return np.concatenate(self.sound)


def on_virtual_time(main: Coroutine[Any, Any, None]) -> None:
    run_virtual(main)


def correlation(heard: np.ndarray, said: np.ndarray) -> float:
    size = 1 << 18
    products = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(said, size)))
    return float(products.max() / (np.linalg.norm(heard) * np.linalg.norm(said)))


def test_packets_leave_every_20_ms_and_decode_to_what_was_said() -> None:
    async def main() -> None:
        reports: list[tuple[int, float]] = []
        sender = AudioSender(lambda epoch, seconds: reports.append((epoch, seconds)))
        for i in range(0, len(SPEECH), 1000):
            await sender.write(SPEECH[i : i + 1000], 24000, 0, 5 + i / 24000)
        await sender.write(SPEECH[:0], 24000, 0, 5 + len(SPEECH) / 24000, final=True)
        peer = Peer(sender)
        heard = await peer.take(200)
        assert np.diff(peer.times) == pytest.approx(0.02)
        assert set(np.diff(peer.pts)) == {960}
        assert correlation(heard, SPEECH) > 0.9
        assert len(reports) == 150
        assert reports[0] == (0, pytest.approx(5.02))
        assert reports[-1] == (0, pytest.approx(8.0))
        assert all(left[1] < right[1] for left, right in pairwise(reports))
        assert sender.queued == sender.gaps == sender.dropped == 0
        assert np.abs(heard[-24000 // 2 :]).max() < 1e-3

    on_virtual_time(main())


def test_what_follows_a_long_silence_is_as_clear_as_what_was_said_first() -> None:
    async def main() -> None:
        sender = AudioSender(lambda epoch, seconds: None)
        peer = Peer(sender)
        await peer.take(300)
        assert peer.sizes[60:] == [peer.sizes[60]] * 240
        await sender.write(SPEECH, 24000, 0, 0.0, final=True)
        heard = await peer.take(160)
        assert correlation(heard, SPEECH) > 0.9

    on_virtual_time(main())


def test_other_rates_are_resampled_and_the_end_is_reported_exactly() -> None:
    async def main() -> None:
        reports: list[tuple[int, float]] = []
        sender = AudioSender(lambda epoch, seconds: reports.append((epoch, seconds)))
        at16 = read(CLIP, 16000)[:48000]
        for i in range(0, 48000, 160):
            await sender.write(at16[i : i + 160], 16000, 0, i / 16000, final=i == 47840)
        heard = await Peer(sender).take(160)
        assert correlation(heard, SPEECH) > 0.9
        assert reports[-1] == (0, 3.0)

    on_virtual_time(main())


def test_an_empty_final_chunk_says_that_everything_was_heard() -> None:
    async def main() -> None:
        reports: list[tuple[int, float]] = []
        sender = AudioSender(lambda epoch, seconds: reports.append((epoch, seconds)))
        await sender.write(np.zeros(0, np.float32), 16000, 3, 2.5, final=True)
        await Peer(sender).take(2)
        assert reports == [(3, 2.5)]
        await asyncio.wait_for(sender.drained(), 0.1)

    on_virtual_time(main())


def test_an_interruption_is_silent_from_the_next_packet_and_frees_the_writer() -> None:
    async def main() -> None:
        epoch = 0
        reports: list[tuple[int, float]] = []
        sender = AudioSender(lambda epoch, seconds: reports.append((epoch, seconds)), epoch=lambda: epoch)
        peer = Peer(sender)
        tone = np.sin(np.arange(24000 * 12) / 10).astype(np.float32) * 0.3
        await sender.write(tone, 24000, 0, 0.0)
        waiting = asyncio.create_task(sender.write(tone[:480], 24000, 0, 12.0))
        await peer.take(10)
        assert not waiting.done()
        epoch = 1
        heard = await peer.take(12)
        await asyncio.wait_for(waiting, 0.1)
        assert len(reports) == 10
        assert np.abs(heard[-4800:]).max() < 0.01
        assert sender.queued == 0
        assert sender.dropped == 24000 * 12 - 10 * 480 + 480
        await sender.write(tone[:480], 24000, 0, 12.02)
        assert sender.queued == 0
        await sender.write(tone[:4800], 24000, 1, 0.0)
        await peer.take(1)
        assert reports[-1] == (1, pytest.approx(0.02))

    on_virtual_time(main())


def test_a_writer_waits_while_ten_seconds_are_queued() -> None:
    async def main() -> None:
        sender = AudioSender(lambda epoch, seconds: None)
        second = np.zeros(24000, np.float32)

        async def write() -> None:
            for i in range(30):
                await sender.write(second, 24000, 0, float(i))

        writing = asyncio.create_task(write())
        await asyncio.sleep(1)
        assert MOST < sender.queued <= MOST + 1
        await Peer(sender).take(30 * 50)
        assert writing.done()

    on_virtual_time(main())


class Live:
    """A sender to which sound is written as it is made, ``pieces`` of seconds and samples, while a peer takes it."""

    def __init__(self, pieces: list[tuple[float, int]], seconds: float, *, lead: float = 0.0) -> None:
        self.heard: list[tuple[float, float]] = []  # clock time, media time
        run_virtual(self._run(pieces, seconds, lead))

    async def _run(self, pieces: list[tuple[float, int]], seconds: float, lead: float) -> None:
        now = asyncio.get_running_loop().time
        self.sender = AudioSender(lambda epoch, at: self.heard.append((now(), at)), lead=lead)
        self.frames: list[np.ndarray] = []
        encode = self.sender.encoder.encode
        self.sender.encoder.encode = lambda frame: self.frames.append(frame) or encode(frame)
        self.peer = Peer(self.sender)
        taking = asyncio.create_task(self.peer.take(1 << 30))
        at = 0
        for when, count in pieces:
            await asyncio.sleep(when - now())
            await self.sender.write(TONE[at : at + count], 24000, 0, at / 24000)
            at += count
        await asyncio.sleep(seconds - now())
        taking.cancel()
        self.delays = [1000 * (when - media) for when, media in self.heard]


TONE = np.sin(np.arange(24000 * 60) / 10).astype(np.float32) * 0.3
BEGIN = 0.113  # seconds: between two packets of silence


def live(seconds: float, wait: Callable[[int], float] = lambda number: 0.0) -> list[tuple[float, int]]:
    """Pieces of 20 ms, each complete 20 ms after the last, and then on its way for ``wait``."""
    return [(BEGIN + number * FRAME + wait(number), 480) for number in range(round(seconds / FRAME))]


def test_sound_leaves_the_moment_it_is_there() -> None:
    run = Live(live(3), 3)
    assert run.delays == pytest.approx([1000 * (BEGIN - FRAME)] * len(run.delays), abs=0.01)
    assert set(np.diff(run.peer.pts)) == {960}
    assert (run.sender.gaps, run.sender.pace.late) == (0, 0)


def test_a_little_that_a_resampler_keeps_back_does_not_cost_a_frame() -> None:
    pieces = live(3)
    pieces[0] = pieces[0][0], 456
    run = Live(pieces, 3)
    assert max(run.delays) < 1000 * (BEGIN - FRAME) + 1.1
    said = np.concatenate([frame for frame in run.frames if frame.any()])
    assert not said[:24].any()  # the silence that was lacking comes first
    assert np.array_equal(said[24:], TONE[: len(said) - 24])


def test_sound_that_comes_late_keeps_its_place_and_what_follows_catches_up() -> None:
    run = Live(live(3, lambda number: PATIENCE - 0.005 if number == 60 else 0.0), 3)
    assert set(np.diff(run.peer.pts)) == {960}
    usual = 1000 * (BEGIN - FRAME)
    assert [round(delay - usual) for delay in run.delays[58:65]] == [0, 0, 55, 35, 15, 0, 0]
    assert (run.sender.gaps, run.sender.pace.late, run.sender.pace.lead) == (0, 3, 0)


def test_sound_that_stays_away_is_a_gap_and_teaches_a_lead() -> None:
    hole = live(1), [(when + 0.3, count) for when, count in live(12)]
    run = Live([*hole[0], *((when + 1, count) for when, count in hole[1])], 13.4)
    assert run.sender.gaps == 1
    apart = np.diff(run.peer.times)
    assert apart.max() == pytest.approx(FRAME + PATIENCE)
    assert sum(np.abs(sound).max() < 0.01 for sound in run.peer.sound[55:75]) >= 8
    spread = [tick / 960 * FRAME - when for tick, when in zip(run.peer.pts, run.peer.times, strict=True)]
    assert max(spread) - min(spread) < PATIENCE + FRAME  # media time goes on with the clock
    resumed = [delay - run.delays[0] for delay in run.delays[50:]]
    assert resumed[0] == pytest.approx(1000 * (0.3 + LEAD_STEP), abs=1)
    assert resumed[-1] == pytest.approx(1000 * (0.3 + LEAD_STEP / 2), abs=3)  # given back while it is quiet
    assert run.sender.pace.lead == pytest.approx(LEAD_STEP / 2)


def test_gaps_teach_no_more_than_the_longest_lead() -> None:
    pieces = [(number * 0.5, 480 * 5) for number in range(40)]
    run = Live(pieces, 20)
    assert run.sender.gaps > 30
    assert run.sender.pace.lead == LONGEST_LEAD


def test_what_waits_for_no_reason_is_worked_off() -> None:
    burst = [(BEGIN, 480 * 3), *live(20)[1:]]  # 40 ms more than were heard in time
    run = Live(burst, 20)
    assert run.delays[3] == pytest.approx(1000 * (BEGIN - FRAME + 0.02), abs=21)
    assert run.delays[-1] == pytest.approx(1000 * (BEGIN - FRAME - 0.04), abs=2.1)
    assert run.sender.gaps == 0


def test_sound_made_ahead_is_sent_in_real_time() -> None:
    run = Live([(BEGIN + number * 0.06, 1920) for number in range(100)], 6)  # 80 ms each 60 ms
    took = run.heard[-1][0] - run.heard[0][0]
    assert took == pytest.approx(run.heard[-1][1] - run.heard[0][1], abs=2 * FRAME)
    assert run.sender.gaps == 0


def test_what_began_early_is_made_up_for_in_the_silence_after_it() -> None:
    async def main() -> None:
        sender = AudioSender(lambda epoch, seconds: None)
        peer = Peer(sender)
        taking = asyncio.create_task(peer.take(1 << 30))
        for number in range(40):
            await asyncio.sleep(0.213)
            await sender.write(TONE[:960], 24000, 0, float(number), final=True)
        await asyncio.sleep(0.5)
        taking.cancel()
        ahead = [tick / 48000 - (when - peer.times[0]) for tick, when in zip(peer.pts, peer.times, strict=True)]
        assert max(ahead) <= FRAME
        assert ahead[-1] == pytest.approx(0, abs=1e-3)
        assert len({round(one, 3) for one in ahead}) > 2  # the control: some did begin early

    on_virtual_time(main())


def test_a_sender_that_was_held_up_goes_on_from_now() -> None:
    async def main() -> None:
        peer = Peer(AudioSender(lambda epoch, seconds: None))
        await peer.take(2)
        await asyncio.sleep(1.0)
        await peer.take(2)
        assert peer.times[3] - peer.times[2] == pytest.approx(FRAME)
        assert peer.pts[2] - peer.pts[1] == pytest.approx(50 * 960, abs=960)

    on_virtual_time(main())


def test_after_the_end_nothing_is_sent_and_nobody_waits() -> None:
    async def main() -> None:
        sender = AudioSender(lambda epoch, seconds: None)
        await sender.write(np.zeros(24000 * 11, np.float32), 24000, 0, 0.0)
        waiting = [
            asyncio.create_task(sender.write(SPEECH[:480], 24000, 0, 11.0)),
            asyncio.create_task(sender.drained()),
        ]
        await asyncio.sleep(0)
        sender.stop()
        await asyncio.wait_for(asyncio.gather(*waiting), 0.1)
        with pytest.raises(MediaStreamError):
            await sender.recv()

    on_virtual_time(main())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2000), st.sampled_from([8000, 16000, 24000, 44100]), st.booleans(), st.booleans()),
        max_size=12,
    )
)
def test_every_sample_is_queued_sent_or_dropped(writes: list[tuple[int, int, bool, bool]]) -> None:
    async def main() -> None:
        reports: list[tuple[int, float]] = []
        sender = AudioSender(lambda epoch, seconds: reports.append((epoch, seconds)))
        peer, epoch, at = Peer(sender), 0, 0.0
        for count, rate, final, interrupt in writes:
            if interrupt:
                epoch, at = epoch + 1, 0.0
            await sender.write(np.zeros(count, np.float32), rate, epoch, at, final)
            at += count / rate
            await peer.take(1)
        await sender.write(np.zeros(0, np.float32), 24000, epoch, at, True)
        await peer.take(60 + len(writes) * 6)
        assert sender.queued == 0
        assert reports[-1] == (epoch, pytest.approx(at))
        assert reports == sorted(reports)

    on_virtual_time(main())
