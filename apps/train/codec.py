"""Train a small Mimi: the codec of the tiny dialogue model.

    antiphon train codec --bank bank --out codec-run --minutes 9 --fit --device cuda

Spectral distances and discriminators make it sound right; the first codebook is distilled from the embedded
recogniser's encoder, whose frames also come 12.5 times a second, as Mimi's is from WavLM (arXiv 2410.00037, section
3.3.2). Codebooks follow moving averages of what they stand for; entries that nobody uses start again at an input
(arXiv 2107.03312). Stop and start again at will. The codec, with averaged weights, is ``OUT/codec``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from ...codecs import mimi_checkpoint
from ...codecs.mel import LogMel, MelConfig
from ...codecs.mimi import Mimi, MimiConfig, Whole
from ...codecs.mimi_quantizer import ResidualQuantizer, SplitQuantizer
from ...models.conformer.checkpoint import load as load_recogniser
from ...models.conformer.encoder import ConformerEncoder
from .bank import LOUDNESS, Bank
from .codec_losses import Judges, MelDistance
from .loop import Graphed, Loop, Losses, Weights, placed, plain, schedule
from .run import Device, Fit, Graphs, Minutes, Rate, Run, SaveEvery, Seed, Steps, Until
from .voices import RATE
from .voices.signal import CLIP_RATE, PLAIN, resample

CODEC = "codec"
BETAS = (0.8, 0.99)

TINY = MimiConfig(
    channels=16,
    width=192,
    layers=2,
    heads=3,
    feedforward=768,
    window=50,
    codebooks=8,
    bins=512,
    code_width=64,
    steps=(1,),
)
"""The codec that is shipped: 8 codebooks of 512. Its transformers look back 2 s, less than the crops it learns from."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides data, sizes and seed. judge_from: share of the steps without judges.

    lag: frames by which the recogniser's features are older than what the codec has heard. own: share of crops of the
    assistant's voice. alone: share in which there is silence around an utterance. judged: frames of a crop that the
    judges hear. remember: how much of a codebook's statistics stays at a step, after the first steps.
    """

    rows: int = 64
    frames: int = 40
    rate: float = 6e-4
    warmup: int = 300
    level_until: float = 0.3
    decay: float = 0.01
    average: float = 0.999
    judge_from: float = 0.35
    judged: int = 12
    mel: float = 15.0
    fool: float = 1.0
    alike: float = 2.0
    commit: float = 0.25
    distil: float = 5.0
    lag: int = 1
    remember: float = 0.99
    dead: float = 0.1
    own: float = 0.45
    alone: float = 0.5
    gain: tuple[float, float] = (-16.0, 8.0)
    noisy: float = 0.3
    noise: tuple[float, float] = (-35.0, -8.0)


class Learned(nn.Module):
    """A residual quantiser's codebooks in training: moving counts and sums of what each entry stands for."""

    counts: Tensor
    sums: Tensor
    updates: Tensor

    def __init__(self, quantizer: ResidualQuantizer, remember: float, dead: float) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.remember, self.dead = remember, dead
        embedding = quantizer.codebooks.embedding
        self.register_buffer("counts", torch.zeros(embedding.shape[:2]))
        self.register_buffer("sums", torch.zeros_like(embedding))
        self.register_buffer("updates", torch.zeros(()))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, n, d]`` -> entries ``[B, n, code_width]`` with the gradient of what they stand for, the commitment
        loss, and how many entries of a codebook are in use (perplexity, the mean over codebooks)."""
        into = self.quantizer.into(latents)
        with torch.autocast(latents.device.type, enabled=False):
            x = into.float().flatten(0, 1)
            left, commit, used = x, x.new_zeros(()), x.new_zeros(())
            if self.training:
                self.updates += 1
            for level, entries in enumerate(self.quantizer.codebooks.embedding):
                with torch.no_grad():
                    codes = torch.addmm(-0.5 * entries.square().sum(1), left, entries.t()).argmax(1)
                    chosen = F.embedding(codes, entries).clone()
                    if self.training:
                        used = used + self._learn(level, codes, left)
                commit = commit + F.mse_loss(left, chosen)
                left = left - chosen
            entry = x + ((x - left) - x).detach()
        return entry.view(into.shape), commit, used / len(self.counts)

    def _learn(self, level: int, codes: Tensor, inputs: Tensor) -> Tensor:
        counts, sums = self.counts[level], self.sums[level]
        ones = torch.ones_like(inputs[:, 0])
        now = torch.zeros_like(counts).index_add_(0, codes, ones)
        # While latents still move fast, their statistics must follow.
        fresh_share = (5 / (5 + self.updates)).clamp(min=1 - self.remember)
        counts.lerp_(now, fresh_share)
        sums.lerp_(torch.zeros_like(sums).index_add_(0, codes, inputs), fresh_share)
        mean = len(inputs) / len(counts)
        dead = counts < self.dead * mean
        fresh = inputs[torch.randint(len(inputs), (len(counts),), device=inputs.device)]
        counts.copy_(torch.where(dead, mean, counts))
        sums.copy_(torch.where(dead[:, None], fresh * mean, sums))
        self.quantizer.codebooks.embedding[level].copy_(sums / counts[:, None])
        share = now / len(inputs)
        return (-(share * share.clamp(min=1e-9).log()).sum()).exp()


class Student(nn.Module):
    """A codec in training: its codebooks' statistics and the head that guesses the recogniser's features."""

    def __init__(self, config: MimiConfig, teacher_width: int, recipe: Recipe) -> None:
        super().__init__()
        self.mimi = Mimi(config)
        quantizer: SplitQuantizer = self.mimi.quantizer
        self.semantic = Learned(quantizer.semantic, recipe.remember, recipe.dead)
        self.acoustic = Learned(quantizer.acoustic, recipe.remember, recipe.dead)
        self.distil = nn.Linear(config.code_width, teacher_width)

        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Weights that keep a signal's size, biases of zero, and speech at a size of one inside: as torch starts them,
        latents would be nearly the same for all sounds, and a codebook that follows them one entry."""
        for module in self.mimi.modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.Linear):
                module.weight.mul_(3**0.5)
                if module.bias is not None:
                    module.bias.zero_()
        self.mimi.encoder.seanet.first.weight.mul_(1 / LOUDNESS)
        self.mimi.decoder.seanet.last.weight.mul_(LOUDNESS)

    def forward(self, pcm: Tensor) -> tuple[Tensor, Tensor, Losses]:
        """``[B, T]`` samples -> the same through the codec, the guess ``[B, n, teacher_width]``, and ``commit`` and
        ``used``."""
        with torch.autocast(pcm.device.type, torch.bfloat16, enabled=pcm.is_cuda, cache_enabled=False):
            latents = self.mimi.encoder(pcm, Whole())
            semantic, first, used = self.semantic(latents)
            acoustic, rest, others = self.acoustic(latents)
            quantizer = self.mimi.quantizer
            made = self.mimi.decoder(quantizer.semantic.back(semantic) + quantizer.acoustic.back(acoustic), Whole())
            guess = self.distil(semantic)
        return made.float(), guess.float(), {"commit": first + rest, "used": used, "others": others}


