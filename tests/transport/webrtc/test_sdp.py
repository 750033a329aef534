"""Offers from strangers: what passes, what is taken out, what is refused."""

from __future__ import annotations

import asyncio
import ipaddress

import pytest
from aiortc import RTCConfiguration, RTCPeerConnection
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.transport.webrtc.sdp import LONGEST, BadOffer, check_offer


async def _offer() -> str:
    pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    pc.addTransceiver("audio")
    pc.addTransceiver("video")
    pc.createDataChannel("events")
    offer = await pc.createOffer()
    await pc.setLocalDescription(offer)
    sdp: str = pc.localDescription.sdp
    await pc.close()
    kept = [line for line in sdp.splitlines() if not line.startswith(("a=candidate", "a=end-of-candidates"))]
    return "\r\n".join([*kept, ""])


OFFER = asyncio.run(_offer())


def with_candidates(*hosts: str) -> str:
    lines = [f"a=candidate:{i} 1 udp {100 - i} {host} {5000 + i} typ host" for i, host in enumerate(hosts)]
    return OFFER + "\r\n".join([*lines, "a=end-of-candidates", ""])


def without(start: str) -> str:
    return "\r\n".join([*(line for line in OFFER.splitlines() if not line.startswith(start)), ""])


def test_an_offer_of_a_browser_passes_unchanged() -> None:
    offer = with_candidates("192.168.1.5", "10.0.0.1", "2001:db8::1", "8.8.8.8")
    assert check_offer(offer) == offer


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.8.8.8", "::1", "169.254.169.254", "0.0.0.0", "224.0.0.251", "255.255.255.255", "fe80::1"),
        *("::ffff:127.0.0.1", "::", "ff02::1", "a1b2.local", "internal.example"),
    ],
)
def test_a_candidate_that_must_not_be_contacted_is_taken_out(host: str) -> None:
    kept = check_offer(with_candidates("192.168.1.5", host))
    assert f" {host} " not in kept
    assert " 192.168.1.5 " in kept
    assert "end-of-candidates" not in kept


def test_what_is_denied_can_be_chosen() -> None:
    offer = with_candidates("127.0.0.1", "192.168.1.5")
    assert check_offer(offer, denied=()) == offer
    kept = check_offer(offer, denied=[ipaddress.ip_network("192.168.0.0/16")])
    assert " 127.0.0.1 " in kept
    assert " 192.168.1.5 " not in kept


@pytest.mark.parametrize(
    ("offer", "said"),
    [
        ("", "0 m= lines"),
        ("v=0\r\n", "0 m= lines"),
        (OFFER + "a=x:" + "y" * LONGEST, "65536 is the most"),
        (OFFER + "m=audio 9 UDP/TLS/RTP/SAVPF 0\r\n" * 2, "5 m= lines"),
        (with_candidates(*["192.168.1.5"] * 33), "33 candidates"),
        (without("a=fingerprint"), "a=fingerprint"),
        (without("a=setup"), "a=setup"),
        (without("a=ice-ufrag"), "a=ice-ufrag"),
        (without("a=ice-pwd"), "a=ice-pwd"),
        (without("a=sctp-port"), "a=sctp-port"),
        (without("a=rtcp-mux"), "a=rtcp-mux"),
        (without("a=mid"), "a=mid"),
        (without("a=group"), "BUNDLE"),
        (OFFER.replace("m=application", "m=text"), "'text'"),
        (OFFER + "a=candidate:1 1 udp\r\n", "AssertionError"),
        (OFFER + "a=candidate:1 1 udp x 192.168.1.5 y typ host\r\n", "ValueError"),
        (OFFER + "a=setup:sideways\r\n", "KeyError"),
        (OFFER + "a=fingerprint\r\n", "AttributeError"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_reason(offer: str, said: str) -> None:
    with pytest.raises(BadOffer) as refused:
        check_offer(offer)
    assert said in str(refused.value)


LINES = OFFER.splitlines()
EDITS = st.lists(
    st.tuples(
        st.integers(0, len(LINES) - 1),
        st.sampled_from(["drop", "double", "cut", "garble", "swap"]),
        st.integers(0, 200),
        st.text(max_size=12),
    ),
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(EDITS)
def test_an_offer_that_was_tampered_with_passes_or_is_refused(edits: list[tuple[int, str, int, str]]) -> None:
    lines = list(LINES)
    for index, kind, at, text in edits:
        index %= len(lines)
        if kind == "drop" and len(lines) > 1:
            del lines[index]
        elif kind == "double":
            lines.insert(at % len(lines), lines[index])
        elif kind == "cut":
            lines[index] = lines[index][: at % (len(lines[index]) + 1)]
        elif kind == "garble":
            position = at % (len(lines[index]) + 1)
            lines[index] = lines[index][:position] + text + lines[index][position:]
        else:
            other = at % len(lines)
            lines[index], lines[other] = lines[other], lines[index]
    try:
        kept = check_offer("\r\n".join([*lines, ""]))
    except BadOffer:
        return
    assert check_offer(kept) == kept


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_text_that_is_no_offer_is_refused(text: str) -> None:
    with pytest.raises(BadOffer):
        check_offer(text)
