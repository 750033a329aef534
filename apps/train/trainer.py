"""The training loop of the embedded recogniser.

One network serves every lookahead: each batch draws one. Three losses, each entering when the one before has prepared
the ground: distillation of whisper's encoder (a dense target for every frame, which a network that starts from nothing
needs to leave the stage where it only says blank), CTC, RNN-T. The learning rate falls to zero while all three are on;
what is exported is a moving average of the weights.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.conformer.config import ConformerConfig, TransducerConfig
from ...models.conformer.ctc import CTCHead
from ...models.conformer.encoder import ConformerEncoder
from ...models.conformer.transducer import Transducer
from .batches import Batch, Batcher
from .rnnt_loss import rnnt_loss
from .teacher import targets

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides data and seed. Times are shares of ``steps``."""

    steps: int = 10_000
    batch_seconds: float = 900.0
    rate: float = 1.5e-3
    warmup: int = 500
    decay: float = 0.01
    clip: float = 1.0
    average: float = 0.998
    distil_block: int = 8
    distil_until: float = 0.6
    distil_weight: float = 4.0
    distil_least: float = 1.0
    ctc_from: float = 0.04
    ctc_weight: float = 0.4
    rnnt_from: float = 0.15
    lookaheads: tuple[int | None, ...] = (None, 13, 6, 1, 0)
    odds: tuple[float, ...] = (0.12, 0.2, 0.32, 0.2, 0.16)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, level until 40 % of the steps, then linear to zero."""
        progress = step / self.steps
        return self.rate * min(1.0, (step + 1) / self.warmup) * min(1.0, max(0.0, 1 - progress) / 0.6)

    def weights(self, step: int) -> dict[str, float]:
        """Of the losses."""
        progress = step / self.steps

        def ramp(start: float, length: float) -> float:
            return min(1.0, max(0.0, (progress - start) / length))

        fall = ramp(self.rnnt_from, self.distil_until - self.rnnt_from)
        return {
            "distil": self.distil_weight + (self.distil_least - self.distil_weight) * fall,
            "ctc": self.ctc_weight * ramp(self.ctc_from, 0.02),
            "rnnt": ramp(self.rnnt_from, 0.05),
        }


class Student(nn.Module):
    """The recogniser's networks and a head that predicts the teacher's features from an inner block."""

    def __init__(self, encoder: ConformerConfig, transducer: TransducerConfig, teacher_width: int, block: int) -> None:
        super().__init__()
        self.encoder = ConformerEncoder(encoder)
        self.transducer = Transducer(transducer)
        self.ctc = CTCHead(encoder.width, transducer.vocabulary)
        self.distil = nn.Linear(encoder.width, 2 * teacher_width)
        self.block = block

    def losses(
        self, batch: Batch, features: Tensor, lookahead: int | None, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Each loss with a weight above zero, a scalar float32: per frame (distil) or per token."""
        device = batch.mel.device
        inner: list[Tensor] = []
        hook = self.encoder.blocks[self.block].register_forward_hook(lambda *call: inner.append(call[2]))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            frames, lengths = self.encoder(batch.mel, batch.frames, lookahead)
            guess = self.distil(inner[0])
        hook.remove()
        real = torch.arange(frames.shape[1], device=device) < lengths[:, None]
        wanted = targets(features, batch.begin, batch.rate, frames.shape[1])
        error = F.smooth_l1_loss(guess.float(), wanted.float(), reduction="none").mean(2)
        result = {"distil": (error * real).sum() / real.sum()}
        counted = batch.trusted & (batch.lengths > 0) & (lengths >= batch.lengths + 1)
        tokens = (batch.lengths * counted).sum().clamp(min=1)
        if weights["ctc"]:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = self.ctc(frames)
            chances = logits.float().log_softmax(-1).transpose(0, 1)
            each = F.ctc_loss(
                chances,
                batch.tokens,
                lengths,
                batch.lengths,
                blank=self.ctc.blank,
                reduction="none",
                zero_infinity=True,
            )
            result["ctc"] = (each * counted).sum() / tokens
        if weights["rnnt"]:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                joint = self.transducer.joint(frames, self.transducer.predict(batch.tokens))
            each = rnnt_loss(joint, batch.tokens, lengths, batch.lengths, self.transducer.blank)
            result["rnnt"] = (each * counted).sum() / tokens
        return result


