"""``python -m antiphon.apps.bench.transport_peers``: an echo over WebRTC, ours beside stock aiortc's in the same run.

A server process answers offers either with our peers around the ``Echo`` graph, or as an aiortc program does that sends
the track it receives straight back. The clients are in this process, aiortc that sends packets encoded beforehand. Each
process keeps to a core of its own where there are two.

- *mouth to ear*: a chirp each second, found again in what comes back by cross-correlation. From the moment its first
  sample is spoken (20 ms before its packet can leave) to the moment that sample is due at the client's loudspeaker:
  packetising, Opus both ways, two trips over loopback, the server, and the client's own playout buffer, which is ours
  for both. Sound cards are not in it. Several calls each, the one server before the other and then the other way round.
- *peers*: how many the server carries at 50 frames a second each way. Frames count as delivered when they carry sound:
  a server that fills gaps with silence gains nothing. The knee is the largest number with at least 49.5 of them a
  second for the mean peer and an event loop at most 20 ms late in 99 of 100 looks (one every 10 ms). CPU time says what
  a machine shared with others cannot: how many a core would carry. One of the peers listens to chirps too.
- *refusal*: what the offer after the last place gets.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from argparse import ArgumentParser
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

import aioice.ice
import httpx
import numpy as np
import uvicorn
from aiortc import RTCConfiguration, RTCPeerConnection, RTCRtpReceiver, RTCSessionDescription
from aiortc.rtp import RtpPacket
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ...codecs import opus
from ...codecs.resample import Samples
from ...pipelines.graph import Graph
from ...pipelines.stage import Inlet
from ...pipelines.stages.parrot import Echo
from ...transport.service import Service
from ...transport.webrtc.receiver import attach, with_fec
from ...transport.webrtc.routes import routes
from .common import command_line, write_result
from .plots import plot_transport_peers
from .transport_call import PTIME, Talk

MODULE = "antiphon.apps.bench.transport_peers"
PATHS = ("antiphon", "aiortc")
RATE, SENT_RATE = 16000, 24000  # samples a second: compared, encoded
PERIOD, CHIRP = 1.0, 0.1  # seconds from chirp to chirp, and of one
LONGEST = 0.8  # seconds that sound may take
WARM_UP = 2.0  # seconds of a call that are not measured
LOOK = 0.01  # seconds between looks at how late the server's event loop is
SOUND_BYTES = 32  # a packet of the test sound is larger, one of silence smaller
FRAMES, LATE_MS = 49.5, 20.0  # a second at least, at the 99th percentile at most
LATENCY_MS, PEERS = 110, 40  # promised
LOOKAHEAD_MS = 6.5  # of libopus for speech, once for each of the two encoders
STATM = Path("/proc/self/statm")
CORES = sorted(os.sched_getaffinity(0))  # the first is the server's, the last the clients'


# ---------------------------------------------------------------- the server process


def echo(options: Mapping[str, Any]) -> Graph:
    """The graph that is served."""
    if options:
        raise ValueError(f"the echo has no options, got {', '.join(options)}")
    return Inlet().named("audio") >> Echo()


def stock_routes() -> list[BaseRoute]:
    """The same offer as to our page's route, answered by aiortc alone."""
    peers: set[RTCPeerConnection] = set()

    async def offer(request: Request) -> Response:
        sdp = (await request.json())["sdp"]
        peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        peers.add(peer)
        peer.on("track", peer.addTrack)
        await peer.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
        await peer.setLocalDescription(await peer.createAnswer())
        return JSONResponse({"sdp": peer.localDescription.sdp}, 201)

    return [Route("/rtc/offer", offer, methods=["POST"])]


