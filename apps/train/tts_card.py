"""Put the trained parts of the embedded voice together as a checkpoint with its card.

    antiphon train tts card --lm lm-run --flow flow-run --vocoder vocoder-run --out antiphon-speech-en-17m

The folder is what ``antiphon speak --model`` takes: the networks in float16, the characters, and a file for each voice,
which is an embedding and a text token, without a clip. The figures come from ``tts_eval.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ...models.cosyvoice.sampling import Sampling
from ...models.cosyvoice.voice import Voice
from ...pipelines import speech_checkpoint
from ..bench.common import command_line
from .duplex_card import CARD, size_of
from .run import record_of
from .tts_flow import load_flow
from .tts_lm import TOKENIZER_FILE, load_lm
from .tts_sizes import VOICE_TOKENS, VOICES
from .tts_vocoder import load_vocoder

LARGEST = 40_000_000  # bytes of a model that ships with the package
PARTS = ("lm", "flow", "vocoder")
SAMPLING = Sampling(temperature=0.5, top_p=0.9, top_k=30, tau=0.5)
"""With 729 tokens, neighbours are often alike: only a token that makes up half of the last ten is drawn again."""


def export(
    folder: Path,
    runs: Mapping[str, Path],
    sampling: Sampling = SAMPLING,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Write the checkpoint. runs: the folders of ``PARTS``.

    Raises ValueError for one too large to ship, or with weights beyond float16.
    """
    lm, (flow, embeddings), vocoder = load_lm(runs["lm"]), load_flow(runs["flow"]), load_vocoder(runs["vocoder"])
    for name, network in zip(PARTS, (lm, flow, vocoder), strict=True):
        _halve(name, network)
    chunk = flow.config.chunk
    drawn = {name: value for name, value in asdict(sampling).items() if name != "seed"}
    manner = {"language": "en", "voice": next(iter(VOICES)), "sampling": drawn, "hops": [chunk, 2 * chunk, 4 * chunk]}
    speech_checkpoint.save(folder, lm, flow, vocoder, manner)
    (folder / TOKENIZER_FILE).write_bytes((runs["lm"] / TOKENIZER_FILE).read_bytes())
    (folder / speech_checkpoint.VOICES).mkdir(exist_ok=True)
    for name, token in zip(VOICES, VOICE_TOKENS, strict=True):
        voice = voice_of(name, embeddings[name], token, flow.config.mels)
        voice.save(folder / speech_checkpoint.VOICES / f"{name}.safetensors")
    facts = {part: record_of(run) for part, run in runs.items()}
    sizes = {part: sum(value.numel() for value in network.state_dict().values())
             for part, network in zip(PARTS, (lm, flow, vocoder), strict=True)}  # fmt: skip
    card = write_card(folder.name, size_of(folder), sizes, facts, figures)
    (folder / CARD).write_text(card, encoding="utf-8")
    if (size := size_of(folder)) > LARGEST:
        raise ValueError(f"{folder} has {size:,} bytes; what ships has {LARGEST:,} at most: make the networks smaller")


