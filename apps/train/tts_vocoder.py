"""Train the embedded voice's vocoder, a small HiFT, on the mel frames of its bank.

    antiphon train tts vocoder --bank speech-bank --out vocoder-run --minutes 8 --fit --device cuda

Spectral distances and the codec's discriminators make it sound right (arXiv 2010.05646); its pitch follows the
autocorrelation of the sound (Boersma, "Accurate short-term analysis of the fundamental frequency", 1993). Stop and
start again at will. The vocoder, with averaged weights, is ``OUT/vocoder.safetensors``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from ...codecs.hift import HiFT, HiFTConfig
from ...codecs.prompt_mel import PromptMel
from ...pipelines.speech_checkpoint import configured
from .codec_losses import Judges, MelDistance
from .loop import Graphed, Loop, Losses, Weights, placed, plain, schedule
from .run import Device, Fit, Graphs, Minutes, Rate, Run, SaveEvery, Seed, Steps, Until, record_of
from .tts_bank import SpeechBank, Spoken
from .tts_sizes import FRAME, TOKEN, VOCODER
from .voices import RATE

VOCODER_FILE = "vocoder.safetensors"
MARGIN = 2  # frames around a crop that its mel frames hear

LOWEST, HIGHEST = 60.0, 500.0  # hertz of a voice
VOICED = 0.4  # of the sound's energy that a period must explain
OCTAVE = 0.02  # how much of it the next higher octave may explain less and still be taken
QUIET = 0.003  # root mean square below which there is no voice
WINDOW = round(3 * RATE / LOWEST)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides data, sizes and seed. judge_from: share of the steps without judges.

    frames: of a crop, without the ``edge`` on either side, which is made but not judged. hertz: weight of the pitch's
    mean error in units of 100 Hz. smear: most noise on the mel frames, so that a flow's errors do no harm.
    """

    rows: int = 48
    frames: int = 40
    edge: int = 4
    rate: float = 5e-4
    warmup: int = 300
    level_until: float = 0.4
    decay: float = 0.01
    average: float = 0.999
    judge_from: float = 0.25
    mel: float = 15.0
    fool: float = 1.0
    alike: float = 2.0
    hertz: float = 1.0
    smear: float = 0.1


def contour(pcm: Tensor, block: int = 4096) -> Tensor:
    """The pitch at the middle of every frame in hertz, 0 without voice: ``[n]`` int16 -> ``[n // 480]`` float32."""
    count = len(pcm) // FRAME
    side = (WINDOW - FRAME) // 2
    window = torch.hann_window(WINDOW, device=pcm.device)
    size = 2 ** (2 * WINDOW - 1).bit_length()
    own = torch.fft.irfft(torch.fft.rfft(window, size).abs().square())
    shortest, longest = int(RATE / HIGHEST), round(RATE / LOWEST)
    lags = torch.arange(shortest, longest + 1, device=pcm.device)
    # Of octaves that explain the sound equally well, the highest is heard.
    bonus = OCTAVE * torch.log2(longest / lags)
    found = []
    padded = F.pad(pcm, (side, side + FRAME))
    for first in range(0, count, block):
        many = min(block, count - first)
        part = padded[first * FRAME : (first + many - 1) * FRAME + WINDOW].float() / 32768
        frames = part.unfold(0, WINDOW, FRAME)
        frames = (frames - frames.mean(1, keepdim=True)) * window
        energy = torch.fft.irfft(torch.fft.rfft(frames, size).abs().square())
        alike = energy / energy[:, :1].clamp(min=1e-9) / (own / own[0]).clamp(min=1e-3)
        alike = alike[:, shortest - 1 : longest + 2]
        middle = alike[:, 1:-1]
        peak = (middle > alike[:, :-2]) & (middle >= alike[:, 2:])
        best = torch.where(peak, middle + bonus, 0.0).argmax(1, keepdim=True)
        before, here, after = (alike.gather(1, best + step)[:, 0] for step in range(3))
        bend = (before - 2 * here + after).clamp(max=-1e-6)
        lag = lags[best[:, 0]] + 0.5 * (before - after) / bend
        loud = energy[:, 0] / window.square().sum() > QUIET**2
        voiced = loud & peak.any(1) & (here > VOICED)
        found.append(torch.where(voiced, RATE / lag, 0.0))
    hertz = torch.cat(found)
    # A frame that neither neighbour agrees with is an error: the median of three.
    return F.pad(hertz, (1, 1)).unfold(0, 3, 1).median(1).values


