"""Train the embedded voice's language model: from characters to the speech tokens of its bank.

    antiphon train tts lm --bank speech-bank --out lm-run --minutes 6 --fit --device cuda

Each utterance is laid out in one of two ways (arXiv 2412.10117 section 2.3): its whole text before its speech, or both
mixed in blocks, as text that arrives while it is spoken. Part of the speech that the model reads is hidden or wrong, so
that it listens to the text and finds its way back from an unlucky draw. Stop and start again at will. The model, with
averaged weights, is ``OUT/lm.safetensors``, its text tokens ``OUT/tokenizer.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import torch
import typer
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from torch import Tensor
from torch.nn import functional as F

from ...models.cosyvoice.lm import SpeechLM
from ...models.cosyvoice.lm_config import LMConfig
from ...models.cosyvoice.stream import IGNORED, lay_out
from ...pipelines.speech_checkpoint import configured
from .loop import Graphed, Loop, Losses, Weights, placed, plain, schedule
from .run import Device, Fit, Graphs, Minutes, Rate, Run, SaveEvery, Seed, Steps, Until, record_of
from .tts_bank import MARKS, Batches, SpeechBank, Spoken, characters, gathered
from .tts_sizes import ALPHABET, LM, TOKEN, VOICE_TOKENS, VOICES
from .voices import RATE

LM_FILE = "lm.safetensors"
TOKENIZER_FILE = "tokenizer.json"
LAYOUTS = ("known", "arriving")
WATCHED = 64  # unseen utterances whose loss is logged


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides data, sizes and seed.

    room: tokens of a batch, padding included. widths: what utterances are padded to. hide: most of an utterance's
    speech tokens that are hidden or replaced where they are read; half of them are hidden.
    """

    room: int = 16384
    widths: tuple[int, ...] = (96, 128, 192, 256, 320, 384, 512)
    rate: float = 1.5e-3
    warmup: int = 300
    level_until: float = 0.3
    decay: float = 0.1
    clip: float = 1.0
    average: float = 0.999
    hide: float = 0.3
    watch_every: int = 250


def text_tokenizer() -> str:
    """``tokenizer.json`` of text in words: what ``tts_bank.written`` and ``characters`` do."""
    vocabulary = {token: number for number, token in enumerate((*ALPHABET, *VOICE_TOKENS))}
    made = Tokenizer(BPE(vocabulary, []))
    steps: list[Any] = [normalizers.Lowercase(), normalizers.NFD(), normalizers.StripAccents()]
    made.normalizer = normalizers.Sequence(
        [*steps, *(normalizers.Replace(Regex(pattern), mark) for pattern, mark in (*MARKS, (r"\s+\Z", "")))]
    )
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in VOICE_TOKENS])
    text: str = made.to_str(pretty=True)
    return text


def text_of(one: Spoken) -> list[int]:
    """An utterance's text tokens, that of its voice first."""
    return [len(ALPHABET) + one.voice, *characters(one.text)]


class Layouts:
    """Every utterance laid out in both ways; one whose speech is too short to be mixed stands twice as known text."""

    def __init__(
        self, config: LMConfig, utterances: Sequence[Spoken], tokens: NDArray[np.int16], place: torch.device
    ) -> None:
        read: list[int] = []
        drawn: list[int] = []
        begins, counts = [], []
        for one in utterances:
            text, speech = text_of(one), tokens[one.tokens].tolist()
            known = lay_out(config, text, speech)
            mixed = known
            if len(speech) * config.mix[0] > len(text) * config.mix[1]:
                mixed = lay_out(config, text, speech, config.mix)
            begins.append((len(read), len(read) + len(known[0])))
            counts.append(len(known[0]))
            for inputs, targets in (known, mixed):
                read += inputs
                drawn += targets
        self.read = torch.tensor(read, dtype=torch.int16, device=place)
        self.drawn = torch.tensor(drawn, dtype=torch.int16, device=place)
        self.begins = np.array(begins)
        self.counts = np.array(counts)

    def batch(self, which: NDArray[np.int64], layout: NDArray[np.int64], width: int) -> tuple[Tensor, Tensor]:
        """``[B, width]`` int64 of what is read and what is to be drawn. layout: ``[B]`` of ``LAYOUTS``."""
        device = self.read.device
        begin, count = placed(np.stack((self.begins[which, layout], self.counts[which])), device)
        read, drawn = (gathered(table, begin, count, width) for table in (self.read, self.drawn))
        real = torch.arange(width, device=device) < count[:, None]
        return read.long(), torch.where(real, drawn, IGNORED).long()


