"""An independent engine against the real server: ``wrtc``, Chrome's libwebrtc, speaks and hears the reply.

Its own statistics tell what the network carried: packets both ways, none lost, and in-band FEC agreed on.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import jiwer
import numpy as np
import pytest
from numpy.typing import NDArray

from .speech import SECONDS, WORDS, likeness, speech

webrtc = pytest.importorskip("webrtc", reason="needs the package wrtc")

pytestmark = pytest.mark.slow

RATE = 48000
FRAME = RATE // 100


async def talk(track: Any) -> None:
    """The speech, then silence, in real time, until cancelled."""
    writer = track.writable.get_writer()
    loop, sent = asyncio.get_running_loop(), 0
    began = loop.time()
    while True:
        piece = speech(RATE)[sent : sent + FRAME]
        data = np.pad(piece, (0, FRAME - len(piece))).tobytes()
        init = webrtc.AudioDataInit("s16", RATE, FRAME, 1, sent * 1_000_000 // RATE, data)
        await writer.write(webrtc.AudioData(init))
        sent += FRAME
        await asyncio.sleep(began + sent / RATE - loop.time())


async def listen(track: Any, heard: list[NDArray[np.int16]]) -> None:
    """Take the sound that comes, its first channel."""
    processor = webrtc.MediaStreamTrackProcessor(webrtc.MediaStreamTrackProcessorInit(track, 100))
    async for data in processor.readable:
        assert data.sample_rate == RATE
        samples = bytearray(data.allocation_size(webrtc.AudioDataCopyToOptions(0)))
        data.copy_to(samples, webrtc.AudioDataCopyToOptions(0))
        heard.append(np.frombuffer(samples, np.int16).reshape(-1, data.number_of_channels)[:, 0])
        data.close()


def test_a_call_is_carried_both_ways(server: str) -> None:
    async def main() -> None:
        pc = webrtc.RTCPeerConnection(webrtc.RTCConfiguration())
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        async def next_message(kind: str, **fields: Any) -> dict[str, Any]:
            while True:
                message = await messages.get()
                if message["type"] == kind and fields.items() <= message.items():
                    return message

        microphone = webrtc.MediaStreamTrackGenerator("audio")
        pc.add_track(microphone)
        channel = pc.create_data_channel("events")
        channel.on("message", lambda event: messages.put_nowait(json.loads(event.data)))
        gathered, connected = asyncio.Event(), asyncio.Event()
        pc.on("icegatheringstatechange", lambda _: pc.ice_gathering_state == "complete" and gathered.set())
        pc.on("connectionstatechange", lambda _: pc.connection_state == "connected" and connected.set())
        heard: list[NDArray[np.int16]] = []
        tasks = []
        try:
            async with asyncio.timeout(45):
                await pc.set_local_description(await pc.create_offer())
                await gathered.wait()
                async with httpx.AsyncClient(base_url=server) as http:
                    response = await http.post("/rtc/offer", json={"sdp": pc.local_description.sdp})
                assert response.status_code == 201
                await pc.set_remote_description(webrtc.RTCSessionDescriptionInit("answer", response.json()["sdp"]))
                await connected.wait()
                tasks = [
                    asyncio.create_task(talk(microphone)),
                    asyncio.create_task(listen(pc.get_receivers()[0].track, heard)),
                ]
                captions = ""
                while jiwer.wer(WORDS, captions) >= 0.5:
                    captions += " " + (await next_message("final", reply=False))["text"]
                while sum(map(len, heard)) < 3 * SECONDS * RATE:
                    await asyncio.sleep(0.05)
                channel.send(json.dumps({"type": "stats"}))
                theirs = await next_message("stats")
                stats = await pc.get_stats()
        finally:
            for task in tasks:
                task.cancel()
            pc.close()
        assert likeness(np.concatenate(heard), RATE) > 0.6
        by_type = {str(one.type.value): one for one in stats.values()}
        assert by_type["outbound-rtp"].packets_sent > 50 * SECONDS
        assert by_type["remote-inbound-rtp"].packets_lost == 0  # of those, by the server's reports
        assert by_type["inbound-rtp"].packets_received > 50 * SECONDS
        assert by_type["inbound-rtp"].packets_lost == 0
        assert by_type["inbound-rtp"].concealed_samples < 0.1 * by_type["inbound-rtp"].total_samples_received
        codecs = [one for one in stats.values() if one.type == "codec"]
        assert [(codec.mime_type, "useinbandfec=1" in (codec.sdp_fmtp_line or "")) for codec in codecs] == [
            ("audio/opus", True)
        ] * 2
        assert (theirs["sender"]["gaps"], theirs["sender"]["dropped"]) == (0, 0)
        assert theirs["receiver"]["lost"] == 0

    asyncio.run(main())