class Trainer:
    """Owns the student, the optimiser and the averaged weights; ``run`` trains from where the checkpoint stands."""

    def __init__(
        self,
        student: Student,
        recipe: Recipe,
        batcher: Batcher,
        features: Tensor,
        out: Path,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        device = batcher.pool.pcm.device
        self.student = student.to(device).train()
        self.recipe, self.batcher, self.features = recipe, batcher, features
        self.out, self.seed, self.rank, self.world = out, seed, rank, world
        matrices = [p for p in student.parameters() if p.ndim > 1]
        vectors = [p for p in student.parameters() if p.ndim <= 1]
        self.parameters = matrices + vectors
        groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)
        self.average = [p.detach().clone() for p in self.parameters]
        self.step = 0
        self.skipped = torch.zeros((), device=device)

    def run(
        self, until: int | None = None, minutes: float | None = None, save_every: int = 1000, log_every: int = 50
    ) -> None:
        """Train up to step ``until`` (all of them by default) or for so long; save now and then and at the end."""
        until = min(until or self.recipe.steps, self.recipe.steps)
        began, last = time.perf_counter(), self.step
        deadline = began + 60 * minutes if minutes else float("inf")
        with self._progress() as progress:
            bar = progress.add_task("training", total=self.recipe.steps, completed=self.step, note="")
            while self.step < until:
                losses = self.train_step()
                if self.step % log_every == 0 or self.step == until:
                    values = {name: round(float(loss), 4) for name, loss in losses.items()}
                    pace = (self.step - last) / (time.perf_counter() - began)
                    began, last = time.perf_counter(), self.step
                    self._log(
                        {"step": self.step, **values, "steps_per_second": round(pace, 2), "skipped": int(self.skipped)}
                    )
                    note = " ".join(f"{name} {value:.3f}" for name, value in values.items())
                    progress.update(bar, completed=self.step, note=f"{note}  {pace:.1f}/s")
                    if self._all_agree(time.perf_counter() > deadline):
                        until = self.step
                if self.step % save_every == 0 or self.step == until:
                    self.save()

    def _all_agree(self, mine: bool) -> bool:
        """What the first process says."""
        if self.world == 1:
            return mine
        said = torch.tensor(float(mine), device=self.skipped.device)
        torch.distributed.broadcast(said, 0)
        return bool(said)

    def train_step(self) -> dict[str, Tensor]:
        """One update. Its randomness follows from the seed and the step alone."""
        recipe, step = self.recipe, self.step
        random = np.random.default_rng([self.seed, 1, step])
        lookahead = recipe.lookaheads[int(random.choice(len(recipe.lookaheads), p=recipe.odds))]
        torch.manual_seed(int(random.integers(2**60)) + self.rank)
        batch = self.batcher(step, recipe.batch_seconds, self.rank)
        weights = recipe.weights(step)
        losses = self.student.losses(batch, self.features, lookahead, weights)
        total = sum((weights[name] * loss for name, loss in losses.items()), torch.zeros((), device=batch.mel.device))
        for parameter in self.parameters:
            parameter.grad = None
        total.backward()
        self._update()
        self.step += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def _update(self) -> None:
        """Average over processes, clip, step, average over time. A gradient that is not finite changes nothing."""
        recipe = self.recipe
        for parameter in self.parameters:
            if parameter.grad is None:  # a loss that has not begun
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.world > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            sizes = [gradient.numel() for gradient in gradients]
            for gradient, part in zip(gradients, flat.split(sizes), strict=True):
                gradient.copy_(part.view_as(gradient) / self.world)
        norm = nn.utils.get_total_norm(gradients)
        bad = (~torch.isfinite(norm)).float()
        self.skipped += bad
        torch._foreach_mul_(gradients, (recipe.clip / (norm + 1e-6)).clamp(max=1.0))
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.learning_rate(self.step)
        self.optimiser.found_inf = bad  # the fused optimiser leaves everything as it is where this is 1
        self.optimiser.step()
        keep = min(recipe.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - keep)

    def averaged(self) -> Student:
        """A copy of the student in eval mode with the averaged weights."""
        student = copy.deepcopy(self.student)
        mine = [p for p in student.parameters() if p.ndim > 1] + [p for p in student.parameters() if p.ndim <= 1]
        with torch.no_grad():
            torch._foreach_copy_(mine, self.average)
        return student.eval()

    def save(self) -> None:
        """Write the checkpoint in one rename. Only the first process writes."""
        if self.rank:
            return
        state = {
            "step": self.step,
            "student": self.student.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "recipe": asdict(self.recipe),
            "skipped": self.skipped,
        }
        partial = self.out / (CHECKPOINT + ".partial")
        torch.save(state, partial)
        partial.replace(self.out / CHECKPOINT)

    def resume(self) -> bool:
        """Continue from the checkpoint in ``out``, if there is one.

        Raises ValueError if it was made by another recipe. Only the number of steps may differ: the schedule then
        follows the new one.
        """
        path = self.out / CHECKPOINT
        if not path.is_file():
            return False
        state = torch.load(path, map_location=self.features.device, weights_only=True)
        if {**state["recipe"], "steps": self.recipe.steps} != asdict(self.recipe):
            raise ValueError(
                f"{path} was made by another recipe: {state['recipe']}; choose another --out or its settings"
            )
        self.student.load_state_dict(state["student"])
        self.optimiser.load_state_dict(state["optimiser"])
        torch._foreach_copy_(self.average, state["average"])
        self.step, self.skipped = state["step"], state["skipped"].to(self.features.device)
        return True

    def _log(self, entry: dict[str, Any]) -> None:
        if self.rank == 0:
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        return Progress(*columns, TimeRemainingColumn(), disable=self.rank > 0)