def hidden(config: LMConfig, read: Tensor, most: float) -> Tensor:
    """What is read, with some of the speech tokens hidden (as the row that nothing else uses) or replaced.

    A row's share is drawn up to ``most``.
    """
    share = most * torch.rand(len(read), 1, device=read.device)
    chance = torch.rand(read.shape, device=read.device)
    other = torch.randint(config.speech, read.shape, device=read.device)
    instead = torch.where(chance < share / 2, config.speech + 1, other)
    return torch.where((chance < share) & (read < config.speech), instead, read)


def loss_of(lm: SpeechLM, read: Tensor, drawn: Tensor) -> tuple[Tensor, Losses]:
    """Nats a token, and its parts: ``speech``, ``end`` and ``fill``, and ``right``, the share of speech guessed."""
    config = lm.config
    with torch.autocast(read.device.type, torch.bfloat16, enabled=read.is_cuda, cache_enabled=False):
        logits = lm(read)
    logits = logits.float()
    each = F.cross_entropy(logits.flatten(0, 1), drawn.flatten(), ignore_index=IGNORED, reduction="none")
    each = each.view(drawn.shape)
    kinds = {"speech": (drawn >= 0) & (drawn < config.speech), "end": drawn == config.end, "fill": drawn == config.fill}
    with torch.no_grad():
        parts = {name: (each * some).sum() / some.sum().clamp(min=1) for name, some in kinds.items()}
        speech = kinds["speech"]
        parts["right"] = ((logits.argmax(2) == drawn) & speech).sum() / speech.sum().clamp(min=1)
    return each.sum() / (drawn != IGNORED).sum(), parts