def resident_bytes() -> int:
    """Memory of this process."""
    return int(STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Lateness:
    """How late the running event loop is, in milliseconds, at every look since ``take``."""

    def __init__(self) -> None:
        self._late: list[float] = []

    async def watch(self) -> None:
        """Look at the loop for ever."""
        while True:
            due = time.monotonic() + LOOK
            await asyncio.sleep(LOOK)
            self._late.append(1000 * (time.monotonic() - due))

    def take(self) -> float:
        """The 99th percentile."""
        late, self._late = self._late or [0.0], []
        return float(np.percentile(late, 99))


class Usage:
    """CPU time, memory, how late the event loop is and what its peers lacked, since ``report`` was last asked for.

    peers: what each, by its name, tells of itself; none for stock.
    """

    def __init__(self, peers: Callable[[], dict[str, dict[str, Any]]]) -> None:
        self.lateness, self._peers = Lateness(), peers
        self._before: dict[str, dict[str, int]] = {}
        self._since, self._cpu = time.monotonic(), time.process_time()

    async def report(self, request: Request) -> Response:
        """``GET /usage``."""
        del request
        now, cpu = time.monotonic(), time.process_time()
        found = {"seconds": now - self._since, "cpu_seconds": cpu - self._cpu, "late_ms_p99": self.lateness.take()}
        self._since, self._cpu = now, cpu
        lacked = {
            name: {"gaps": peer["sender"]["gaps"], "concealed": peer["receiver"]["concealed"]}
            for name, peer in self._peers().items()
        }
        for count in ("gaps", "concealed"):
            found[count] = sum(one[count] - self._before.get(name, one)[count] for name, one in lacked.items())
        self._before = lacked
        return JSONResponse(found | {"calls": len(lacked), "rss_mib": resident_bytes() / 2**20})


async def serve(path: str, max_calls: int) -> None:
    """Serve until standard input ends; the first line printed is the port."""
    service = Service(echo, None, max_calls=max_calls)
    offers = routes(service) if path == "antiphon" else stock_routes()
    running = getattr(getattr(offers[0], "endpoint", None), "__self__", None)  # the peers of ``routes``
    usage = Usage(lambda: {name: peer.statistics() for name, (peer, _) in running.running.items()} if running else {})
    app = Starlette(routes=[*offers, Route("/usage", usage.report)])
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    tasks = [asyncio.create_task(usage.lateness.watch()), asyncio.create_task(server.serve([listening]))]
    print(listening.getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    await service.close()
    server.should_exit = True
    await tasks[1]
    tasks[0].cancel()


@asynccontextmanager
async def serving(path: str, max_calls: int = 64) -> AsyncIterator[httpx.AsyncClient]:
    """A server process on a core of its own; a client for its requests."""
    arguments = ["--serve", path, "--core", str(CORES[0]), "--max-calls", str(max_calls)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", MODULE, *arguments, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            port = int(await process.stdout.readline())
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http:
            yield http
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


# ---------------------------------------------------------------- the clients


class Refused(RuntimeError):
    """The server took no further peer."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"{response.status_code}: {response.text[:200]}")
        self.status, self.retry_after = response.status_code, response.headers.get("retry-after")


class Client:
    """An aiortc client that talks; ``frames`` counts the packets with sound that came back, if it does not listen."""

    def __init__(self, payloads: Sequence[bytes]) -> None:
        self.talk = Talk(payloads)
        self.frames = 0
        self.peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.peer.addTrack(self.talk)

    async def connect(self, http: httpx.AsyncClient) -> RTCRtpReceiver:
        """Offer, and take the answer. Raises Refused."""
        await self.peer.setLocalDescription(await self.peer.createOffer())
        response = await http.post("/rtc/offer", json={"sdp": self.peer.localDescription.sdp})
        if response.status_code != 201:
            raise Refused(response)
        receiver = self.peer.getReceivers()[0]

        async def count(packet: RtpPacket, arrival_time_ms: int) -> None:
            del arrival_time_ms
            self.frames += len(packet.payload) > SOUND_BYTES

        setattr(receiver, "_handle_rtp_packet", count)  # noqa: B010 (a method, to the type checker)
        answer = RTCSessionDescription(response.json()["sdp"], "answer")
        await self.peer.setRemoteDescription(with_fec(answer))
        return receiver


def chirps(rate: int, seconds: float) -> Samples:
    """A sweep from 300 to 3300 Hz at the begin of each ``PERIOD``, over noise so that no packet is silence."""
    at = np.arange(round(CHIRP * rate)) / rate
    sweep = 0.4 * np.sin(2 * np.pi * (300 * at + 3000 / (2 * CHIRP) * at**2)) * np.hanning(len(at))
    whole = 0.01 * np.random.default_rng(1).standard_normal(round(seconds * rate))
    for begin in range(0, len(whole) - len(at) + 1, round(PERIOD * rate)):
        whole[begin : begin + len(at)] += sweep
    return np.asarray(whole, np.float32)


def encoded(samples: Samples) -> list[bytes]:
    """Packets of 20 ms."""
    encoder, size = opus.encoder(SENT_RATE), round(PTIME * SENT_RATE)
    return [encoder.encode(samples[i : i + size]) for i in range(0, len(samples) - size + 1, size)]


def lags(heard: Samples, began: float) -> list[float]:
    """Milliseconds that each chirp in ``heard`` (at RATE) took; its first sample was due ``began`` seconds after the
    first of the first chirp was spoken.
    """
    template = chirps(RATE, CHIRP)
    found = []
    first = int(np.ceil(began / PERIOD))
    last = int((began + len(heard) / RATE - LONGEST - CHIRP) / PERIOD)
    for number in range(first, last + 1):
        offset = round((number * PERIOD - began) * RATE)
        window = heard[offset : offset + round((LONGEST + CHIRP) * RATE)]
        if len(window) >= len(template):
            match = np.correlate(window, template, "valid")
            found.append(1000 * (offset / RATE + began - number * PERIOD + int(np.argmax(match)) / RATE))
    return found


class Ear:
    """What a client hears of its own chirps, as a loudspeaker would play it, from ``WARM_UP`` seconds on."""

    def __init__(self, talk: Talk, receiver: RTCRtpReceiver) -> None:
        self.talk, self.audio = talk, attach(receiver, paced=True)
        self._pieces: list[Samples] = []
        self._origins: list[float] = []  # the time at which the first sample was due, as each frame tells it

    async def listen(self, seconds: float = float("inf")) -> None:
        """For so many seconds after the warm-up."""
        async for played in self.audio:
            self._pieces.append(played.samples)
            self._origins.append(time.monotonic() - played.position / RATE)
            if len(self._pieces) * PTIME > seconds + WARM_UP:
                return

    def lags(self) -> list[float]:
        """Milliseconds from mouth to ear, of each chirp."""
        spoken, skipped = self.talk.sent_at[0] - PTIME, round(WARM_UP / PTIME)
        if len(self._pieces) <= skipped:
            return []
        began = min(self._origins[skipped:]) + WARM_UP - spoken  # a pull is never early: the least is the playout clock
        return lags(np.concatenate(self._pieces[skipped:]), began)


async def mouth_to_ear(path: str, seconds: float) -> dict[str, Any]:
    """The lags of a call, and what they are made of."""
    client = Client(encoded(chirps(SENT_RATE, PERIOD * np.ceil(seconds + WARM_UP + 1))))
    async with serving(path) as http:
        try:
            ear = Ear(client.talk, await client.connect(http))
            await ear.listen(seconds)
        finally:
            await client.peer.close()
    found, stats = ear.lags(), ear.audio.stats
    parts = {"packet": 1000 * PTIME, "codecs": 2 * LOOKAHEAD_MS, "client_buffer": stats.delay_ms}
    parts["server_and_network"] = median(found) - sum(parts.values())
    return {
        "ms": [round(lag, 1) for lag in found],
        "parts_ms": {name: round(part, 1) for name, part in parts.items()},
        "client_concealed_ms": round(1000 * stats.concealed / RATE),
        "load_average": round(os.getloadavg()[0], 2),
    }


def summary(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several calls: the middle of their chirps, the extremes, and the middle of each part."""
    every = [lag for call in calls for lag in call["ms"]]
    names = calls[0]["parts_ms"]
    return {
        "chirps": len(every),
        "ms_p50": round(median(every), 1),
        "ms_least": min(every),
        "ms_most": max(every),
        "parts_ms": {name: round(median(call["parts_ms"][name] for call in calls), 1) for name in names},
        "calls": list(calls),
    }


async def peers(path: str, count: int, seconds: float) -> dict[str, Any]:
    """``count`` clients at once, the last of which listens, and one more than the server has places for."""
    payloads = encoded(chirps(SENT_RATE, 10 * PERIOD))
    clients = [Client(payloads) for _ in range(count)]
    lateness = Lateness()
    tasks = [asyncio.create_task(lateness.watch())]
    async with serving(path, max_calls=count) as http:
        try:
            for client in clients[:-1]:
                await client.connect(http)
            ear = Ear(clients[-1].talk, await clients[-1].connect(http))
            tasks.append(asyncio.create_task(ear.listen()))
            await asyncio.sleep(WARM_UP)
            await http.get("/usage")
            lateness.take()
            before, cpu, began = [client.frames for client in clients[:-1]], time.process_time(), time.monotonic()
            await asyncio.sleep(seconds)
            after, took = [client.frames for client in clients[:-1]], time.monotonic() - began
            client_cpu = (time.process_time() - cpu) / took
            usage = (await http.get("/usage")).json()
            refused = await _refusal(http, payloads) if path == "antiphon" else None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*(client.peer.close() for client in clients), *tasks, return_exceptions=True)
    rates = [(end - begin) / took for begin, end in zip(before, after, strict=True)]
    heard = ear.lags()
    row = {
        "path": path,
        "peers": count,
        "frames_a_second": round(mean(rates), 2),
        "frames_a_second_least": round(min(rates), 2),
        "late_ms_p99": round(usage["late_ms_p99"], 1),
        "mouth_to_ear_ms": round(median(heard), 1) if heard else None,
        **(
            {
                "calls_lost": count - usage["calls"],
                "gaps": usage["gaps"],
                "concealed_ms": round(1000 * usage["concealed"] / RATE),
            }
            if path == "antiphon"
            else {}
        ),
        "cpu": round(usage["cpu_seconds"] / usage["seconds"], 3),
        "cpu_us_per_peer_per_20_ms": round(1e6 * usage["cpu_seconds"] / usage["seconds"] * PTIME / count),
        "rss_mib": round(usage["rss_mib"]),
        "client_cpu": round(client_cpu, 3),
        "client_late_ms_p99": round(lateness.take(), 1),
        "load_average": round(os.getloadavg()[0], 2),
    }
    return row | ({"refused": refused} if refused else {})


async def _refusal(http: httpx.AsyncClient, payloads: Sequence[bytes]) -> dict[str, Any]:
    extra = Client(payloads)
    try:
        await extra.connect(http)
    except Refused as error:
        return {"status": error.status, "retry_after": error.retry_after}
    finally:
        await extra.peer.close()
    return {"status": 201, "retry_after": None}


def knee(rows: Sequence[Mapping[str, Any]], path: str) -> int:
    """The largest number of peers of which all were carried; 0 for none. A smaller number may have failed by chance."""
    carried = (row for row in rows if row["frames_a_second"] >= FRAMES and row["late_ms_p99"] < LATE_MS)
    return max((int(row["peers"]) for row in carried if row["path"] == path), default=0)


def verdict(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The promises, and what was measured."""
    rows = numbers["rows"]
    statuses = [row["refused"]["status"] for row in rows if "refused" in row]
    return {
        "mouth_to_ear_ms": {"measured": numbers["mouth_to_ear"]["antiphon"]["ms_p50"], "at_most": LATENCY_MS},
        "mouth_to_ear_ms_stock": numbers["mouth_to_ear"]["aiortc"]["ms_p50"],
        "peers_per_core": {"measured": knee(rows, "antiphon"), "at_least": PEERS},
        "peers_per_core_stock": knee(rows, "aiortc"),
        "refused_with_503": {"measured": sum(status == 503 for status in statuses), "at_least": len(statuses)},
    }


async def measure(options: Any) -> dict[str, Any]:
    """Both paths, taking turns."""
    numbers: dict[str, Any] = {"aiortc": version("aiortc"), "seconds": options.seconds, "mouth_to_ear": {}, "rows": []}
    calls: dict[str, list[dict[str, Any]]] = {path: [] for path in PATHS}
    with mock.patch.object(aioice.ice, "get_host_addresses", return_value=["127.0.0.1"]):
        for number in range(options.calls):
            for path in PATHS if number % 2 == 0 else reversed(PATHS):
                one = await mouth_to_ear(path, options.latency_seconds)
                calls[path].append(one)
                print(f"{path}: mouth to ear {one}", flush=True)
        numbers["mouth_to_ear"] = {path: summary(made) for path, made in calls.items() if made}
        for path, counts in zip(PATHS, (options.peers, options.stock_peers), strict=True):
            for count in counts:
                row = await peers(path, count, options.seconds)
                numbers["rows"].append(row)
                print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return numbers


def main(arguments: Sequence[str]) -> None:
    """See the module."""
    parser = ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--seconds", type=float, default=8.0, help="measured of each number of peers (%(default)s)")
    parser.add_argument("--latency-seconds", type=float, default=7.0, help="measured of each echo (%(default)s)")
    parser.add_argument("--calls", type=int, default=4, help="of each echo (%(default)s)")
    parser.add_argument("--peers", type=int, nargs="*", default=[10, 20, 30, 40, 50], help="%(default)s")
    parser.add_argument("--stock-peers", type=int, nargs="*", default=[10, 20], help="%(default)s")
    parser.add_argument("--no-write", dest="write", action="store_false", help="leave results/ as it is")
    parser.add_argument("--serve", choices=PATHS, help="be the server (used by the benchmark itself)")
    parser.add_argument("--core", type=int, default=CORES[0], help="of that server")
    parser.add_argument("--max-calls", type=int, default=64, help="of that server")
    options = parser.parse_args(arguments)
    if options.serve:
        os.sched_setaffinity(0, [options.core])
        addresses = ["127.0.0.1"] if options.serve == "aiortc" else []  # ours offers it by itself
        with mock.patch.object(aioice.ice, "get_host_addresses", return_value=addresses):
            asyncio.run(serve(options.serve, options.max_calls))
        return
    os.sched_setaffinity(0, CORES[-1:])
    numbers = asyncio.run(measure(options))
    numbers["verdict"] = verdict(numbers)
    for name, one in numbers["verdict"].items():
        print(f"{name}: {one}")
    if options.write:
        plot_transport_peers(write_result("transport_peers", command_line(MODULE, arguments), numbers))


if __name__ == "__main__":
    main(sys.argv[1:])
