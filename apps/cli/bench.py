"""``antiphon bench NAME``: hands its arguments to ``main`` of a module of ``apps/bench``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ...pipelines.graph import did_you_mean
from .console import CommandError

BENCHMARKS = {
    "asr": "streaming recognition: step time, sessions in real time, beside other implementations",
    "runtime": "what the graph itself costs a chunk",
}


def run(arguments: Sequence[str]) -> None:
    """Run the benchmark named first, with the rest as its own arguments; without a name, list them.

    Raises CommandError for an unknown name, or one that needs a package that is not installed.
    """
    if not arguments or arguments[0] in ("--help", "-h"):
        print("Usage: antiphon bench NAME [OPTIONS]   (antiphon bench NAME --help)\n")
        for name, what in BENCHMARKS.items():
            print(f"  {name:<10}{what}")
        return
    name, *rest = arguments
    if name not in BENCHMARKS:
        raise CommandError(f"no benchmark {name!r}{did_you_mean(name, BENCHMARKS)}")
    try:
        module = importlib.import_module(f"..bench.{name}", __package__)
    except ImportError as error:
        raise CommandError(f"bench {name} needs {error.name}: pip install 'antiphon[bench]'") from error
    module.main(rest)
