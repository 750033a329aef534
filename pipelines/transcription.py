"""Speech recognition of one stretch of audio: samples in, captions out, whoever steps the model.

``Transcription`` is what a session keeps outside the engine's slot: the samples of an unfinished block and the words of
an unfinished caption. ``Transcriber`` drives it for files, several at a time in one batch; the stage
(``stages/transcribe.py``) drives it live.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ..codecs.audio_file import AudioError, stream
from ..models.conformer.checkpoint import load
from .captions import Caption, Captioner
from .engine import Engine, Lease
from .recognizer import FRAME_SAMPLES, SAMPLE_RATE, Block, Blocks, Recognizer

READ_SECONDS = 10.0  # of a file at a time: bounds memory whatever its length
FILES_AT_ONCE = 4  # the smallest batch steps four rows anyway


class Transcription:
    """Blocks and captions of one session of a recogniser.

    lookahead: milliseconds, one of the model's; None for its default. language: for models with a language prompt.
    endpoint, longest: seconds, see ``Captioner``.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        lookahead: float | None = None,
        *,
        language: str | None = None,
        endpoint: float = 1.0,
        longest: float = 20.0,
    ) -> None:
        self.variant = recognizer.variant(lookahead)
        self._constant = recognizer.constant_inputs(language)
        self._blocks = Blocks(self.variant)
        self._captioner = Captioner(recognizer.vocabulary, endpoint=endpoint, longest=longest)
        self._begin = 0  # of the stretch under way, in samples since the first
        self._frames = 0.0  # encoder frames since the first sample
        self.reached = 0.0  # seconds of audio whose words were taken

    def push(self, pcm: NDArray[np.float32]) -> list[Block]:
        """Mono float32 samples at 16 kHz -> the blocks they complete."""
        return self._blocks.push(pcm)

    def flush(self) -> list[Block]:
        """The blocks that bring out what is still inside the model at the end of the audio, or of a stretch of it."""
        return self._blocks.finish() if self._blocks.samples else []

    def inputs(self, block: Block) -> dict[str, Any]:
        """A block as the model's step takes it."""
        return {"pcm": block.pcm, "end": np.int64(block.end), **self._constant}

    def take(self, outputs: Mapping[str, torch.Tensor], block: Block) -> Iterator[Caption]:
        """The captions that a step's outputs change."""
        tokens, open_tokens = self._tokens(outputs, ""), self._tokens(outputs, "open_")
        self._frames += int(outputs["frames"])
        self.reached = (self._begin + block.heard) / SAMPLE_RATE
        return self._captioner.add(tokens, self._frames, self.reached, open_tokens)

    def _tokens(self, outputs: Mapping[str, torch.Tensor], kind: str) -> list[tuple[int, float]]:
        """Tokens and the frames they were heard in, from the first sample; ``kind`` "open_": those not final."""
        if kind + "count" not in outputs:
            return []
        count = int(outputs[kind + "count"])
        times = [self._frames + time for time in outputs[kind + "times"][:count].tolist()]
        return list(zip(outputs[kind + "tokens"][:count].tolist(), times, strict=True))

    def finish(self) -> Iterator[Caption]:
        """The last caption, after the outputs of ``flush`` were taken."""
        self.reached = self.seconds
        return self._captioner.finish(self.seconds)

    def restart(self) -> None:
        """After ``finish``: what is pushed next is a new stretch, for a model that was reset. Times go on."""
        self._begin += self._blocks.samples
        self._blocks, self._frames = Blocks(self.variant), self._begin / FRAME_SAMPLES

    @property
    def seconds(self) -> float:
        """Audio taken so far."""
        return (self._begin + self._blocks.samples) / SAMPLE_RATE


