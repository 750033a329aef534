"""Where checkpoints are: embedded in the package, on this computer, or on the Hugging Face hub."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from .. import hub
from ..files import CheckpointError

EMBEDDED = hub.EMBEDDED
FORMAT = "antiphon-conformer-1"  # of checkpoints in our layout, in their config.json
LAYOUT_FILES = ("*.json", "*.safetensors")  # of transformers' layout
ARCHIVE_FILES = ("*.nemo",)


@dataclass(frozen=True)
class Known:
    """A published checkpoint that these readers are made for. ``lookaheads``: encoder frames of 80 ms."""

    name: str
    about: str
    languages: str
    licence: str
    parameters: int
    lookaheads: tuple[int, ...]


KNOWN = (
    Known(
        "nvidia/nemotron-speech-streaming-en-0.6b",
        "RNN-T, punctuation and capitals",
        "English",
        "NVIDIA Open Model License",
        618_000_000,
        (13, 6, 1, 0),
    ),
    Known(
        "nvidia/nemotron-3.5-asr-streaming-0.6b",
        "RNN-T with a language prompt, punctuation and capitals",
        "40 locales",
        "OpenMDW-1.1",
        638_000_000,
        (3, 0, 6, 13),
    ),
    Known(
        "nvidia/stt_en_fastconformer_hybrid_large_streaming_multi",
        "RNN-T and CTC, lower case",
        "English",
        "CC-BY-4.0",
        114_000_000,
        (13, 6, 1, 0),
    ),
    Known(
        "nvidia/parakeet_realtime_eou_120m-v1",
        "RNN-T with end-of-utterance tokens, lower case",
        "English",
        "NVIDIA Open Model License",
        120_000_000,
        (1,),
    ),
)


def embedded() -> list[str]:
    """Names of the recognisers that come with the package."""
    return hub.embedded(EMBEDDED, "format", FORMAT)


def cached(name: str) -> Path | None:
    """The folder of a hub checkpoint that is already on this computer."""
    folder = hub.cached(name)
    whole = folder is not None and (
        any(folder.glob("*.nemo"))
        or (
            (folder / "config.json").is_file()
            and (folder / "tokenizer.json").is_file()
            and any(folder.glob("*.safetensors"))
        )
    )
    return folder if whole else None


def resolve(name: str | PathLike[str] | None = None) -> Path:
    """The file or folder of a checkpoint, fetched from the hub where needed.

    Raises CheckpointError for a name that is nowhere (suggesting the nearest) or that cannot be fetched now.
    """
    if name is None:
        if not embedded():
            raise CheckpointError("this installation embeds no checkpoint; name one of " + ", ".join(_names()))
        return EMBEDDED / embedded()[0]
    path = Path(name)
    if path.exists():
        return path
    name = str(name)
    if name in embedded():
        return EMBEDDED / name
    if name.count("/") != 1 or path.suffix == ".nemo" or name.startswith(("/", ".", "~")):
        short = [known for known in _names() if known.rpartition("/")[2] == name]
        if not short:
            raise CheckpointError(f"no file, folder or checkpoint {name!r}{_nearest(name)}")
        name = short[0]
    return cached(name) or _fetch(name)


def _fetch(name: str) -> Path:
    def choose(files: Sequence[str]) -> Sequence[str]:
        if "config.json" in files and any(file.endswith(".safetensors") for file in files):
            return LAYOUT_FILES
        if any(file.endswith(".nemo") for file in files):
            return ARCHIVE_FILES
        raise CheckpointError(f"{name} on the hub holds neither safetensors with a config.json nor a .nemo file")

    nearest = _nearest(name)
    return hub.fetch(name, choose, unknown=nearest, unreachable="" if name in _names() else nearest)


def _names() -> list[str]:
    return [*embedded(), *(known.name for known in KNOWN)]


def _nearest(name: str) -> str:
    names = {part: whole for whole in _names() for part in (whole, whole.rpartition("/")[2])}
    near = difflib.get_close_matches(name, names, 1, 0.5)
    return f"; did you mean {names[near[0]]!r}?" if near else f"; known are {', '.join(_names())}"
