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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
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
HEALTHY, LOST = 1.15, 1.3  # mean distillation loss over its lowest so far: fit to save, and beyond recovery

Hear = Callable[[Tensor, Tensor, int | None], tuple[Tensor, Tensor, Tensor]]
"""Log-mel ``[B, T, F]``, lengths ``[B]`` and a lookahead to what ``Student.hear`` returns."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides data and seed. ``..._at`` are steps, ``..._until`` shares of them.

    The losses join one after the other: CTC once the features tell phones apart, RNN-T once CTC has begun to spell. In
    a run where both joined in the first 200 steps the encoder had learned nothing after 2,000.

    forget: share of the labels that the prediction network does not get to see, so that it cannot learn a few hours'
    texts by heart.
    """

    steps: int = 4_000
    batch_seconds: float = 1200.0
    rate: float = 8e-4
    warmup: int = 500
    level_until: float = 0.2
    decay: float = 0.05
    clip: float = 1.0
    average: float = 0.999
    distil_weight: float = 4.0
    distil_least: float = 1.0
    distil_until: float = 0.6
    ctc_at: int = 500
    ctc_weight: float = 0.4
    rnnt_at: int = 1300
    forget: float = 0.05
    lookaheads: tuple[int | None, ...] = (None, 13, 6, 1, 0)
    odds: tuple[float, ...] = (0.12, 0.2, 0.32, 0.2, 0.16)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, level, then linear to zero."""
        left = (1 - step / self.steps) / (1 - self.level_until)
        return self.rate * min(1.0, (step + 1) / self.warmup) * min(1.0, max(0.0, left))

    def weights(self, step: int) -> dict[str, float]:
        """Of the losses."""

        def ramp(start: int, length: float) -> float:
            return min(1.0, max(0.0, (step - start) / max(1.0, length)))

        fall = ramp(self.rnnt_at, self.distil_until * self.steps - self.rnnt_at)
        return {
            "distil": self.distil_weight + (self.distil_least - self.distil_weight) * fall,
            "ctc": self.ctc_weight * ramp(self.ctc_at, 100),
            "rnnt": ramp(self.rnnt_at, 200),
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
        self._start_front()

    @torch.no_grad()
    def _start_front(self) -> None:
        """Start the subsampling as if its input were normalised, and so that signals keep their size through its ReLUs.

        Log-mels are about -12 with a spread of 3; without this the first layers mostly see their mean.
        """
        front = self.encoder.subsampling
        front.first.weight.mul_(0.8)
        front.first.bias.add_(12.0 * front.first.weight.sum(1))
        for layer in (*front.depthwise, *front.pointwise):
            layer.weight.mul_(2.0)

    def hear(self, mel: Tensor, lengths: Tensor, lookahead: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder frames, their number per row, and the guessed features."""
        inner: list[Tensor] = []
        hook = self.encoder.blocks[self.block].register_forward_hook(lambda *call: inner.append(call[2]))
        with torch.autocast(mel.device.type, torch.bfloat16, enabled=mel.is_cuda, cache_enabled=False):
            frames, lengths = self.encoder(mel, lengths, lookahead)
            guess = self.distil(inner[0])
        hook.remove()
        return frames, lengths, guess

    def losses(
        self,
        batch: Batch,
        features: Tensor,
        lookahead: int | None,
        weights: Mapping[str, float],
        hear: Hear,
        forget: float,
    ) -> dict[str, Tensor]:
        """Each loss with a weight above zero, a scalar float32: per frame (distil) or per token.

        hear: ``self.hear``, or the same as graphs. forget: see ``Recipe``.
        """
        device = batch.mel.device
        frames, lengths, guess = hear(batch.mel, batch.frames, lookahead)
        real = torch.arange(frames.shape[1], device=device) < lengths[:, None]
        wanted = targets(features, batch.begin, batch.rate, frames.shape[1])
        error = F.smooth_l1_loss(guess.float(), wanted.float(), reduction="none").mean(2)
        result = {"distil": (error * real).sum() / real.sum()}
        counted = batch.trusted & (batch.lengths > 0) & (lengths >= batch.lengths + 1)
        tokens = (batch.lengths * counted).sum().clamp(min=1)
        if weights["rnnt"]:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                gone = torch.rand(batch.tokens.shape, device=device) < forget
                predicted = self.transducer.predict(batch.tokens.masked_fill(gone, self.transducer.blank))
                joint = self.transducer.joint(frames, predicted)
            each = rnnt_loss(joint, batch.tokens, lengths, batch.lengths, self.transducer.blank)
            result["rnnt"] = (each * counted).sum() / tokens
        if weights["ctc"]:  # last: it waits for the device, which by then has all the rest to do
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = self.ctc(frames)
            chances = logits.float().log_softmax(-1).transpose(0, 1)
            each = F.ctc_loss(
                chances,
                batch.tokens,
                batch.host_frames,
                batch.host_lengths,
                blank=self.ctc.blank,
                reduction="none",
                zero_infinity=True,
            )
            result["ctc"] = (each * counted).sum() / tokens
        return result


