"""Where captions go: standard output or files, in the order and the format asked for."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self, TextIO

from ...codecs.audio_file import STDIN
from ...pipelines.captions import Caption
from ..subtitles import FORMATS, Subtitles
from .console import CommandError


class Outputs:
    """One writer for each input file. Use it in a ``with`` block.

    output: None for standard output (where several files follow each other in order); else a file, or a folder for
    several files. in_turn: the files' captions come one file after the other, so nothing has to be held back.
    Raises CommandError for a place that cannot be written.
    """

    def __init__(self, files: Sequence[str], format: str, output: Path | None, *, in_turn: bool) -> None:
        self._format = FORMATS[format]
        self._titled = len(files) > 1 and format == "text"
        if duplicates := {path for path in files if files.count(path) > 1}:
            raise CommandError(f"{min(duplicates)} is given twice")
        if output is None and len(files) > 1 and format in ("srt", "vtt"):
            raise CommandError(f"several files as {format} need a folder to go to: add --output FOLDER")
        self._held_back = len(files) > 1 and not in_turn
        self._paths = {} if output is None else _places(files, output, self._format.suffix)
        self._writers: dict[str, Subtitles] = {}
        self._open: dict[str, TextIO] = {}
        self._order = list(files)

    def add(self, path: str, caption: Caption) -> None:
        """Write a final caption of the file ``path``."""
        self._writer(path).add(caption)

    def close(self, path: str, seconds: float) -> None:
        """The file ``path`` has ended after ``seconds``."""
        self._writer(path).close("standard input" if path == STDIN else path, seconds)
        if path in self._paths:
            self._open.pop(path).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._order:
            file = self._open.get(path)
            if isinstance(file, io.StringIO):
                sys.stdout.write(file.getvalue())
            elif file is not None and file is not sys.stdout:
                file.close()
        sys.stdout.flush()

    def _writer(self, path: str) -> Subtitles:
        if path not in self._writers:
            self._open[path] = self._target(path)
            self._writers[path] = self._format(self._open[path])
        return self._writers[path]

    def _target(self, path: str) -> TextIO:
        place = self._paths.get(path)
        if place is None:
            out = io.StringIO() if self._held_back else sys.stdout
            if self._titled:
                out.write(f"==> {path} <==\n")
            return out
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            return place.open("w", encoding="utf-8")
        except OSError as error:
            raise CommandError(f"{place}: cannot write: {error.strerror}") from error


def _places(files: Sequence[str], output: Path, suffix: str) -> dict[str, Path]:
    """Which file each input's captions go to; never over an input, never two to one."""
    if len(files) == 1 and not output.is_dir():
        places = {files[0]: output}
    elif output.exists() and not output.is_dir():
        raise CommandError(f"{output} is a file; the captions of several files need a folder")
    else:
        names = {path: "standard input" if path == STDIN else Path(path).name for path in files}
        stems = [Path(name).stem for name in names.values()]
        places = {
            path: output / ((Path(name).stem if stems.count(Path(name).stem) == 1 else name) + suffix)
            for path, name in names.items()
        }
    inputs = {Path(path).resolve() for path in files if path != STDIN}
    for place in places.values():
        if place.resolve() in inputs:
            raise CommandError(f"{place} is one of the recordings; choose another --output")
    if len(set(places.values())) < len(places):
        raise CommandError("two of the files have the same name; caption them one at a time")
    return places