class Transcriber:
    """A loaded model for files, on the calling thread.

    model: an embedded or hub name or a path; None for the embedded English model. lookahead: milliseconds; None for the
    model's default. device: "cpu", "cuda"; None for CUDA where there is one.
    Raises CheckpointError (for an unknown name with the nearest) and ValueError (a lookahead the model lacks).
    """

    def __init__(
        self,
        model: str | PathLike[str] | None = None,
        lookahead: float | None = None,
        *,
        device: str | None = None,
        decoder: str | None = None,
        language: str | None = None,
        files: int = FILES_AT_ONCE,
    ) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.recognizer = Recognizer(load(model, device=device), decoder)
        self.lookahead, self.language, self.files = lookahead, language, files
        variant = self.recognizer.variant(lookahead)
        self.engine = Engine(device, inline=True)
        self.engine.add("asr", self.recognizer, slots=files, variants=[variant])

    def transcribe(self, path: str | PathLike[str]) -> Iterator[Caption]:
        """Captions of a file (or ``-``, standard input) as they come. Raises AudioError."""
        for _, event in self.transcribe_many([path]):
            if not isinstance(event, End):
                yield event
            elif event.error is not None:
                raise event.error

    def transcribe_many(self, paths: Iterable[str | PathLike[str]]) -> Iterator[tuple[int, Caption | End]]:
        """Captions of several files, and each one's ``End``, with the file's number; ``files`` at a time in one batch.

        A file that cannot be read ends with its error; the others go on.
        """
        waiting = enumerate(paths)
        running: list[_Reading] = []
        try:
            while True:
                while len(running) < self.files and (entry := next(waiting, None)) is not None:
                    running.append(_Reading(self, *entry))
                if not running:
                    return
                ready = []
                for reading in list(running):
                    block = reading.next_block()
                    if block is not None:
                        ready.append((reading, block))
                        continue
                    running.remove(reading)
                    reading.lease.close()
                    for caption in reading.transcription.finish():
                        yield reading.number, caption
                    yield reading.number, End(reading.transcription.seconds, reading.error)
                rows = self.engine.run_sync(
                    [(reading.lease, reading.transcription.inputs(block)) for reading, block in ready]
                )
                for (reading, block), outputs in zip(ready, rows, strict=True):
                    for caption in reading.transcription.take(outputs, block):
                        yield reading.number, caption
        finally:
            for reading in running:
                reading.lease.close()

    def close(self) -> None:
        """Free the model."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class End:
    """A file has ended after ``seconds`` of audio, with ``error`` where it could not be read (further)."""

    seconds: float
    error: AudioError | None = None


class _Reading:
    """One file on its way through a Transcriber."""

    def __init__(self, transcriber: Transcriber, number: int, path: str | PathLike[str]) -> None:
        self.number = number
        self.error: AudioError | None = None
        self.transcription = Transcription(
            transcriber.recognizer, transcriber.lookahead, language=transcriber.language
        )  # fmt: skip
        self.lease: Lease = transcriber.engine.open_sync("asr", self.transcription.variant)
        self._blocks = self._read(path)

    def next_block(self) -> Block | None:
        """None at the end, or where the file cannot be read further: see ``error``."""
        try:
            return next(self._blocks, None)
        except AudioError as error:
            self.error = error
            return None

    def _read(self, path: str | PathLike[str]) -> Iterator[Block]:
        for pcm in stream(path, SAMPLE_RATE, READ_SECONDS):
            yield from self.transcription.push(pcm)
        yield from self.transcription.flush()


def transcribe(
    path: str | PathLike[str],
    *,
    model: str | PathLike[str] | None = None,
    lookahead: float | None = None,
    device: str | None = None,
    language: str | None = None,
) -> Iterator[Caption]:
    """Captions of an audio or video file: ``Partial`` as they grow, ``Final`` when they are done.

    model, lookahead, device, language: as for ``Transcriber``. The last model used stays loaded.
    """
    yield from _cached(None if model is None else str(model), lookahead, device, language).transcribe(path)


@lru_cache(maxsize=1)
def _cached(model: str | None, lookahead: float | None, device: str | None, language: str | None) -> Transcriber:
    return Transcriber(model, lookahead, device=device, language=language)