class LMTraining(Loop):
    """The language model's training."""

    def __init__(
        self,
        config: LMConfig,
        recipe: Recipe,
        layouts: Layouts,
        unseen: Layouts,
        out: Path,
        steps: int,
        seed: int = 0,
        graphed: bool = False,
    ) -> None:
        sizes = {name: value for name, value in asdict(config).items() if name != "kept"}
        super().__init__(out, steps, plain({"config": sizes, "recipe": asdict(recipe), "seed": seed}))
        torch.manual_seed(seed)
        self.recipe, self.layouts, self.unseen, self.seed = recipe, layouts, unseen, seed
        self.device = layouts.read.device
        self.lm = SpeechLM(config).to(self.device).train()
        self.weights = Weights(self.lm, betas=(0.9, 0.95), decay=recipe.decay, clip=recipe.clip, average=recipe.average)
        self.batches = Batches(layouts.counts.tolist(), recipe.room, recipe.widths, seed)
        self.graph = Graphed(self._step, graphed)
        self.watched = torch.zeros((), device=self.device)

    def train_step(self) -> Losses:
        share = schedule(self.step, self.steps, self.recipe.warmup, self.recipe.level_until)
        self.weights.rate.fill_(self.recipe.rate * share)
        width, which = self.batches(self.step)
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        layout = np.random.default_rng([self.seed, self.step, 1]).integers(len(LAYOUTS), size=len(which))
        losses = self.graph(width, *self.layouts.batch(which, layout, width))
        if self.step % self.recipe.watch_every == 0:
            self.watched = self._watch()
        return {**losses, "unseen": self.watched}

    def _step(self, width: int, read: Tensor, drawn: Tensor) -> Losses:
        loss, parts = loss_of(self.lm, hidden(self.lm.config, read, self.recipe.hide), drawn)
        self.weights.clear()
        loss.backward()
        self.weights.update()
        return parts

    @torch.no_grad()
    def _watch(self) -> Tensor:
        """The loss on a few utterances that are not trained on, as it is used: with nothing hidden."""
        some = np.arange(min(WATCHED, len(self.unseen.counts)))
        return loss_of(self.lm, *self.unseen.batch(some, some % len(LAYOUTS), int(self.unseen.counts[some].max())))[1][
            "speech"
        ]

    @torch.no_grad()
    def measured(self, layouts: Layouts, most: int = 512) -> dict[str, dict[str, float]]:
        """The averaged model's losses in either layout, every token given the right ones before it."""
        lm, found = self.weights.averaged(self.lm), {}
        which = np.arange(min(most, len(layouts.counts)))
        for number, name in enumerate(LAYOUTS):
            sums: dict[str, float] = {}
            for part in np.array_split(which, -(-len(which) // WATCHED)):
                layout = np.full(len(part), number)
                _, parts = loss_of(lm, *layouts.batch(part, layout, int(layouts.counts[part].max())))
                for key, value in parts.items():
                    sums[key] = sums.get(key, 0.0) + float(value) * len(part) / len(which)
            found[name] = {key: round(value, 4) for key, value in sums.items()}
        return found

    def skipped(self) -> int:
        return int(self.weights.skipped)

    def state(self) -> dict[str, Any]:
        return {"lm": self.weights.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.weights.load(state["lm"])

    def save_model(self) -> None:
        """Write the averaged model and its text tokens."""
        (self.out / TOKENIZER_FILE).write_text(text_tokenizer(), encoding="utf-8")
        weights = self.weights.averaged(self.lm).state_dict()
        safetensors.torch.save_file(
            {key: value.contiguous().cpu() for key, value in weights.items()}, self.out / LM_FILE
        )


def hours_of(utterances: Sequence[Spoken]) -> dict[str, dict[str, float]]:
    """What the card says of every voice."""
    found = {}
    for number, name in enumerate(VOICES):
        counts = [one.count for one in utterances if one.voice == number]
        found[name] = {"utterances": len(counts), "hours": round(sum(counts) * TOKEN / RATE / 3600, 2)}
    return found


def load_lm(run: Path) -> SpeechLM:
    """The language model of a training's folder."""
    lm = SpeechLM(configured(LMConfig, record_of(run)["config"]))
    lm.load_state_dict(safetensors.torch.load_file(run / LM_FILE))
    return lm.eval()


def train(
    bank: Annotated[Path, typer.Option(help="What 'antiphon train tts bank' made and 'tts encode' went over.")],
    out: Annotated[Path, typer.Option(help="Where checkpoint, log and model go.")],
    steps: Steps = 15000,
    until: Until = None,
    minutes: Minutes = None,
    fit: Fit = False,
    save_every: SaveEvery = 1000,
    room: Annotated[int, typer.Option(help="Tokens of a batch.")] = Recipe.room,
    rate: Rate = Recipe.rate,
    hide: Annotated[float, typer.Option(help="Most of what is read that is hidden.")] = Recipe.hide,
    graphs: Graphs = True,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Train the embedded voice's language model."""
    run = Run(device, until, minutes, fit, save_every, graphs)
    spoken = SpeechBank(bank)
    recipe = replace(Recipe(), room=room, rate=rate, hide=hide)
    layouts, unseen = (
        Layouts(LM, some, spoken.tokens, run.device) for some in (spoken.train, spoken.test or spoken.train[:WATCHED])
    )
    training = LMTraining(LM, recipe, layouts, unseen, out, steps, seed, run.graphs)
    count = sum(parameter.numel() for parameter in training.lm.parameters())
    mixed = float((layouts.drawn == LM.fill).sum()) / len(layouts.counts)
    run.train(
        training,
        f"{count / 1e6:.2f} M parameters, {len(layouts.counts):,} utterances of {layouts.counts.mean():.0f} tokens and "
        f"{mixed:.1f} blocks",
    )
    found = {"train": training.measured(layouts), "unseen": training.measured(unseen)}
    run.record(training, found, voices=hours_of(spoken.utterances))
    training.save_model()
