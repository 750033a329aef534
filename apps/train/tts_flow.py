"""Train the embedded voice's flow matching: speech tokens of its bank to mel frames, under the mask that streams.

    antiphon train tts flow --bank speech-bank --out flow-run --minutes 7 --fit --device cuda

Every batch is masked as ``StreamingFlow`` masks: a frame sees its own chunk and all before it, three tokens are heard
ahead. The loss is ``FlowMatching.loss`` without prompts, since these voices have none, and the encoder is drawn
towards the mel frames besides (as Grad-TTS is, arXiv 2105.06337), which tells it sooner what it is for. A voice is a
learned vector. Stop and start again at will. ``OUT/flow.safetensors`` has averaged weights,
``OUT/voices.safetensors`` a vector for each voice by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from ...models.cosyvoice.flow import FlowMatching
from ...models.cosyvoice.flow_config import RATE, FlowConfig
from ...models.cosyvoice.flow_context import Mask
from .loop import Graphed, Loop, Losses, Weights, placed, plain, schedule
from .run import Device, Fit, Graphs, Minutes, Rate, Run, SaveEvery, Seed, Steps, Until, record_of
from .tts_bank import Batches, SpeechBank, Spoken, gathered
from .tts_sizes import FLOW, VOICES

FLOW_FILE, VOICES_FILE = "flow.safetensors", "voices.safetensors"
WIDTHS = (48, 80, 112, 144, 184, 232, 304)  # speech tokens of a batch's rows: one CUDA graph each


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides data, sizes and seed. room: tokens in a batch.

    prior: weight of the encoder's own distance to the mel frames. told: share of the rows that know a prompt.
    """

    room: int = 6400
    rate: float = 1e-3
    warmup: int = 500
    level_until: float = 0.4
    decay: float = 0.01
    clip: float = 1.0
    average: float = 0.9995
    prior: float = 0.2
    told: float = 0.0


