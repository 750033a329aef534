"""``antiphon bench asr``: what a step of streaming recognition costs, and how many sessions a device holds.

Three tables, all with random weights and emission pinned (the blank's bias is set for a given rate of tokens):

- *steps*: the seconds of one chunk in this process, same weights and audio, ours (samples in, tokens out, through the
  engine) beside NeMo's and transformers' own streaming (features in, tokens out). In float32 the tokens must agree.
- *capacity*: the most sessions whose p99 chunk latency stays below the chunk, open loop on the media clock.
- *floors*: the time that the bytes and the operations of a step need at the device's measured rates.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from ...codecs.mel import UNKNOWN, LogMel, MelConfig
from ...models.conformer.config import ASRConfig, ConformerConfig, TransducerConfig
from ...models.conformer.model import ConformerASR
from ...models.conformer.names import HF, nemo_layout, to_layout
from ...models.conformer.tokenizer import WORD_START, Source, Tokenizer
from ...pipelines.engine import Engine
from ...pipelines.recognizer import FRAME_SAMPLES, Blocks, Recognizer
from .common import RESULTS, told, write_result
from .load import run_load
from .references import NeMo, Transformers, synchronize

EMITTING = 0.3  # tokens a frame: about 3.75 a second
NOISE = 0.1  # standard deviation of the samples


@dataclass(frozen=True)
class Shape:
    """A published checkpoint's sizes."""

    encoder: ConformerConfig
    decoder: TransducerConfig


SHAPES = {
    "tiny": Shape(
        ConformerConfig(width=64, layers=2, heads=4, feedforward=256, channels=32),
        TransducerConfig(vocabulary=64, encoder_width=64, width=64, joint_width=64),
    ),
    "114m": Shape(ConformerConfig(), TransducerConfig()),
    "0.6b": Shape(
        ConformerConfig(mels=128, width=1024, layers=24, heads=8, feedforward=4096, bias=False, conv_bias=False),
        TransducerConfig(encoder_width=1024, layers=2),
    ),
}


def build(shape: Shape, lookahead: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> ConformerASR:
    """A recogniser with random weights and emission pinned for a lookahead, for the engine to prepare."""
    torch.manual_seed(seed)
    words = shape.decoder.vocabulary
    config = ASRConfig(shape.encoder, words, shape.decoder, mel=mel_settings(shape.encoder.mels))
    asr = ConformerASR(config, numbered(words))
    pin_emission(asr, EMITTING, lookahead)
    return asr.to(device, dtype)


def mel_settings(mels: int) -> dict[str, Any]:
    """The features of NVIDIA's streaming checkpoints."""
    return {"features": mels, "window_size": 0.025, "window_stride": 0.01, "n_fft": 512, "normalize": "NA"}


def numbered(count: int) -> Tokenizer:
    """A tokenizer whose pieces are numbers: random weights say nothing anyway."""
    pieces = {f"{WORD_START}{index}": index for index in range(count)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token=f"{WORD_START}0"))
    return Tokenizer(Source("tokenizer.json", made.to_str().encode()))


@torch.no_grad()
def pin_emission(asr: ConformerASR, share: float, lookahead: int) -> None:
    """Make about ``share`` tokens come out of a frame of noise, by the blank's bias.

    Random weights hear nearly the same in every frame, and would emit in all or in none: what is heard and what was
    said are brought to unit variance where they meet in the joint.
    """
    transducer = asr.transducer
    assert transducer is not None
    rows, count = 16, 63
    pcm = torch.randn(rows, count * FRAME_SAMPLES) * NOISE
    mel, lengths = LogMel(MelConfig.from_nemo(asr.mel))(pcm, torch.full((rows,), pcm.shape[1]))
    asr.prepare()
    frames, _ = asr.encoder(mel, lengths, lookahead)
    said, _ = transducer.lstm(transducer.embedding(torch.randint(transducer.blank, (rows, 30))))
    for layer, given in ((transducer.from_encoder, frames), (transducer.from_prediction, said)):
        made = layer(given).flatten(0, 1)
        deviation = made.std(0) + 1e-6
        layer.weight.div_(deviation[:, None])
        layer.bias.sub_(made.mean(0)).div_(deviation)
    slots, active = torch.arange(rows), torch.ones(rows, dtype=torch.bool)
    valid = torch.ones(frames.shape[:2], dtype=torch.bool)
    low, high = -50.0, 50.0
    for _ in range(14):
        transducer.head.bias[-1] = (low + high) / 2
        transducer.prepare()
        state = {name: spec.new(rows + 1) for name, spec in transducer.state_spec().items()}
        emitted = transducer.decode(frames, valid, state, slots, active)[2].sum() / valid.numel()
        low, high = ((low + high) / 2, high) if emitted > share else (low, (low + high) / 2)


