"""Turn a finished training run into a checkpoint with its card.

    python -m antiphon.apps.train.card RUN TOKENIZER MODEL --figures apps/bench/results/asr_wer.json

RUN is the folder that ``asr.py`` wrote, MODEL the checkpoint's folder. The figures come from ``evaluate.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...models.conformer.checkpoint import save
from ...models.conformer.config import ASRConfig, ConformerConfig, TransducerConfig
from ...models.conformer.tokenizer import Source, Tokenizer
from ..bench.common import command_line
from .data import Clip

AVERAGED = "averaged.pt"
RUN = "run.json"
RATES = "Word error rates"
MEL = {
    "sample_rate": 16000,
    "normalize": "NA",
    "window_size": 0.025,
    "window_stride": 0.01,
    "window": "hann",
    "features": 80,
    "n_fft": 512,
}
LOOKAHEADS = (6, 0, 1, 13)


def by_corpus(clips: Iterable[Clip]) -> dict[str, list[Clip]]:
    corpora: dict[str, list[Clip]] = {}
    for clip in clips:
        corpora.setdefault(clip.corpus, []).append(clip)
    return corpora


def summary(clips: Sequence[Clip]) -> dict[str, Any]:
    """What the card says of a corpus."""
    return {
        "hours": round(sum(clip.seconds for clip in clips) / 3600, 2),
        "clips": len(clips),
        "speakers": len({clip.speaker.split("@")[0] for clip in clips}),
        "licences": sorted({clip.licence for clip in clips}),
        "sources": sorted({clip.source.split(";")[0] for clip in clips}),
    }


def configuration(weights: Mapping[str, torch.Tensor]) -> ASRConfig:
    """The sizes, read off the weights."""
    width, joint = weights["ctc.linear.weight"].shape[1], weights["transducer.head.weight"].shape[1]
    vocabulary = len(weights["ctc.linear.weight"]) - 1
    encoder = ConformerConfig(
        width=width,
        layers=1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.blocks.")),
        heads=len(weights["encoder.blocks.0.attention.bias_u"]),
        feedforward=len(weights["encoder.blocks.0.before.up.weight"]),
        channels=len(weights["encoder.subsampling.first.weight"]),
        lookaheads=LOOKAHEADS,
    )
    prediction = weights["transducer.embedding.weight"].shape[1]
    transducer = TransducerConfig(vocabulary, encoder_width=width, width=prediction, joint_width=joint)
    return ASRConfig(encoder, vocabulary, transducer, ctc=True, mel=MEL)


def export(
    run: Path, tokenizer: Path, model: Path, figures: Mapping[str, Any] | None = None, prompts: str = ""
) -> None:
    """Write the checkpoint ``model`` from the averaged weights of ``run``. prompts: what its synthetic speech reads."""
    weights: dict[str, torch.Tensor] = torch.load(run / AVERAGED, map_location="cpu", weights_only=True)
    config = configuration(weights)
    facts = json.loads((run / RUN).read_text(encoding="utf-8"))
    count = sum(value.numel() for name, value in weights.items() if not name.startswith("distil"))
    card = write_card(model.name, count, config, facts, figures, prompts)
    save(model, config, weights, Tokenizer(Source("tokenizer.model", tokenizer.read_bytes())), card)


def write_card(
    name: str,
    parameters: int,
    config: ASRConfig,
    run: Mapping[str, Any],
    figures: Mapping[str, Any] | None,
    prompts: str = "",
) -> str:
    """The README of a checkpoint: what it is, from what it was made and how, how well it does."""
    encoder = config.encoder
    lines = [
        "---",
        "license: cc-by-4.0",
        "language: en",
        "---",
        f"# {name}",
        "",
        f"English streaming speech recognition: FastConformer encoder ({encoder.layers} x {encoder.width}), RNN-T and "
        f"CTC heads, {parameters / 1e6:.1f} M parameters, {config.vocabulary} SentencePiece pieces. One network serves "
        "lookaheads of 0, 80, 480 and 1040 ms, chosen for each session. It writes lower-case words, no punctuation.",
        "",
        "Licence of the weights: CC BY 4.0, because of the speech they were trained on; attributions below.",
        "",
        "## Training data",
        "",
        "| corpus | hours | clips | voices | licence | source |",
        "|---|---|---|---|---|---|",
    ]
    for corpus, facts in sorted(run["corpora"].items()):
        sources = "; ".join(facts["sources"])
        licences = ", ".join(facts["licences"])
        lines.append(
            f"| {corpus} | {facts['hours']} | {facts['clips']} | {facts['speakers']} | {licences} | {sources} |"
        )
    lines += [
        "",
        f"Speakers never trained on: {', '.join(run['held_out']) or 'none'}. The teacher of the features is whisper "
        "(MIT, OpenAI)." + (f" Synthetic speech reads {prompts}." if prompts else ""),
        "",
        "## Recipe",
        "",
        f"`{command_line('antiphon.apps.train.asr', run['command'][1:])}`, seed {run['seed']}, "
        f"{run['steps']} steps. Settings:",
        "",
        "```json",
        json.dumps(run["recipe"], indent=1),
        "```",
        "",
        f"## {RATES}",
        "",
    ]
    if figures is None:
        lines.append("Not measured yet: run `antiphon.apps.train.evaluate`.")
    else:
        lines += _tables(figures)
    return "\n".join(lines) + "\n"


def with_section(card: str, title: str, lines: Sequence[str]) -> str:
    """A card with this section in the place of one of that title, or before the word error rates."""
    body = "\n".join([f"## {title}", "", *lines]) + "\n"
    sections = re.split(r"(?m)^(?=## )", card)
    titles = [section.partition("\n")[0] for section in sections]
    if f"## {title}" in titles:
        at = titles.index(f"## {title}")
        sections[at] = body if at == len(sections) - 1 else body + "\n"
    else:
        sections.insert(titles.index(f"## {RATES}"), body + "\n")
    return "".join(sections)


def with_figures(card: str, figures: Mapping[str, Any]) -> str:
    """A card with the figures that ``evaluate.py`` wrote."""
    return with_section(card, RATES, _tables(figures))


def _tables(figures: Mapping[str, Any]) -> list[str]:
    tests = list(figures["wer"])
    head = " | ".join(f"{test} ({figures['clips'][test]} clips)" for test in tests)
    lines = [
        "Percent, on the same clips. rnnt and ctc: greedy, no language model; beam: search with the language model.",
        "",
        f"| recogniser | {head} |",
    ]
    lines.append("|---" * (1 + len(tests)) + "|")
    lookaheads = sorted(figures["wer"][tests[0]], key=int)
    for decoder in figures["wer"][tests[0]][lookaheads[0]]:
        for lookahead in lookaheads:
            rates = " | ".join(str(figures["wer"][test][lookahead][decoder]) for test in tests)
            lines.append(f"| this, {decoder}, lookahead {80 * int(lookahead)} ms | {rates} |")
    for who, sets in figures["others"].items():
        lines.append(f"| {who} | " + " | ".join(str(sets[test]["wer"]) for test in tests) + " |")
    return lines


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    tokenizer: Annotated[Path, typer.Argument(help="Its SentencePiece model.")],
    model: Annotated[Path, typer.Argument(help="Folder to write.")],
    figures: Annotated[Path | None, typer.Option(help="JSON that evaluate.py wrote.")] = None,
    prompts: Annotated[str, typer.Option(help="What the synthetic speech reads, for the card.")] = "",
) -> None:
    """Write a checkpoint and its card."""
    export(
        run, tokenizer, model, json.loads(figures.read_text(encoding="utf-8"))["numbers"] if figures else None, prompts
    )


if __name__ == "__main__":
    typer.run(main)
