"""Make one bank of the embedded voice's from several.

    antiphon train tts join heart-bank michael-bank emma-bank --out speech-bank

Tokens and mel frames are joined too where every bank has them. ``--no-sound`` leaves sound and mel frames out: text and
tokens are all that the language model learns from, and a hundred hours of sound are 17 GB.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from .data import MANIFEST, PCM
from .tts_bank import MEL, TOKENS, SpeechBank
from .tts_sizes import TOKEN


def joined(banks: list[Path], out: Path, sound: bool = True) -> SpeechBank:
    """The banks one after the other. Without ``sound``, ``pcm`` is silence that takes no room.

    Raises ValueError for a bank that does not end with a token.
    """
    if out.resolve() in [bank.resolve() for bank in banks]:
        raise ValueError(f"{out} is one of the banks: name another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    lines, end = [], 0
    with (out / PCM).open("wb") as pcm:
        for bank in banks:
            size = (bank / PCM).stat().st_size
            if size % (2 * TOKEN):
                raise ValueError(
                    f"{bank / PCM} does not end with a speech token: make it with 'antiphon train tts bank'"
                )
            for line in (bank / MANIFEST).read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                record["begin"] += end // 2
                lines.append(json.dumps(record) + "\n")
            if sound:
                with (bank / PCM).open("rb") as part:
                    shutil.copyfileobj(part, pcm, 1 << 24)
            end += size
        pcm.truncate(end)
    for name in (TOKENS, *([MEL] if sound else [])):
        (out / name).unlink(missing_ok=True)
        if all((bank / name).is_file() for bank in banks):
            np.save(out / name, np.concatenate([np.load(bank / name, mmap_mode="r") for bank in banks]))
    (out / MANIFEST).write_text("".join(lines), encoding="utf-8")
    return SpeechBank(out)


def join(
    banks: Annotated[list[Path], typer.Argument(help="What 'antiphon train tts bank' made.")],
    out: Annotated[Path, typer.Option(help="Folder of the joined bank.")],
    sound: Annotated[bool, typer.Option(help="With sound and mel frames.")] = True,
) -> None:
    """Make one bank of several."""
    made = joined(banks, out, sound)
    print(f"{len(made.utterances):,} utterances, {sum(one.count for one in made.utterances) / 25 / 3600:.2f} h")