class GraphedHearing:
    """``Student.hear`` and its gradient as CUDA graphs, one for each shape and lookahead, captured when first met.

    A step has thousands of small kernels, which take longer to launch than to run. All graphs share one memory pool:
    the backward pass of one is through before the next one starts.
    """

    def __init__(self, student: Student) -> None:
        self.student = student
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple[torch.Size, int | None], Any] = {}

    def __call__(self, mel: Tensor, lengths: Tensor, lookahead: int | None) -> tuple[Tensor, Tensor, Tensor]:
        key = (mel.shape, lookahead)
        if key not in self.graphs:
            make: Any = torch.cuda.make_graphed_callables
            self.graphs[key] = make(
                _Hearing(self.student, lookahead), (mel.clone(), lengths.clone()), num_warmup_iters=1, pool=self.pool
            )
        result: tuple[Tensor, Tensor, Tensor] = self.graphs[key](mel, lengths)
        return result


class _Hearing(nn.Module):
    """``Student.hear`` under one lookahead, with the parameters it uses and no others."""

    def __init__(self, student: Student, lookahead: int | None) -> None:
        super().__init__()
        self.encoder, self.distil = student.encoder, student.distil
        self._hear, self._lookahead = student.hear, lookahead

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._hear(mel, lengths, self._lookahead)


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
        self.recipe, self.batcher, self.features = recipe, batcher, features
        self.out, self.seed, self.rank, self.world = out, seed, rank, world
        self.student = student.to(device).train()
        # All weights are views of one flat tensor, so that clipping, the optimiser and the average take a few kernels.
        self.parameters = sorted(student.parameters(), key=lambda parameter: parameter.ndim <= 1)
        self.flat = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, self._split(self.flat), strict=True):
            parameter.data = part
        decayed = sum(parameter.numel() for parameter in self.parameters if parameter.ndim > 1)
        self.masters = [nn.Parameter(part) for part in (self.flat[:decayed], self.flat[decayed:])]
        groups = [
            {"params": [master], "weight_decay": decay}
            for master, decay in zip(self.masters, (recipe.decay, 0.0), strict=True)
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)
        self.average = self.flat.clone()
        self.step = 0
        self.skipped = torch.zeros((), device=device)
        self.hear: Hear = GraphedHearing(self.student) if device.type == "cuda" else self.student.hear

    def run(
        self,
        until: int | None = None,
        minutes: float | None = None,
        fit: bool = False,
        save_every: int = 1000,
        log_every: int = 50,
    ) -> None:
        """Train up to step ``until`` (all of them by default) or for so long; save now and then and at the end.

        A run whose distillation loss climbs far above its lowest goes back to its last checkpoint at half the rate.

        fit: keep changing the recipe's number of steps to what the minutes allow at the measured pace, so that the
        schedule ends with them. Such a run cannot be repeated to the bit.
        """
        until = min(until or self.recipe.steps, self.recipe.steps)
        began, last = time.perf_counter(), self.step
        deadline = began + 60 * minutes if minutes else float("inf")
        distil, lowest, ratio = torch.zeros((), device=self.flat.device), float("inf"), 1.0
        with self._progress() as progress:
            bar = progress.add_task("training", total=self.recipe.steps, completed=self.step, note="")
            while self.step < until:
                losses = self.train_step()
                distil += losses["distil"]
                if self.step % log_every == 0 or self.step == until:
                    mean = self._agreed(float(distil) / max(1, self.step - last))
                    distil.zero_()
                    lowest = min(lowest, mean)
                    ratio = mean / lowest
                    values = {name: round(float(loss), 4) for name, loss in losses.items()}
                    pace = (self.step - last) / (time.perf_counter() - began)
                    began, last = time.perf_counter(), self.step
                    self._log(
                        {
                            "step": self.step,
                            "steps": self.recipe.steps,
                            **values,
                            "steps_per_second": round(pace, 2),
                            "skipped": int(self.skipped),
                        }
                    )
                    note = " ".join(f"{name} {value:.3f}" for name, value in values.items())
                    progress.update(bar, completed=self.step, note=f"{note}  {pace:.1f}/s")
                    left = self._agreed(deadline - time.perf_counter())
                    if left < 0:
                        until = self.step
                    elif fit:
                        until = self.step + max(1, int(left * self._agreed(pace)))
                        self.recipe = replace(self.recipe, steps=until)
                    if ratio > LOST and self.step < until and self.retreat():
                        last = self.step
                        continue
                if (self.step % save_every == 0 and ratio < HEALTHY) or self.step == until:
                    self.save()

    def _agreed(self, mine: float) -> float:
        """What the first process says."""
        if self.world == 1:
            return mine
        said = torch.tensor(mine, device=self.flat.device)
        torch.distributed.broadcast(said, 0)
        return float(said)

    def train_step(self) -> dict[str, Tensor]:
        """One update. Its randomness follows from the seed and the step alone."""
        recipe, step = self.recipe, self.step
        random = np.random.default_rng([self.seed, 1, step])
        lookahead = recipe.lookaheads[int(random.choice(len(recipe.lookaheads), p=recipe.odds))]
        torch.manual_seed(int(random.integers(2**60)) + self.rank)
        batch = self.batcher(step, recipe.batch_seconds, self.rank)
        weights = recipe.weights(step)
        losses = self.student.losses(batch, self.features, lookahead, weights, self.hear, recipe.forget)
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
        gradient = torch.cat(
            [
                torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()
                for parameter in self.parameters
            ]
        )
        if self.world > 1:
            torch.distributed.all_reduce(gradient)
        gradient = gradient.float() / self.world
        norm = gradient.norm()
        bad = (~torch.isfinite(norm)).float()
        self.skipped += bad
        gradient *= (recipe.clip / (norm + 1e-6)).clamp(max=1.0)
        for master, part in zip(self.masters, gradient.split([len(master) for master in self.masters]), strict=True):
            master.grad = part
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.learning_rate(self.step)
        self.optimiser.found_inf = bad  # type: ignore[attr-defined]  # the fused optimiser leaves everything as it is where this is 1
        self.optimiser.step()
        keep = min(recipe.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            self.average.lerp_(self.flat, 1 - keep)

    def _split(self, flat: Tensor) -> list[Tensor]:
        """A tensor like ``flat`` as views shaped like the parameters."""
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)]

    def averaged(self) -> Student:
        """A copy of the student in eval mode with the averaged weights."""
        student = copy.deepcopy(self.student)
        copies = sorted(student.parameters(), key=lambda parameter: parameter.ndim <= 1)
        for parameter, part in zip(copies, self._split(self.average), strict=True):
            parameter.data = part.clone()
        return student.eval()

    def save(self) -> None:
        """Write the checkpoint in one rename. Only the first process writes."""
        if self.rank:
            return
        state = {
            "step": self.step,
            "weights": self.flat,
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "recipe": asdict(self.recipe),
            "skipped": self.skipped,
        }
        partial = self.out / (CHECKPOINT + ".partial")
        torch.save(state, partial)
        partial.replace(self.out / CHECKPOINT)

    def retreat(self) -> bool:
        """Back to the checkpoint, if there is one, with half the learning rate from here on.

        Attention whose logits have grown too large stays blind: at a level rate of 1.2e-3 the loss climbed from step
        2,700 on and was that of guessing the mean from 3,400 to the end, step 14,000.
        """
        rate, steps = self.recipe.rate / 2, self.recipe.steps
        if self.world > 1:
            torch.distributed.barrier()
        if not self.resume():
            return False
        self.recipe = replace(self.recipe, rate=rate, steps=steps)
        self._log({"step": self.step, "rate": rate})
        return True

    def resume(self) -> bool:
        """Continue from the checkpoint in ``out``, if there is one.

        Raises ValueError if it was made by another recipe. Only the number of steps may differ, and then the schedule
        follows the new one; and the rate, which is the lower of the two.
        """
        path = self.out / CHECKPOINT
        if not path.is_file():
            return False
        state = torch.load(path, map_location=self.features.device, weights_only=True)
        rate = min(self.recipe.rate, state["recipe"]["rate"])
        free = {"steps": self.recipe.steps, "rate": self.recipe.rate}
        if {**state["recipe"], **free} != asdict(self.recipe):
            raise ValueError(
                f"{path} was made by another recipe: {state['recipe']}; choose another --out or its settings"
            )
        self.recipe = replace(self.recipe, rate=rate)
        with torch.no_grad():
            self.flat.copy_(state["weights"])
            self.average.copy_(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
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