class Ours:
    """This project's engine and recogniser, stepped a whole batch at a time."""

    name = "antiphon"

    def __init__(self, asr: ConformerASR, lookahead: int, rows: int, device: torch.device) -> None:
        self.engine = Engine(device, inline=True)
        self.recognizer = Recognizer(asr, "rnnt")
        buckets = [rows] if device.type == "cuda" else None
        self.engine.add("asr", self.recognizer, slots=rows, variants=[lookahead], buckets=buckets)
        self.lookahead, self.rows, self.device = lookahead, rows, device
        self.tokens: list[list[int]] = []

    def times(self, pcm: Tensor) -> list[float]:
        """Seconds of each chunk of ``pcm [B, N]`` samples; the tokens are in ``tokens``."""
        leases = [self.engine.open_sync("asr", self.lookahead) for _ in range(self.rows)]
        blocks = [Blocks(self.lookahead).push(row.numpy()) for row in pcm]
        self.tokens = [[] for _ in leases]
        seconds = []
        for chunk in zip(*blocks, strict=True):
            begin = synchronize(self.device)
            inputs = [{"pcm": block.pcm, "end": np.int64(block.end)} for block in chunk]
            rows = self.engine.run_sync(list(zip(leases, inputs, strict=True)))
            seconds.append(synchronize(self.device) - begin)
            for tokens, row in zip(self.tokens, rows, strict=True):
                tokens += row["tokens"][: int(row["count"])].tolist()
        for lease in leases:
            lease.close()
        return seconds

    def close(self) -> None:
        """Free the slots."""
        self.engine.close()


