"""Fuzz what strangers may send: ``python tests/fuzz/run.py --seconds 60`` (needs ``pip install atheris``).

Each target runs in a process of its own; the first that fails ends the run with its trace and the input's file.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LONGEST_INPUT = 4096  # bytes
NAMES = ("sdp", "answer", "stun", "plain", "realtime", "deepgram", "twilio", "wyoming", "ogg", "moshi")
CODE = "antiphon.transport", "antiphon.codecs.ogg", "aiortc.sdp", "aioice"


def fuzz(name: str, options: list[str]) -> None:
    """Run one target in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=list(CODE)):
        from antiphon.tests.fuzz.targets import SEEDS, TARGETS
    logging.disable(logging.CRITICAL)
    corpus = Path(options[0])
    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed{number}").write_bytes(seed)
    atheris.Setup([name, *options], TARGETS[name])
    atheris.Fuzz()


def run(names: list[str], seconds: int, jobs: int, found: Path) -> int:
    """Run targets side by side with a bar each; the exit status."""
    waiting, running = list(names), {}
    bars = Progress(
        TextColumn("{task.description:8}"), BarColumn(), TextColumn("{task.fields[runs]}"), TimeRemainingColumn()
    )
    with tempfile.TemporaryDirectory() as folder, bars:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name = waiting.pop(0)
                    (corpus := Path(folder) / name).mkdir()
                    log = (Path(folder) / f"{name}.log").open("w+")
                    options = [str(corpus), f"-max_total_time={seconds}", f"-max_len={LONGEST_INPUT}", "-timeout=10"]
                    options += ["-rss_limit_mb=2048", f"-artifact_prefix={found}/{name}-"]
                    command = [sys.executable, __file__, "--target", name, "--", *options]
                    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
                    running[name] = process, log, bars.add_task(name, total=seconds, runs=""), time.monotonic()
                time.sleep(0.5)
                for name, (process, log, bar, began) in list(running.items()):
                    log.seek(0)
                    lines = log.read().splitlines()
                    counts = [line.split()[0][1:] for line in lines if line.startswith("#") and line[1:2].isdigit()]
                    bars.update(bar, completed=time.monotonic() - began, runs=f"{counts[-1] if counts else 0} runs")
                    if process.poll() is None:
                        continue
                    del running[name]
                    log.close()
                    if process.returncode:
                        Console().print("\n".join(lines[-40:]), markup=False, highlight=False)
                        Console().print(f"{name} failed: the input is in {found}")
                        return 1
                    bars.update(bar, completed=seconds)
        finally:
            for process, log, *_ in running.values():
                process.terminate()
                process.wait()
                log.close()
    return 0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"any of {', '.join(NAMES)}; all of them if none is named")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="folder for inputs that fail")
    parser.add_argument("--target", choices=NAMES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.target is not None:
        fuzz(given.target, given.targets)
        return
    if unknown := set(given.targets) - set(NAMES):
        parser.error(f"no target {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    given.found.mkdir(exist_ok=True)
    sys.exit(run(given.targets or list(NAMES), given.seconds, given.jobs, given.found.resolve()))


if __name__ == "__main__":
    main()
