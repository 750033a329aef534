"""What strangers may send, as functions of bytes: each lets through only what nobody declared.

``TARGETS`` maps a name to a function that is called with any bytes at all. It returns when the input was taken or
refused as its module documents, and raises for everything else. ``SEEDS`` are inputs to start from.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

import msgpack
import numpy as np
from aioice import Candidate, Connection
from aioice.ice import StunProtocol
from aioice.stun import COOKIE, message_integrity, set_body_length
from aiortc import RTCConfiguration, RTCPeerConnection

from antiphon.codecs.ogg import OggError, OggOpusReader, OggOpusWriter, write_page
from antiphon.pipelines.chunk import Chunk
from antiphon.pipelines.clock import running_clock
from antiphon.pipelines.graph import Graph
from antiphon.pipelines.stage import Context, Inlet, Input, stage
from antiphon.transport.call import Call, CallError
from antiphon.transport.protocols import common, deepgram, moshi_server, plain, twilio, wyoming
from antiphon.transport.protocols.realtime import Realtime
from antiphon.transport.service import ConnectionLost, Service
from antiphon.transport.webrtc import ice
from antiphon.transport.webrtc.peer import Peer
from antiphon.transport.webrtc.sdp import BadOffer, check_offer

ADDRESS = ("192.0.2.1", 4000)
CALL_INPUTS = 200  # that one call gets before the next takes over


@cache
def loop() -> asyncio.AbstractEventLoop:
    """One event loop for every input; what a task or callback raises unseen ends the run."""
    made = asyncio.new_event_loop()
    made.set_exception_handler(_fail)
    return made


_unseen: list[BaseException] = []


def _fail(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    _unseen.append(context.get("exception") or RuntimeError(context["message"]))


def run(coroutine: Any) -> None:
    """To the end, and what it left to run once after it."""

    async def main() -> None:
        await coroutine
        await asyncio.sleep(0)

    loop().run_until_complete(main())
    if _unseen:
        raise _unseen.pop()


# -- offers ------------------------------------------------------------------------------------------------------------


@cache
def offer() -> str:
    """A good one: a microphone, a camera and a data channel."""

    async def made() -> str:
        pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        pc.addTransceiver("audio")
        pc.addTransceiver("video")
        pc.createDataChannel("events")
        await pc.setLocalDescription(await pc.createOffer())
        sdp: str = pc.localDescription.sdp
        await pc.close()
        return sdp

    return loop().run_until_complete(made())


def edited(data: bytes) -> str:
    """The good offer after edits of four bytes each: what to do, to which line, at which place, with which byte."""
    lines = offer().splitlines()
    for what, where, place, byte in struct.iter_unpack("BBBB", data[: len(data) // 4 * 4]):
        if not lines:
            break
        index, other = where % len(lines), place % len(lines)
        line, at = lines[index], place % (len(lines[index]) + 1)
        if what % 6 == 0:
            lines.pop(index)
        elif what % 6 == 1:
            lines.insert(other, line)
        elif what % 6 == 2:
            lines[index], lines[other] = lines[other], line
        elif what % 6 == 3:
            lines[index] = line[:at]
        elif what % 6 == 4:
            lines[index] = line[:at] + chr(byte) + line[at + 1 :]
        else:
            lines[index] = line[:at] + str(byte * 0x01010101) + line[at + 1 :]
    return "\r\n".join([*lines, ""])


def sdp(data: bytes) -> None:
    """Any text as an offer, and the good offer edited: BadOffer or nothing."""
    for text in (data.decode(errors="replace"), data.decode("latin-1"), edited(data)):
        try:
            check_offer(text)
        except BadOffer:
            continue


class Anything:
    """A call that takes whatever is offered."""

    session = None

    def takes(self, inlet: str) -> bool:
        """See ``Call``."""
        return True

    def played(self, epoch: int, seconds: float) -> None:
        """See ``Call``."""


def answer(data: bytes) -> None:
    """The good offer, edited, is answered by a peer or refused with BadOffer."""

    async def main() -> None:
        peer = Peer(Anything(), loopback=True)  # type: ignore[arg-type]
        try:
            await peer.answer(edited(data))
        except BadOffer:
            return
        finally:
            await peer.close()

    run(main())


# -- datagrams ---------------------------------------------------------------------------------------------------------


class Nowhere(asyncio.DatagramTransport):
    """Sends nothing."""

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Forget it."""


