"""Voices by name: those that come with a model, those made on this computer, and files, of a voice or a clip."""

from __future__ import annotations

import os
from pathlib import Path

from ..codecs.voice_clip import check
from ..models.cosyvoice.voice import Voice
from ..models.files import CheckpointError
from ..pipelines.graph import did_you_mean
from ..pipelines.speech_checkpoint import Loaded, read_clip

SUFFIX = ".safetensors"


def folder() -> Path:
    """Where voices lie that were made here: ``antiphon/voices`` of the user's data."""
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "antiphon" / "voices"


def made() -> list[str]:
    """Names of the voices made here."""
    return sorted(path.stem for path in folder().glob(f"*{SUFFIX}"))


def place(name: str) -> Path:
    """Where a voice is written: a path where it looks like one, else among those made here."""
    path = Path(name)
    if path.suffix and path.suffix != SUFFIX:
        raise ValueError(f"{name}: a voice is written to a {SUFFIX} file, or give a name alone")
    return path if path.suffix or len(path.parts) > 1 else folder() / f"{name}{SUFFIX}"


def from_clip(loaded: Loaded, path: Path, *, text: str = "", name: str = "") -> Voice:
    """Raises AudioError, ValueError for a clip of which no voice is made, and CheckpointError."""
    pcm = read_clip(path)
    try:
        check(pcm, loaded.speech.rate)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return loaded.voice_of(pcm, text=text, name=name)


def find(loaded: Loaded, name: str | None) -> tuple[str, Voice]:
    """A voice and what it is called: by name, or from a file. None: the model's own.

    Raises CheckpointError with the remedy, and what ``from_clip`` raises.
    """
    known = [*loaded.voices, *made()]
    if name is None:
        if not loaded.voices:
            known_here = f" (made here: {', '.join(made())})" if made() else ""
            raise CheckpointError(
                f"{loaded.name} comes without voices: name one with --voice{known_here}; "
                "antiphon voice make clip.wav -o NAME makes one"
            )
        return next(iter(loaded.voices.items()))
    if name in loaded.voices:
        return name, loaded.voices[name]
    path = Path(name)
    if path.is_file():
        return path.stem, Voice.load(path) if path.suffix == SUFFIX else from_clip(loaded, path, name=path.stem)
    if path == Path(path.name) and (here := folder() / f"{name}{SUFFIX}").is_file():
        return name, Voice.load(here)
    raise CheckpointError(f"no voice or file {name!r}{did_you_mean(name, known)}")
