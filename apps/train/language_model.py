"""Train a recogniser's language model on text and put both into one checkpoint.

    python -m antiphon.apps.train.language_model MODEL --text novel.txt --text more.txt --data DATA/librispeech \\
        --hold-out ls-1867 --exclude DATA/ljspeech --out MODEL

MODEL is a checkpoint in our layout (a folder or an embedded name). Sentences that share eight words in a row with what
is spoken by held-out speakers or in excluded data folders are left out, so that tests stay tests.
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from ...models.conformer.checkpoint import load, save
from ...models.conformer.config import BeamConfig, LanguageModelConfig
from ...models.conformer.hub import resolve
from ...models.conformer.language_model import LanguageModel
from ...models.conformer.model import ConformerASR
from ...models.conformer.tokenizer import Tokenizer
from ..bench.common import command_line
from .card import with_section
from .data import read_manifest
from .text import spoken

OVERLAP = 8  # words in a row that two texts may not share
PIECE_WORDS = 35  # sentences are joined up to this many words, about what an utterance holds
VALIDATION = 300  # pieces
SENTENCES = re.compile(r"(?<=[.!?])\s+|\n")


@dataclass(frozen=True)
class Recipe:
    """How the language model is trained."""

    epochs: int = 4
    rows: int = 64
    steps_a_row: int = 96
    rate: float = 3e-3
    warmup: int = 200
    decay: float = 0.01
    clip: float = 1.0


def overlaps(words: Sequence[str]) -> set[tuple[str, ...]]:
    """All runs of ``OVERLAP`` words."""
    return {tuple(words[start : start + OVERLAP]) for start in range(len(words) - OVERLAP + 1)}


def pieces_of(text: str, forbidden: set[tuple[str, ...]]) -> Iterator[str]:
    """Sentences as they are spoken, joined up to ``PIECE_WORDS``; none with a forbidden run, nor across one."""
    words: list[str] = []
    for sentence in SENTENCES.split(text):
        more = spoken(sentence).split()
        if overlaps(more) & forbidden:
            words = []
            continue
        words += more
        if len(words) >= PIECE_WORDS:
            yield " ".join(words)
            words = []


def batches(sequences: Iterable[Sequence[int]], start: int, recipe: Recipe, chance: random.Random) -> Iterator[Tensor]:
    """``[rows, T]`` pieces with the start before them, -1 past a row's end; long sequences are cut."""
    cut: list[list[int]] = []
    for sequence in sequences:
        whole = [start, *sequence]
        cut += [whole[at : at + recipe.steps_a_row + 1] for at in range(0, max(1, len(whole) - 8), recipe.steps_a_row)]
    chance.shuffle(cut)
    cut.sort(key=lambda row: len(row) // 8)
    groups = [cut[at : at + recipe.rows] for at in range(0, len(cut), recipe.rows)]
    chance.shuffle(groups)
    for group in groups:
        batch = torch.full((len(group), max(map(len, group))), -1)
        for row, sequence in zip(batch, group, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        yield batch


def loss(model: LanguageModel, batch: Tensor) -> Tensor:
    """Mean nats a piece."""
    logits = model(batch[:, :-1].clamp(min=0))
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-1)


def fit(
    model: LanguageModel, sequences: Sequence[Sequence[int]], recipe: Recipe, seed: int = 0
) -> Iterator[tuple[float, float]]:
    """Train; yields the share done and the loss of each step."""
    total = recipe.epochs * sum(1 for _ in batches(sequences, model.start, recipe, random.Random(0)))
    optimiser = torch.optim.AdamW(model.parameters(), recipe.rate, (0.9, 0.99), weight_decay=recipe.decay)
    chance, step = random.Random(seed), 0
    model.train()
    for _ in range(recipe.epochs):
        for batch in batches(sequences, model.start, recipe, chance):
            rate = recipe.rate * min(1.0, (step + 1) / recipe.warmup) * (0.5 + 0.5 * math.cos(math.pi * step / total))
            for group in optimiser.param_groups:
                group["lr"] = rate
            here = loss(model, batch.to(model.bias.device))
            optimiser.zero_grad()
            here.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimiser.step()
            step += 1
            yield step / total, float(here.detach())
    model.eval()


@torch.no_grad()
def nats(model: LanguageModel, sequences: Sequence[Sequence[int]], recipe: Recipe) -> float:
    """Mean nats a piece over all of them."""
    total = count = 0.0
    for batch in batches(sequences, model.start, recipe, random.Random(0)):
        pieces = int((batch[:, 1:] >= 0).sum())
        total += pieces * float(loss(model, batch.to(model.bias.device)))
        count += pieces
    return total / count


def with_language_model(asr: ConformerASR, model: LanguageModel, beam: BeamConfig) -> ConformerASR:
    """The recogniser with this language model and search."""
    joined = ConformerASR(replace(asr.config, language_model=model.config, beam=beam), asr.vocabulary)
    weights = {name: value for name, value in asr.state_dict().items() if not name.startswith("language_model.")}
    joined.load_state_dict(weights | {f"language_model.{name}": value for name, value in model.state_dict().items()})
    return joined


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    import sentencepiece

    if tokenizer.source.name != "tokenizer.model":
        raise typer.BadParameter("the checkpoint's tokenizer is no SentencePiece model")
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.source.content)
    return [processor.encode(text) for text in texts]


