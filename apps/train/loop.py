"""What trainings share: weights as one flat tensor, steps as CUDA graphs, and the loop with its log and checkpoints."""

from __future__ import annotations

import copy
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"

Module = TypeVar("Module", bound=nn.Module)
Losses = dict[str, Tensor]


def prepare(device: torch.device) -> None:
    """Let a GPU multiply in TF32, and choose its convolutions by trying: a training has few shapes."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def placed(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device, without waiting for what runs there."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def schedule(step: int, steps: int, warmup: int, level_until: float) -> float:
    """A learning rate's share of its highest: linear warm-up, level, then linear to zero."""
    left = (1 - step / steps) / (1 - level_until)
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, left))


class Weights:
    """A module's parameters as views of one flat tensor, with AdamW, clipping and a moving average in a few kernels.

    The module must be on its device. average: how much of the old average stays at a step, 0 for none.
    """

    def __init__(
        self, module: nn.Module, *, betas: tuple[float, float], decay: float, clip: float, average: float = 0.0
    ) -> None:
        self.parameters = self._sorted(module)
        self.flat = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, self._split(self.flat), strict=True):
            parameter.data = part
        decayed = sum(parameter.numel() for parameter in self.parameters if parameter.ndim > 1)
        self.masters = [nn.Parameter(part) for part in (self.flat[:decayed], self.flat[decayed:])]
        device = self.flat.device
        groups = [
            {"params": [master], "weight_decay": share}
            for master, share in zip(self.masters, (decay, 0.0), strict=True)
        ]
        cuda = device.type == "cuda"
        self.rate = torch.zeros((), device=device)
        self.optimiser = torch.optim.AdamW(groups, lr=self.rate, betas=betas, fused=True, capturable=cuda)
        self.clip, self.keep = clip, average
        self.average = self.flat.clone() if average else None
        self.updates = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)

    @staticmethod
    def _sorted(module: nn.Module) -> list[nn.Parameter]:
        return sorted((p for p in module.parameters() if p.requires_grad), key=lambda parameter: parameter.ndim <= 1)

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)]

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def update(self) -> None:
        """One step down the gradients. One that is not finite changes nothing but ``skipped``."""
        gradient = torch.cat(
            [
                torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()
                for parameter in self.parameters
            ]
        ).float()
        norm = gradient.norm()
        bad = (~torch.isfinite(norm)).float()
        self.skipped += bad
        gradient *= (self.clip / (norm + 1e-6)).clamp(max=1.0)
        for master, part in zip(self.masters, gradient.split([len(master) for master in self.masters]), strict=True):
            master.grad = part
        self.optimiser.found_inf = bad  # type: ignore[attr-defined]  # the fused optimiser leaves everything as it is where this is 1
        self.optimiser.step()
        self.updates += 1
        if self.average is not None:
            keep = torch.minimum(self.updates / (9 + self.updates), torch.full_like(self.updates, self.keep))
            with torch.no_grad():
                self.average.lerp_(self.flat, 1 - keep)

    def averaged(self, module: Module) -> Module:
        """A copy of the module in eval mode, with the averaged weights."""
        if self.average is None:
            raise ValueError("these weights are not averaged: make them with average > 0")
        copied = copy.deepcopy(module)
        for parameter, part in zip(self._sorted(copied), self._split(self.average), strict=True):
            parameter.data = part.clone()
        return copied.eval()

    def state(self) -> dict[str, Any]:
        return {
            "weights": self.flat,
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "updates": self.updates,
            "skipped": self.skipped,
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        self.flat.copy_(state["weights"])
        if self.average is not None:
            self.average.copy_(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate
        self.updates.copy_(state["updates"])
        self.skipped.copy_(state["skipped"])


class Graphed:
    """A training step as CUDA graphs: ``step(key, *tensors) -> losses``, captured for each key once it ran a few times.

    A step has thousands of small kernels, which take longer to launch than to run. Tensors of one key have one shape;
    the step may depend on nothing else that changes but tensors that stay in place. On the CPU it is simply called.
    """

    EAGER = 3  # calls before the capture: libraries set themselves up in them

    def __init__(self, step: Callable[..., Losses], graphed: bool) -> None:
        self.step, self.graphed = step, graphed
        self.calls: dict[Hashable, int] = {}
        self.graphs: dict[Hashable, tuple[Any, tuple[Tensor, ...], Losses]] = {}

    def __call__(self, key: Hashable, *tensors: Tensor) -> Losses:
        if not self.graphed:
            return self.step(key, *tensors)
        if key not in self.graphs:
            self.calls[key] = self.calls.get(key, 0) + 1
            if self.calls[key] <= self.EAGER:
                return self._aside(key, tensors)
            fixed = tuple(tensor.clone() for tensor in tensors)
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                losses = self.step(key, *fixed)
            self.graphs[key] = graph, fixed, losses
        graph, fixed, losses = self.graphs[key]
        for place, tensor in zip(fixed, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        return {name: loss.clone() for name, loss in losses.items()}

    def _aside(self, key: Hashable, tensors: tuple[Tensor, ...]) -> Losses:
        """On a stream of its own, as a capture wants it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            losses = self.step(key, *tensors)
        torch.cuda.current_stream().wait_stream(stream)
        return losses


class Loop(ABC):
    """A training: ``train_step`` again and again, with a log and checkpoints in ``out``.

    steps: in all; the schedule follows from it. settings: everything else that decides the result; a run resumes only
    under the same.
    """

    def __init__(self, out: Path, steps: int, settings: Mapping[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.steps, self.settings = out, steps, dict(settings)
        self.step = 0

    @abstractmethod
    def train_step(self) -> Losses:
        """One update, which follows from ``step`` and the seed alone; the losses as tensors that nobody waits for."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that a step changes."""

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None:
        """Put it back."""

    def skipped(self) -> int:
        """Updates that were left out because a gradient was not finite."""
        return 0

    def run(
        self,
        until: int | None = None,
        minutes: float | None = None,
        fit: bool = False,
        save_every: int = 1000,
        log_every: int = 50,
    ) -> None:
        """Train up to step ``until`` (all of them by default) or for so long; save now and then and at the end.

        fit: keep changing the number of steps to what the minutes allow at the measured pace, so that the schedule ends
        with them. Such a run cannot be repeated to the bit.
        """
        until = min(until or self.steps, self.steps)
        began, last = time.perf_counter(), self.step
        deadline = began + 60 * minutes if minutes else float("inf")
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, TimeRemainingColumn()) as progress:
            bar = progress.add_task("training", total=self.steps, completed=self.step, note="")
            while self.step < until:
                losses = self.train_step()
                self.step += 1
                if self.step % log_every == 0 or self.step == until:
                    values = {name: round(float(loss), 4) for name, loss in losses.items()}
                    pace = (self.step - last) / (time.perf_counter() - began)
                    began, last = time.perf_counter(), self.step
                    left = deadline - time.perf_counter()
                    if left < 0:
                        until = self.step
                    elif fit:
                        until = self.steps = self.step + max(1, int(left * pace))
                    entry = {"step": self.step, "steps": self.steps, **values, "steps_per_second": round(pace, 2)}
                    self._log({**entry, "skipped": self.skipped()})
                    note = " ".join(f"{name} {value:.3f}" for name, value in values.items())
                    progress.update(bar, total=self.steps, completed=self.step, note=f"{note}  {pace:.1f}/s")
                if self.step % save_every == 0 or self.step == until:
                    self.save()

    def save(self) -> None:
        """Write the checkpoint in one rename."""
        partial = self.out / (CHECKPOINT + ".partial")
        torch.save({"step": self.step, "settings": self.settings, "state": self.state()}, partial)
        partial.replace(self.out / CHECKPOINT)

    def resume(self) -> bool:
        """Continue from the checkpoint in ``out``, if there is one. Raises ValueError if other settings made it."""
        path = self.out / CHECKPOINT
        if not path.is_file():
            return False
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["settings"] != self.settings:
            raise ValueError(f"{path} was made by another recipe: {saved['settings']}; choose another --out")
        self.load(saved["state"])
        self.step = saved["step"]
        return True

    def _log(self, entry: Mapping[str, Any]) -> None:
        with (self.out / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON, for comparing."""
    result: dict[str, Any] = json.loads(json.dumps(settings))
    return result


def log_of(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's log."""
    for line in (run / LOG).read_text(encoding="utf-8").splitlines():
        yield json.loads(line)
