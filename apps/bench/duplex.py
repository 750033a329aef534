"""``antiphon bench duplex``: how many full-duplex dialogues one device holds, and what a frame of 80 ms takes.

Random weights of a published shape, made on the device, and rings that are full from the start: every session is as
old as the model looks back. A frame is the whole of it: Mimi's encoder, temporal and depth transformer, Mimi's decoder.

- *frame*: seconds of a frame by batch size, ours and the ``moshi`` package's in the same process.
- *capacity*: the most sessions whose p99 latency, from the scheduled end of each frame, stays below 80 ms with at most
  1 % of the frames late and none lost, found by bisection, open loop on the media clock with seeded phases and jitter.
- *unbatched*: the same with batches of one.
- *answers*: the share of tokens that a session in a full batch has in common with the same session alone, each going on
  from its own. In float32 on the CPU that is all of them; elsewhere a batch rounds in its own way.
- *floor*: the time that the bytes, the operations and the launches of a frame need at the device's measured rates.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from ...codecs.mimi import Mimi
from ...codecs.mimi_config import MimiConfig
from ...models.moshi.config import MOSHI_7B, MoshiConfig, read_config
from ...models.moshi.lm import MoshiLM
from ...pipelines.duplex import Duplex
from ...pipelines.engine import Engine, Lease
from ...pipelines.engine.engine import default_buckets
from ...pipelines.engine.runner import EXACT_ROWS
from .asr import ceilings, device_name, noting, numbered
from .common import RESULTS, told, write_result
from .duplex_reference import Moshi
from .floor import floor_of, launch_seconds, launches_of
from .load import bisect, run_load
from .references import synchronize

KINDS = ("frame", "references", "capacity", "unbatched", "answers", "floor")
ANSWERING = 8  # sessions of a batch that are repeated alone
NAME = "duplex"  # of the model in the engine
JITTER = 0.01  # seconds that a frame may come later than it was complete
NOISE = 0.1
Advance = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """Settings of a language model as in Kyutai's ``config.json``, and its codec."""

    settings: dict[str, Any]
    mimi: MimiConfig

    @property
    def config(self) -> MoshiConfig:
        return read_config(self.settings)


_TINY = {"dim": 64, "num_layers": 2, "num_heads": 4, "context": 60, "text_card": 64, "card": 32}
_TINY |= {"depformer_dim": 32, "depformer_dim_feedforward": 132, "depformer_num_heads": 2, "depformer_num_layers": 1}
SHAPES = {
    "tiny": Shape(
        MOSHI_7B | _TINY,
        MimiConfig(channels=2, width=16, layers=1, heads=2, feedforward=32, codebooks=8, bins=32, code_width=8),
    ),
    "7b": Shape(MOSHI_7B, MimiConfig()),
}


