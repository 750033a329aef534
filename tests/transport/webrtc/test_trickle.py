"""Candidates that come after the offer (RFC 9725 section 4.3): fragments, and PATCH on the resource of a WHIP peer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.transport.webrtc.sdp import LONGEST, MOST_CANDIDATES, BadOffer, read_fragment

from .test_peer import Client, client, serving, until

FRAGMENT = "application/trickle-ice-sdpfrag"
HEAD = (
    "a=group:BUNDLE 0\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\na=ice-ufrag:EsAw\r\na=ice-pwd:"
    + "p" * 24
    + "\r\n"
)


def line(host: str, port: int = 5000, protocol: str = "udp") -> str:
    return f"a=candidate:1387637174 1 {protocol} 2122260223 {host} {port} typ host generation 0 ufrag EsAw\r\n"


def test_a_fragment_of_the_rfc() -> None:
    hosts = ("192.0.2.1", "127.0.0.1", "169.254.169.254", "a1b2.local")
    tcp = line("192.0.2.1", 9, "tcp").replace("generation", "tcptype active generation")
    found = read_fragment(HEAD + "".join(map(line, hosts)) + tcp + "a=end-of-candidates\r\n")
    assert (found.username, found.password, found.mids) == ("EsAw", "p" * 24, ("0",))
    assert [(one.ip, one.port, one.protocol) for one in found.candidates] == [("192.0.2.1", 5000, "udp")]
    assert (found.stated, found.ended) == (5, True)
    bare = read_fragment(HEAD.replace("\r\n", "\n"))
    assert (bare.candidates, bare.stated, bare.ended) == ((), 0, False)


@pytest.mark.parametrize(
    ("sdp", "said"),
    [
        ("", "a=ice-ufrag"),
        (HEAD.replace("ice-pwd", "ice-xyz"), "a=ice-pwd"),
        ("nonsense", "not SDP"),
        (HEAD + "a=candidate:1 1 udp x 192.0.2.1 9 typ host\r\n", "malformed"),
        (HEAD + "a=candidate:1 1 udp\r\n", "malformed"),
        (HEAD + line("192.0.2.1") * (MOST_CANDIDATES + 1), "33 candidates"),
        (HEAD + line("192.0.2.1") * 5000, f"{LONGEST} is the most"),
    ],
)
def test_what_is_no_fragment(sdp: str, said: str) -> None:
    with pytest.raises(BadOffer, match=re.escape(said)):
        read_fragment(sdp)


@given(st.text() | st.lists(st.sampled_from([*HEAD.splitlines(True), line("192.0.2.1"), "\n", "a=", "x"])).map("".join))
@settings(max_examples=300, deadline=None)
def test_whatever_is_sent_is_read_or_refused(sdp: str) -> None:
    try:
        found = read_fragment(sdp)
    except BadOffer:
        return
    assert len(found.candidates) <= found.stated <= MOST_CANDIDATES


@dataclass
class Resource:
    """A WHIP resource made by an offer without candidates, and what would complete it."""

    http: httpx.AsyncClient
    browser: Client
    url: str
    tag: str
    answer: str
    head: str
    candidates: str

    async def patch(self, body: str, kind: str = FRAGMENT, **headers: str) -> httpx.Response:
        return await self.http.patch(self.url, content=body, headers={"content-type": kind, **headers})

    async def tell(self, body: str) -> int:
        return (await self.patch(self.head + body, **{"if-match": self.tag})).status_code


@asynccontextmanager
async def whip() -> AsyncIterator[Resource]:
    async with serving() as server, client(None) as browser:
        lines = (await browser.offer()).splitlines(True)
        candidates = [one for one in lines if one.startswith(("a=candidate", "a=end-of-candidates"))]
        offer = "".join(one for one in lines if one not in candidates)
        response = await server.http.post("/whip", content=offer, headers={"content-type": "application/sdp"})
        assert response.status_code == 201
        assert response.headers["accept-patch"] == FRAGMENT
        assert re.fullmatch(r'"[!#-~]+"', response.headers["etag"])
        head = "".join(one for one in lines if one.startswith(("m=audio", "a=mid", "a=ice-ufrag", "a=ice-pwd")))
        yield Resource(
            server.http,
            browser,
            response.headers["location"],
            response.headers["etag"],
            response.text,
            head,
            "".join(candidates),
        )


def test_the_server_calls_the_candidates_that_come_later() -> None:
    """The client is told of no address to call, so only the server can begin."""

    async def main() -> None:
        async with whip() as one:
            silent = [line for line in one.answer.splitlines(True) if not line.startswith(("a=candidate", "a=end-of"))]
            await one.browser.accept("".join(silent))
            await asyncio.sleep(0)
            assert one.browser.pc.iceConnectionState != "completed"
            response = await one.patch(one.head + one.candidates, **{"if-match": one.tag})
            assert (response.status_code, response.content) == (204, b"")
            assert "etag" not in response.headers
            await until(lambda: one.browser.pc.connectionState == "connected")
            assert await one.tell(line("192.0.2.1")) == 204  # when it is too late too
            assert (await one.http.delete(one.url)).status_code == 200
            assert await one.tell(line("192.0.2.1")) == 404

    asyncio.run(main())


def test_conditions_and_refusals() -> None:
    async def main() -> None:
        async with whip() as one:
            body = one.head + line("192.0.2.1")
            for headers, status in (
                ({}, 428),
                ({"if-match": '"other"'}, 412),
                ({"if-match": f'"other", {one.tag}'}, 204),
                ({"if-match": "*"}, 204),
                ({"etag": one.tag}, 204),
                ({"etag": '"other"'}, 412),
            ):
                assert (await one.patch(body, **headers)).status_code == status
            assert (await one.patch(body, "application/sdp", **{"if-match": one.tag})).status_code == 415
            assert (await one.patch("nonsense", **{"if-match": one.tag})).status_code == 400
            assert await one.tell("a=mid:7\r\n") == 400
            restart = re.sub("ice-ufrag:.*", "ice-ufrag:another", body)
            refused = await one.patch(restart, **{"if-match": "*"})
            assert refused.status_code == 422
            assert refused.json()["error"]["type"] == "IceRestart"
            assert (await one.http.patch("/whip/other", content=body)).status_code == 404
            await one.browser.accept(one.answer)
            await until(lambda: one.browser.pc.connectionState == "connected")  # nothing of it ended the session

    asyncio.run(main())


def test_candidates_are_counted_whenever_they_come() -> None:
    async def main() -> None:
        async with whip() as one:
            for number in range(MOST_CANDIDATES):
                assert await one.tell(line("192.0.2.1", 5000 + number)) == 204
            assert await one.tell(line("192.0.2.1", 6000)) == 400
            assert await one.tell("") == 204

    asyncio.run(main())


def test_an_address_that_must_not_be_called_is_left_out_silently() -> None:
    async def main() -> None:
        async with whip() as one, asyncio.timeout(10):
            loop = asyncio.get_running_loop()
            called: asyncio.Queue[bytes] = asyncio.Queue()

            class Listener(asyncio.DatagramProtocol):
                def datagram_received(self, data: bytes, address: object) -> None:
                    called.put_nowait(data)

            listener, _ = await loop.create_datagram_endpoint(Listener, local_addr=("127.0.0.2", 0))
            port = listener.get_extra_info("sockname")[1]
            assert await one.tell(line("127.0.0.2", port)) == 204
            await called.get()  # a client of this host may name addresses of this host
            for host in ("169.254.169.254", "0.0.0.0", "224.0.0.1", "metadata.internal"):
                assert await one.tell(line(host)) == 204
            listener.close()

    asyncio.run(main())
