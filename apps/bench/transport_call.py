"""A call over loopback in real time, lossy by a seed: our receive path, and stock aiortc's, at the same time.

Both are whole peer connections of aiortc; packets are lost where they come out of the transport, before either
receiver sees them. A check on ``transport_loss.py``, whose figures do not depend on the machine being idle.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from statistics import median
from typing import Any
from unittest import mock

import aioice.ice
import av
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection
from aiortc.mediastreams import MediaStreamError

from ...transport.webrtc.playout import Kind
from ...transport.webrtc.receiver import attach, with_fec

PTIME = 0.02
WARM_UP = 2.0  # seconds of each call that are not measured


class Talk(MediaStreamTrack):
    """Packets on the clock, over and over; ``sent_at`` has the time each left."""

    kind = "audio"

    def __init__(self, payloads: Sequence[bytes]) -> None:
        super().__init__()
        self.payloads = payloads
        self.sent_at: list[float] = []

    async def recv(self) -> av.Packet[Any]:
        """The next packet, when it is due."""
        number, now = len(self.sent_at), time.monotonic()
        begin = self.sent_at[0] if self.sent_at else now
        await asyncio.sleep(begin + number * PTIME - now)
        packet = av.Packet(self.payloads[number % len(self.payloads)])
        packet.pts, packet.time_base = number * 960, Fraction(1, 48000)
        self.sent_at.append(time.monotonic())
        return packet


async def measure_calls(payloads: Sequence[bytes], seconds: float, loss: float) -> dict[str, Any]:
    """Both calls at once; for each the share of frames handed out and their delay after sending, in ms."""
    with mock.patch.object(aioice.ice, "get_host_addresses", return_value=["127.0.0.1"]):
        results = await asyncio.gather(*(_call(payloads, seconds, loss, own) for own in (True, False)))
    return dict(zip(("antiphon", "aiortc"), results, strict=True))


async def _call(payloads: Sequence[bytes], seconds: float, loss: float, own: bool) -> dict[str, float]:
    talker, listener = (RTCPeerConnection(RTCConfiguration(iceServers=[])) for _ in range(2))
    talk = Talk(payloads)
    talker.addTrack(talk)
    await talker.setLocalDescription(await talker.createOffer())
    await listener.setRemoteDescription(talker.localDescription)
    receiver = listener.getReceivers()[0]
    audio = attach(receiver, paced=True) if own else None
    await listener.setLocalDescription(await listener.createAnswer())
    handle, rng = receiver.transport._handle_rtp_data, random.Random(1)
    stamps: list[int] = []

    async def lossy(data: bytes, arrival_time_ms: int) -> None:
        stamps.append(int.from_bytes(data[4:8], "big"))
        if rng.random() >= loss or len(stamps) == 1:
            await handle(data, arrival_time_ms)

    setattr(receiver.transport, "_handle_rtp_data", lossy)  # noqa: B010 (a method, to the type checker)
    handed: list[tuple[float, float]] = []  # when, and the end of it in the sender's media time
    try:
        await talker.setRemoteDescription(with_fec(listener.localDescription))
        with suppress(TimeoutError, MediaStreamError):
            async with asyncio.timeout(WARM_UP + seconds + 0.5):
                if audio is None:
                    while True:
                        frame: Any = await receiver.track.recv()
                        handed.append((time.monotonic(), frame.pts / 48000 + PTIME))
                async for played in audio:
                    if played.kind is not Kind.SILENCE:
                        media = audio.buffer.media_position / audio.buffer.rate - stamps[0] / 48000
                        handed.append((time.monotonic(), media))
    finally:
        await asyncio.gather(talker.close(), listener.close())
    delays = [1000 * (at - talk.sent_at[max(0, round(media / PTIME) - 1)]) for at, media in handed]
    measured = [delay for delay, (_, media) in zip(delays, handed, strict=True) if WARM_UP <= media < WARM_UP + seconds]
    delivered = {round(media / PTIME) for _, media in handed if WARM_UP <= media < WARM_UP + seconds}
    return {
        "covered": round(min(1.0, len(delivered) * PTIME / seconds), 4),
        "delay_ms_p50": round(median(measured), 1),
        "frames": len(measured),
    }