class Random:
    """Dialogue models of one shape and one set of random weights, with keys and values of any dtype."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        generator = torch.Generator(device).manual_seed(seed)
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in MoshiLM(shape.config).state_dict().items()}
        self.weights = {name: self._weight(size, generator) for name, size in shapes.items()}
        torch.manual_seed(seed)
        self.mimi = Mimi(dataclasses.replace(shape.mimi, steps=(1,))).to(device).eval()
        self.tokenizer = numbered(shape.config.text_card)

    def _weight(self, size: torch.Size, generator: torch.Generator) -> Tensor:
        made = torch.empty(size, dtype=self.dtype, device=self.device)
        return made.fill_(1.0) if made.dim() < 2 else made.normal_(0, size[-1] ** -0.5, generator=generator)

    def model(self, kv: torch.dtype | None) -> Duplex:
        """A model for an engine of its own."""
        with torch.device("meta"):
            lm = MoshiLM(self.shape.config.changed(kv_dtype=kv))
        lm.load_state_dict(self.weights, assign=True)
        return Duplex(lm.to(self.device), self.mimi, self.tokenizer)


def age(lease: Lease) -> None:
    """Make a session as old as its rings are long: keys and values at random, all of them in reach. Not for use."""
    row = lease.slot.row
    for name, tensor in lease.store.state.items():
        if name.endswith(".rings"):
            ring = tensor[row]
            if ring.dtype.itemsize == 1:
                ring.view(torch.uint8).random_(0, 0x30)  # 8-bit floats from 0 to 0.5
            else:
                ring.normal_()
        elif name.endswith(".seen"):
            longest = lease.store.specs[f"{name.removesuffix('.seen')}.rings"].shape[-2]
            tensor[row].fill_(2 * longest)


def make_inputs(model: Duplex) -> Callable[[int, int], dict[str, Any]]:
    """Noise to hear, and the sampling of a conversation with a seed of its own."""
    pool = np.random.default_rng(0).standard_normal((32, model.frame), dtype=np.float32) * np.float32(NOISE)
    constants = [
        model.inputs(dataclasses.replace(model.lm.config.sampling, text_seed=seed, audio_seed=seed))
        for seed in range(len(pool))
    ]

    def make(session: int, chunk: int) -> dict[str, Any]:
        return constants[session % len(pool)] | {"pcm": pool[(session * 7 + chunk) % len(pool)]}

    return make


def bench_frame(
    random: Random, kv: torch.dtype | None, batches: Sequence[int], *, frames: int, advance: Advance
) -> list[dict[str, Any]]:
    """Median seconds of a frame of full rings, samples in and samples out, by batch size."""
    model = random.model(kv)
    make = make_inputs(model)
    rows = []
    with Engine(random.device, inline=True) as engine:
        engine.add(NAME, model, slots=max(batches), variants=(1,), buckets=batches, exact=False)
        leases = [engine.open_sync(NAME) for _ in range(max(batches))]
        for lease in leases:
            age(lease)
        for size in batches:
            advance(f"{size} sessions at once: antiphon")
            seconds = []
            for frame in range(frames):
                chunk = [(lease, make(session, frame)) for session, lease in enumerate(leases[:size])]
                begin = synchronize(random.device)
                engine.run_sync(chunk)
                seconds.append(synchronize(random.device) - begin)
            rows.append({"name": f"antiphon {_short(kv, random)}", "sessions": size, **_times(seconds)})
    return rows


def bench_answers(
    random: Random, kv: torch.dtype | None, sessions: int, *, frames: int, advance: Advance
) -> dict[str, Any]:
    """Tokens of sessions that are stepped together, beside those of the same sessions one at a time.

    The engine chooses its batches as in service. first: the earliest frame of a token that differs; None for none.
    """
    model = random.model(kv)
    make = make_inputs(model)
    chosen = sorted({round(number) for number in np.linspace(0, sessions - 1, ANSWERING)})
    smallest = 1 if random.device.type == "cuda" else EXACT_ROWS
    with Engine(random.device, inline=True) as engine:
        engine.add(NAME, model, slots=sessions, variants=(1,), buckets=(smallest, max(smallest, sessions)))

        def said(numbers: Sequence[int]) -> NDArray[np.int64]:
            """``[sessions, frames, streams]``."""
            leases = [engine.open_sync(NAME) for _ in numbers]
            for number, lease in zip(numbers, leases, strict=True):
                torch.manual_seed(number)
                age(lease)
            tokens = []
            for frame in range(frames):
                chunks = [(lease, make(number, frame)) for number, lease in zip(numbers, leases, strict=True)]
                tokens.append([row["sampled"].numpy() for row in engine.run_sync(chunks)])
            for lease in leases:
                lease.close()
            return np.swapaxes(np.array(tokens), 0, 1)

        advance(f"{sessions} sessions at once, and {len(chosen)} of them alone")
        together = said(range(sessions))[chosen]
        alone = np.concatenate([said([number]) for number in chosen])
    same = together == alone
    different = np.flatnonzero(~same.all((0, 2)))
    return {
        "name": _short(kv, random),
        "sessions": sessions,
        "alone": len(chosen),
        "frames": frames,
        "tokens": int(same.size),
        "equal": round(float(same.mean()), 5),
        "first": int(different[0]) if len(different) else None,
    }


def bench_references(
    random: Random, batches: Sequence[int], *, frames: int, failures: list[str], advance: Advance
) -> list[dict[str, Any]]:
    """The same of the ``moshi`` package: a batch in lockstep, which is its only one; 1 is its server's loop."""
    rows = []
    for size in batches:
        advance(f"{size} sessions at once: moshi")
        with noting(failures, f"moshi {size}"):
            reference = Moshi(random.shape.settings, random.shape.mimi, size, random.device, random.dtype)
            rows.append({"name": Moshi.name, "sessions": size, **_times(reference.times(frames))})
        _release(random.device)
    return rows


