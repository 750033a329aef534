"""A peer: one WebRTC connection (aiortc) to one call.

Its microphone goes through our playout buffer into the call, the call's sound goes out by ``AudioSender``, of its
camera or screen the newest picture is looked at a few times a second, and one data channel carries JSON, which the
protocol of the route writes and reads. What the graph does not take is refused in the answer, so that it is not sent.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import asdict
from typing import Any, Protocol

import av
import numpy as np
from aiortc import (
    RTCConfiguration,
    RTCDataChannel,
    RTCIceTransport,
    RTCPeerConnection,
    RTCRtpSender,
    RTCRtpTransceiver,
    RTCSessionDescription,
)
from numpy.typing import NDArray

from ...codecs.resample import Resampler
from ...pipelines.chunk import Audio
from ...pipelines.clock import Clock, running_clock
from ...pipelines.stage import StageError
from ..call import Call, Item
from ..service import ConnectionLost
from .ice import Guard
from .receiver import RATE, AudioReceiver, attach, with_fec
from .sdp import (
    DENIED,
    LOOPBACK,
    MOST_CANDIDATES,
    REFUSALS,
    BadOffer,
    Fragment,
    Network,
    check_offer,
    read_fragment,
)
from .sender import AudioSender
from .video import VideoReceiver, bound

LABELS = ("events", "oai-events")
CONNECT_SECONDS = 15.0
SILENT_SECONDS = 5.0  # without a datagram, from a peer that sends sound
IDLE_SECONDS = 15.0  # without a datagram, from any other: only its consent checks come, every 4 to 6 s (RFC 7675)
LOOK_SECONDS = 0.5  # between looks at how the connection is
SEND_SECONDS = 2.0  # for a client to take its messages
UNSENT_BYTES = 1 << 20  # of messages, before that matters
UNREAD_MESSAGES = 256
LONGEST_MESSAGE = 256 * 1024  # characters
PICTURE_SIDE = 768  # pixels, the longest
PICTURES = 2.0  # a second
VIDEO_RATE = 90000


class Handler(Protocol):
    """What speaks on the data channel: the client's messages to the call, the call's items to the client."""

    async def start(self) -> None:
        """The peer runs: say hello."""

    async def handle(self, text: str) -> None:
        """A message from the client."""

    async def item(self, item: Item) -> None:
        """Something the call put out; sound goes by the audio track."""

    async def played(self) -> None:
        """Sound has left, and ``Call.played`` been told so."""

    async def finish(self) -> None:
        """The call has ended."""

    async def fail(self, error: StageError) -> None:
        """The call has ended because a stage failed."""


class NeverConnected(ConnectionError):
    """The client took the answer and did not come."""


class IceRestart(ValueError):
    """The client wants a new ICE session on its peer, which aiortc cannot give it."""


class Peer:
    """``answer`` an offer, then ``run`` until the client leaves, then ``close``.

    handler: makes what speaks on the data channel; None where nothing does. loopback: the client is on this host, so
    127.0.0.1 is offered to it and taken from it. denied: networks whose addresses in offers are left alone. pictures:
    looked at in a second. after: the number of the last item that the client saw, None for where the last reader
    stopped.
    """

    def __init__(
        self,
        call: Call,
        handler: Callable[[Peer], Handler] | None = None,
        *,
        loopback: bool = False,
        denied: Iterable[Network] = DENIED,
        pictures: float = PICTURES,
        after: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.call, self.after, self.pictures = call, after, pictures
        self.clock = clock or running_clock()
        self.guard = Guard(self.clock)
        self.counts: Counter[str] = Counter()  # unsent, unread, channels_refused: messages and channels left out
        self.sender = AudioSender(self._heard, epoch=lambda: call.session.epoch, clock=self.clock)
        self.receiver: AudioReceiver | None = None
        self.camera: VideoReceiver | None = None
        self._loopback, self._denied = loopback, (*denied, *(() if loopback else LOOPBACK))
        self._pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._ice: Fragment | None = None  # the client's, as it was offered
        self._candidates = 0  # of the client so far
        self._speaks = False  # the client takes our sound
        self._channel: RTCDataChannel | None = None
        self._channel_offered = False
        self._open = asyncio.Event()  # the data channel is, or never will be
        self._messages: asyncio.Queue[str] = asyncio.Queue(UNREAD_MESSAGES)
        self._played = asyncio.Event()  # sound has left since the handler was told
        self._connected = asyncio.Event()
        self._gone = asyncio.Event()
        self._pc.on("connectionstatechange", self._on_state)
        self._pc.on("datachannel", self._on_channel)
        self.handler = handler(self) if handler is not None else None

    # ---------------------------------------------------------------- the offer

    async def answer(self, offer: str) -> str:
        """The SDP answer, with every candidate. Raises BadOffer."""
        offer = check_offer(offer, denied=self._denied)
        self._ice = read_fragment(offer, denied=self._denied)
        self._candidates = self._ice.stated
        opus = [codec for codec in RTCRtpSender.getCapabilities("audio").codecs if codec.mimeType == "audio/opus"]
        try:
            for line in offer.splitlines():
                if line.startswith("m=audio"):
                    self._pc.addTransceiver("audio").setCodecPreferences(opus)
            await self._pc.setRemoteDescription(RTCSessionDescription(offer, "offer"))
            self._arrange(self._pc.getTransceivers())
            for transport in self._transports():
                self.guard.attach(transport._connection, loopback=self._loopback)
            await self._pc.setLocalDescription(await self._pc.createAnswer())
        except REFUSALS as error:
            raise BadOffer(
                f"the offer cannot be answered ({type(error).__name__}): offer Opus, VP8 or H.264"
            ) from error
        self._speaks = any(
            transceiver.sender.track is self.sender and transceiver.currentDirection in ("sendonly", "sendrecv")
            for transceiver in self._pc.getTransceivers()
        )
        self._channel_offered = "m=application" in offer
        answer: str = with_fec(self._pc.localDescription).sdp
        return answer

    async def trickle(self, sdp: str) -> None:
        """More of the client's candidates, in a fragment (RFC 8840); they count together with those of its offer.

        What names another ICE session is a restart: raises IceRestart. Raises BadOffer.
        """
        assert self._ice is not None, "an offer comes first"
        more = read_fragment(sdp, denied=self._denied)
        if (more.username, more.password) != (self._ice.username, self._ice.password):
            raise IceRestart("ICE is not restarted here: send a new offer, with ?resume= to go on with the call")
        if unknown := set(more.mids) - set(self._ice.mids):
            raise BadOffer(f"a=mid:{min(unknown)[:20]} was not in the offer")
        if self._candidates + more.stated > MOST_CANDIDATES:
            raise BadOffer(f"that makes {self._candidates + more.stated} candidates: {MOST_CANDIDATES} is the most")
        self._candidates += more.stated
        for transport in self._transports():  # there is one: an offer bundles
            for candidate in more.candidates:
                await transport.addRemoteCandidate(candidate)
            if more.ended and len(more.candidates) == more.stated:
                await transport.addRemoteCandidate(None)

    def _transports(self) -> set[RTCIceTransport]:
        transports: set[RTCIceTransport] = getattr(self._pc, "_RTCPeerConnection__iceTransports")  # noqa: B009
        return transports

    def _arrange(self, transceivers: list[RTCRtpTransceiver]) -> None:
        """Take the first microphone and the first camera if the graph does, and speak on the first audio line."""
        for transceiver in transceivers:
            speaks = hears = False
            if transceiver.kind == "audio":
                hears = self.call.takes("audio") and self.receiver is None and transceiver.receiver.track is not None
                if hears:
                    self.receiver = attach(transceiver.receiver, clock=self.clock)
                speaks = all(other.sender.track is not self.sender for other in transceivers)
                if speaks:
                    transceiver.sender.replaceTrack(self.sender)
            elif self.call.takes("video") and self.camera is None and transceiver.receiver.track is not None:
                self.camera, hears = bound(transceiver.receiver), True
            transceiver.direction = {
                (True, True): "sendrecv",
                (True, False): "sendonly",
                (False, True): "recvonly",
                (False, False): "inactive",
            }[speaks, hears]

    # ---------------------------------------------------------------- the connection's life

    async def run(self) -> None:
        """Carry the call until it or its client ends it.

        Raises NeverConnected, ConnectionLost when the client vanished, and what ``Call.items`` and the handler raise.
        """
        watch = asyncio.create_task(self._watch())
        jobs: list[Coroutine[Any, Any, None]] = [
            self._speak(), self._hear(), self._look(), self._read(), self._tell_played()
        ]  # fmt: skip
        tasks = {watch, *map(asyncio.create_task, jobs)}
        waiting = set(tasks)
        try:
            while not watch.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def take(self, text: str) -> None:
        """A message from the client, whichever way it came: the handler gets it in its turn."""
        if len(text) > LONGEST_MESSAGE or self._messages.full():
            self.counts["unread"] += 1
        else:
            self._messages.put_nowait(text)

    def leave(self) -> None:
        """The client said goodbye by another way: ``run`` returns."""
        self._gone.set()

    async def close(self) -> None:
        """End the connection and free what it holds."""
        self._gone.set()
        self.sender.stop()
        if self.receiver is not None:
            self.receiver.close()
        transceivers: list[RTCRtpTransceiver] = getattr(self._pc, "_RTCPeerConnection__transceivers")  # noqa: B009
        transceivers[:] = [one for one in transceivers if one.receiver.transport is not None]  # an offer failed halfway
        await self._pc.close()

    def statistics(self) -> dict[str, Any]:
        """Packets, delay and losses of the sound and the pictures coming in, the sound going out, what was left out."""
        sender, guard = self.sender, self.guard
        return {
            "receiver": asdict(self.receiver.stats) if self.receiver is not None else None,
            "video": asdict(self.camera.stats) if self.camera is not None else None,
            "sender": {
                "packets": sender.packets,
                "queued_ms": round(1000 * sender.queued),
                "gaps": sender.gaps,
                "dropped": sender.dropped,
            },
            "datagrams": {
                "received": guard.received,
                "oversized": guard.oversized,
                "malformed": guard.malformed,
                "overflowed": guard.overflowed,
            },
            **self.counts,
        }

    def counted(self) -> dict[tuple[str, str], int]:
        """What only rises of ``statistics``, for ``Service.metered``."""
        guard, found = self.guard, {("messages", what): count for what, count in self.counts.items()}
        for what in ("received", "oversized", "malformed", "overflowed"):
            found["datagrams", what] = getattr(guard, what)
        if self.receiver is not None:
            for what in ("received", "lost", "late", "empty", "malformed", "overflowed"):
                found["audio_packets", what] = getattr(self.receiver.stats, what)
            for what in ("decoded", "fec", "concealed", "silence"):
                found["audio_samples", what] = getattr(self.receiver.stats, what)
        if self.camera is not None:
            for what in ("frames", "skipped", "undecoded", "refused"):
                found["video_frames", what.replace("frames", "decoded")] = getattr(self.camera.stats, what)
        return found

    async def _watch(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._connected.wait()
        except TimeoutError:
            raise NeverConnected(f"the client did not connect within {CONNECT_SECONDS:g} s of the answer") from None
        while not self._gone.is_set():
            if self._pc.connectionState == "failed":
                raise ConnectionLost("the WebRTC connection failed")
            allowed = SILENT_SECONDS if self.receiver is not None and self.receiver.stats.received else IDLE_SECONDS
            if self.guard.last is not None and self.clock.now() - self.guard.last > allowed:
                raise ConnectionLost(f"nothing came from the client for {allowed:g} s")
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._gone.wait()
            except TimeoutError:
                continue

    def _on_state(self) -> None:
        state = self._pc.connectionState
        if state == "connected":
            self._connected.set()
        elif state in ("closed", "failed"):
            self._connected.set()  # for ``_watch`` to see which
            if state == "closed":
                self._gone.set()

    # ---------------------------------------------------------------- in

    async def _hear(self) -> None:
        if self.receiver is None:
            return
        resampler = Resampler(RATE, self.call.rate or RATE)  # a resumed call keeps the rate it began with
        async for frame in self.receiver:
            await self.call.hear(resampler.push(frame.samples), resampler.rate)

    async def _look(self) -> None:
        """Show the call the newest picture, so many times a second."""
        if self.camera is None:
            return
        began: float | None = None
        async for frame in self.camera:
            now = self.clock.now()
            if began is None:
                began = now - self.call.heard_seconds
            pixels = await asyncio.to_thread(picture, frame)
            await self.call.see(pixels, round((now - began) * VIDEO_RATE), VIDEO_RATE)
            await self.clock.sleep_until(now + 1 / self.pictures)

    def _on_channel(self, channel: RTCDataChannel) -> None:
        if self._channel is not None or channel.label not in LABELS:
            self.counts["channels_refused"] += 1
            channel.close()
            return
        self._channel = channel
        channel.on("message", self._on_message)
        channel.on("close", self._open.set)
        self._open.set()

    def _on_message(self, data: str | bytes) -> None:
        if isinstance(data, bytes):
            self.counts["unread"] += 1
        else:
            self.take(data)

    async def _read(self) -> None:
        if self.handler is None:
            return
        await self.handler.start()
        while True:
            await self.handler.handle(await self._messages.get())

    async def _tell_played(self) -> None:
        while self.handler is not None:
            await self._played.wait()
            self._played.clear()
            await self.handler.played()

    def _heard(self, epoch: int, seconds: float) -> None:
        self.call.played(epoch, seconds)
        self._played.set()

    # ---------------------------------------------------------------- out

    async def send(self, text: str) -> None:
        """A message to the client, when its data channel is open. Raises ConnectionLost if it takes none for 2 s."""
        if not self._channel_offered:
            self.counts["unsent"] += 1
            return
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._open.wait()
        except TimeoutError:
            self._open.set()  # it will not come: nothing waits for it any more
        channel = self._channel
        if channel is None or channel.readyState != "open":
            self.counts["unsent"] += 1
            return
        waited = 0.0
        while channel.bufferedAmount > UNSENT_BYTES:
            if waited >= SEND_SECONDS:
                raise ConnectionLost(f"the client took no message for {SEND_SECONDS:g} s")
            await self.clock.sleep(SEND_SECONDS / 20)
            waited += SEND_SECONDS / 20
        channel.send(text)

    async def _speak(self) -> None:
        """The call's items, until they end and what was said has left."""
        await self._connected.wait()
        try:
            async for item in self.call.items(self.after):
                chunk = item.chunk
                if self.handler is not None:
                    await self.handler.item(item)
                if not isinstance(chunk, Audio):
                    self.sender.flush(self.call.session.epoch)
                elif self._speaks:
                    await self.sender.write(chunk.samples, chunk.rate, chunk.epoch, chunk.start_seconds, chunk.final)
        except StageError as error:
            if self.handler is not None:
                await self.handler.fail(error)
            raise
        if self.handler is not None:
            await self.handler.finish()
        await self.sender.drained()
        self._gone.set()


def picture(frame: av.VideoFrame, side: int = PICTURE_SIDE) -> NDArray[np.uint8]:
    """A frame as RGB ``[height, width, 3]``, made smaller to at most ``side`` pixels on its longer side."""
    scale = min(1.0, side / max(frame.width, frame.height))
    size = {"width": max(1, round(frame.width * scale)), "height": max(1, round(frame.height * scale))}
    return np.asarray(frame.reformat(**size, format="rgb24").to_ndarray(), np.uint8)
