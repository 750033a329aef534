"""``antiphon codec``: a recording through Mimi and back, to hear what is left of it at so many codebooks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...codecs.audio_file import STDIN, AudioError, AudioWarning, AudioWriter, info, stream
from ...codecs.mimi import MimiDecoder, MimiEncoder
from ...codecs.mimi_checkpoint import CheckpointError, load
from ...pipelines.engine import Engine, EngineError
from .console import CommandError, stderr, warnings_as_lines
from .progress import progress, real_time_factor
from .transcribe import check_device

FRAMES = 16  # of a step: fast for a file, small in memory

Samples = NDArray[np.float32]


class Codec:
    """A codec at a number of codebooks, for one recording at a time.

    Raises CheckpointError, and ValueError for a number of codebooks that the codec does not have.
    """

    def __init__(self, model: str, codebooks: int, device: str) -> None:
        mimi = load(model, steps=(FRAMES,), device=device)
        self.config, self.codebooks = mimi.config, codebooks
        self.engine = Engine(device, inline=True)
        for name, half in (("encoder", MimiEncoder(mimi, codebooks)), ("decoder", MimiDecoder(mimi, codebooks))):
            self.engine.add(name, half, slots=1, buckets=(1,), exact=False)

    def through(self, pieces: Iterable[Samples]) -> Iterator[Samples]:
        """Pieces of a step, the last one shorter, to the same of what they sound like."""
        encoder, decoder = (self.engine.open_sync(name) for name in ("encoder", "decoder"))
        for piece in pieces:
            pcm = np.pad(piece, (0, FRAMES * self.config.frame - len(piece)))
            codes = encoder.step_sync({"pcm": pcm})["codes"]
            yield decoder.step_sync({"codes": codes})["pcm"].numpy()[: len(piece)]

    def __str__(self) -> str:
        """The codes' rate."""
        count = f"{self.codebooks} codebook{'s' if self.codebooks > 1 else ''}"
        kilobits = self.config.bit_rate(self.codebooks) / 1000
        return f"{count} at {self.config.frame_rate:g} frames a second, {kilobits:g} kbit/s"


def run(file: str, *, output: Path, codebooks: int, model: str, device: str | None) -> None:
    """See ``antiphon codec --help``. Raises CommandError."""
    check_device(device)
    if file != STDIN and output.resolve() == Path(file).resolve():
        raise CommandError(f"{output} is the recording itself: give another name for the result")
    console = stderr()
    try:
        seconds = None if file == STDIN else info(file).duration
        with console.status("Loading the model"):
            codec = Codec(model, codebooks, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with warnings_as_lines(AudioWarning), codec.engine:
            heard, took = _convert(file, output, codec, seconds)
    except (CheckpointError, AudioError, EngineError, ValueError) as error:
        raise CommandError(str(error)) from error
    console.print(f"{heard:.1f} s of audio in {took:.2f} s; {real_time_factor(took, heard)}; {codec}", style="dim")


def _convert(file: str, output: Path, codec: Codec, seconds: float | None) -> tuple[float, float]:
    """Write the result. Returns the seconds of audio and those it took."""
    rate, samples = codec.config.sample_rate, 0
    began = time.perf_counter()
    with progress(seconds) as bar, AudioWriter(output, rate) as writer:
        for piece in codec.through(stream(file, rate, FRAMES / codec.config.frame_rate)):
            writer.write(piece)
            samples += len(piece)
            bar.update(bar.task_ids[0], completed=samples / rate)
    return samples / rate, time.perf_counter() - began
