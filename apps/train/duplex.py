"""Train the tiny full-duplex dialogue model: an RQ-transformer on the codes of composed dialogues.

    antiphon train duplex --bank bank --codec codec-run/codec --out duplex-run --minutes 13 --fit --device cuda

Dialogues are composed of the bank (``dialogues.py``) and encoded by the finished codec as they are needed. Encoding one
takes longer than learning from it, so each is drawn a few times, among others, before newer ones take its place. The
loss is Moshi's (arXiv 2410.00037, section 3.4.4): text, and codebooks of which the semantic one weighs
most; frames in which the assistant is silent weigh less. Stop and start again at will. ``OUT/model`` is a checkpoint in
Kyutai's layout, with averaged weights: what ``antiphon serve --graph converse --model OUT/model`` takes.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import sentencepiece
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from ...codecs import mimi_checkpoint
from ...codecs.mimi import Mimi
from ...models.moshi.config import read_config
from ...models.moshi.lm import MoshiLM
from .bank import Bank
from .dialogues import FRAME, PAD, Batch, Composer, Dialogues, Encode, Style
from .domain import answers
from .duplex_card import export
from .loop import Graphed, Loop, Losses, Weights, placed, plain, schedule
from .run import RUN, Device, Fit, Graphs, Minutes, Rate, Run, SaveEvery, Seed, Steps, Until, record_of
from .voices import RATE

MODEL = "model"
CODEC_ROWS = {"cuda": 32}  # dialogues that are encoded at a time: bounds memory


def settings(text_card: int, codec: Mimi, **changes: Any) -> dict[str, Any]:
    """The shipped model's ``config.json`` in Kyutai's words. It hears half the codebooks that it speaks."""
    spoken = codec.config.codebooks
    heard = max(1, spoken // 2)
    return {
        "model_type": "moshi",
        "dim": 256,
        "text_card": text_card,
        "existing_text_padding_id": PAD,
        "n_q": spoken + heard,
        "dep_q": spoken,
        "card": codec.config.bins,
        "num_heads": 4,
        "num_layers": 5,
        "hidden_scale": 3.5625,
        "causal": True,
        "layer_scale": None,
        "context": 250,
        "max_period": 10000,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "depformer_dim": 128,
        "depformer_dim_feedforward": 384,
        "depformer_num_heads": 2,
        "depformer_num_layers": 2,
        "depformer_multi_linear": True,
        "depformer_context": spoken,
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
        "depformer_weights_per_step_schedule": [min(step, 3) for step in range(spoken)],
        "delays": [0, 0, *[1] * (spoken - 1), 0, *[1] * (heard - 1)],
        "lm_gen_config": {"temp": 0.6, "top_k": 50, "temp_text": 0.2, "top_k_text": 10},
    } | changes


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides data, sizes and seed.

    frames: of a dialogue, more than the window, so that its end is trained too. reuse: steps from one new batch to the
    next; the batch of a step is drawn from the last ``pool`` ones. semantic: weight of the first codebook
    among the others' 1. padding: weight of a text token that says nothing. silent: of a frame's sound where the
    assistant is silent. spoil: share of the heard codes that are those of another dialogue, so that the model does not
    learn its utterances by heart.
    """

    rows: int = 32
    frames: int = 376
    reuse: int = 4
    pool: int = 8
    rate: float = 1.2e-3
    warmup: int = 200
    level_until: float = 0.3
    decay: float = 0.05
    clip: float = 1.0
    average: float = 0.999
    semantic: float = 4.0
    padding: float = 0.5
    silent: float = 0.2
    spoil: float = 0.05
    text: float = 1.0


