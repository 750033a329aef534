"""Sound to a peer: what a decoder gets from it, when, and what the call is told was heard. On virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
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
from antiphon.transport.webrtc.sender import FRAME, LEAD, MOST, AudioSender

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


def test_sound_that_runs_out_is_counted_and_waits_for_a_lead() -> None:
    async def main() -> None:
        reports: list[float] = []
        sender = AudioSender(lambda epoch, seconds: reports.append(seconds))
        peer = Peer(sender)
        await sender.write(SPEECH[:480], 24000, 0, 0.0)
        await peer.take(1)
        assert reports == []
        await sender.write(SPEECH[480:960], 24000, 0, 0.02)
        assert sender.queued == pytest.approx(LEAD)
        await peer.take(3)
        assert reports == pytest.approx([0.02, 0.04])
        assert sender.gaps == 1

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