def main(
    model: Annotated[str, typer.Argument(help="Recogniser: folder or embedded name.")],
    text: Annotated[list[Path], typer.Option(help="Text to learn from; repeat it.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint to write.")],
    data: Annotated[list[Path] | None, typer.Option(help="Data folder whose transcripts to learn; repeat it.")] = None,
    hold_out: Annotated[list[str] | None, typer.Option(help="Speaker whose words to leave out; repeat it.")] = None,
    exclude: Annotated[list[Path] | None, typer.Option(help="Data folder of words to leave out; repeat it.")] = None,
    about: Annotated[str, typer.Option(help="What the text is, for the card.")] = "",
    weight: Annotated[float, typer.Option(help="Of the language model in the search.")] = 0.25,
    internal: Annotated[float, typer.Option(help="Of the transducer's own, taken off.")] = 0.2,
    bonus: Annotated[float, typer.Option(help="For each label.")] = 0.4,
    temperature: Annotated[float, typer.Option(help="Of the transducer in the search.")] = 2.0,
    width: Annotated[int, typer.Option(help="Transcripts that the search keeps.")] = 6,
    prune: Annotated[float, typer.Option(help="How much less likely (log) a transcript may be to go on.")] = 4.0,
    epochs: Annotated[int, typer.Option(help="Times through the text.")] = Recipe.epochs,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train a language model for a recogniser and write both."""
    console = Console(stderr=True)
    torch.manual_seed(seed)
    asr, recipe = load(model), Recipe(epochs=epochs)
    lines = [line for folder in data or [] for line in read_manifest(folder)]
    tests = [line for path in exclude or [] for line in read_manifest(path)]
    tests += [line for line in lines if line["speaker"] in set(hold_out or [])]
    forbidden: set[tuple[str, ...]] = set()
    for line in tests:
        forbidden |= overlaps(spoken(line["text"]).split())
    kept = {line["text"] for line in lines} - {line["text"] for line in tests}
    texts = [piece for path in text for piece in pieces_of(path.read_text(encoding="utf-8"), forbidden)]
    sequences = _encode(asr.vocabulary, texts + sorted(spoken(line) for line in kept))
    random.Random(seed).shuffle(sequences)
    held, sequences = sequences[:VALIDATION], sequences[VALIDATION:]
    count = sum(map(len, sequences))
    console.print(f"{count / 1e6:.2f} M pieces of text")
    lm = LanguageModel(LanguageModelConfig(), asr.config.vocabulary).to(device)
    torch.nn.init.normal_(lm.embedding.weight, std=0.05)
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=1.0)
        for share, here in fit(lm, sequences, recipe, seed):
            progress.update(task, completed=share, description=f"{here:.3f} nats a piece")
    found = nats(lm, held, recipe)
    console.print(f"{found:.3f} nats a piece on {len(held)} stretches left out")
    search = BeamConfig(
        width, prune=prune, temperature=temperature, language_model=weight, internal=internal, bonus=bonus
    )
    joined = with_language_model(asr, lm.cpu(), search)
    section = [
        f"An LSTM over the same pieces ({sum(p.numel() for p in lm.parameters()) / 1e6:.1f} M parameters), for beam "
        f"search. It learnt {count / 1e6:.2f} M pieces of text{': ' + about if about else ''}; stretches that share "
        f"{OVERLAP} words in a row with the test clips were left out. {found:.3f} nats a piece on text left out.",
        "",
        f"`{command_line('antiphon.apps.train.language_model', sys.argv[1:])}`, with {asdict(recipe)}.",
    ]
    card = (resolve(model) / "README.md").read_text(encoding="utf-8")
    save(out, joined.config, joined.state_dict(), asr.vocabulary, with_section(card, "Language model", section))


if __name__ == "__main__":
    typer.run(main)
