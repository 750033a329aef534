"""What clients are told on their data channels: turns that they end themselves, and that a stage has failed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from antiphon.pipelines.chunk import Event
from antiphon.pipelines.stage import Context, Inlet, Input, select, stage

from .test_peer import Client, client, serving


@stage(name="oai_test_listener", lasting=True)
async def listener(ctx: Context, audio: Input, control: Input) -> AsyncIterator[Event]:
    """Ends turns by hand, and fails when it is told to fail."""
    while ready := await select(control, audio):
        chunk = ready.get_nowait()
        if isinstance(chunk, Event) and chunk.name == "commit":
            yield Event(name="turn_end", data={"reason": "manual", "waited_ms": 0}, rate=chunk.rate, start=chunk.start)
        elif isinstance(chunk, Event) and chunk.data.get("instructions") == "fail":
            raise ValueError("the secret of the session")


def listening(options: Any) -> Any:
    made = listener()
    return (Inlet().named("audio") >> made["audio"]) | (Inlet().named("control") >> made["control"])


async def calling(http: Any, caller: Client) -> None:
    headers = {"Content-Type": "application/sdp"}
    response = await http.post("/v1/realtime/calls", content=await caller.offer(), headers=headers)
    await caller.accept(response.text)
    await caller.next("session.created")


def test_a_turn_is_ended_by_hand_where_sound_comes_by_rtp() -> None:
    async def main() -> None:
        async with serving(listening) as server, client("oai-events") as caller:
            await calling(server.http, caller)
            manual = {"format": {"type": "audio/pcmu"}, "turn_detection": None}
            (call,) = server.service.calls.values()
            async with asyncio.timeout(10):
                while call.heard_seconds < 0.2:
                    await asyncio.sleep(0.02)
            caller.send(type="session.update", session={"type": "realtime", "audio": {"input": manual}})
            updated = await caller.next("session.updated")
            assert updated["session"]["audio"]["input"] == manual
            caller.send(type="input_audio_buffer.commit")
            caller.send(type="input_audio_buffer.commit", event_id="soon")  # less than 100 ms later
            said: dict[str, Any] = {}
            async with asyncio.timeout(10):
                while not {"error", "conversation.item.done"} <= said.keys():
                    message = await caller.messages.get()
                    said[message["type"]] = message
            error = said["error"]["error"]
            assert (error["code"], error["event_id"]) == ("input_audio_buffer_commit_empty", "soon")
            item = said["input_audio_buffer.committed"]["item_id"]
            assert said["conversation.item.done"]["item"]["id"] == item

    asyncio.run(main())


@pytest.mark.parametrize("label", ["events", "oai-events"])
def test_a_stage_that_fails_is_named_before_the_connection_ends(label: str) -> None:
    async def main() -> None:
        async with serving(listening) as server, client(label) as caller:
            if label == "events":
                response = await server.http.post("/rtc/offer", json={"sdp": await caller.offer()})
                await caller.accept(response.json()["sdp"])
                await caller.opened()
                caller.send(type="control", name="session", data={"instructions": "fail"})
                error = await caller.next("error")
                assert error["code"] == "failed"
            else:
                await calling(server.http, caller)
                caller.send(type="session.update", session={"type": "realtime", "instructions": "fail"})
                error = (await caller.next("error"))["error"]
                assert error["type"] == "server_error"
            assert "'oai_test_listener' failed" in error["message"]
            assert "secret" not in error["message"]
            async with asyncio.timeout(10):
                while server.service.calls:
                    await asyncio.sleep(0.02)
            assert server.service.counts["failed"] == 1

    asyncio.run(main())