class Student(nn.Module):
    """A flow in training with a vector for each voice."""

    def __init__(self, config: FlowConfig, voices: int) -> None:
        super().__init__()
        self.flow = FlowMatching(config)
        self.voices = nn.Embedding(voices, config.speaker)

    @torch.no_grad()
    def start(self, mel: Tensor) -> None:
        """Begin at the mean of the frames ``[N, mels]``, which lies far from 0: a narrow network learns it slowly."""
        mean = mel[:: max(1, len(mel) // 100_000)].float().mean(0)
        for layer in (self.flow.encoder.project, self.flow.estimator.project):
            layer.bias.copy_(mean)


@dataclass(frozen=True, eq=False)
class Examples:
    """Utterances, with the bank's tokens ``[N]`` and mel frames ``[2 N, mels]`` on the device."""

    utterances: Sequence[Spoken]
    tokens: Tensor
    mel: Tensor

    @classmethod
    def of(cls, bank: SpeechBank, device: torch.device) -> tuple[Examples, Examples]:
        """Of a bank: to train on, and to test with."""
        tokens, mel = (torch.from_numpy(np.array(array)).to(device) for array in (bank.tokens, bank.mel))
        return cls(bank.train, tokens, mel), cls(bank.test, tokens, mel)

    def batch(self, width: int, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """tokens ``[B, width]``, how many of them are each row's own, mel ``[B, 2 width, mels]``, voices ``[B]``."""
        some = [self.utterances[index] for index in chosen]
        numbers = np.array([(one.begin, one.count, one.voice) for one in some]).T.copy()
        begin, count, voice = placed(numbers, self.mel.device)
        tokens = gathered(self.tokens, begin, count, width).long()
        mel = gathered(self.mel, begin * RATE, count * RATE, width * RATE).float()
        return tokens, count, mel, voice


class FlowTraining(Loop):
    """The flow's training."""

    def __init__(
        self,
        config: FlowConfig,
        recipe: Recipe,
        examples: Examples,
        out: Path,
        steps: int,
        seed: int = 0,
        graphed: bool = False,
    ) -> None:
        super().__init__(out, steps, plain({"config": asdict(config), "recipe": asdict(recipe), "seed": seed}))
        torch.manual_seed(seed)
        self.recipe, self.examples, self.seed = recipe, examples, seed
        self.mask = Mask(config.chunk)
        self.batches = Batches([one.count for one in examples.utterances], recipe.room, WIDTHS, seed)
        self.student = Student(config, len(VOICES)).to(examples.mel.device).train()
        self.student.start(examples.mel)
        self.weights = Weights(
            self.student, betas=(0.9, 0.98), decay=recipe.decay, clip=recipe.clip, average=recipe.average
        )  # fmt: skip
        self.graph = Graphed(self._step, graphed)

    def losses(self, student: Student, tokens: Tensor, count: Tensor, mel: Tensor, voice: Tensor) -> Losses:
        """``flow``, the velocity's mean squared error, and ``prior``, the encoder's mean absolute one."""
        with torch.autocast(mel.device.type, torch.bfloat16, enabled=mel.is_cuda, cache_enabled=False):
            flow = student.flow
            mu = flow.encode(tokens, count, self.mask).float()
            error = flow.loss(mu, count, mel, student.voices(voice), self.mask, told=self.recipe.told)
        real = (torch.arange(mel.shape[1], device=mel.device) < (count * RATE)[:, None])[..., None]
        prior = ((mu - mel).abs() * real).sum() / (real.sum() * mel.shape[2])
        return {"flow": error, "prior": prior}

    def train_step(self) -> Losses:
        recipe = self.recipe
        self.weights.rate.fill_(recipe.rate * schedule(self.step, self.steps, recipe.warmup, recipe.level_until))
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        width, chosen = self.batches(self.step)
        return self.graph(width, *self.examples.batch(width, chosen))

    def _step(self, width: int, tokens: Tensor, count: Tensor, mel: Tensor, voice: Tensor) -> Losses:
        losses = self.losses(self.student, tokens, count, mel, voice)
        self.weights.clear()
        (losses["flow"] + self.recipe.prior * losses["prior"]).backward()
        self.weights.update()
        return {name: loss.detach() for name, loss in losses.items()}

    def skipped(self) -> int:
        return int(self.weights.skipped)

    def state(self) -> dict[str, Any]:
        return {"student": self.weights.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.weights.load(state["student"])

    @torch.no_grad()
    def measured(self, examples: Examples, batches: int = 4, rows: int = 16) -> dict[str, float]:
        """The averaged flow's losses, and ``drawn``: how far its frames are from the real ones (mean absolute)."""
        student = self.weights.averaged(self.student)
        of_length = Batches([one.count for one in examples.utterances], self.recipe.room, WIDTHS, self.seed)
        torch.manual_seed(self.seed)
        sums = {"flow": 0.0, "prior": 0.0, "drawn": 0.0}
        for number in range(batches):
            width, chosen = of_length(2**31 + number)
            tokens, count, mel, voice = examples.batch(width, chosen)
            for name, loss in self.losses(student, tokens, count, mel, voice).items():
                sums[name] += float(loss) / batches
            embedding = student.voices(voice)[:rows]
            made = student.flow.generate(tokens[:rows], count[:rows], mel[:rows, :0], embedding, self.mask)
            far = (made - mel[:rows]).abs().sum() / (count[:rows].sum() * RATE * mel.shape[2])
            sums["drawn"] += float(far) / batches
        return {name: round(value, 4) for name, value in sums.items()}

    def save_model(self) -> None:
        """Write the flow and the voices with averaged weights."""
        student = self.weights.averaged(self.student)
        safetensors.torch.save_file(student.flow.state_dict(), self.out / FLOW_FILE)
        vectors = {name: student.voices.weight[number].detach().clone() for number, name in enumerate(VOICES)}
        safetensors.torch.save_file(vectors, self.out / VOICES_FILE)


def load_flow(run: Path) -> tuple[FlowMatching, dict[str, Tensor]]:
    """The flow of a training's folder, and the voices' embeddings by name."""
    settings = record_of(run)["config"]
    flow = FlowMatching(FlowConfig(**settings))
    flow.load_state_dict(safetensors.torch.load_file(run / FLOW_FILE))
    return flow.eval(), safetensors.torch.load_file(run / VOICES_FILE)


def train(
    bank: Annotated[Path, typer.Option(help="What 'antiphon train tts bank' made, with its tokens.")],
    out: Annotated[Path, typer.Option(help="Where checkpoint, log and flow go.")],
    steps: Steps = 20000,
    until: Until = None,
    minutes: Minutes = None,
    fit: Fit = False,
    save_every: SaveEvery = 2000,
    room: Annotated[int, typer.Option(help="Speech tokens in a batch.")] = Recipe.room,
    rate: Rate = Recipe.rate,
    graphs: Graphs = True,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Train the flow matching and its voices."""
    run = Run(device, until, minutes, fit, save_every, graphs)
    examples, others = Examples.of(SpeechBank(bank), run.device)
    recipe = Recipe(room=room, rate=rate)
    training = FlowTraining(FLOW, recipe, examples, out, steps, seed, run.graphs)
    count = sum(value.numel() for value in training.student.flow.state_dict().values())
    run.train(training, f"{count / 1e6:.2f} M numbers, {len(examples.utterances):,} utterances")
    found = {"train": training.measured(examples)}
    if others.utterances:
        found["held-out sentences"] = training.measured(others)
    run.record(training, found)
    training.save_model()
