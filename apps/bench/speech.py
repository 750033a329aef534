"""``antiphon bench speech``: how many streams of synthesised speech one device makes, and how soon each begins.

Random weights of CosyVoice 2's published shape, made on the device, that never end an utterance early: 40 text tokens
give 200 speech tokens, 8 s of sound, with the voice of a clip of 5 s. Everything goes the way of the stage ``speak``:
``Synthesis`` and one engine for language model, flow and vocoder.

- *first*: milliseconds from text to first samples of one session alone; *reference*: the same of upstream's own serving
  class (``cosyvoice2-eu``) in the same process.
- *load*: the most streams whose p99 to first audio stays within the limit without an underrun, found by bisection, open
  loop on the media clock with seeded phases and jitter.
- *stages*: what a step of each model takes, by rows of a batch; *floor*: what its bytes, operations and launches need
  at the device's measured rates.
- *requests*: three requests in a row and twenty at once begin with the same hop and sound as alone, bit by bit, in
  batches of one size.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ...pipelines.engine import Engine
from ...pipelines.speech import PARTS, PATIENT, PRIORITIES, Part, Speech
from .asr import device_name, noting
from .common import RESULTS, told, write_result
from .load import bisect
from .speech_load import Load, Said, open_places, run_load, say, text_of
from .speech_models import NAME, SHAPES, VOICES, Random, Settings, powers
from .speech_reference import Upstream
from .speech_stages import bench_stages, floors

KINDS = ("first", "reference", "stages", "floor", "load", "requests")
AT_ONCE = 20
WARM = 2  # utterances that are not measured
LEFTS = (50, 100, 150, 250, 500, 1500)  # of the table of bytes; the last holds 30 s, as trained
Advance = Callable[[str], None]


def bench_first(engine: Engine, random: Random, rounds: int) -> dict[str, Any]:
    """One session alone: the time to its first audio and what it is made of, and to its last."""

    async def alone() -> list[Said]:
        speech = Speech.of(engine, NAME)
        (places,) = await open_places(engine, NAME, 1)
        try:
            said = [await say(speech, places, text_of(random.shape.words, seed), seed) for seed in range(rounds + WARM)]
        finally:
            places.close()
        return said[WARM:]

    said = asyncio.run(alone())
    whole = [one.end - one.due for one in said]
    return {
        "name": "antiphon",
        **_times([one.first for one in said]),
        "median_ms_until": {
            part: round(statistics.median(one.done[part] - one.due for one in said) * 1e3, 2) for part in PARTS
        },
        "utterance_ms": round(statistics.median(whole) * 1e3, 1),
        "real_time_factor": round(statistics.median(whole) / random.seconds, 4),
        "seconds": round(statistics.median(one.made / one.rate for one in said), 3),
    }


def bench_reference(random: Random, rounds: int) -> dict[str, Any]:
    """The same of upstream's."""
    shape = random.shape
    half = random.device.type == "cuda"
    upstream = Upstream(
        random.lm.config, shape.flow, shape.vocoder, random.device, prompt=shape.prompt, half=half
    )  # fmt: skip
    made = [upstream.times(shape.words, shape.prompt_text, seed) for seed in range(rounds + WARM)][WARM:]
    firsts, wholes, samples = zip(*made, strict=True)
    return {
        "name": upstream.name,
        **_times(firsts),
        "utterance_ms": round(statistics.median(wholes) * 1e3, 1),
        "real_time_factor": round(statistics.median(wholes) / random.seconds, 4),
        "seconds": round(statistics.median(samples) / shape.vocoder.sample_rate, 3),
    }


