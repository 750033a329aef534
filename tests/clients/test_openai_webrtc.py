"""The ``openai`` package places a WebRTC call with the real server; its media end is aiortc as it comes.

The package makes the call and ends it, aiortc sends the sample and takes the reply, and each event of the data channel
is parsed by the package's types.
"""

from __future__ import annotations

import asyncio
import fractions
import json
from contextlib import suppress
from typing import Any

import av
import jiwer
import numpy as np
import pytest
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from numpy.typing import NDArray

from .speech import WORDS, likeness, speech

openai = pytest.importorskip("openai")
from openai.types.realtime import RealtimeServerEvent  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402

pytestmark = pytest.mark.slow

RATE = 48000
FRAME = RATE // 50
SERVER_EVENT: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)


class Microphone(MediaStreamTrack):
    """The speech, then silence, in real time."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.began = 0, 0.0

    async def recv(self) -> av.AudioFrame:
        now = asyncio.get_running_loop().time()
        self.began = self.began or now
        await asyncio.sleep(self.began + self.sent / RATE - now)
        piece = speech(RATE)[self.sent : self.sent + FRAME]
        frame = av.AudioFrame.from_ndarray(np.pad(piece, (0, FRAME - len(piece)))[None], "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, self.sent, fractions.Fraction(1, RATE)
        self.sent += FRAME
        return frame


async def listen(track: MediaStreamTrack, heard: list[NDArray[np.int16]]) -> None:
    """Take the sound that comes, its left channel."""
    with suppress(MediaStreamError):
        while True:
            frame = await track.recv()
            assert isinstance(frame, av.AudioFrame)
            assert frame.sample_rate == RATE
            heard.append(frame.to_ndarray().reshape(-1, len(frame.layout.channels))[:, 0])


def test_a_call_is_placed_heard_and_ended(server: str) -> None:
    async def main() -> None:
        client = openai.AsyncOpenAI(api_key="unused", base_url=f"{server}/v1", max_retries=0)
        pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        events: asyncio.Queue[Any] = asyncio.Queue()
        seen: dict[str, Any] = {}
        deltas = []

        async def until(kind: str) -> Any:
            while kind not in seen:
                event = await events.get()
                seen[event.type] = event
                if event.type.endswith("transcription.delta"):
                    deltas.append(event.delta)
            return seen[kind]

        def send(**event: Any) -> None:
            channel.send(json.dumps(event))

        pc.addTrack(Microphone())
        channel = pc.createDataChannel("oai-events")
        channel.on("message", lambda text: events.put_nowait(SERVER_EVENT.validate_json(text)))
        await pc.setLocalDescription(await pc.createOffer())
        try:
            async with asyncio.timeout(45):
                created = await client.realtime.calls.create(
                    sdp=pc.localDescription.sdp, session={"type": "realtime", "instructions": "Say it back."}
                )
                call_id = created.response.headers["Location"].rpartition("/")[2]
                await pc.setRemoteDescription(RTCSessionDescription(created.text, "answer"))
                heard: list[NDArray[np.int16]] = []
                listening = asyncio.create_task(listen(pc.getReceivers()[0].track, heard))
                assert (await until("session.created")).session.model == "parrot"
                assert (await until("session.updated")).session.instructions == "Say it back."
                transcript = (await until("conversation.item.input_audio_transcription.completed")).transcript
                assert jiwer.wer(WORDS, transcript) < 0.5
                assert "".join(deltas) == transcript
                done = (await until("response.done")).response
                assert done.status == "completed"
                assert jiwer.wer(WORDS, done.output[0].content[0].transcript) < 0.5
                await until("output_audio_buffer.stopped")
                assert "output_audio_buffer.started" in seen
                assert "error" not in seen
                send(type="nonsense", event_id="mine")
                assert (await until("error")).error.event_id == "mine"

                closed = asyncio.Event()
                pc.on("connectionstatechange", lambda: pc.connectionState == "closed" and closed.set())
                await client.realtime.calls.hangup(call_id)
                await closed.wait()
                await listening
                assert likeness(np.concatenate(heard), RATE) > 0.6
                with pytest.raises(openai.NotFoundError, match="it has ended"):
                    await client.realtime.calls.hangup(call_id)
        finally:
            await pc.close()
            await client.close()

    asyncio.run(main())
