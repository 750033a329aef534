"""Offers from strangers (SDP, RFC 8866; the use WebRTC makes of it, RFC 8829), and candidates that come after them
(fragments, RFC 8840 section 9), checked before aiortc sees them.

aiortc parses whatever it gets: thousands of candidates stall the event loop for seconds, what is missing fails in a
task that nobody awaits, and every candidate is sent a STUN packet, which lets an offer aim the server at addresses of
its choice. ``check_offer`` bounds the first, refuses the second, and takes out of the third what ``denied`` names.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from aiortc import RTCIceCandidate
from aiortc.exceptions import InternalError, InvalidAccessError, InvalidStateError, OperationError
from aiortc.sdp import MediaDescription, SessionDescription, candidate_from_sdp

LONGEST = 64 * 1024  # bytes
MOST_MEDIA = 4  # m= lines
MOST_CANDIDATES = 32
PARSE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, AssertionError, StopIteration, ArithmeticError)
"""What aiortc raises for a description that it cannot parse."""
REFUSALS = (*PARSE_ERRORS, InternalError, InvalidAccessError, InvalidStateError, OperationError)
"""What aiortc raises for a description that it cannot accept."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LOOPBACK: tuple[Network, ...] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
DENIED: tuple[Network, ...] = tuple(
    ipaddress.ip_network(network)
    for network in ("0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/128", "fe80::/10", "ff00::/8", "::ffff:0:0/96")
)
"""Never a peer's: unspecified, link-local (where clouds answer questions about themselves), multicast, mapped."""

_LINE = re.compile(r"[a-z]=.*")
_UFRAG, _PASSWORD = re.compile(r"[A-Za-z0-9+/]{4,256}"), re.compile(r"[A-Za-z0-9+/]{22,256}")


class BadOffer(ValueError):
    """An offer that is not answered; the message says what is wrong with it and what would do."""


def check_offer(sdp: str, *, denied: Iterable[Network] = (*DENIED, *LOOPBACK)) -> str:
    """The offer to answer: ``sdp`` without the candidates that are not to be contacted. Raises BadOffer.

    Taken out are candidates whose address is in a ``denied`` network, and those that name a host instead of an address
    (mDNS names too: such a peer is reached at the address it calls from).
    """
    size = len(sdp.encode(errors="surrogatepass"))
    if size > LONGEST:
        raise BadOffer(f"the offer has {size} bytes: {LONGEST} is the most")
    lines = sdp.splitlines()
    media = sum(line.startswith("m=") for line in lines)
    if not 0 < media <= MOST_MEDIA:
        raise BadOffer(f"the offer has {media} m= lines: send 1 to {MOST_MEDIA} (audio, video, application)")
    candidates = sum(line.startswith("a=candidate:") for line in lines)
    if candidates > MOST_CANDIDATES:
        raise BadOffer(f"the offer has {candidates} candidates: {MOST_CANDIDATES} is the most")
    kept = _without_denied(lines, tuple(denied))
    try:
        description = SessionDescription.parse(kept)
    except PARSE_ERRORS as error:
        raise BadOffer(
            f"the offer is not SDP that WebRTC uses ({type(error).__name__}): send that of createOffer()"
        ) from error
    for index, section in enumerate(description.media):
        _check_section(section, f"m= line {index + 1} ({section.kind[:20]!r})")
    mids = [section.rtp.muxId for section in description.media]
    if len(set(mids)) < len(mids) or not all(mids):
        raise BadOffer("the m= lines have no a=mid each of its own: send an offer of createOffer()")
    bundled = [item for group in description.group if group.semantic == "BUNDLE" for item in group.items]
    if media > 1 and sorted(bundled) != sorted(mids):
        raise BadOffer("a=group:BUNDLE does not name every m= line once: offer with bundlePolicy max-bundle")
    if sum(section.kind == "application" for section in description.media) > 1:
        raise BadOffer("the offer has more than one m=application line: one carries every data channel")
    return kept