def _times(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(np.array(seconds) * 1e3, [50, 99])
    return {"ms": round(float(p50), 2), "p99_ms": round(float(p99), 2), "rounds": len(seconds)}


def bench_load(
    engine: Engine,
    random: Random,
    most: int,
    *,
    seconds: float,
    confirm: float,
    warm: float,
    until: float,
    limit: float,
    seed: int,
    advance: Advance,
) -> dict[str, Any]:
    """The largest number of streams up to ``most`` that holds, by bisection.

    until: ``time.monotonic()`` after which no further run begins. confirm: seconds of a last run of that number, 0 for
    none.
    """
    runs: list[dict[str, Any]] = []

    def run(count: int, measured: float) -> bool:
        advance(f"{count} streams for {warm + measured:.0f} s")
        hopeless = max(4, int(0.02 * count * measured / random.seconds) + 1)

        def enough(load: Load) -> bool:
            return sum(one.first > limit or one.late > 0 for one in load.said) >= hopeless

        load = run_load(
            engine, NAME, count, random.seconds, random.shape.words, seconds=measured, warm=warm, limit=limit,
            seed=seed, enough=enough,
        )  # fmt: skip
        runs.append({**asyncio.run(load).summary(), "seconds": measured})
        return bool(runs[-1]["held"])

    held = bisect(most, lambda count: run(count, seconds), lambda: time.monotonic() + warm + seconds < until)
    while held and confirm and time.monotonic() + warm + confirm < until and not run(held, confirm):
        held -= max(1, held // 16)
    confirmed = bool(confirm and runs and runs[-1]["held"] and runs[-1]["sessions"] == held)
    return {"held": held, "confirmed": confirmed, "most": most, "limit_ms": round(limit * 1e3), "runs": runs}


def bench_requests(random: Random) -> dict[str, Any]:
    """Three in a row and twenty at once: their first hop, their sound and their latency beside the same alone."""
    texts = [text_of(random.shape.words, seed) for seed in range(VOICES)]

    async def requests(engine: Engine) -> tuple[list[Said], list[Said], list[Said]]:
        speech = Speech.of(engine, NAME)
        places = await open_places(engine, NAME, AT_ONCE)
        await say(speech, places[0], texts[0], 0)
        alone = []
        for number in range(VOICES):
            alone.append(await say(speech, places[number], texts[number], number, keep=True))
        row = [await say(speech, places[0], texts[0], 0, keep=True) for _ in range(3)]
        asked = (
            say(speech, place, texts[number % VOICES], number % VOICES, keep=True)
            for number, place in enumerate(places)
        )
        crowd = list(await asyncio.gather(*asked))
        for place in places:
            place.close()
        return alone, row, crowd

    with Engine(random.device) as engine:
        random.install(engine, AT_ONCE, rows=powers(AT_ONCE)[-1])
        alone, row, crowd = asyncio.run(requests(engine))

    pairs = {
        "in_a_row": [(said, alone[0]) for said in row],
        "at_once": [(said, alone[number % VOICES]) for number, said in enumerate(crowd)],
    }
    compared = {
        name: {part: compare(part, [(one.made_by(part), other.made_by(part)) for one, other in both]) for part in PARTS}
        for name, both in pairs.items()
    }

    def hop(said: Said) -> int:
        return next(len(samples) for samples in said.samples if len(samples))

    return {
        "first_samples": sorted({hop(said) for said in (*alone, *row, *crowd)}),
        "loud": bool(all(float(np.abs(said.sound()).max()) > 0 for said in alone)),
        "same_sound_in_a_row": compared["in_a_row"]["vocoder"]["same"],
        "same_sound_at_once": compared["at_once"]["vocoder"]["same"],
        "compared": compared,
        "alone_ms": [round(said.first * 1e3, 2) for said in alone],
        "in_a_row_ms": [round(said.first * 1e3, 2) for said in row],
        "at_once_ms": _times([said.first for said in crowd]),
    }


def compare(part: Part, pairs: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> dict[str, Any]:
    """How many pairs of a part's tokens, frames or samples are the same to the bit. Of the others, the first token, row
    of frames or sample that differs in any, and by how much any differs at most."""
    found: dict[str, Any] = {"same": 0}
    for one, other in pairs:
        if one.size and one.shape == other.shape and np.array_equal(one, other):
            found["same"] += 1
            continue
        size = min(len(one), len(other))
        apart = np.abs(one[:size].astype(np.float64) - other[:size])
        differs = (apart > 0).any(axis=tuple(range(1, apart.ndim)))
        first = int(differs.argmax()) if differs.any() else size
        found["first"] = min(first, found.get("first", first))
        found["largest"] = max(float(apart.max(initial=0.0)), found.get("largest", 0.0))
    return {**found, "of": len(pairs), "what": {"lm": "tokens", "flow": "frames", "vocoder": "samples"}[part]}


def room(random: Random, reserve: float) -> int:
    """Sessions that fit the device's memory, the scratch slot counted off."""
    if random.device.type != "cuda":
        return 1 << 20
    return max(1, int((torch.cuda.mem_get_info(random.device)[0] - reserve) // sum(random.slot_bytes().values())) - 1)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str]) -> None:
    """The command line; see ``--help``."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    if not cuda:
        torch.set_num_threads(1)
    sys.setswitchinterval(options.switch)
    begin = time.monotonic()
    until = begin + 60 * options.minutes
    console = Console(stderr=True)
    rows: dict[Part, int] = {"lm": options.sessions, "flow": options.flow_rows, "vocoder": options.vocoder_rows}
    settings = Settings(
        tuple(options.hops),
        options.left,
        options.kept,
        tuple(options.bursts),
        tuple(options.prefill),
        tuple(options.frames),
        rows,
        options.early,
        tuple(options.patient),
        dict(zip(PARTS, options.priorities, strict=True)),
    )
    numbers: dict[str, Any] = {"device": device_name(device), "dtype": str(dtype), "shapes": [], "failures": []}

    def write() -> Path:
        """What there is so far."""
        command = shlex.join(("antiphon", "bench", "speech", *arguments))
        return write_result(options.name or f"speech_{device.type}", command, numbers, options.results)

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("making weights", total=None)

        def advance(what: str) -> None:
            progress.update(task, description=what)
            if not console.is_terminal:
                console.print(f"{time.monotonic() - begin:.0f} s: {what}", markup=False)
            write()

        for name in options.shapes or (["0.5b"] if cuda else ["tiny"]):
            random = Random(SHAPES[name], settings, device, dtype)
            numbers["shapes"].append({"name": name, "first": []})
            bench_shape(random, options, until, numbers["shapes"][-1], numbers["failures"], advance)
            _release(device)
    path = write()
    report(numbers, console)
    told(path, "plot_speech", console)


def bench_shape(
    random: Random,
    options: argparse.Namespace,
    until: float,
    found: dict[str, Any],
    failures: list[str],
    advance: Advance,
) -> None:
    """All that is asked for, of one shape."""
    kinds = options.kinds
    found["settings"] = {
        **dataclasses.asdict(random.settings), "prompt": random.shape.prompt, "seconds": random.seconds
    }  # fmt: skip
    found["state_bytes"] = random.slot_bytes()
    found["flow_bytes_by_frames_kept"] = random.flow_bytes(LEFTS)
    if "requests" in kinds:
        advance("requests alone, in a row and at once")
        with noting(failures, "requests"):
            found["requests"] = bench_requests(random)
        _release(random.device)
    if {"first", "stages", "load", "floor"} & set(kinds):
        with noting(failures, "the engine"):
            bench_engine(random, options, until, found, failures, advance)
        _release(random.device)
    if "reference" in kinds:
        advance("upstream")
        with noting(failures, f"the reference {Upstream.name}"):
            found["first"].append(bench_reference(random, options.reference_rounds))
        _release(random.device)


def bench_engine(
    random: Random,
    options: argparse.Namespace,
    until: float,
    found: dict[str, Any],
    failures: list[str],
    advance: Advance,
) -> None:
    """What one engine with room for all sessions tells."""
    kinds = options.kinds
    slots = min(options.sessions, room(random, options.reserve_gb * 1e9))
    with Engine(random.device) as engine:
        advance(f"capturing for {slots} sessions")
        began = time.perf_counter()
        speech = random.install(engine, slots)
        found["ready_seconds"] = round(time.perf_counter() - began, 1)
        if "first" in kinds:
            advance("first audio")
            with noting(failures, "first"):
                found["first"].append(bench_first(engine, random, options.rounds))
        if "stages" in kinds:
            advance("stages")
            with noting(failures, "stages"):
                found["stages"] = bench_stages(engine, NAME, speech, options.batches, random.shape.prompt)
        if "load" in kinds:
            with noting(failures, "load"):
                found["load"] = bench_load(
                    engine, random, slots, seconds=options.seconds, confirm=options.confirm, warm=options.warm,
                    until=until, limit=options.limit / 1e3, seed=options.seed, advance=advance,
                )  # fmt: skip
        if "floor" in kinds:
            advance("floors")
            with noting(failures, "floor"):
                found["floors"] = floors(speech, options.batches, random.device, random.dtype, random.shape.prompt)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="antiphon bench speech", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what to measure")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), help="default: 0.5b on CUDA, tiny elsewhere")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--hops", nargs="+", type=int, default=[25, 75, 100], help="tokens of the flow's hops")
    parser.add_argument("--early", action="store_true", help="cut clips so that the first hop needs just its tokens")
    parser.add_argument("--patient", nargs="*", choices=PARTS, default=list(PATIENT), help="whose steps wait")
    parser.add_argument(
        "--priorities", nargs=len(PARTS), type=int, default=list(PRIORITIES.values()), metavar=PARTS,
        help="of the streams, 0 to 2",
    )  # fmt: skip
    parser.add_argument("--left", type=int, default=150, help="mel frames that the flow looks back behind the clip")
    parser.add_argument("--kept", choices=("bfloat16", "float8_e4m3fn"), help="of the flow's keys and values")
    parser.add_argument("--bursts", nargs="*", type=int, default=[32], help="tokens drawn by a step")
    parser.add_argument("--prefill", nargs="*", type=int, default=[64, 192], help="tokens read by a step")
    parser.add_argument("--frames", nargs="+", type=int, default=[100, 50, 25, 10], help="mel frames a vocoder's step")
    parser.add_argument("--flow-rows", type=int, default=8, help="sessions of the flow's largest batch")
    parser.add_argument("--vocoder-rows", type=int, default=16, help="sessions of the vocoder's largest batch")
    parser.add_argument("--rounds", type=int, default=40, help="utterances of one session alone")
    parser.add_argument("--reference-rounds", type=int, default=6, help="utterances of upstream's")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 32, 128], help="of the stage table")
    parser.add_argument("--sessions", type=int, default=256, help="the most to try")
    parser.add_argument(
        "--limit", type=float, default=150.0, help="milliseconds to first audio, at the 99th percentile"
    )
    parser.add_argument("--seconds", type=float, default=16.0, help="of a run while searching")
    parser.add_argument("--confirm", type=float, default=0.0, help="seconds of a last run of the number found")
    parser.add_argument("--warm", type=float, default=8.0, help="seconds before each run that are not measured")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no further run begins")
    parser.add_argument("--reserve-gb", type=float, default=24.0, help="device memory left to steps")
    parser.add_argument("--switch", type=float, default=0.0005, help="seconds a Python thread may hold the interpreter")
    parser.add_argument("--seed", type=int, default=0, help="of phases and jitter")
    parser.add_argument("--name", default=None, help="of the result file; default speech_<device>")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    return parser


def report(numbers: dict[str, Any], console: Console) -> None:
    """The tables, short."""

    def line(text: str) -> None:
        console.print(text, markup=False)

    for failure in numbers["failures"]:
        line(f"could not run {failure}")
    for shape in numbers["shapes"]:
        line(f"{shape['name']}: {shape['settings']}; a session keeps {shape['state_bytes']} bytes")
        for row in shape["first"]:
            parts = row.get("median_ms_until", "")
            line(
                f"first audio alone, {row['name']}: {row['ms']} ms, p99 {row['p99_ms']} ms {parts}; "
                f"{row['seconds']} s take {row['utterance_ms']} ms"
            )
        for row in shape.get("stages", ()):
            line(f"{row['stage']}, {row['rows']} at once: {row['ms']} ms, of the device {row['device_ms']} ms")
        for row in shape.get("floors", ()):
            line(f"floor, {row['stage']}, {row['rows']} at once: {row['ms']}, {row['launches']} launches")
        if load := shape.get("load"):
            line(f"{load['held']} of {load['most']} streams held within {load['limit_ms']} ms; runs:")
            for run in load["runs"]:
                line(f"  {run}")
        if requests := shape.get("requests"):
            line(f"requests: {requests}")


if __name__ == "__main__":
    main(sys.argv[1:])
