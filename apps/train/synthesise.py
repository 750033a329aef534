"""Make training speech from text: prompts read by several synthesis teachers into shards that training reads.

    python -m antiphon.apps.train.synthesise --texts a.txt b.txt --out shards --hours 50 --voices hibari,kokoro:4 \\
        --kokoro packed --device cuda:0 --workers 6

The work is cut into blocks of a few hundred utterances. Which prompt is read by which voice at what speed follows from
the arguments and the seed alone; a block becomes the shard ``OUT/<teacher>-<number>`` in one rename, so a run that was
stopped goes on with the blocks that are missing. Every process synthesises whole blocks; several share a device.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .data import MANIFEST, ShardWriter
from .prompts import Prompt, build_prompts, sentences
from .voices import Line, Teacher
from .voices.signal import CLIP_RATE, PERTURBED, PLAIN, defect, resample

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

TEACHERS = ("hibari", "kokoro")
SPEEDS = (0.8, 1.25)
SECONDS_A_CHARACTER = 0.062  # of both teachers at speed 1, for planning
REPORT = "report.json"


@dataclass(frozen=True)
class Block:
    """Consecutive prompts for one teacher; ``seconds`` is what they are expected to last."""

    teacher: str
    number: int
    prompts: tuple[Prompt, ...]
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.teacher}-{self.number:05d}"


@dataclass(frozen=True)
class Settings:
    """What a worker needs to speak a block."""

    out: Path
    kokoro: Path | None
    seed: int
    perturb: bool


@dataclass(frozen=True)
class Result:
    """What became of a block: clips kept, their seconds, the time it took, and the defects of the rejected ones.

    made_from tells apart blocks of one name whose prompts or settings differ.
    """

    block: str
    made_from: str
    clips: int
    seconds: float
    took: float
    rejected: dict[str, int]


def plan(prompts: Sequence[Prompt], weights: dict[str, float], hours: float, size: int) -> list[Block]:
    """Blocks for each teacher, by weight, until their expected length is ``hours``. More hours only append blocks.

    Prompts are used once each; when they run out, the list starts over (other voices will read it).
    """
    if not prompts:
        raise ValueError("no prompts: the text files hold no sentence of 3 to 25 plain words")
    target = {teacher: 3600 * hours * weight / sum(weights.values()) for teacher, weight in weights.items()}
    made = dict.fromkeys(weights, 0.0)
    blocks: list[Block] = []
    taken = 0
    while open_ := [teacher for teacher in weights if made[teacher] < target[teacher]]:
        teacher = min(open_, key=lambda name: made[name] / target[name])
        chosen = tuple(prompts[(taken + index) % len(prompts)] for index in range(size))
        taken += size
        seconds = SECONDS_A_CHARACTER * sum(len(prompt.text) for prompt in chosen)
        number = sum(block.teacher == teacher for block in blocks)
        blocks.append(Block(teacher, number, chosen, seconds))
        made[teacher] += seconds
    return blocks


def speak_block(block: Block, teacher: Teacher, settings: Settings) -> Result:
    """Speak a block into its shard. The shard appears under its name only when it is complete."""
    began = time.perf_counter()
    rng = random.Random(f"{settings.seed} {block.name}")
    lines: list[Line] = []
    ratios: list[tuple[int, int]] = []
    for prompt in block.prompts:
        lines.append(Line(prompt.text, teacher.draw(rng), round(rng.uniform(*SPEEDS), 3), rng.getrandbits(32)))
        ratios.append(rng.choice(PERTURBED) if settings.perturb else PLAIN)
    partial = settings.out / f".{block.name}.partial"
    rejected: Counter[str] = Counter()
    kept, samples = 0, 0
    with ShardWriter(partial) as shard:
        for index, (line, prompt, ratio, speech) in enumerate(
            zip(lines, block.prompts, ratios, teacher.speak(lines), strict=True)
        ):
            clip = resample(speech, ratio) if len(speech) else speech
            if reason := defect(clip, len(line.text)):
                rejected[reason] += 1
                continue
            shard.add(
                clip.numpy(),
                {
                    "id": f"{block.name}-{index:04d}",
                    "text": line.text,
                    "speaker": f"{teacher.name}:{line.voice}@{ratio[0]}/{ratio[1]}",
                    "licence": teacher.licence,
                    "source": f"{teacher.source}; text: {prompt.source}",
                    "corpus": f"synthetic-{teacher.name}",
                },
            )
            kept += 1
            samples += len(clip)
    result = Result(
        block.name, fingerprint(block, settings), kept, samples / CLIP_RATE, time.perf_counter() - began, dict(rejected)
    )
    (partial / REPORT).write_text(json.dumps(result.__dict__), encoding="utf-8")
    final = settings.out / block.name
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    return result


def fingerprint(block: Block, settings: Settings) -> str:
    """A digest of everything that decides what the block's speech is."""
    content = [settings.seed, settings.perturb, [[prompt.text, prompt.source] for prompt in block.prompts]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def finished(block: Block, settings: Settings) -> Result | None:
    """The result of a block that an earlier run completed. Raises ValueError when that run had other arguments."""
    folder = settings.out / block.name
    if not (folder / MANIFEST).is_file() or not (folder / REPORT).is_file():
        return None
    result = Result(**json.loads((folder / REPORT).read_text(encoding="utf-8")))
    if result.made_from != fingerprint(block, settings):
        raise ValueError(f"{folder} was made from other texts, seed or options: choose another --out or delete it")
    return result


def load_teacher(name: str, device: torch.device, kokoro: Path | None) -> Teacher:
    """Raises ValueError for an unknown name or when Kokoro's packed weights are not given."""
    if name == "hibari":
        from .voices.hibari import HibariTeacher

        return HibariTeacher()
    if name == "kokoro":
        from .voices.kokoro_teacher import KokoroTeacher

        if kokoro is None:
            raise ValueError("the voice 'kokoro' needs --kokoro FOLDER: the output of antiphon.apps.train.voices.pack")
        return KokoroTeacher(kokoro, device)
    raise ValueError(f"unknown voice {name!r}: choose among {', '.join(TEACHERS)}")


class Worker:
    """A process's teachers, each loaded when its first block comes."""

    here: Worker  # the one of this process, set by start()

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self._teachers: dict[str, Teacher] = {}

    def speak(self, block: Block) -> Result:
        if block.teacher not in self._teachers:
            self._teachers[block.teacher] = load_teacher(block.teacher, self.device, self.settings.kokoro)
        return speak_block(block, self._teachers[block.teacher], self.settings)

    @classmethod
    def start(cls, settings: Settings, devices: Sequence[str], started: Synchronized[int]) -> None:
        """Process initialiser: processes take the devices in turn."""
        torch.set_num_threads(1)
        with started.get_lock():
            number = started.value
            started.value += 1
        cls.here = cls(settings, torch.device(devices[number % len(devices)]))


def _speak(block: Block) -> Result:
    return Worker.here.speak(block)


def run(
    blocks: Sequence[Block],
    settings: Settings,
    devices: Sequence[str],
    workers: int,
    minutes: float | None,
    console: Console,
) -> list[Result]:
    """Speak all blocks that are not there yet with ``workers`` processes; start none after ``minutes``."""
    settings.out.mkdir(parents=True, exist_ok=True)
    results = [result for block in blocks if (result := finished(block, settings))]
    have = {result.block for result in results}
    todo = [block for block in blocks if block.name not in have]
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    context = multiprocessing.get_context("spawn")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(workers, context, Worker.start, (settings, list(devices), context.Value("i", 0))) as pool,
    ):
        bar = progress.add_task("speaking", total=sum(block.seconds for block in blocks), note="")
        expected = {block.name: block.seconds for block in blocks}
        progress.update(bar, completed=sum(expected[name] for name in have))
        queue = iter(todo)
        pending: set[Future[Result]] = set()
        while True:
            while len(pending) < 2 * workers and time.monotonic() < deadline and (block := next(queue, None)):
                pending.add(pool.submit(_speak, block))
            if not pending:
                break
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                results.append(result)
                hours = sum(result.seconds for result in results) / 3600
                progress.update(bar, advance=expected[result.block], note=f"{hours:.2f} h")
    return results