def _times(seconds: Sequence[float]) -> dict[str, float]:
    """Of the later two thirds."""
    counted = sorted(seconds[len(seconds) // 3 :])
    return {"ms": round(statistics.median(counted) * 1e3, 3), "max_ms": round(counted[-1] * 1e3, 3)}


def bench_capacity(
    random: Random,
    kv: torch.dtype | None,
    most: int,
    *,
    seconds: float,
    confirm: float,
    warm: float,
    until: float,
    seed: int,
    reserve: float,
    advance: Advance,
    buckets: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The largest number of sessions up to ``most`` (and what fits the memory) that holds, by bisection.

    until: ``time.monotonic()`` after which no further run begins. confirm: seconds of a last run of that number, 0 for
    none. reserve: bytes of the device that are left to a step.
    """
    model = random.model(kv)
    make, period = make_inputs(model), model.tick(1)
    what = f"{_short(kv, random)}{'' if buckets is None else ', unbatched'}"
    most = min(most, _room(model, random.device, reserve))
    runs: list[dict[str, Any]] = []
    with Engine(random.device, inbox=16) as engine:
        advance(f"{what}: capturing for {most} sessions")
        began = time.perf_counter()
        sizes = default_buckets(most) if buckets is None else buckets
        engine.add(NAME, model, slots=most, variants=(1,), buckets=sizes, exact=False)
        ready = time.perf_counter() - began

        def run(count: int, measured: float) -> bool:
            advance(f"{what}: {count} sessions for {warm + measured:.0f} s")
            load = run_load(
                engine, NAME, 1, period, count, make, seconds=measured, warm=warm, opened=age, seed=seed, jitter=JITTER
            )  # fmt: skip
            runs.append({**asyncio.run(load).summary(), "seconds": measured})
            return bool(runs[-1]["held"])

        held = bisect(most, lambda count: run(count, seconds), lambda: time.monotonic() + warm + seconds < until)
        while held and confirm and time.monotonic() + warm + confirm < until and not run(held, confirm):
            held -= max(1, held // 16)
        held = min(held, _shown(runs))
        metrics = engine.metrics()["models"][NAME]
    return {
        "name": what,
        "held": held,
        "confirmed": bool(runs and runs[-1]["held"] and runs[-1]["sessions"] == held and confirm),
        "most": most,
        "runs": runs,
        "state_bytes": metrics["slot_bytes"],
        "ready_seconds": round(ready, 1),
        "steps": metrics["variants"][1]["steps"],
    }


def _shown(runs: Sequence[Mapping[str, Any]]) -> int:
    """The largest number that held and is smaller than any that did not."""
    least = min((run["sessions"] for run in runs if not run["held"]), default=math.inf)
    return max((run["sessions"] for run in runs if run["held"] and run["sessions"] < least), default=0)


def _room(model: Duplex, device: torch.device, reserve: float) -> int:
    """Sessions that fit the device's memory, the scratch slot counted off."""
    if device.type != "cuda":
        return 1 << 20
    size = sum(spec.bytes for spec in model.state_spec().values())
    return max(1, int((torch.cuda.mem_get_info(device)[0] - reserve) // size) - 1)


def floors(random: Random, kv: torch.dtype | None, counts: Sequence[int]) -> list[dict[str, Any]]:
    """What a frame of so many sessions must at least take: weights read once, every session's keys and values once."""
    model = random.model(kv)
    config, stack = model.lm.config, model.lm.config.temporal
    read = [value for name, value in random.weights.items() if "embedding" not in name and ".audio." not in name]
    weights = sum(value.numel() for value in read if value.dim() > 1)
    state = stack.layers * stack.window * 2 * stack.kv * stack.head * (kv or random.dtype).itemsize
    flop = 2 * weights + 4 * stack.layers * stack.window * stack.heads * stack.head
    bandwidth, rate = ceilings(random.device, random.dtype)
    launches, launch = operations(model), launch_seconds(random.device)
    rows = []
    for count in counts:
        floor = floor_of(
            weights * random.dtype.itemsize + count * state, count * flop, launches, launch, bandwidth, rate
        )  # fmt: skip
        about = {"name": _short(kv, random), "sessions": count, "window": config.temporal.window}
        held = {"weight_bytes": weights * random.dtype.itemsize, "state_bytes": state, "flop": count * flop}
        rows.append({**about, **held, **floor})
    return rows


@torch.inference_mode()
def operations(model: Duplex) -> int:
    """Launches of a frame, the same for any number of sessions."""
    device = model.lm.embedding.weight.device
    state = {name: spec.new(2, device) for name, spec in model.state_spec().items()}
    inputs = {name: spec.new(1, device) for name, spec in model.input_spec(1).items()}
    slots, active = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, dtype=torch.bool, device=device)
    model.prepare()
    return launches_of(lambda: model.step(inputs, state, slots, active), device)


def _short(kv: torch.dtype | None, random: Random) -> str:
    return f"keys and values {str(kv or random.dtype).removeprefix('torch.')}"


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str]) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="antiphon bench duplex", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what to measure")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="default: 7b on CUDA, tiny elsewhere")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, else bfloat16")
    parser.add_argument(
        "--kv", nargs="+", default=["", "float8_e4m3fn"], help="dtypes of keys and values; '': weights'"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64], help="of the frame table, ascending")
    parser.add_argument("--frames", type=int, default=45, help="a run of the frame table")
    parser.add_argument("--sessions", type=int, default=192, help="the most to try")
    parser.add_argument("--unbatched-sessions", type=int, default=16, help="the most to try one at a time")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a run while searching")
    parser.add_argument("--confirm", type=float, default=0.0, help="seconds of a last run of the number found")
    parser.add_argument("--warm", type=float, default=2.0, help="seconds before each run that are not measured")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no further run begins")
    parser.add_argument("--reserve-gb", type=float, default=16.0, help="device memory left to a step")
    parser.add_argument("--seed", type=int, default=0, help="of phases and jitter")
    parser.add_argument("--name", default=None, help="of the result file; default duplex_<device>")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    if not cuda:
        torch.set_num_threads(1)
    shape = options.shape or ("7b" if cuda else "tiny")
    until = time.monotonic() + 60 * options.minutes
    console = Console(stderr=True)
    numbers: dict[str, Any] = {"device": device_name(device), "dtype": str(dtype), "shape": shape}
    numbers |= {"frame": [], "capacity": [], "answers": [], "floors": [], "failures": []}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("making weights", total=None)

        def advance(what: str) -> None:
            progress.update(task, description=what)

        random = Random(SHAPES[shape], device, dtype)
        search = partial(
            bench_capacity, random, seconds=options.seconds, confirm=options.confirm, warm=options.warm, until=until,
            seed=options.seed, reserve=options.reserve_gb * 1e9, advance=advance,
        )  # fmt: skip
        for kv in [getattr(torch, name) if name else None for name in options.kv]:
            what = _short(kv, random)
            if "frame" in options.kinds:
                with noting(numbers["failures"], f"frame, {what}"):
                    numbers["frame"] += bench_frame(random, kv, options.batches, frames=options.frames, advance=advance)
                _release(device)
            if "capacity" in options.kinds:
                with noting(numbers["failures"], f"capacity, {what}"):
                    numbers["capacity"].append(search(kv, options.sessions))
                _release(device)
            if "answers" in options.kinds:
                with noting(numbers["failures"], f"answers, {what}"):
                    numbers["answers"].append(
                        bench_answers(random, kv, max(options.batches), frames=options.frames, advance=advance)
                    )
                _release(device)
            if "floor" in options.kinds:
                numbers["floors"] += floors(random, kv, options.batches)
        if "unbatched" in options.kinds:
            numbers["capacity"].append(search(None, options.unbatched_sessions, buckets=(1,)))
            _release(device)
        if "references" in options.kinds:
            random.weights.clear()
            numbers["frame"] += bench_references(
                random, options.batches, frames=options.frames, failures=numbers["failures"], advance=advance
            )
    command = shlex.join(("antiphon", "bench", "duplex", *arguments))
    path = write_result(options.name or f"duplex_{device.type}", command, numbers, options.results)
    report(numbers, console)
    told(path, "plot_duplex", console)


def report(numbers: dict[str, Any], console: Console) -> None:
    """The tables, short."""
    for failure in numbers["failures"]:
        console.print(f"could not run {failure}", markup=False)
    for row in numbers["frame"]:
        console.print(f"{row['name']}, {row['sessions']} at once: {row['ms']} ms a frame")
    for row in numbers["capacity"]:
        last = row["runs"][-1] if row["runs"] else "no run"
        console.print(f"{row['name']}: {row['held']} of {row['most']} sessions held; last run {last}")
    for row in numbers["answers"]:
        where = "" if row["first"] is None else f", the first other one in frame {row['first']}"
        console.print(f"{row['name']}: {row['equal']:.2%} of {row['tokens']} tokens as alone{where}")
    for row in numbers["floors"]:
        console.print(f"floor, {row['name']}, {row['sessions']} sessions: {row['floor_ms']} ms; {row['ms']}")


if __name__ == "__main__":
    main(sys.argv[1:])
