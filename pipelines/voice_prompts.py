"""Voices for PersonaPlex from files: a clip, or a folder of clips, each named as its file."""

from __future__ import annotations

from pathlib import Path

from ..codecs import audio_file
from .duplex import Duplex

CLIPS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a")
SAVED = ".pt"  # what PersonaPlex itself saves: embeddings of its own weights


def add(model: Duplex, path: Path) -> list[str]:
    """Add what lies at a path to the model's voices; their names.

    Raises AudioError, and ValueError for what is no voice or takes none, with the remedy.
    """
    if not path.exists():
        raise ValueError(f"no file or folder {path}: give a clip of a voice, or a folder of clips")
    files = sorted(one for one in path.iterdir() if not one.name.startswith(".")) if path.is_dir() else [path]
    clips = [one for one in files if one.suffix.lower() in CLIPS]
    names = [clip.stem for clip in clips]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: several clips are called {', '.join(twice)}; rename all but one")
    if saved := [one for one in files if one.suffix.lower() == SAVED and one.stem not in names]:
        raise ValueError(
            f"{saved[0]}: holds embeddings, which are not read; put a clip of this voice, {saved[0].stem}.wav, in its "
            "place: clients that ask for the one get the other"
        )
    if not names:
        raise ValueError(f"{path}: no clip of a voice ({', '.join(CLIPS)})")
    for clip in clips:
        try:
            model.add_voice(clip.stem, audio_file.read(clip, model.rate))
        except ValueError as error:
            raise ValueError(f"{clip}: {error}") from error
    return names
