"""What commands that train have in common: their options, and one go at a training from its device to its record."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from .loop import Loop, prepare

RUN = "run.json"
"""What a training's folder says of it: settings, command, steps and what was measured."""

Steps = Annotated[int, typer.Option(help="Updates in all; the schedule follows from it.")]
Until = Annotated[int | None, typer.Option(help="Stop at this step; start again to go on.")]
Minutes = Annotated[float | None, typer.Option(help="Stop after so long; start again to go on.")]
Fit = Annotated[bool, typer.Option(help="Let --steps follow from --minutes at the measured pace.")]
SaveEvery = Annotated[int, typer.Option(help="Steps from one checkpoint to the next.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate.")]
Graphs = Annotated[bool, typer.Option(help="Run steps as CUDA graphs.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Seed = Annotated[int, typer.Option(help="Everything random follows from it.")]


class Run:
    """One go at a training. Its minutes begin when it is made."""

    def __init__(
        self, device: str, until: int | None, minutes: float | None, fit: bool, save_every: int, graphs: bool = False
    ) -> None:
        """graphs: whether steps may be CUDA graphs, which ``graphs`` then tells for this device."""
        self._began = time.perf_counter()
        self.console = Console()
        self.device = torch.device(device)
        prepare(self.device)
        self.graphs = graphs and self.device.type == "cuda"
        self._until, self._minutes, self._fit, self._save_every = until, minutes, fit, save_every

    def train(self, training: Loop, what: str) -> None:
        """Go on with the checkpoint, if there is one, as far as the options say. what: is trained, on what."""
        self.console.print(f"{what}, on {self.device.type}")
        if training.resume():
            self.console.print(f"continuing at step {training.step}")
        spent = (time.perf_counter() - self._began) / 60
        training.run(self._until, self._minutes and self._minutes - spent, self._fit, self._save_every)

    def record(self, training: Loop, measured: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Write ``run.json`` and say what was measured; returns what was written."""
        self.console.print(json.dumps(measured))
        record = {**training.settings, "command": sys.argv, "steps": training.step, "measured": measured, **facts}
        (training.out / RUN).write_text(json.dumps(record, indent=1), encoding="utf-8")
        return record


def record_of(run: Path) -> dict[str, Any]:
    """What ``Run.record`` wrote in a training's folder."""
    record: dict[str, Any] = json.loads((run / RUN).read_text(encoding="utf-8"))
    return record
