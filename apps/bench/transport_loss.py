"""``python -m antiphon.apps.bench.transport_loss``: what a bad network leaves of speech, ours beside stock aiortc.

The same packets, lost and delayed by the same seeds, go through our playout buffer and through aiortc's own jitter
buffer and decoder, on a simulated clock: loss of 0, 1, 5 and 10 percent, each packet on its own, with and without
0 to 60 ms of jitter. For each:

- *covered*: the share of the timeline that was handed out as sound, and how much of it came from packets (decoded, or
  from the copy in the next packet) rather than being made up.
- *delay*: from the moment a packet could have come at best to the moment its sound is handed out, p50 and p95. Stock
  has no playout clock: its frames count as handed out as soon as they leave its decoder.
- *recovery*: the delay before, and two seconds after, one lost packet, 200 ms of lost packets, and 300 ms in which
  the network stood still.
- *words*: errors of the embedded recogniser on what was handed out.
- *cost*: CPU time of the receive path for 20 ms.

A call over loopback in real time (``transport_call.py``) then checks the simulation against the whole of aiortc.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from aiortc.codecs import get_decoder
from aiortc.jitterbuffer import JitterBuffer
from aiortc.rtcrtpparameters import RTCRtpCodecParameters
from aiortc.rtp import RtpPacket

from ...codecs import opus
from ...codecs.audio_file import read, write
from ...codecs.resample import Resampler, Samples
from ...pipelines.captions import Final
from ...pipelines.transcription import Transcriber
from ...transport.webrtc.playout import Kind, PlayoutBuffer
from ..train.evaluate import word_errors
from .common import command_line, write_result
from .plots import plot_transport_loss
from .transport_call import measure_calls

MODULE = "antiphon.apps.bench.transport_loss"
CLIP = Path(__file__).parents[1] / "samples" / "two_cities.flac"
RATE, PTIME, NETWORK = 16000, 0.02, 0.03  # samples a second, seconds of a packet, seconds it travels at least
LOSSES, JITTERS = (0.0, 0.01, 0.05, 0.1), (0.0, 0.06)
EVENTS = {"packet": (8.0, 8.02), "burst": (8.0, 8.2), "stall": (8.0, 8.3)}  # seconds; see ``disturbed``
LEAD = 0.012  # seconds of silence more before each seed's speech
EDGE = 0.5  # seconds at the end of the clip that are left out: what is still in a buffer there is not lost

Trace = list[tuple[float, int]]  # seconds of arrival, number of packet


@dataclass
class Heard:
    """What came out: samples at 16 kHz, and each span of media (seconds) with the time it was handed out."""

    samples: Samples
    spans: list[tuple[float, float, float]] = field(default_factory=list)
    from_packets: float = 0.0  # seconds
    cpu_us: float = 0.0  # for 20 ms of media

    def covered(self, seconds: float) -> float:
        """Share of the first ``seconds``."""
        there = np.zeros(round(seconds * 1000), bool)
        for _, begin, end in self.spans:
            there[round(begin * 1000) : round(end * 1000)] = True
        return float(there.mean())

    def delays(self, begin: float, end: float) -> list[float]:
        """Milliseconds, of what was handed out between these times, above what the network takes."""
        return [1000 * (at - upto - NETWORK) for at, _, upto in self.spans if begin <= at < end]


def network(packets: int, loss: float, jitter: float, seed: int) -> Trace:
    """Arrivals of packets that leave every 20 ms, once their sound is complete."""
    rng = random.Random(seed)
    trace = []
    for number in range(packets):
        arrival = (number + 1) * PTIME + NETWORK + jitter * rng.random()
        if rng.random() >= loss:
            trace.append((arrival, number))
    return sorted(trace)


def disturbed(packets: int, event: str) -> Trace:
    """A clean network but for one of ``EVENTS``: its packets are lost, or (a stall) arrive all at once when it ends."""
    begin, end = EVENTS[event]
    clean = network(packets, 0, 0, 0)
    if event == "stall":
        return [(end if begin <= at < end else at, number) for at, number in clean]
    return [(at, number) for at, number in clean if not begin <= number * PTIME < end]


def ours(payloads: Sequence[bytes], trace: Trace, phase: float) -> Heard:
    """Through ``PlayoutBuffer``, pulled every 20 ms, ``phase`` seconds after packets arrive on a clean network."""
    buffer = PlayoutBuffer(opus.decoder(RATE), round(PTIME * RATE))
    pieces, spans, begin, at = [], [], 0.0, 0
    spent = time.process_time()
    for tick in range(len(payloads)):
        now = tick * PTIME + NETWORK + phase
        while at < len(trace) and trace[at][0] <= now:
            arrival, number = trace[at]
            buffer.push(number & 0xFFFF, number * 960, payloads[number], arrival)
            at += 1
        frame = buffer.pull(now)
        pieces.append(frame.samples)
        end = buffer.media_position / RATE
        if frame.kind is not Kind.SILENCE:
            spans.append((now, begin, end))
        begin = end
    spent = time.process_time() - spent
    stats = buffer.stats
    real = (stats.decoded + stats.fec) / RATE
    return Heard(np.concatenate(pieces), spans, real, 1e6 * spent / len(payloads))


def stock(payloads: Sequence[bytes], trace: Trace, phase: float) -> Heard:
    """Through the classes that ``RTCRtpReceiver`` uses, as it uses them; resampled as a recogniser needs it."""
    del phase  # it has no clock
    jitter_buffer = JitterBuffer(capacity=16, prefetch=4)
    decoder = get_decoder(RTCRtpCodecParameters("audio/opus", clockRate=48000, channels=2, payloadType=96))
    resampler = Resampler(48000, RATE)
    pieces, spans = [], []
    spent = time.process_time()
    for arrival, number in trace:
        packet: Any = RtpPacket(payload_type=96, sequence_number=number & 0xFFFF, timestamp=number * 960)
        packet.payload = packet._data = payloads[number]
        _, encoded = jitter_buffer.add(packet)
        frames: list[Any] = decoder.decode(encoded) if encoded is not None else []
        for frame in frames:
            stereo = frame.to_ndarray().reshape(-1, 2).T.astype(np.float32) / 32768
            pieces.append(resampler.push(stereo))
            spans.append((arrival, frame.pts / 48000, frame.pts / 48000 + PTIME))
    spent = time.process_time() - spent
    return Heard(np.concatenate(pieces), spans, len(spans) * PTIME, 1e6 * spent / len(payloads))


PATHS = {"antiphon": ours, "aiortc": stock}


def phase(seed: int) -> float:
    """Playout clocks and packets are not in step: another offset for each seed, spread over 20 ms."""
    return PTIME * (0.35 + 0.618034 * seed) % PTIME


def measure(payloads: Sequence[bytes], seeds: int) -> list[dict[str, Any]]:
    """A row for each loss, jitter and path: means over seeds."""
    seconds = len(payloads) * PTIME - EDGE
    rows = []
    for jitter in JITTERS:
        for loss in LOSSES:
            for name, path in PATHS.items():
                traces = [network(len(payloads), loss, jitter, seed) for seed in range(seeds)]
                runs = [path(payloads, trace, phase(seed)) for seed, trace in enumerate(traces)]
                delays = np.concatenate([run.delays(0, seconds) for run in runs])
                row = {
                    "path": name,
                    "loss": loss,
                    "jitter_ms": round(1000 * jitter),
                    "covered": mean(run.covered(seconds) for run in runs),
                    "from_packets": mean(run.from_packets / (len(payloads) * PTIME) for run in runs),
                    "delay_ms_p50": float(np.percentile(delays, 50)),
                    "delay_ms_p95": float(np.percentile(delays, 95)),
                    "cpu_us": median(run.cpu_us for run in runs),
                }
                rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def recovery(payloads: Sequence[bytes]) -> dict[str, Any]:
    """For each path and event: the delay before and after, and its course for the picture."""
    found: dict[str, Any] = {}
    for name, path in PATHS.items():
        found[name] = {}
        for event, (_, over) in EVENTS.items():
            heard = path(payloads, disturbed(len(payloads), event), phase(0))
            found[name][event] = {
                "before_ms": round(median(heard.delays(5, 8)), 1),
                "after_2_s_ms": round(median(heard.delays(over + 2, over + 2.2)), 1),
                "later_ms": round(median(heard.delays(12, 16)), 1),
                "course": [
                    [round(at, 2), round(1000 * (at - upto - NETWORK), 1)]
                    for at, _, upto in heard.spans[::5]
                    if 7 <= at < 12
                ],
            }
    return found


def words(payloads: Sequence[bytes], seeds: int) -> dict[str, Any]:
    """Word errors (percent) of the embedded recogniser on both paths, clean and at 5 percent, and without a network.

    They depend on where the recogniser's blocks happen to begin by several words in seventy, so each seed has another
    silence before it, the same for all.
    """
    decoder = opus.decoder(RATE)
    decoded = np.concatenate([decoder.decode(payload) for payload in payloads])
    versions: dict[tuple[str, float, int], Samples] = {}
    for seed in range(seeds):
        heard = {("no network", 0.0): decoded}
        for name, path in PATHS.items():
            for loss in (0.0, 0.05):
                heard[name, loss] = path(payloads, network(len(payloads), loss, 0, seed), phase(seed)).samples
        silence = np.zeros(round(seed * LEAD * RATE), np.float32)
        versions |= {(*key, seed): np.concatenate([silence, samples]) for key, samples in heard.items()}
    said = dict.fromkeys(versions, "")
    with tempfile.TemporaryDirectory() as folder, Transcriber() as transcriber:
        paths = []
        for number, samples in enumerate(versions.values()):
            paths.append(Path(folder) / f"{number}.wav")
            write(paths[-1], samples, RATE)
        keys = list(versions)
        for number, caption in transcriber.transcribe_many(paths):
            if isinstance(caption, Final):
                said[keys[number]] += f" {caption.text}"
    found: dict[str, Any] = {}
    for name, loss in dict.fromkeys(key[:2] for key in versions):
        rates = [word_errors(transcript(), said[key]).rate for key in said if key[:2] == (name, loss)]
        found.setdefault(name, {})[f"{loss:g}"] = {"wer": round(mean(rates), 2), "runs": [round(r, 2) for r in rates]}
    return found


def wer_ratio(found: dict[str, Any]) -> float:
    """At 5 percent loss against the better of a clean network and none at all."""
    clean = min(found["antiphon"]["0"]["wer"], found["no network"]["0"]["wer"])
    return round(float(found["antiphon"]["0.05"]["wer"] / clean), 3)


def transcript() -> str:
    """What is said in the clip."""
    lines = (CLIP.parent / "README.md").read_text(encoding="utf-8").splitlines()
    return " ".join(line[2:] for line in lines if line.startswith("> "))


def encoded_clip() -> list[bytes]:
    """The clip as a browser would send it: mono, 24 kb/s, with FEC."""
    samples = read(CLIP, 24000)
    encoder = opus.encoder(24000, bitrate=24000, loss=10)
    size = round(PTIME * 24000)
    return [encoder.encode(samples[i : i + size]) for i in range(0, len(samples) - size + 1, size)]


def verdict(numbers: dict[str, Any]) -> dict[str, Any]:
    """The promises, and what was measured."""
    at = {(row["path"], row["loss"], row["jitter_ms"]): row for row in numbers["rows"]}
    ours_5, clean = at["antiphon", 0.05, 0], at["antiphon", 0.0, 0]
    events = numbers["recovery"]["antiphon"]
    return {
        "covered_at_5_percent": {"measured": ours_5["covered"], "at_least": 0.99},
        "covered_at_5_percent_stock": at["aiortc", 0.05, 0]["covered"],
        "added_delay_ms_at_5_percent": {
            "measured": round(ours_5["delay_ms_p50"] - clean["delay_ms_p50"], 1),
            "at_most": 60,
        },
        **{
            f"ms_from_before_2_s_after_{event}": {
                "measured": round(abs(events[event]["after_2_s_ms"] - events[event]["before_ms"]), 1),
                "at_most": 20,
            }
            for event in EVENTS
        },
        **({"wer_ratio": {"measured": wer_ratio(numbers["words"]), "at_most": 1.3}} if numbers["words"] else {}),
        "cpu_us_per_20_ms": {"measured": clean["cpu_us"], "at_most": 100},
    }


def main(arguments: Sequence[str]) -> None:
    """See the module."""
    parser = ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--seeds", type=int, default=10, help="of each loss and jitter (%(default)s)")
    parser.add_argument("--live", type=float, default=15.0, help="seconds of the call over loopback; 0 for none")
    parser.add_argument("--no-words", dest="words", action="store_false", help="leave out the recogniser")
    parser.add_argument("--no-write", dest="write", action="store_false", help="leave results/ as it is")
    options = parser.parse_args(arguments)
    payloads = encoded_clip()
    numbers: dict[str, Any] = {
        "packets": len(payloads),
        "decoder": opus.decoder(RATE).name,
        "aiortc": version("aiortc"),
        "seeds": options.seeds,
    }
    numbers["rows"] = measure(payloads, options.seeds)
    numbers["recovery"] = recovery(payloads)
    numbers["words"] = words(payloads, options.seeds) if options.words else {}
    if options.live:
        numbers["live"] = asyncio.run(measure_calls(payloads, options.live, loss=0.05))
    numbers["verdict"] = verdict(numbers)
    report(numbers)
    if options.write:
        plot_transport_loss(write_result("transport_loss", command_line(MODULE, arguments), numbers))


def report(numbers: dict[str, Any]) -> None:
    """Print it."""
    print(f"{'':<10}{'loss':>6}{'jitter':>8}{'covered':>10}{'packets':>9}{'p50 ms':>8}{'p95 ms':>8}{'us/20 ms':>10}")
    for row in numbers["rows"]:
        print(
            f"{row['path']:<10}{row['loss']:>6.0%}{row['jitter_ms']:>8}{row['covered']:>10.2%}"
            f"{row['from_packets']:>9.2%}{row['delay_ms_p50']:>8.0f}{row['delay_ms_p95']:>8.0f}{row['cpu_us']:>10.1f}"
        )
    for path, events in numbers["recovery"].items():
        for event, one in events.items():
            print(f"{path}, {event}: {one['before_ms']} ms before, {one['after_2_s_ms']} ms two seconds after")
    for path, losses in numbers["words"].items():
        print(f"{path}, word errors: " + ", ".join(f"{one['wer']} % at loss {loss}" for loss, one in losses.items()))
    for path, one in numbers.get("live", {}).items():
        print(f"{path}, call over loopback: " + ", ".join(f"{key} {value}" for key, value in one.items()))
    for name, one in numbers["verdict"].items():
        print(f"{name}: {one}")


if __name__ == "__main__":
    main(sys.argv[1:])
