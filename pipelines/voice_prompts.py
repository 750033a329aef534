"""Voices for PersonaPlex from files, a clip or what PersonaPlex saved, or from a folder of them; named as the files."""

from __future__ import annotations

from pathlib import Path

from ..codecs import audio_file
from ..models.moshi import saved_voice
from .duplex import Duplex

CLIPS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a")
SAVED = ".pt"  # see ``saved_voice``


def add(model: Duplex, path: Path) -> list[str]:
    """Add what lies at a path to the model's voices; their names. Of a clip and a saved voice of one name, the clip.

    Raises AudioError, CheckpointError, and ValueError for what is no voice or takes none, with the remedy.
    """
    if not path.exists():
        raise ValueError(f"no file or folder {path}: give a clip of a voice, or a folder of clips")
    files = sorted(one for one in path.iterdir() if not one.name.startswith(".")) if path.is_dir() else [path]
    clips = [one for one in files if one.suffix.lower() in CLIPS]
    named = {one.stem: one for one in files if one.suffix.lower() == SAVED} | {clip.stem: clip for clip in clips}
    if twice := sorted({clip.stem for clip in clips if named[clip.stem] != clip}):
        raise ValueError(f"{path}: several clips are called {', '.join(twice)}; rename all but one")
    if not named:
        raise ValueError(f"{path}: no voice; it takes a clip ({', '.join(CLIPS)}) or what PersonaPlex saved ({SAVED})")
    for name, file in sorted(named.items()):
        if file.suffix.lower() == SAVED:
            model.voices[name] = saved_voice.read(file, model.lm)
            continue
        try:
            model.add_voice(name, audio_file.read(file, model.rate))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    return sorted(named)
