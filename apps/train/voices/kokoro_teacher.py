"""The Kokoro teacher: many voices, and random blends of two, in large batches on a GPU (or slowly on the CPU)."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from . import Line
from .hibari import phonemiser, symbols
from .kokoro import FRAME, MAX_TOKENS, Kokoro, Prosody
from .packed import STYLES, unpack

# Padded frames (25 ms) of one batch: about 15 MiB of GPU memory a second of speech; a CPU gains nothing from batches.
_BATCH_FRAMES = {"cuda": 16_000}
_BATCH_TOKENS = {"cuda": 20_000}
_BLEND = re.compile(r"(\w+)\*([\d.]+)\+(\w+)")


class KokoroTeacher:
    """A voice is a style table's name, such as ``af_heart``, or a blend: ``af_heart*0.35+am_adam``.

    The first letter of a table's name is its speaker's language. ``b`` reads British phonemes; all others read American
    ones, the speakers of other languages with an accent of their own.
    """

    name = "kokoro"
    licence = "Apache-2.0"
    source = "Kokoro-82M (synthetic)"

    def __init__(self, folder: Path, device: torch.device) -> None:
        """folder: what voices.pack wrote."""
        self.device = device
        self.styles = {name: table.float() for name, table in load_file(folder / STYLES).items()}
        model = Kokoro()
        model.load_state_dict(unpack(folder))
        self.model = model.to(device).eval().requires_grad_(False)
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True

    def draw(self, rng: random.Random) -> str:
        """One voice a third of the time, else a blend of two that read the same phonemes."""
        first = rng.choice(sorted(self.styles))
        others = [name for name in sorted(self.styles) if (name[0] == "b") == (first[0] == "b") and name != first]
        if rng.random() < 1 / 3:
            return first
        return f"{first}*{rng.uniform(0.2, 0.8):.2f}+{rng.choice(others)}"

    def style(self, voice: str, phonemes: int) -> torch.Tensor:
        """The style [256] of a voice for an utterance of so many phonemes. Raises KeyError for an unknown voice."""
        if blend := _BLEND.fullmatch(voice):
            first, share, second = blend[1], float(blend[2]), blend[3]
            return torch.lerp(self.styles[second][phonemes - 1], self.styles[first][phonemes - 1], share)
        return self.styles[voice][phonemes - 1]

    @torch.inference_mode()
    def speak(self, lines: Sequence[Line]) -> list[torch.Tensor]:
        table = symbols()
        spoken = [torch.zeros(0)] * len(lines)
        tokens: dict[int, torch.Tensor] = {}
        styles: dict[int, torch.Tensor] = {}
        for index, line in enumerate(lines):
            phonemes = phonemiser(british=line.voice.startswith("b"))(line.text)
            ids = [table[symbol] for symbol in phonemes if symbol in table]
            if 0 < len(ids) <= MAX_TOKENS:
                tokens[index] = torch.tensor([0, *ids, 0])
                styles[index] = self.style(line.voice, len(ids))
        planned: dict[int, Prosody] = {}
        lengths = {index: len(ids) for index, ids in tokens.items()}
        for batch in _batches(lengths, _BATCH_TOKENS.get(self.device.type, 0)):
            count = torch.tensor([lengths[index] for index in batch])
            prosody = self.model.prosody(
                pad_sequence([tokens[index] for index in batch], batch_first=True).to(self.device),
                count.to(self.device),
                torch.stack([styles[index] for index in batch]).to(self.device),
                torch.tensor([lines[index].speed for index in batch], device=self.device),
            )
            for row, index in enumerate(batch):
                size = lengths[index]
                planned[index] = Prosody(
                    prosody.prosodic[row, :size], prosody.phonetic[row, :size], prosody.durations[row, :size]
                )
        totals = torch.stack([plan.durations.sum() for plan in planned.values()]).tolist() if planned else []
        frames = dict(zip(planned, totals, strict=True))
        for batch in _batches(frames, _BATCH_FRAMES.get(self.device.type, 0)):
            plans = [planned[index] for index in batch]
            together = Prosody(
                *(
                    pad_sequence([getattr(plan, part) for plan in plans], batch_first=True)
                    for part in ("prosodic", "phonetic", "durations")
                )
            )
            style = torch.stack([styles[index] for index in batch]).to(self.device)
            samples = self.model.voice(together, style, [lines[index].seed for index in batch]).cpu()
            for row, index in enumerate(batch):
                spoken[index] = samples[row, : frames[index] * FRAME].clone()
        return spoken


def _batches(sizes: dict[int, int], most: int) -> Iterator[list[int]]:
    """Keys in groups of similar size whose padded total is at most ``most`` (a group holds at least one)."""
    group: list[int] = []
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        if group and sizes[group[0]] * (len(group) + 1) > most:
            yield group
            group = []
        group.append(key)
    if group:
        yield group
