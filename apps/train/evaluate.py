"""Word error rates of a recogniser, per lookahead and decoder, beside recognisers that others wrote.

    python -m antiphon.apps.train.evaluate --model DIR --test SHARD... --speakers ls-1867 ... --judges \\
        --json apps/bench/results/asr_wer.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...codecs.mel import LogMel
from ...models.conformer.ctc import CTCHead
from ...models.conformer.encoder import ConformerEncoder
from ...models.conformer.transducer import Transducer
from .text import scored

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
    heads: dict[str, CTCHead | Transducer],
    detokenise: Callable[[list[int]], str],
    lookahead: int | None,
    seconds: float = 240.0,
) -> dict[str, list[str]]:
    """Greedy transcripts of whole clips under one lookahead, for each head by name.

    The heads must be prepared. Clips are batched by length, about ``seconds`` of audio at a time.
    """
    device = mel.window.device
    order = sorted(range(len(clips)), key=lambda index: len(clips[index]))
    texts = {name: [""] * len(clips) for name in heads}
    while order:
        rows = max(1, int(seconds * 16_000 / max(1, len(clips[order[-1]]))))
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


def _decode(head: CTCHead | Transducer, frames: Tensor, valid: Tensor) -> list[list[int]]:
    rows = len(frames)
    state = {name: spec.new(rows + 1, frames.device) for name, spec in head.state_spec().items()}
    slots = torch.arange(rows, device=frames.device)
    active = torch.ones(rows, dtype=torch.bool, device=frames.device)
    if isinstance(head, CTCHead):
        tokens, _, count = head.decode(frames, valid, state, slots, active)
    else:
        tokens, _, count = head.decode(frames, valid, state, slots, active, max_symbols=SYMBOLS)
    return [row[:size] for row, size in zip(tokens.tolist(), count.tolist(), strict=True)]