@dataclass(frozen=True, slots=True)
class Fragment:
    """ICE attributes of a peer, of its whole description or of what came later.

    username, password: of the first section, whose transport carries the whole bundle (RFC 9143 section 7.2). mids: the
    m= lines named. candidates: those that may be contacted. stated: how many there were. ended: no more come.
    """

    username: str
    password: str
    mids: tuple[str, ...]
    candidates: tuple[RTCIceCandidate, ...]
    stated: int
    ended: bool


def read_fragment(sdp: str, *, denied: Iterable[Network] = (*DENIED, *LOOPBACK)) -> Fragment:
    """The ICE attributes of a description or a fragment. Raises BadOffer.

    Candidates are left out as by ``check_offer``, and those of a transport other than UDP too.
    """
    size = len(sdp.encode(errors="surrogatepass"))
    if size > LONGEST:
        raise BadOffer(f"the fragment has {size} bytes: {LONGEST} is the most")
    lines = [line.rstrip() for line in sdp.splitlines() if line.strip()]
    if not all(_LINE.fullmatch(line) for line in lines):
        raise BadOffer("the fragment is not SDP: send lines of application/trickle-ice-sdpfrag (RFC 8840)")
    values: dict[str, list[str]] = {name: [] for name in ("mid", "ice-ufrag", "ice-pwd", "candidate")}
    for line in lines:
        name, _, value = line[2:].partition(":")
        if line.startswith("a=") and name in values:
            values[name].append(value)
    stated = values["candidate"]
    if len(stated) > MOST_CANDIDATES:
        raise BadOffer(f"the fragment has {len(stated)} candidates: {MOST_CANDIDATES} is the most")
    if not values["ice-ufrag"] or not values["ice-pwd"]:
        raise BadOffer("the fragment has no a=ice-ufrag or no a=ice-pwd: send those of the offer")
    reached = tuple(denied)
    try:
        found = [candidate_from_sdp(one) for one in stated if _reachable(f"a=candidate:{one}", reached)]
    except PARSE_ERRORS as error:
        raise BadOffer(f"a candidate is malformed ({type(error).__name__}): send those of the browser") from error
    return Fragment(
        values["ice-ufrag"][0],
        values["ice-pwd"][0],
        tuple(values["mid"]),
        tuple(one for one in found if one.protocol.lower() == "udp"),
        len(stated),
        "a=end-of-candidates" in lines,
    )


def _check_section(section: MediaDescription, name: str) -> None:
    if section.kind not in ("audio", "video", "application"):
        raise BadOffer(f"{name} is of no kind served here: offer audio, video or application")
    if section.dtls is None or not section.dtls.fingerprints:
        raise BadOffer(f"{name} has no a=fingerprint or no a=setup: media is encrypted with DTLS-SRTP (RFC 8827)")
    ice = section.ice
    if ice is None or not _UFRAG.fullmatch(ice.usernameFragment or ""):
        raise BadOffer(f"{name} has no a=ice-ufrag of 4 to 256 ICE characters (RFC 8839)")
    if not _PASSWORD.fullmatch(ice.password or ""):
        raise BadOffer(f"{name} has no a=ice-pwd of 22 to 256 ICE characters (RFC 8839)")
    if section.kind == "application" and section.profile != "DTLS/SCTP" and section.sctp_port is None:
        raise BadOffer(f"{name} has no a=sctp-port (RFC 8841)")
    if section.kind != "application" and not section.rtcp_mux:
        raise BadOffer(f"{name} has no a=rtcp-mux: offer with rtcpMuxPolicy require")


def _without_denied(lines: list[str], denied: tuple[Network, ...]) -> str:
    kept, gone = [], 0
    for line in lines:
        if line.startswith("a=candidate:") and not _reachable(line, denied):
            gone += 1
        else:
            kept.append(line)
    if gone:  # a list that was cut is not complete: the peer is still to be met at the address it calls from
        kept = [line for line in kept if line.rstrip() != "a=end-of-candidates"]
    return "\r\n".join([*kept, ""])


def _reachable(line: str, denied: tuple[Network, ...]) -> bool:
    parts = line.split()
    try:
        address = ipaddress.ip_address(parts[4])
    except (IndexError, ValueError):
        return len(parts) < 8  # one that is malformed stays, for the parser to refuse
    return not any(address in network for network in denied)
