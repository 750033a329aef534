"""Write a trained dialogue model as a checkpoint with its card, or a new card with figures.

    python -m antiphon.apps.train.duplex_card duplex-run models/weights/antiphon-talk-en-12m --figures behaviour.json

RUN is the folder that ``duplex.py`` wrote; the figures come from ``duplex_eval.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ...codecs import mimi_checkpoint
from ...codecs.mimi import Mimi
from ...models.moshi import checkpoint
from ...models.moshi.lm import MoshiLM
from ..bench.common import command_line
from .codec import CODEC
from .run import record_of

CARD = "README.md"
LARGEST = 25_000_000  # bytes of a model that ships with the package
CREDITS = {  # by how the name of a source begins
    "hibari": "hibari-tts, synthetic speech",
    "kokoro": "Kokoro-82M (hexgrad), synthetic speech",
    "librispeech": "LibriSpeech (openslr.org/12), V. Panayotov et al., CC BY 4.0, cut and mixed",
    "kathleen": "Kathleen's recordings (rhasspy/dataset-voice-kathleen), CC0",
    "noise_esc10": "ESC-10 (karoldvl/ESC-10), K. J. Piczak and the contributors of freesound.org, CC BY 3.0, mixed",
}


def export(
    folder: Path, lm: MoshiLM, codec: Mimi, tokenizer: bytes, settings: Mapping[str, Any], run: Mapping[str, Any]
) -> None:
    """Write the checkpoint. Raises ValueError for one too large to ship, or with weights beyond float16."""
    for name, value in lm.state_dict().items():
        if not value.half().isfinite().all():
            raise ValueError(f"weight {name} does not fit into float16")
    checkpoint.save(folder, lm, settings)
    mimi_checkpoint.save(folder / checkpoint.CODEC, codec)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    (folder / CARD).write_text(write_card(folder.name, size_of(folder), run), encoding="utf-8")
    if (size := size_of(folder)) > LARGEST:
        raise ValueError(f"{folder} has {size:,} bytes; what ships has {LARGEST:,} at most: make the networks smaller")


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != CARD)


def write_card(
    name: str,
    size: int,
    run: Mapping[str, Any],
    figures: Mapping[str, Any] | None = None,
    refined: Mapping[str, Any] | None = None,
) -> str:
    """The README of a checkpoint: what it is, from what it was made and how, how it behaves. refined: the run that
    trained the codec's decoder on."""
    lines = [
        "---",
        "license: cc-by-4.0",
        "language: en",
        "---",
        f"# {name}",
        "",
        "A tiny English full-duplex dialogue model: Mimi's and Moshi's networks in small, trained from nothing "
        f"({size / 1e6:.1f} MB in float16). It hears and speaks at the same time, 80 ms at a time, with an inner "
        "monologue of text. It knows a closed world of questions: small sums, counting, spelling, days and months, "
        "capitals, colours, opposites, animals, greetings; to other talk it says that it does not know. It is made to "
        "show and to measure full-duplex behaviour on a laptop without a network, not to be an assistant.",
        "",
        "Licence of the weights: CC BY 4.0, because of the speech they were trained on; attributions below.",
        "",
        "## Training data",
        "",
        "Dialogues composed of these utterances, never the same twice:",
        "",
        "| what | utterances | hours | voices | sources | licences |",
        "|---|---|---|---|---|---|",
    ]
    for role, facts in run["bank"].items():
        names = (", ".join(facts[key]) for key in ("sources", "licences"))
        cells = (facts["utterances"], facts["hours"], facts["voices"], *names)
        lines.append(f"| {role} | " + " | ".join(map(str, cells)) + " |")
    used = {source for facts in run["bank"].values() for source in facts["sources"]}
    lines += [
        "",
        *(f"- {credit}" for begin, credit in CREDITS.items() if any(source.startswith(begin) for source in used)),
        "",
        "Some forms, questions and voices, told by a hash of their names, were kept for testing.",
        "",
        "## Recipe",
        "",
        f"`{command_line('antiphon.apps.train.duplex', run['command'][1:])}`, "
        f"seed {run['seed']}, {run['steps']} steps.",
        "",
        "```json",
        json.dumps(run["recipe"], indent=1),
        "```",
        "",
        *_codec("The codec", "codec", run.get("codec")),
        *_codec("Its decoder, trained on for the assistant's voice", "codec_refine", refined),
        "Losses in nats a token, each token given the right ones before it; `right` is the share of text tokens:",
        "",
        "```json",
        json.dumps(run["measured"], indent=1),
        "```",
        "",
        "## Behaviour",
        "",
        *(["Not measured yet: run `antiphon train duplex_eval`."] if figures is None else table(figures)),
    ]
    return "\n".join(lines) + "\n"


def _codec(what: str, program: str, run: Mapping[str, Any] | None) -> list[str]:
    """How (a part of) the codec was made, where that is known."""
    if run is None:
        return []
    command = command_line(f"antiphon.apps.train.{program}", run["command"][1:])
    facts = {**run["recipe"], "measured": run["measured"]}
    made = f"{what}: `{command}`, seed {run['seed']}, {run['steps']} steps."
    return [made, "", "```json", json.dumps(facts, indent=1), "```", ""]


def take_decoder(model: Path, refined: Path) -> None:
    """Put a refined codec in the place of a model's. Raises ValueError for one that makes other codes."""
    before, after = (mimi_checkpoint.load(folder).state_dict() for folder in (model / checkpoint.CODEC, refined))
    for name, value in before.items():
        if name.startswith(("encoder.", "quantizer.")) and ".back." not in name and not value.equal(after[name]):
            raise ValueError(f"{refined} makes other codes than {model}: {name} differs; refine this model's codec")
    shutil.copytree(refined, model / checkpoint.CODEC, dirs_exist_ok=True)


def table(figures: Mapping[str, Any]) -> list[str]:
    """The behaviour table that ``duplex_eval.py`` wrote, as Markdown."""
    lines = ["| behaviour | " + " | ".join(figures["sets"]) + " |", "|---" * (1 + len(figures["sets"])) + "|"]
    names = list(dict.fromkeys(name for rows in figures["sets"].values() for name in rows))
    for name in names:
        cells = []
        for rows in figures["sets"].values():
            row = rows.get(name)
            cells.append("" if row is None else _cell(row))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _cell(row: Mapping[str, Any]) -> str:
    if "of" in row:
        return f"{row['value']}/{row['of']}"
    return "never" if row["value"] is None else f"{row['value']} {row['unit']}"


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    model: Annotated[Path, typer.Argument(help="Folder to write.")],
    figures: Annotated[Path | None, typer.Option(help="JSON that duplex_eval.py wrote.")] = None,
    refined: Annotated[Path | None, typer.Option(help="Folder of a run of codec_refine.py, to take its codec.")] = None,
) -> None:
    """Copy a run's model to where it ships from, with a card that has the figures."""
    facts = record_of(run)
    numbers = json.loads(figures.read_text(encoding="utf-8"))["numbers"] if figures else None
    shutil.copytree(run / "model", model, dirs_exist_ok=True)
    more = None
    if refined is not None:
        more = record_of(refined)
        take_decoder(model, refined / CODEC)
    (model / CARD).write_text(write_card(model.name, size_of(model), facts, numbers, more), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
