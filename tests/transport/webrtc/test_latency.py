"""From mouth to ear on virtual time: a peer's packets through receiver, graph and sender, into a peer's loudspeaker."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import pytest
from aiortc.rtp import RtpPacket

from antiphon.apps.bench.transport_peers import RATE, SENT_RATE, chirps, echo, encoded, lags
from antiphon.pipelines.chunk import Audio
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.transport.call import Call
from antiphon.transport.webrtc.pacing import Alarm
from antiphon.transport.webrtc.receiver import AudioReceiver
from antiphon.transport.webrtc.sender import AudioSender

SECONDS, WARM_UP = 12, 4
TRIP, FRAME, LOOKAHEAD_MS = 0.0005, 0.02, 6.5  # seconds over loopback; of a packet; of libopus
HOPS = 5  # turns of the event loop from a datagram to the playout buffer
Wait = Callable[[int], float]  # of a packet


def rtp(number: int, ticks: int, payload: bytes) -> RtpPacket:
    packet = RtpPacket(payload_type=96, sequence_number=number & 0xFFFF, timestamp=ticks & 0xFFFFFFFF, ssrc=1)
    packet.payload = payload
    return packet


def later(loop: asyncio.AbstractEventLoop, hops: int, call: Callable[[], None]) -> None:
    """As many turns of the loop later."""
    loop.call_soon(later, loop, hops - 1, call) if hops else call()


class EchoCall:
    """A peer says chirps, one each second, to an echo; ``lags`` are those of what it hears.

    network: seconds that each of the peer's packets takes. lost: of them. busy: seconds for which the event loop does
    something else at the most, half of the time. drift: of the peer's clock against ours.
    """

    def __init__(
        self,
        network: Wait = lambda number: TRIP,
        *,
        lost: frozenset[int] = frozenset(),
        busy: float = 0.0,
        drift: float = 0.0,
        seconds: int = SECONDS,
    ) -> None:
        self.network, self.lost, self.busy, self.drift, self.seconds = network, lost, busy, drift, seconds
        self.payloads = encoded(chirps(SENT_RATE, seconds))
        run_virtual(self._run())

    async def _run(self) -> None:
        clock = VirtualClock()
        self.server, self.client = AudioReceiver(clock), AudioReceiver(clock, paced=True)
        self.sender = AudioSender(lambda epoch, seconds: None, clock=clock)
        self.sent: list[tuple[float, int]] = []
        call = Call("echo", echo({}), None)
        await call.start()
        work = [
            asyncio.create_task(job)
            for job in (self._hear(call), self._speak(call), self._send(clock), self._talk(clock), self._block(clock))
        ]
        heard, began, origin = [], 0.0, 0.0
        async for played in self.client:
            if not heard:
                origin = clock.now()
            heard.append(played.samples)
            if clock.now() > self.seconds - 0.2:
                break
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        await call.close()
        skipped = round(WARM_UP / 0.02)
        began = origin + skipped * 0.02
        self.lags = lags(np.concatenate(heard[skipped:]), began)

    async def _talk(self, clock: VirtualClock) -> None:
        arrivals = sorted(
            ((number + 1) * 0.02 * (1 + self.drift) + self.network(number), number)
            for number in range(len(self.payloads))
            if number not in self.lost
        )
        for at, number in arrivals:
            await clock.sleep_until(at)
            packet = rtp(number, 960 * number, self.payloads[number])
            later(asyncio.get_running_loop(), HOPS, partial(self.server.push, packet))

    async def _hear(self, call: Call) -> None:
        async for played in self.server:
            await call.hear(played.samples, RATE)

    async def _speak(self, call: Call) -> None:
        async for item in call.items():
            chunk = item.chunk
            assert isinstance(chunk, Audio)
            await self.sender.write(chunk.samples, chunk.rate, chunk.epoch, chunk.start_seconds, chunk.final)

    async def _block(self, clock: VirtualClock) -> None:
        loop, rng = asyncio.get_running_loop(), random.Random(2)
        while self.busy:
            block = self.busy * rng.random()
            await clock.sleep(block)
            loop._now += block  # as if it had worked

    async def _send(self, clock: VirtualClock) -> None:
        for number in range(1 << 30):
            packet = await self.sender.recv()
            self.sent.append((clock.now(), packet.pts))
            self.client.push(rtp(number, packet.pts, bytes(packet)))


@pytest.fixture(scope="module")
def clean() -> EchoCall:
    return EchoCall()


@pytest.mark.parametrize("phase", [0.0, 0.007, 0.013, 0.019])
def test_an_echo_adds_next_to_nothing_to_the_codec_and_the_ear(phase: float) -> None:
    call = EchoCall(lambda number: TRIP + phase)
    assert len(call.lags) >= 6
    ear = 1000 * FRAME + 15  # of the peer's playout buffer: a frame, and what it leaves alone
    assert max(call.lags) <= 1000 * (FRAME + phase + 2 * TRIP) + 2 * LOOKAHEAD_MS + ear + 5
    assert call.sender.gaps == 0
    assert call.server.stats.concealed == 0


def test_five_percent_loss_adds_less_than_sixty_milliseconds(clean: EchoCall) -> None:
    rng = random.Random(1)
    call = EchoCall(lost=frozenset(number for number in range(50 * SECONDS) if rng.random() < 0.05))
    assert call.server.stats.lost > 20
    assert median(call.lags) <= median(clean.lags) + 60
    assert call.sender.gaps <= 1  # at the start, when nothing is known of the network


@pytest.mark.parametrize("busy", [0.01, 0.02, 0.04, 0.08])
def test_a_busy_event_loop_makes_no_gaps(clean: EchoCall, busy: float) -> None:
    call = EchoCall(busy=busy)
    assert call.sender.gaps == 0
    assert call.server.stats.concealed == 0
    assert median(call.lags) <= median(clean.lags) + 1000 * (FRAME + 1.5 * busy)
    late = np.diff([at for at, _ in call.sent])
    assert late.max() > busy / 2  # the control: it was busy
    assert set(np.diff([ticks for _, ticks in call.sent])[50:]) == {960}  # all of it, in its place


@pytest.mark.parametrize("fair", [True, False])
def test_a_late_loop_is_given_time_for_what_would_have_rung(fair: bool) -> None:
    async def main() -> bool:
        clock, loop = VirtualClock(), asyncio.get_running_loop()
        alarm = Alarm(clock)

        def block() -> None:
            loop._now += 0.05
            later(loop, HOPS, alarm.ring)

        loop.call_at(0.01, block)
        return await alarm.wait(0.02, fair=fair)

    assert run_virtual(main()) is fair


def test_an_alarm_rings_once_or_when_it_is_time() -> None:
    async def main() -> None:
        clock, loop = VirtualClock(), asyncio.get_running_loop()
        alarm = Alarm(clock)
        alarm.ring()
        assert await alarm.wait()
        assert not await alarm.wait(0.5, fair=True)
        assert clock.now() == pytest.approx(0.5)
        loop.call_at(0.7, alarm.ring)
        assert await alarm.wait(1.0)
        assert clock.now() == pytest.approx(0.7)
        assert not await alarm.wait(0.1)

    run_virtual(main())


def test_after_a_stall_the_delay_comes_back(clean: EchoCall) -> None:
    call = EchoCall(lambda number: max(TRIP, 5.3 - (number + 1) * 0.02 if 5 <= (number + 1) * 0.02 < 5.3 else 0))
    assert max(call.lags) > median(clean.lags) + 100  # the control: it did stall
    assert call.lags[-2:] == pytest.approx(clean.lags[-2:], abs=20)
    assert call.sender.gaps == 0


@pytest.mark.parametrize("drift", [-1e-3, 1e-3])
def test_a_peers_clock_is_followed(drift: float) -> None:
    call = EchoCall(drift=drift, seconds=40)
    assert abs(drift) * 1000 * (40 - WARM_UP) > 30  # milliseconds that would add up
    behind = [lag - 1000 * drift * index for index, lag in enumerate(call.lags)]  # the peer's seconds, by our clock
    assert max(behind) - min(behind) <= 20  # what playout buffers leave alone, and a period of the sound
    assert call.sender.gaps == 0
