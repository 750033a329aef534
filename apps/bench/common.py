"""What every benchmark shares: a JSON beside its numbers says where, when and how they came about."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The processor, its usable cores, memory, accelerators, and the versions that matter."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for package in ("antiphon", "torch", "numpy", "transformers", "nemo_toolkit"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")  # a benchmark of the runtime alone does not load it
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
    return found


def command_line(module: str, arguments: Sequence[str]) -> str:
    """How a module was started: paths by their last part, so that nobody's folders show.

    arguments: of the process, which may be ``antiphon train NAME ...`` or ``antiphon bench NAME ...``.
    """
    if list(arguments[:2]) == module.split(".")[-2:]:
        arguments = arguments[2:]
    short = [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments]
    return shlex.join(["python", "-m", module, *short])


def write_result(name: str, command: str, numbers: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``folder/name.json`` with the command, the machine, the date and the numbers; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    date = datetime.now(UTC).isoformat(timespec="seconds")
    result = {"name": name, "command": command, "date": date, "machine": machine(), "numbers": numbers}
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def told(path: Path, plot: str, console: Console) -> None:
    """Say where a result lies, and draw it with this function of ``plots``, where there is what draws."""
    console.print(f"wrote {path}")
    try:
        from . import plots
    except ImportError:
        console.print("no plot: pip install 'antiphon[bench]' for one", markup=False)
    else:
        console.print(f"wrote {getattr(plots, plot)(path)}")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