def voice_of(name: str, embedding: Tensor, token: str, mels: int) -> Voice:
    """A voice without a clip: its token is the prompt's text."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return Voice(nothing, torch.zeros(0, mels), embedding.float(), token, name)


def _halve(part: str, network: nn.Module) -> None:
    for name, value in network.state_dict().items():
        if not value.half().isfinite().all():
            raise ValueError(f"weight {part}.{name} does not fit into float16")
    network.half()


def write_card(
    name: str,
    size: int,
    sizes: Mapping[str, int],
    runs: Mapping[str, Mapping[str, Any]],
    figures: Mapping[str, Any] | None,
) -> str:
    """The README of a checkpoint: what it is, from what it was made and how, how well it does."""
    lm = runs["lm"]
    parts = ", ".join(f"{part} {sizes[part] / 1e6:.1f} M" for part in PARTS)
    lines = [
        "---",
        "license: apache-2.0",
        "language: en",
        "---",
        f"# {name}",
        "",
        "English streaming speech synthesis: CosyVoice 2's networks in small, trained from nothing "
        f"({parts} numbers; {size / 1e6:.1f} MB in float16), at 24 kHz. It reads characters, speaks text as a whole or "
        f"as it arrives, and has the voices {', '.join(lm['voices'])}. It cannot take on the voice of a clip.",
        "",
        "## Training data",
        "",
        "Synthetic speech alone:",
        "",
        "| voice | utterances | hours | teacher | licence |",
        "|---|---|---|---|---|",
    ]
    for voice, facts in lm["voices"].items():
        speaker = VOICES[voice]
        lines.append(
            f"| {voice} | {facts['utterances']} | {facts['hours']} | {speaker.teacher}'s {speaker.voice} | Apache-2.0 |"
        )
    lines += ["", "A sentence in a hundred, told by a hash of its words, was kept for testing.", "", "## Recipe", ""]
    lines += ["How the banks were spoken and their speech tokens made is told in apps/train/README.md.", ""]
    for part in PARTS:
        run = runs[part]
        command = command_line("antiphon.apps.train.tts", run["command"][1:])
        facts = {"recipe": run["recipe"], "measured": run["measured"]}
        lines += [f"{part}: `{command}`, seed {run['seed']}, {run['steps']} steps.", ""]
        lines += ["```json", json.dumps(facts, indent=1), "```", ""]
    lines += ["## How well it speaks", ""]
    lines += ["Not measured yet: run `antiphon train tts evaluate`."] if figures is None else tables(figures)
    return "\n".join(lines) + "\n"


def tables(figures: Mapping[str, Any]) -> list[str]:
    """What ``tts_eval.py`` measured, as Markdown."""
    columns = ("wer", "plcmos", "similarity")
    lines = [
        f"{figures['sentences']} sentences that were not trained on. Word error rate in percent by faster-whisper "
        "tiny.en; PLCMOS from 1 to 5; similarity: cosine to the voice's training speech by resemblyzer.",
        "",
        "| who | word error rate | PLCMOS | similarity |",
        "|---|---|---|---|",
    ]
    for who, row in figures["speakers"].items():
        lines.append(f"| {who} | " + " | ".join(_cell(row.get(column)) for column in columns) + " |")
    seams, speed, less = figures["seams"], figures["speed"], figures["stream less whole"]
    lines += [
        "",
        f"Seam score at {seams['joins']} joins: at most {_cell(seams['worst'])}, 99 % below {_cell(seams['p99'])} "
        f"(made whole, at the same places: {_cell(seams['whole worst'])} and {_cell(seams['whole p99'])}). "
        f"PLCMOS of the stream less that of the whole: {_cell(less)}.",
        "",
        f"On {speed['threads']} cores ({speed['cpu']}), through the speaking stage: real-time factor {speed['rtf']}, "
        f"first audio after {speed['first audio ms']['median']} ms (median of {speed['utterances']}; at most "
        f"{speed['first audio ms']['worst']} ms).",
    ]
    return lines


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def card(
    lm: Annotated[Path, typer.Option(help="Folder of 'antiphon train tts lm'.")],
    flow: Annotated[Path, typer.Option(help="Folder of 'antiphon train tts flow'.")],
    vocoder: Annotated[Path, typer.Option(help="Folder of 'antiphon train tts vocoder'.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    figures: Annotated[Path | None, typer.Option(help="JSON that 'antiphon train tts evaluate' wrote.")] = None,
    temperature: Annotated[float, typer.Option(help="How freely tokens are drawn.")] = SAMPLING.temperature,
    top_p: Annotated[float, typer.Option(help="Probability of the tokens that are drawn among.")] = SAMPLING.top_p,
    top_k: Annotated[int, typer.Option(help="How many are drawn among at most.")] = SAMPLING.top_k,
) -> None:
    """Write the checkpoint of a voice and its card."""
    numbers = json.loads(figures.read_text(encoding="utf-8"))["numbers"] if figures else None
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, tau=SAMPLING.tau)
    export(out, {"lm": lm, "flow": flow, "vocoder": vocoder}, sampling, numbers)
