"""Train the decoder of a codec on, for one voice; its codes stay what they are.

    antiphon train codec_refine --codec duplex-run/model/mimi --bank bank --out refine-run --minutes 40 --fit

A dialogue model speaks with one voice in the codes that it learnt. Better sound of these codes needs neither other
codes nor another model: only the decoder learns, and the projections into it, mostly on the assistant's answers.
``OUT/codec`` may take the place of the model's codec: ``duplex_card.py --refined OUT``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from ...codecs import mimi_checkpoint
from ...codecs.mimi import Mimi
from .bank import Bank
from .codec import BETAS, CODEC, Crops, Judged, Recipe, measured
from .loop import Graphed, Losses, Weights, plain
from .run import Device, Fit, Graphs, Minutes, Rate, Run, SaveEvery, Seed, Steps, Until
from .voices import RATE

ONE_VOICE = Recipe(rows=8, rate=3e-4, warmup=50, judge_from=0.1, judged=8, own=0.9, alone=0.9, noisy=0.0)


class Refining(Judged):
    """The decoder of ``codec`` against judges."""

    def __init__(
        self,
        codec: Mimi,
        recipe: Recipe,
        crops: Crops,
        out: Path,
        steps: int,
        seed: int = 0,
        graphed: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        super().__init__(plain({"recipe": asdict(recipe), "seed": seed}), recipe, crops, out, steps)
        self.mimi = codec.requires_grad_(False).train()
        for part in (codec.decoder, codec.quantizer.semantic.back, codec.quantizer.acoustic.back):
            part.requires_grad_(True)
        self.weights = Weights(codec, betas=BETAS, decay=recipe.decay, clip=100.0, average=recipe.average)
        self.graph = Graphed(self._step, graphed)

    def train_step(self) -> Losses:
        judged, pcm = self.begin(), self.crops(self.step)
        with torch.no_grad():
            codes = self.mimi.encode(pcm)
        return self.graph(judged, pcm, codes)

    def _step(self, judged: bool, pcm: Tensor, codes: Tensor) -> Losses:
        with torch.autocast(pcm.device.type, torch.bfloat16, enabled=pcm.is_cuda, cache_enabled=False):
            made = self.mimi.decode(codes)
        return self.learn(made.float(), pcm, pcm.new_zeros(()), {}, judged)

    def state(self) -> dict[str, Any]:
        return {"decoder": self.weights.state(), "judges": self.judging.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.weights.load(state["decoder"])
        self.judging.load(state["judges"])

    def codec(self) -> Mimi:
        """With averaged weights, ready to encode and decode."""
        return self.weights.averaged(self.mimi).float()


def train(
    codec: Annotated[Path, typer.Option(help="What 'antiphon train codec' made, or a model's folder 'mimi'.")],
    bank: Annotated[Path, typer.Option(help="What 'antiphon train bank' made.")],
    out: Annotated[Path, typer.Option(help="Where checkpoint, log and codec go.")],
    steps: Steps = 3000,
    until: Until = None,
    minutes: Minutes = None,
    fit: Fit = False,
    save_every: SaveEvery = 500,
    rows: Annotated[int, typer.Option(help="Crops in a batch.")] = ONE_VOICE.rows,
    rate: Rate = ONE_VOICE.rate,
    graphs: Graphs = True,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Train a codec's decoder on, for the assistant's voice."""
    run = Run(device, until, minutes, fit, save_every, graphs)
    spoken = Bank(bank)
    pcm = torch.from_numpy(np.array(spoken.pcm)).to(run.device)
    recipe = Recipe(**{**asdict(ONE_VOICE), "rows": rows, "rate": rate})
    crops = Crops(spoken, pcm, recipe, seed)
    mimi = mimi_checkpoint.load(codec, steps=(1,), device=run.device)
    before = measured(mimi, crops)
    training = Refining(mimi, recipe, crops, out, steps, seed, run.graphs)
    run.train(training, f"a decoder, {len(pcm) / RATE / 3600:.2f} h of sound")
    refined = training.codec()
    run.record(training, measured(refined, crops), before=before)
    mimi_checkpoint.save(out / CODEC, refined)


def main(arguments: Sequence[str]) -> None:
    """The command line; see ``--help``."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(train)
    command(list(arguments), standalone_mode=False, prog_name="antiphon train codec_refine")


if __name__ == "__main__":
    main(sys.argv[1:])