class Crops:
    """Stretches of utterances, a pure function of seed and step: ``[rows, frames + margins]`` of sound and of pitch."""

    def __init__(self, utterances: list[Spoken], pcm: Tensor, hertz: Tensor, recipe: Recipe, seed: int) -> None:
        self.pcm, self.hertz, self.recipe, self.seed = pcm, hertz, recipe, seed
        self.begin = np.array([one.begin for one in utterances]) * TOKEN // FRAME
        self.count = np.array([one.count for one in utterances]) * TOKEN // FRAME
        self.odds = np.cumsum(self.count) / self.count.sum()

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """``[rows, samples]`` float32 with ``MARGIN`` frames more at either end, and ``[rows, frames]`` hertz."""
        recipe, random, device = self.recipe, np.random.default_rng([self.seed, step]), self.pcm.device
        width = recipe.frames + 2 * recipe.edge
        chosen = np.searchsorted(self.odds, random.random(recipe.rows))
        spare = np.maximum(0, self.count[chosen] - width)
        places = self.begin[chosen] + (random.random(recipe.rows) * (spare + 1)).astype(np.int64)
        bounds = np.stack((places, self.begin[chosen], self.begin[chosen] + self.count[chosen]))
        at, low, high = placed(bounds, device)[..., None]
        frames = at + torch.arange(width, device=device)
        hertz = torch.where(frames < high, self.hertz[frames.clamp(max=len(self.hertz) - 1)], 0.0)
        samples = (at - MARGIN) * FRAME + torch.arange((width + 2 * MARGIN) * FRAME, device=device)
        real = (samples >= low * FRAME) & (samples < high * FRAME)
        sound = self.pcm[samples.clamp(0, len(self.pcm) - 1)].float() / 32768
        return torch.where(real, sound, 0.0), hertz