def train_tokenizer(texts: Sequence[str], vocabulary: int = 700) -> bytes:
    """A SentencePiece model, as large as the texts' words make it, with Moshi's ids: end of padding 0, padding 3."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(texts) * 8),
        model_writer=model,
        vocab_size=vocabulary,
        pad_id=PAD,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@torch.no_grad()
def codes_of(batch: Batch, codec: Mimi, heard: int) -> Tensor:
    """``[B, 1 + spoken + heard, T]``: what the language model is to say and to hear."""
    rows = CODEC_ROWS.get(batch.model.device.type, 8)
    spoken = torch.cat([codec.encode(part) for part in batch.model.split(rows)])
    user = torch.cat([codec.encode(part, heard) for part in batch.user.split(rows)])
    return torch.cat((batch.text[:, None], spoken, user), 1)


def speaking(batch: Batch) -> Tensor:
    """``[B, T]`` bool: frames in which the assistant is heard."""
    loudest: Tensor = batch.model.unflatten(1, (-1, FRAME)).abs().amax(2)
    return loudest > 1e-3


def loss_of(lm: MoshiLM, codes: Tensor, active: Tensor, recipe: Recipe) -> tuple[Tensor, Losses]:
    """The sum to minimise, and its parts: ``text`` and ``words`` (where there is text), ``semantic`` and ``acoustic``
    (where the assistant speaks), nats a token, and ``right``, the share of text tokens guessed right."""
    spoken = lm.config.spoken
    with torch.autocast(codes.device.type, torch.bfloat16, enabled=codes.is_cuda, cache_enabled=False):
        logits = lm(codes)
    text, wanted = logits.text.float(), codes[:, 0]
    each = F.cross_entropy(text.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
    says = wanted != PAD
    weight = torch.where(says, 1.0, recipe.padding)
    text_loss = (each * weight).sum() / weight.sum()
    sound = F.cross_entropy(
        logits.audio.float().flatten(0, 2), codes[:, 1 : 1 + spoken].flatten(), reduction="none"
    ).view(logits.mask.shape)  # fmt: skip
    books = torch.where(torch.arange(spoken, device=codes.device) == 0, recipe.semantic, 1.0)
    share = torch.where(active, 1.0, recipe.silent)[:, None] * logits.mask * books[:, None]
    sound_loss = (sound * share).sum() / share.sum()
    heard = (logits.mask & active[:, None]).float()
    with torch.no_grad():
        by_book = (sound * heard).sum((0, 2)) / heard.sum((0, 2)).clamp(min=1)
        parts = {
            "text": text_loss,
            "words": (each * says).sum() / says.sum().clamp(min=1),
            "right": ((text.argmax(2) == wanted) & says).sum() / says.sum().clamp(min=1),
            "semantic": by_book[0],
            "acoustic": by_book[1:].mean(),
        }
    return recipe.text * text_loss + sound_loss, {name: value.detach() for name, value in parts.items()}


class DuplexTraining(Loop):
    """The language model's training; the codec stays as it is."""

    def __init__(
        self,
        lm_settings: Mapping[str, Any],
        recipe: Recipe,
        dialogues: Dialogues,
        codec: Mimi,
        out: Path,
        steps: int,
        seed: int = 0,
        graphed: bool = False,
    ) -> None:
        known = {"settings": dict(lm_settings), "recipe": asdict(recipe), "seed": seed}
        super().__init__(out, steps, plain(known | {"style": asdict(dialogues.composer.style)}))
        torch.manual_seed(seed)
        self.recipe, self.dialogues, self.codec = recipe, dialogues, codec.eval().requires_grad_(False)
        self.lm = MoshiLM(read_config(lm_settings)).to(dialogues.pcm.device).train()
        self.weights = Weights(
            self.lm, betas=(0.9, 0.95), decay=recipe.decay, clip=recipe.clip, average=recipe.average
        )  # fmt: skip
        self.graph = Graphed(self._step, graphed)
        config, device, kept = self.lm.config, dialogues.pcm.device, recipe.pool * recipe.rows
        frames = dialogues.composer.frames
        self._codes = torch.zeros(kept, 1 + config.spoken + config.heard, frames, dtype=torch.int64, device=device)
        self._active = torch.zeros(kept, frames, dtype=torch.bool, device=device)
        self._newest = -1

    def drawn(self, step: int) -> tuple[Tensor, Tensor]:
        """A step's ``codes`` and ``active`` (where the assistant speaks), drawn from the batches that are kept."""
        recipe, rows = self.recipe, self.dialogues.rows
        newest = step // recipe.reuse + recipe.pool - 1
        for number in range(max(self._newest, newest - recipe.pool) + 1, newest + 1):
            batch, place = self.dialogues(number), number % recipe.pool * rows
            self._codes[place : place + rows] = codes_of(batch, self.codec, self.lm.config.heard)
            self._active[place : place + rows] = speaking(batch)
            self._newest = number
        chosen = np.random.default_rng([self.dialogues.seed, step]).permutation(recipe.pool * rows)[:rows]
        index = placed(chosen, self._codes.device)
        return self._codes[index], self._active[index]

    def _spoilt(self, codes: Tensor, step: int) -> Tensor:
        """``codes`` whose heard ones are in part the next row's."""
        first = 1 + self.lm.config.spoken
        generator = torch.Generator(codes.device).manual_seed(self.dialogues.seed * 1_000_003 + step)
        heard = codes[:, first:]
        chance = torch.rand(heard.shape, generator=generator, device=codes.device)
        return torch.cat((codes[:, :first], torch.where(chance < self.recipe.spoil, heard.roll(1, 0), heard)), 1)

    def train_step(self) -> Losses:
        share = schedule(self.step, self.steps, self.recipe.warmup, self.recipe.level_until)
        self.weights.rate.fill_(self.recipe.rate * share)
        codes, active = self.drawn(self.step)
        return self.graph("step", self._spoilt(codes, self.step), active)

    def _step(self, key: str, codes: Tensor, active: Tensor) -> Losses:
        loss, parts = loss_of(self.lm, codes, active, self.recipe)
        self.weights.clear()
        loss.backward()
        self.weights.update()
        return parts

    @torch.no_grad()
    def measured(self, dialogues: Dialogues, batches: int = 4) -> dict[str, float]:
        """The averaged model's losses on other dialogues, every token given the right ones before it."""
        lm, sums = self.weights.averaged(self.lm), Counter[str]()
        for number in range(batches):
            batch = dialogues(2**31 + number)
            _, parts = loss_of(lm, codes_of(batch, self.codec, lm.config.heard), speaking(batch), self.recipe)
            sums.update({name: float(value) / batches for name, value in parts.items()})
        return {name: round(value, 4) for name, value in sums.items()}

    def skipped(self) -> int:
        return int(self.weights.skipped)

    def state(self) -> dict[str, Any]:
        return {"lm": self.weights.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.weights.load(state["lm"])
        self._newest = -1


def train(
    bank: Annotated[Path, typer.Option(help="What 'antiphon train bank' made.")],
    codec: Annotated[Path, typer.Option(help="What 'antiphon train codec' made, or another Mimi.")],
    out: Annotated[Path, typer.Option(help="Where checkpoint, log and model go.")],
    steps: Steps = 15000,
    until: Until = None,
    minutes: Minutes = None,
    fit: Fit = False,
    save_every: SaveEvery = 1000,
    rows: Annotated[int, typer.Option(help="Dialogues in a batch.")] = Recipe.rows,
    frames: Annotated[int, typer.Option(help="Frames of a dialogue.")] = Recipe.frames,
    rate: Rate = Recipe.rate,
    graphs: Graphs = True,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Train a tiny full-duplex dialogue model."""
    run = Run(device, until, minutes, fit, save_every, graphs)
    out.mkdir(parents=True, exist_ok=True)
    spoken = Bank(bank)
    tokenizer = out / "tokenizer.model"
    if not tokenizer.is_file():
        tokenizer.write_bytes(train_tokenizer(answers()))
    encode = Encode(tokenizer.read_bytes())
    pcm = torch.from_numpy(np.array(spoken.pcm)).to(run.device)
    mimi = mimi_checkpoint.load(codec, steps=(1,), device=run.device)
    recipe = Recipe(rows=rows, frames=frames, rate=rate)
    dialogues = Dialogues(Composer(spoken, encode, frames, Style()), pcm, rows, seed)
    others = {"train": dialogues}
    try:
        test = Composer(spoken, encode, frames, Style(), "question")
        others["held-out questions and voices"] = Dialogues(test, pcm, rows, seed)
    except ValueError as error:
        run.console.print(f"nothing to test on: {error}")
    lm_settings = settings(encode.size, mimi)
    training = DuplexTraining(lm_settings, recipe, dialogues, mimi, out, steps, seed, run.graphs)
    count = sum(parameter.numel() for parameter in training.lm.parameters())
    run.train(training, f"{count / 1e6:.2f} M parameters, {len(pcm) / RATE / 3600:.2f} h of utterances")
    facts: dict[str, Any] = {"bank": spoken.summary()}
    if (codec.parent / RUN).is_file():
        facts["codec"] = record_of(codec.parent)
    record = run.record(training, {name: training.measured(some) for name, some in others.items()}, **facts)
    export(out / MODEL, training.weights.averaged(training.lm), mimi, tokenizer.read_bytes(), lm_settings, record)


def main(arguments: Sequence[str]) -> None:
    """The command line; see ``--help``."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(train)
    command(list(arguments), standalone_mode=False, prog_name="antiphon train duplex")


if __name__ == "__main__":
    main(sys.argv[1:])