def parse_weights(voices: str) -> dict[str, float]:
    """``hibari,kokoro:4`` -> {"hibari": 1.0, "kokoro": 4.0}: shares of the hours."""
    weights: dict[str, float] = {}
    for part in voices.split(","):
        name, _, weight = part.strip().partition(":")
        if name not in TEACHERS:
            raise ValueError(f"unknown voice {name!r}: choose among {', '.join(TEACHERS)}")
        weights[name] = float(weight or 1)
        if not weights[name] > 0:
            raise ValueError(f"the weight of {name} must be positive, not {weight}")
    return weights


def parser() -> argparse.ArgumentParser:
    args = argparse.ArgumentParser(
        prog="python -m antiphon.apps.train.synthesise", description=(__doc__ or "").partition("\n")[0]
    )
    args.add_argument("--texts", nargs="+", type=Path, required=True, metavar="FILE", help="plain text to read aloud")
    args.add_argument(
        "--exclude", nargs="*", type=Path, default=[], metavar="FILE", help="text never to read: a held-out corpus"
    )
    args.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    args.add_argument("--hours", type=float, required=True, help="length of all speech together (about)")
    args.add_argument("--voices", default="hibari", help="teachers and weights: hibari,kokoro:4")
    args.add_argument("--kokoro", type=Path, metavar="DIR", help="what antiphon.apps.train.voices.pack wrote")
    args.add_argument("--device", default="cpu", help="cpu, or cuda:0,cuda:1 (hibari always uses the CPU)")
    args.add_argument("--workers", type=int, default=1, help="processes")
    args.add_argument("--block", type=int, default=512, help="utterances a shard")
    args.add_argument("--minutes", type=float, help="start no block after this long; run again to go on")
    args.add_argument("--perturb", action="store_true", help="scale pitch, formants and tempo by 0.90 to 1.10")
    args.add_argument("--seed", type=int, default=0)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    try:
        speak(parser().parse_args(argv))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"synthesise: {error}") from error