class Student(nn.Module):
    """The vocoder in training. It starts quiet, and with a pitch of the size of a voice's."""

    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.vocoder = HiFT(config)
        with torch.no_grad():
            self.vocoder.f0_predictor.classifier.weight.mul_(100)
            self.vocoder.f0_predictor.classifier.bias.fill_(100)
            last: nn.Conv1d = self.vocoder.conv_post
            last.bias[: config.n_fft // 2 + 1] = -3  # type: ignore[index]

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, n, mels]`` -> sound ``[B, 480 n]`` and hertz ``[B, n]``."""
        frames = torch.full((len(mel),), mel.shape[1], device=mel.device)
        noise = torch.randn(len(mel), mel.shape[1] * FRAME, device=mel.device)
        return self.vocoder(mel, frames, noise=noise), self.vocoder.pitch(mel, frames)


class VocoderTraining(Loop):
    """Vocoder and judges against each other."""

    def __init__(
        self,
        config: HiFTConfig,
        recipe: Recipe,
        crops: Crops,
        out: Path,
        steps: int,
        seed: int = 0,
        graphed: bool = False,
    ) -> None:
        super().__init__(out, steps, plain({"config": asdict(config), "recipe": asdict(recipe), "seed": seed}))
        device = crops.pcm.device
        torch.manual_seed(seed)
        self.recipe, self.crops, self.seed = recipe, crops, seed
        self.student = Student(config).to(device).train()
        self.judges = Judges().to(device).train()
        self.mel = PromptMel(config.mels).to(device)
        self.distance = MelDistance(config.sample_rate).to(device)
        betas = (0.8, 0.99)
        self.weights = Weights(self.student, betas=betas, decay=recipe.decay, clip=100.0, average=recipe.average)
        self.judging = Weights(self.judges, betas=betas, decay=recipe.decay, clip=10.0)
        self.graph = Graphed(self._step, graphed)

    def train_step(self) -> Losses:
        share = schedule(self.step, self.steps, self.recipe.warmup, self.recipe.level_until)
        self.weights.rate.fill_(self.recipe.rate * share)
        self.judging.rate.fill_(self.recipe.rate * share)
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        judged = self.step >= self.recipe.judge_from * self.steps
        return self.graph(judged, *self.pairs(self.step))

    @torch.no_grad()
    def pairs(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mel frames ``[B, n, mels]``, the sound ``[B, 480 n]`` and the pitch ``[B, n]`` that they belong to."""
        sound, hertz = self.crops(step)
        return self.mel(sound)[:, MARGIN:-MARGIN], sound[:, MARGIN * FRAME : -MARGIN * FRAME], hertz

    def _step(self, judged: bool, mel: Tensor, pcm: Tensor, hertz: Tensor) -> Losses:
        recipe = self.recipe
        smear = recipe.smear * torch.rand(len(mel), 1, 1, device=mel.device)
        made, pitch = self.student(mel + smear * torch.randn_like(mel))
        inside = slice(recipe.edge * FRAME, (recipe.edge + recipe.frames) * FRAME)
        made, pcm = made[:, inside], pcm[:, inside]
        losses = {"mel": self.distance(made, pcm), "hertz": (pitch - hertz).abs().mean()}
        total = recipe.mel * losses["mel"] + recipe.hertz * losses["hertz"] / 100
        if judged:
            with torch.autocast(pcm.device.type, torch.bfloat16, enabled=pcm.is_cuda, cache_enabled=False):
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

    def skipped(self) -> int:
        return int(self.weights.skipped + self.judging.skipped)

    def state(self) -> dict[str, Any]:
        return {"student": self.weights.state(), "judges": self.judging.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.weights.load(state["student"])
        self.judging.load(state["judges"])

    def save_model(self) -> None:
        """Write the averaged vocoder."""
        weights = self.weights.averaged(self.student).vocoder.state_dict()
        cpu = {name: value.contiguous().cpu() for name, value in weights.items()}
        safetensors.torch.save_file(cpu, self.out / VOCODER_FILE)

    @torch.no_grad()
    def measured(self, crops: Crops, batches: int = 4) -> dict[str, float]:
        """On other crops: the spectral distance, the median error of the pitch where there is voice, in hertz, and the
        share of frames whose voice is told wrongly."""
        own, self.crops = self.crops, crops
        student = self.weights.averaged(self.student)
        distances, wrong, errors = [], [], []
        for number in range(batches):
            mel, pcm, hertz = self.pairs(2**31 + number)
            made, pitch = student(mel)
            distances.append(self.distance(made, pcm))
            heard, voiced = pitch > student.vocoder.config.voiced_hertz, hertz > 0
            wrong.append((heard != voiced).float().mean())
            errors.append((pitch - hertz).abs()[heard & voiced])
        self.crops = own
        found = torch.stack((torch.stack(distances).mean(), torch.cat(errors).median(), torch.stack(wrong).mean()))
        return dict(zip(("mel", "hertz", "voicing"), (round(value, 4) for value in found.tolist()), strict=True))


def load_vocoder(run: Path) -> HiFT:
    """The vocoder of a training's folder."""
    vocoder = HiFT(configured(HiFTConfig, record_of(run)["config"]))
    vocoder.load_state_dict(safetensors.torch.load_file(run / VOCODER_FILE))
    return vocoder.eval()


def train(
    bank: Annotated[Path, typer.Option(help="What 'antiphon train tts bank' made.")],
    out: Annotated[Path, typer.Option(help="Where checkpoint, log and vocoder go.")],
    steps: Steps = 10000,
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
    """Train the embedded voice's vocoder."""
    run = Run(device, until, minutes, fit, save_every, graphs)
    spoken = SpeechBank(bank)
    pcm = torch.from_numpy(np.array(spoken.pcm)).to(run.device)
    hertz = contour(pcm)
    recipe = Recipe(rows=rows, rate=rate)
    crops, unseen = (Crops(some, pcm, hertz, recipe, seed) for some in (spoken.train, spoken.test or spoken.train))
    training = VocoderTraining(VOCODER, recipe, crops, out, steps, seed, run.graphs)
    count = sum(value.numel() for value in training.student.vocoder.state_dict().values())
    voiced = float((hertz > 0).float().mean())
    run.train(
        training,
        f"{count / 1e6:.2f} M numbers, {len(pcm) / RATE / 3600:.2f} h of speech, {voiced:.0%} of it voiced, around "
        f"{float(hertz[hertz > 0].median()):.0f} Hz",
    )
    run.record(training, training.measured(unseen))
    training.save_model()