class Teacher(nn.Module):
    """A recogniser's encoder: 24 kHz sound to one vector for each of the codec's frames."""

    mean: Tensor
    spread: Tensor

    def __init__(self, encoder: ConformerEncoder, mel: LogMel, lag: int) -> None:
        super().__init__()
        self.encoder, self.mel, self.lag = encoder.eval().requires_grad_(False), mel, lag
        self.register_buffer("mean", torch.zeros(encoder.config.width))
        self.register_buffer("spread", torch.ones(encoder.config.width))

    @classmethod
    def embedded(cls, lag: int, device: torch.device) -> Teacher:
        """The package's own recogniser."""
        recogniser = load_recogniser(device=device)
        return cls(recogniser.encoder, LogMel(MelConfig.from_nemo(recogniser.mel)).to(device), lag).to(device)

    @property
    def width(self) -> int:
        return self.encoder.config.width

    @torch.no_grad()
    def forward(self, pcm: Tensor) -> Tensor:
        """``[B, n * 1920]`` -> ``[B, n, width]`` standardised: frame i has heard up to the codec's frame i - lag."""
        rows, width = pcm.shape
        # Rows lie back to back: the filter mixes the millisecond where they meet.
        sound = resample(pcm.reshape(-1), PLAIN).view(rows, width * CLIP_RATE // RATE)
        frames = width // 1920
        sizes = torch.full((rows,), sound.shape[1], device=pcm.device)
        with torch.autocast(pcm.device.type, torch.bfloat16, enabled=pcm.is_cuda, cache_enabled=False):
            mel, lengths = self.mel(sound, sizes)
            heard, _ = self.encoder(mel, lengths, 6)
        # The recogniser's frame k is centred on the end of the codec's frame k - 1.
        heard = F.pad(heard.float(), (0, 0, max(0, self.lag - 1), 1))[:, max(0, 1 - self.lag) :][:, :frames]
        return (heard - self.mean) / self.spread

    @torch.no_grad()
    def standardise(self, pcm: Tensor) -> None:
        """Take mean and spread from this sound, ``[B, T]``."""
        frames = self(pcm).flatten(0, 1) * self.spread + self.mean
        self.mean.copy_(frames.mean(0))
        self.spread.copy_(frames.std(0).clamp(min=1e-3))


class Crops:
    """Stretches of a bank's sound, a pure function of seed and step. pcm: the bank's samples on the device."""

    def __init__(self, bank: Bank, pcm: Tensor, recipe: Recipe, seed: int) -> None:
        self.pcm, self.recipe, self.seed = pcm, recipe, seed
        kept = [one for one in bank.utterances if not one.held_out]
        self.begin = np.array([one.begin for one in kept])
        self.samples = np.array([one.samples for one in kept])
        own = np.array([one.role == "answer" for one in kept])
        self.own = own
        share = np.where(own, recipe.own / max(1, self.samples[own].sum()), 0)
        share = share + np.where(own, 0, (1 - recipe.own) / max(1, self.samples[~own].sum()))
        odds = self.samples * share
        self.odds = np.cumsum(odds) / odds.sum()
        self.noises = np.array([(one.begin, one.samples) for one in bank.of("noise")]).reshape(-1, 2)

    def __call__(self, step: int) -> Tensor:
        """``[rows, frames * 1920]`` float32."""
        recipe, random = self.recipe, np.random.default_rng([self.seed, step])
        rows, width = recipe.rows, recipe.frames * 1920
        chosen = np.searchsorted(self.odds, random.random(rows))
        first, size = self.begin[chosen], self.samples[chosen]
        begin = first + (random.random(rows) * size).astype(np.int64) - width // 2
        alone = random.random(rows) < recipe.alone
        low, high = np.where(alone, first, 0), np.where(alone, first + size, len(self.pcm))
        gain = 10 ** (random.uniform(*recipe.gain, rows) / 20)
        gain = np.where(self.own[chosen] & (random.random(rows) < 0.8), 1.0, gain)
        sound = self._read(begin, low, high, gain, width)
        if len(self.noises):
            which = random.integers(len(self.noises), size=rows)
            start = self.noises[which, 0]
            level = gain * 10 ** (random.uniform(*recipe.noise, rows) / 20)
            level = np.where((random.random(rows) < recipe.noisy) & ~self.own[chosen], level, 0.0)
            sound = sound + self._read(start, start, start + self.noises[which, 1], level, width)
        return sound.clamp(-1, 1)

    def _read(self, begin: Any, low: Any, high: Any, gain: Any, width: int) -> Tensor:
        device = self.pcm.device
        begin, low, high = placed(np.stack((begin, low, high)), device)[:, :, None]
        gain = placed(np.asarray(gain, np.float32), device)[:, None]
        index = begin + torch.arange(width, device=device)
        real = (index >= low) & (index < high) & (index >= 0) & (index < len(self.pcm))
        sound = self.pcm[index.clamp(0, len(self.pcm) - 1)].float() / 32768
        return torch.where(real, sound * gain, 0.0)


class Judged(Loop):
    """What makes sound against judges, with ``self.weights`` those of what makes it."""

    weights: Weights

    def __init__(self, settings: Mapping[str, Any], recipe: Recipe, crops: Crops, out: Path, steps: int) -> None:
        super().__init__(out, steps, settings)
        self.recipe, self.crops, device = recipe, crops, crops.pcm.device
        self.judges = Judges().to(device).train()
        self.distance = MelDistance(RATE).to(device)
        self.judging = Weights(self.judges, betas=BETAS, decay=recipe.decay, clip=10.0)

    def begin(self) -> bool:
        """Set a step's rates and seed; whether it has judges."""
        share = schedule(self.step, self.steps, self.recipe.warmup, self.recipe.level_until)
        self.weights.rate.fill_(self.recipe.rate * share)
        self.judging.rate.fill_(self.recipe.rate * share)
        torch.manual_seed(self.crops.seed * 1_000_003 + self.step)
        return self.step >= self.recipe.judge_from * self.steps

    def learn(self, made: Tensor, pcm: Tensor, total: Tensor, losses: Losses, judged: bool) -> Losses:
        """One step down ``total`` and the spectral distance, and against the judges, who learn too."""
        recipe = self.recipe
        losses["mel"] = self.distance(made, pcm)
        total = total + recipe.mel * losses["mel"]
        if judged:
            with torch.autocast(pcm.device.type, torch.bfloat16, enabled=pcm.is_cuda, cache_enabled=False):
                made, pcm = self._stretch(made, pcm)
                losses["tell"] = self.judges.to_tell(made.detach(), pcm)
            self.judging.clear()
            losses["tell"].backward()
            self.judging.update()
            with torch.autocast(pcm.device.type, torch.bfloat16, enabled=pcm.is_cuda, cache_enabled=False):
                losses["fool"], losses["alike"] = self.judges.to_fool(made, pcm)
            total = total + recipe.fool * losses["fool"] + recipe.alike * losses["alike"]
        self.weights.clear()
        total.backward()
        self.weights.update()
        return {name: loss.detach() for name, loss in losses.items()}

    def _stretch(self, made: Tensor, pcm: Tensor) -> tuple[Tensor, Tensor]:
        """The part of both that the judges hear."""
        width = min(pcm.shape[1], self.recipe.judged * 1920)
        start = torch.randint(pcm.shape[1] - width + 1, (), device=pcm.device)
        index = start + torch.arange(width, device=pcm.device)
        return made.index_select(1, index), pcm.index_select(1, index)

    def skipped(self) -> int:
        return int(self.weights.skipped + self.judging.skipped)


class CodecTraining(Judged):
    """Codec and judges against each other."""

    def __init__(
        self,
        config: MimiConfig,
        recipe: Recipe,
        crops: Crops,
        teacher: Teacher,
        out: Path,
        steps: int,
        seed: int = 0,
        graphed: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        student = Student(config, teacher.width, recipe)
        settings = plain({"config": asdict(config), "recipe": asdict(recipe), "seed": seed})
        super().__init__(settings, recipe, crops, out, steps)
        self.teacher, self.student = teacher, student.to(crops.pcm.device).train()
        self.weights = Weights(self.student, betas=BETAS, decay=recipe.decay, clip=100.0, average=recipe.average)
        self.graph = Graphed(self._step, graphed)
        teacher.standardise(crops(2**31))

    def train_step(self) -> Losses:
        judged, pcm = self.begin(), self.crops(self.step)
        return self.graph(judged, pcm, self.teacher(pcm))

    def _step(self, judged: bool, pcm: Tensor, wanted: Tensor) -> Losses:
        recipe = self.recipe
        made, guess, losses = self.student(pcm)
        losses["distil"] = 1 - F.cosine_similarity(guess, wanted, dim=-1)[:, 1:].mean()
        total = recipe.commit * losses["commit"] + recipe.distil * losses["distil"]
        return self.learn(made, pcm, total, losses, judged)

    def state(self) -> dict[str, Any]:
        return {
            "student": self.weights.state(),
            "judges": self.judging.state(),
            "buffers": dict(self.student.named_buffers()),
            "teacher": dict(self.teacher.named_buffers()),
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        self.weights.load(state["student"])
        self.judging.load(state["judges"])
        for module, name in ((self.student, "buffers"), (self.teacher, "teacher")):
            for key, buffer in module.named_buffers():
                if key in state[name]:
                    buffer.copy_(state[name][key])

    def codec(self) -> Mimi:
        """With averaged weights, ready to encode."""
        return self.weights.averaged(self.student).mimi.float()


@torch.no_grad()
def measured(codec: Mimi, crops: Crops, batches: int = 4) -> dict[str, float]:
    """Of sound it was not trained on this way: the spectral distance, and the level of what is lost against the sound
    in decibels."""
    distance = MelDistance(codec.config.sample_rate).to(crops.pcm.device)
    mel = lost = heard = 0.0
    for number in range(batches):
        pcm = crops(2**31 + 1 + number)
        made = codec.decode(codec.encode(pcm))
        mel += float(distance(made, pcm)) / batches
        lost += float((made - pcm).square().sum())
        heard += float(pcm.square().sum())
    return {"mel": round(mel, 4), "snr": round(10 * float(np.log10(heard / max(lost, 1e-9))), 2)}


def train(
    bank: Annotated[Path, typer.Option(help="What 'antiphon train bank' made.")],
    out: Annotated[Path, typer.Option(help="Where checkpoint, log and codec go.")],
    steps: Steps = 8000,
    until: Until = None,
    minutes: Minutes = None,
    fit: Fit = False,
    save_every: SaveEvery = 1000,
    rows: Annotated[int, typer.Option(help="Crops in a batch.")] = Recipe.rows,
    rate: Rate = Recipe.rate,
    graphs: Graphs = True,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Train a small Mimi."""
    run = Run(device, until, minutes, fit, save_every, graphs)
    spoken = Bank(bank)
    pcm = torch.from_numpy(np.array(spoken.pcm)).to(run.device)
    recipe = Recipe(rows=rows, rate=rate)
    crops = Crops(spoken, pcm, recipe, seed)
    teacher = Teacher.embedded(recipe.lag, run.device)
    training = CodecTraining(TINY, recipe, crops, teacher, out, steps, seed, run.graphs)
    count = sum(value.numel() for value in training.student.mimi.state_dict().values())
    run.train(training, f"{count / 1e6:.2f} M numbers, {len(pcm) / RATE / 3600:.2f} h of sound")
    codec = training.codec()
    run.record(training, measured(codec, crops))
    mimi_checkpoint.save(out / CODEC, codec)


def main(arguments: Sequence[str]) -> None:
    """The command line; see ``--help``."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(train)
    command(list(arguments), standalone_mode=False, prog_name="antiphon train codec")


if __name__ == "__main__":
    main(sys.argv[1:])