def signed(data: bytes, key: bytes) -> bytes:
    """A binding request with these attributes that bears the integrity of somebody who knows the password."""
    head = struct.pack("!HHI12s", 1, len(data), COOKIE, b"transaction!") + data
    whole = set_body_length(head, len(data) + 24)
    return whole + struct.pack("!HH", 8, 20) + message_integrity(whole, key)


def stun(data: bytes) -> None:
    """A datagram from a stranger, and STUN from somebody who knows the password: counted, whatever it is."""

    async def main() -> None:
        connection = Connection(ice_controlling=False)
        guard = ice.Guard(running_clock())
        guard.attach(connection)
        protocol = StunProtocol(connection)
        protocol.connection_made(Nowhere())
        protocol.local_candidate = Candidate("1", 1, "udp", 1, "192.0.2.9", 5000, "host")
        guard._watch(connection, protocol)
        connection.remote_username, connection.remote_password = "them", "p" * 22
        connection._early_checks_done = True
        name = f"{connection.local_username}:them".encode()
        user = struct.pack("!HH", 6, len(name)) + name + bytes(-len(name) % 4)
        body = data[: len(data) // 4 * 4]
        for datagram in (data, signed(user + body, connection.local_password.encode()), signed(body, b"guess")):
            protocol.datagram_received(datagram, ADDRESS)
        assert guard.received == 3
        assert connection._queue.qsize() <= ice.WAITING_DATAGRAMS
        tasks = [pair.task for pair in connection._check_list if pair.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(main())


# -- messages ----------------------------------------------------------------------------------------------------------


@stage(name="fuzz_swallow")
async def swallow(ctx: Context, source: Input) -> AsyncIterator[Chunk]:
    """Takes everything and says nothing."""
    async for chunk in source:
        if chunk.start < 0:
            yield chunk


def swallowing(options: Any = None) -> Graph:
    """A graph that takes sound and control events."""
    return (Inlet().named("audio") >> swallow()) | (Inlet().named("control") >> swallow())


async def _sent(message: dict[str, Any]) -> None:
    """Every message that is sent must be one that can be."""
    json.dumps(message, ensure_ascii=False).encode()


class Calls:
    """A call at a time, for so many inputs or until it ends."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.realtime: Realtime | None = None
        self.inputs = 0

    async def next(self) -> Call:
        """The call for one more input."""
        if self.call is not None and (self.call._finished or self.inputs >= CALL_INPUTS):
            await self.call.close()
            self.call = None
        if self.call is None:
            self.call, self.inputs = Call("fuzz", swallowing(), None), 0
            await self.call.start()
            self.realtime = Realtime(self.call, _sent, audio_in_band=True)
        self.inputs += 1
        return self.call


_calls = Calls()


def plain_message(data: bytes) -> None:
    """A message, sound and a query of the plain protocol: taken, or an error of the kinds that clients are told."""

    async def main() -> None:
        call = await _calls.next()
        text = data.decode(errors="replace")
        try:
            await plain.obey(call, text)
        except (ValueError, CallError) as error:
            common.refusal(error)
        try:
            await call.hear(common.from_pcm16(data), 16000)
        except ValueError as error:
            common.refusal(error)
        names = ("language", "lookahead_ms", "endpoint_ms")
        try:
            plain.options_of(dict(zip(names, text.split("&"), strict=False)))
        except ValueError as error:
            common.refusal(error)

    run(main())


def realtime(data: bytes) -> None:
    """OpenAI's events, one a line: every error is answered by an event, so nothing is raised."""

    async def main() -> None:
        await _calls.next()
        assert _calls.realtime is not None
        for line in data.decode(errors="replace").split("\n"):
            await _calls.realtime.handle(line)

    run(main())


def deepgram_message(data: bytes) -> None:
    """Deepgram's query and its text messages: ValueError or nothing."""
    text = data.decode(errors="replace")
    for parse in (lambda: deepgram.Settings.of(dict(parse_qsl(text)), "en").options, lambda: deepgram._type(text)):
        try:
            parse()
        except ValueError:
            continue


def moshi_message(data: bytes) -> None:
    """A message to Kyutai's Rust server, of either kind, and its sound: ValueError or nothing."""
    reader = OggOpusReader(moshi_server.RATE, trim=False)
    for kinds in (moshi_server.HEARD, moshi_server.SPOKEN):
        try:
            for pcm in moshi_server.sound(moshi_server.unpack(data, kinds), reader):
                assert np.isfinite(pcm).all()
        except ValueError as error:
            common.refusal(error)


class Lines:
    """A websocket whose client sends lines, then closes; it stands in for ``Socket``."""

    def __init__(self, data: bytes) -> None:
        self.lines = deque(data.decode(errors="replace").split("\n"))

    async def receive(self) -> str | None:
        """See ``Socket``."""
        return self.lines.popleft() if self.lines else None

    async def send_json(self, message: Any) -> None:
        """See ``Socket``."""
        await _sent(message)


def twilio_messages(data: bytes) -> None:
    """A stream of Twilio's, one message a line: taken, or an error that closes it."""

    async def main() -> None:
        service, socket = Service(swallowing, None), Lines(data)
        try:
            start = await twilio._started(socket)  # type: ignore[arg-type]
            if start is not None:
                await twilio._converse(service, socket, start)  # type: ignore[arg-type]
        except (*common.TOLD, ConnectionLost):
            return
        finally:
            await service.close()

    run(main())


class Writer:
    """A connection whose client reads everything; it stands in for ``asyncio.StreamWriter``."""

    def write(self, data: bytes) -> None:
        """See ``StreamWriter``."""

    async def drain(self) -> None:
        """See ``StreamWriter``."""


def wyoming_events(data: bytes) -> None:
    """A connection of Wyoming's: answered, or ended as one that broke."""

    async def main() -> None:
        service, reader = Service(swallowing, None), asyncio.StreamReader(wyoming.LINE_BYTES)
        reader.feed_data(data)
        reader.feed_eof()
        try:
            await wyoming._Connection(service, reader, Writer()).serve()  # type: ignore[arg-type]
        except (EOFError, OSError, TimeoutError):
            return
        finally:
            await service.close()

    run(main())


def ogg(data: bytes) -> None:
    """Opus in Ogg as it is, and as packets in pages whose checksums are right."""
    opening = OggOpusWriter(24000).push(np.zeros(960, np.float32))
    flags, packets = data[:1], [data[at : at + 100] for at in range(1, len(data), 100)][:200]
    page = write_page(packets, 1, 3, 0, flags[0]) if flags else b""
    for stream in (data, opening + page, opening + data):
        reader = OggOpusReader(24000)
        try:
            for pcm in reader.push(stream):
                assert pcm.dtype == np.float32
        except OggError:
            continue


TARGETS: dict[str, Callable[[bytes], None]] = {
    "sdp": sdp,
    "answer": answer,
    "stun": stun,
    "plain": plain_message,
    "realtime": realtime,
    "deepgram": deepgram_message,
    "twilio": twilio_messages,
    "wyoming": wyoming_events,
    "ogg": ogg,
    "moshi": moshi_message,
}

SHORT_PRIORITY = struct.pack("!HHH2x", 0x24, 2, 1)

TWILIO_START = (
    b'{"event":"connected"}\n{"event":"start","start":{"streamSid":"s","customParameters":{},"mediaFormat":'
    + json.dumps(twilio.FORMAT).encode()
    + b"}}\n"
)

SEEDS: dict[str, list[bytes]] = {
    "moshi": [
        msgpack.packb({"type": "Audio", "pcm": [0.0, -1.0, float("inf")]}, use_single_float=True),
        msgpack.packb({"type": "OggOpus", "data": [79, 103, 103, 83]}),
        msgpack.packb({"type": "Marker", "id": 1}),
        msgpack.packb({"type": "Text", "text": "so be it"}),
        b"\x91" * 1000,
    ],
    "ogg": [b"", b"OggS", b"\x02OpusHead\x01\x01\x38\x01\x80\xbb\0\0\0\0\0", b"\0\x78\x07\xff", b"\x01\xff\xff\xff"],
    "sdp": [b"", offer().encode()],
    "answer": [b"", b"T\xee\x7f\xff\x00p\xffP}w", bytes([0, 9, 0, 0]), bytes([4, 12, 7, 65, 1, 20, 2, 0])],
    "stun": [
        struct.pack("!HHI12s", 1, len(SHORT_PRIORITY), COOKIE, b"transaction!") + SHORT_PRIORITY,
        struct.pack("!HHIHHQ", 0x24, 4, 1, 0x802A, 8, 1),
        struct.pack("!HHHHI", 0x25, 0, 0x24, 4, 7),
        b"\x80" + bytes(99),
    ],
    "plain": [
        b'{"type":"control","name":"turns","data":{"mode":"vad"}}',
        b'{"type":"played","epoch":0,"seconds":1.5}',
        b'{"type":"interrupt"}',
        b'{"type":"finish"}',
        b"[" * 100_000,
    ],
    "realtime": [
        b'{"type":"session.update","session":{"type":"realtime","audio":{"input":{"turn_detection":null}}}}',
        b'{"type":"input_audio_buffer.append","audio":"AAAA"}\n{"type":"input_audio_buffer.commit"}',
        b'{"type":"conversation.item.create","item":{"id":"a","type":"message","role":"user","content":[]}}\n'
        b'{"type":"conversation.item.retrieve","item_id":"a"}\n{"type":"conversation.item.delete","item_id":"a"}',
        b'{"type":"conversation.item.truncate","item_id":"a","content_index":0,"audio_end_ms":10}',
        b'{"type":"response.create"}\n{"type":"response.cancel","event_id":"\\ud800"}',
        b"[" * 100_000,
    ],
    "deepgram": [
        b"encoding=linear16&sample_rate=16000&endpointing=300&utterance_end_ms=1000&language=en",
        b'{"type":"Finalize"}',
        b"[" * 100_000,
    ],
    "twilio": [
        TWILIO_START + b'{"event":"media","media":{"track":"inbound","payload":"AAAA"}}\n'
        b'{"event":"mark","mark":{"name":"m1"}}\n{"event":"dtmf","dtmf":{"digit":"1"}}\n{"event":"stop"}',
        TWILIO_START.replace(b"{}", b"[1]"),
        TWILIO_START.replace(b"{}", b'{"language":[1],"lookahead_ms":{}}'),
        TWILIO_START + b'{"event":"mark","mark":{"name":["m1"]}}',
        TWILIO_START + b'{"event":"media","media":{"track":["inbound"],"payload":"\xff\xff"}}',
    ],
    "wyoming": [
        b'{"type":"describe"}\n{"type":"transcribe","data":{"language":"en"}}\n',
        b'{"type":"audio-start","data":{"rate":16000,"width":2,"channels":1}}\n'
        b'{"type":"audio-chunk","data":{"rate":16000,"width":2,"channels":1},"payload_length":4}\n0000'
        b'{"type":"audio-stop"}\n',
        b'{"type":"ping","data_length":12}\n{"text":"\\n"}',
        b"[" * 50_000 + b"\n",
    ],
}