def bench_steps(
    name: str,
    lookaheads: Sequence[int],
    batches: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    chunks: int,
    references: bool,
    failures: list[str],
    advance: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Median seconds a chunk, ours and the references', interleaved so that drifts of the machine meet all alike."""
    shape = SHAPES[name]
    results = []
    for lookahead in lookaheads:
        asr = build(shape, lookahead, device, dtype)
        state = {key: value.detach().cpu() for key, value in asr.state_dict().items()}
        mel_of = LogMel(MelConfig.from_nemo(asr.mel))
        period = (lookahead + 1) * 0.08
        generator = torch.Generator().manual_seed(1)
        theirs: list[NeMo | Transformers] = []
        for reference, layout in ((NeMo, nemo_layout(())), (Transformers, HF)) if references else ():
            with noting(failures, f"{reference.name} {name} {lookahead}"):
                weights = to_layout(state, layout)
                theirs.append(reference(shape.encoder, shape.decoder, weights, lookahead, device, dtype))
        for rows in batches:
            frames = (lookahead + 1) * (chunks + 1)
            pcm = torch.randn(rows, frames * FRAME_SAMPLES, generator=generator) * NOISE
            mel, _ = mel_of(pcm, torch.full((rows,), pcm.shape[1]))
            ours = Ours(asr, lookahead, rows, device)
            seconds: dict[str, list[float]] = {}
            for _ in range(2):
                for runner, audio in ((ours, pcm), *((reference, mel) for reference in theirs)):
                    advance(f"{name} {period * 1e3:.0f} ms, {rows} sessions: {runner.name}")
                    with noting(failures if runner is not ours else None, f"{runner.name} {name} {lookahead} {rows}"):
                        seconds.setdefault(runner.name, []).extend(runner.times(audio)[chunks // 3 : chunks])
            medians = {key: statistics.median(values) for key, values in seconds.items() if values}
            agreed = {
                reference.name: agreement(ours.tokens, reference.tokens)
                for reference in theirs
                if reference.name in medians and (rows == 1 or reference.name != Transformers.name)
            }
            results.append(
                {
                    "shape": name,
                    "chunk_ms": round(period * 1e3),
                    "sessions": rows,
                    "ms": {key: round(value * 1e3, 3) for key, value in medians.items()},
                    "ratio": {
                        key: round(value / medians[ours.name], 2) for key, value in medians.items() if key != ours.name
                    },
                    "tokens_a_frame": round(sum(map(len, ours.tokens)) / (rows * frames), 2),
                    "same_tokens": agreed,
                }
            )
            ours.close()
        del theirs
        gc.collect()
    return results


@contextmanager
def noting(failures: list[str] | None, what: str) -> Iterator[None]:
    """Go on where a reference cannot run here, and say so in the results; with None, let the error pass."""
    try:
        yield
    except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if failures is None:
            raise
        failures.append(f"{what}: {type(error).__name__}: {error}".splitlines()[0])


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens that two runs have in common from the start on, over the shorter of each pair of rows."""
    same = total = 0
    for left, right in zip(ours, theirs, strict=True):
        length = min(len(left), len(right))
        first = next((i for i in range(length) if left[i] != right[i]), length)
        same, total = same + first, total + length
    return round(same / total, 4) if total else 1.0


def bench_capacity(
    name: str,
    lookahead: int,
    counts: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    seconds: float,
    warm: float,
    buckets: Sequence[int],
    advance: Callable[[str], None],
) -> dict[str, Any]:
    """The largest of ``counts`` (ascending) that holds; stops at the first that does not."""
    asr = build(SHAPES[name], lookahead, device, dtype)
    recognizer = Recognizer(asr, "rnnt")
    period = recognizer.tick(lookahead)
    samples = FRAME_SAMPLES * (lookahead + 1)
    pool = np.random.default_rng(0).standard_normal((64, samples), dtype=np.float32) * np.float32(NOISE)
    end = np.int64(UNKNOWN)

    def make(session: int, chunk: int) -> dict[str, Any]:
        return {"pcm": pool[(session * 7 + chunk) % len(pool)], "end": end}

    runs = []
    with Engine(device) as engine:
        advance(f"{name} {period * 1e3:.0f} ms: capturing {len(buckets)} batch sizes")
        began = time.perf_counter()
        engine.add("asr", recognizer, slots=max(counts), variants=[lookahead], buckets=buckets)
        ready = time.perf_counter() - began
        for count in counts:
            advance(f"{name} {period * 1e3:.0f} ms: {count} sessions for {warm + seconds:.0f} s")
            load = asyncio.run(
                run_load(engine, "asr", lookahead, period, count, make, seconds=seconds, warm=max(warm, 3 * period))
            )
            runs.append(load.summary())
            if not runs[-1]["held"]:
                break
        metrics = engine.metrics()["models"]["asr"]
        return {
            "shape": name,
            "chunk_ms": round(period * 1e3),
            "held": max((run["sessions"] for run in runs if run["held"]), default=0),
            "runs": runs,
            "state_bytes": metrics["slot_bytes"],
            "ready_seconds": round(ready, 1),
            "steps": metrics["variants"][lookahead]["steps"],
        }


def floors(name: str, lookahead: int, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What one step of ``rows`` sessions must at least take: bytes over the measured bandwidth, operations over the
    measured rate. Per frame an encoder layer multiplies ``23 d^2 + 9 d + 3 (left + n) d`` times; weights are read once,
    a session's keys and values once, and written where they are new.
    """
    encoder = SHAPES[name].encoder
    width, layers, frames = encoder.width, encoder.layers, lookahead + 1
    macs = frames * layers * (23 * width**2 + 9 * width + 3 * (encoder.left + frames) * width)
    weights = layers * 24 * width**2 * dtype.itemsize
    state = layers * 2 * width * (encoder.left + 2 * frames + 8) * dtype.itemsize
    bandwidth, rate = ceilings(device, dtype)
    by_bytes, by_operations = (weights + rows * state) / bandwidth, 2 * rows * macs / rate
    return {
        "shape": name,
        "chunk_ms": frames * 80,
        "sessions": rows,
        "weight_bytes": weights,
        "state_bytes": state,
        "flop": 2 * rows * macs,
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "gflop_s": round(rate / 1e9, 1),
        "floor_ms": round(max(by_bytes, by_operations) * 1e3, 3),
        "bound": "bytes" if by_bytes > by_operations else "operations",
    }


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measured bytes a second of a large copy (read plus written) and operations a second of a large product."""
    cuda = device.type == "cuda"
    size, side = (1 << 30, 8192) if cuda else (1 << 27, 1024)
    source = torch.empty(size // dtype.itemsize, dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=device, dtype=dtype)
    times: dict[str, list[float]] = {"copy": [], "product": []}
    for _ in range(6):
        begin = synchronize(device)
        target.copy_(source)
        middle = synchronize(device)
        torch.mm(left, left)
        times["copy"].append(middle - begin)
        times["product"].append(synchronize(device) - middle)
    return 2 * size / min(times["copy"]), 2 * side**3 / min(times["product"])


def main(arguments: Sequence[str]) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="antiphon bench asr", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["114m"])
    parser.add_argument("--lookaheads", nargs="+", type=int, default=[0, 1, 6], help="frames of 80 ms")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--chunks", type=int, default=30, help="chunks a run of the step table")
    parser.add_argument("--no-references", action="store_true", help="without NeMo and transformers")
    parser.add_argument("--sessions", nargs="*", type=int, default=[], help="session counts to try, ascending")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured, for each session count")
    parser.add_argument("--warm", type=float, default=3.0, help="not measured, before them")
    parser.add_argument("--buckets", nargs="+", type=int, default=[4, 16, 64, 128, 256, 512], help="batch sizes")
    parser.add_argument("--name", default=None, help="of the result file; default asr_<device>")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if device.type == "cpu":
        torch.set_num_threads(1)
    console = Console(stderr=True)
    numbers: dict[str, Any] = {
        "device": device_name(device),
        "dtype": str(dtype),
        "steps": [],
        "capacity": [],
        "floors": [],
        "failures": [],
    }
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def advance(what: str) -> None:
            progress.update(task, description=what)

        for name in options.shapes:
            if options.batches:
                numbers["steps"] += bench_steps(
                    name,
                    options.lookaheads,
                    options.batches,
                    device,
                    dtype,
                    chunks=options.chunks,
                    references=not options.no_references,
                    failures=numbers["failures"],
                    advance=advance,
                )
            for lookahead in options.lookaheads:
                numbers["floors"] += [
                    floors(name, lookahead, rows, device, dtype) for rows in (*options.batches, *options.sessions[-1:])
                ]
                if options.sessions:
                    numbers["capacity"].append(
                        bench_capacity(
                            name,
                            lookahead,
                            options.sessions,
                            device,
                            dtype,
                            seconds=options.seconds,
                            warm=options.warm,
                            buckets=options.buckets,
                            advance=advance,
                        )
                    )
    command = shlex.join(("antiphon", "bench", "asr", *arguments))
    path = write_result(options.name or f"asr_{device.type}", command, numbers, options.results)
    report(numbers, console)
    told(path, "plot_asr", console)


def report(numbers: dict[str, Any], console: Console) -> None:
    """The tables, short."""
    for failure in numbers["failures"]:
        console.print(f"could not run {failure}", markup=False)
    for row in numbers["steps"]:
        times = ", ".join(f"{key} {value:.2f} ms" for key, value in row["ms"].items())
        ratios = ", ".join(f"{value:.2f}x {key}'s" for key, value in row["ratio"].items())
        console.print(
            f"{row['shape']} {row['chunk_ms']} ms chunks, {row['sessions']} sessions: {times}"
            + (f" (speed {ratios}; same tokens {row['same_tokens']})" if ratios else "")
        )
    for row in numbers["capacity"]:
        last = row["runs"][-1]
        console.print(f"{row['shape']} {row['chunk_ms']} ms chunks: {row['held']} sessions held; last run {last}")
    for row in numbers["floors"]:
        what = f"{row['shape']} {row['chunk_ms']} ms, {row['sessions']} sessions"
        console.print(f"floor {what}: {row['floor_ms']} ms ({row['bound']})")


def device_name(device: torch.device) -> str:
    """What the figures were measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread"


if __name__ == "__main__":
    main(sys.argv[1:])