def speak(args: argparse.Namespace) -> None:
    """Do what the command line asks and report it."""
    console = Console()
    held_out = [text for path in args.exclude for text in sentences(path)]
    prompts = build_prompts(args.texts, seed=args.seed, exclude=held_out)
    weights = parse_weights(args.voices)
    blocks = plan(prompts, weights, args.hours, args.block)
    console.print(f"{len(prompts):,} prompts; {len(blocks)} blocks of {args.block} utterances")
    settings = Settings(args.out, args.kokoro, args.seed, args.perturb)
    began = time.perf_counter()
    results = run(blocks, settings, args.device.split(","), args.workers, args.minutes, console)
    took = time.perf_counter() - began
    rejected: Counter[str] = Counter()
    for result in results:
        rejected.update(result.rejected)
    for teacher in weights:
        own = [result for result in results if result.block.startswith(f"{teacher}-")]
        seconds, busy = sum(result.seconds for result in own), sum(result.took for result in own)
        pace = f", {seconds / busy:.0f} x real time a process" if busy else ""
        console.print(f"{teacher}: {sum(result.clips for result in own):,} clips, {seconds / 3600:.2f} h{pace}")
    console.print(f"rejected: {dict(rejected) or 'none'}")
    console.print(f"{len(results)} of {len(blocks)} blocks are there; this run took {took:.0f} s")


if __name__ == "__main__":
    main()
