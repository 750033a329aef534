"""``antiphon transcribe`` with a model that writes while it hears (Kyutai's speech to text)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import torch
from rich.progress import Progress

from ...codecs.audio_file import AudioError, AudioWarning
from ...models.files import CheckpointError, read_json
from ...models.moshi.checkpoint import SHORT
from ...pipelines import duplex
from ...pipelines.captions import Final
from ...pipelines.chunk import Audio, Text
from ...pipelines.engine import Engine, EngineError
from ...pipelines.graph import Chain
from ...pipelines.stage import Context, Input, Stage, StageError
from ...pipelines.stages.dictate import Dictate
from ...transport.files import FileSource
from .console import CommandError, stderr, warnings_as_lines
from .outputs import Outputs
from .progress import progress, real_time_factor

MODEL = "dictate"  # its name in the engine


def writes(model: str | None) -> bool:
    """Whether this name or folder is of a model that ``run`` takes, by its name or its ``config.json``."""
    if model is None:
        return False
    config = Path(model) / "config.json"
    if config.is_file():
        return read_json(config).get("dep_q") == 0
    names = [name for short, hub in SHORT.items() for name in (short, hub) if short.startswith("stt-")]
    return model in names


def run(files: Sequence[str], seconds: float | None, outputs: Outputs, model: str, device: str | None) -> None:
    """Write the captions of files, one after the other. Raises CommandError.

    seconds: of all files, where it is known.
    """
    console = stderr()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with console.status("Loading the model"):
            loaded = duplex.load(model, device=device)
        if loaded.decoder is not None:
            raise CheckpointError(f"{model} converses: use antiphon talk --model {model}")
        began = time.perf_counter()
        with warnings_as_lines(AudioWarning), outputs, Engine(device) as engine, progress(seconds) as bar:
            engine.add(MODEL, loaded, slots=1, variants=(1,), buckets=(1,), exact=False)
            heard = 0.0
            for file in files:
                count = _Count(bar, heard)
                graph = FileSource(file, rate=loaded.rate) >> count >> Dictate(model=MODEL)
                asyncio.run(_captions(graph, engine, outputs, file))
                outputs.close(file, count.seconds)
                heard += count.seconds
    except StageError as error:
        raise CommandError(str(error.__cause__ or error)) from error
    except (AudioError, CheckpointError, EngineError) as error:
        raise CommandError(str(error)) from error
    took = time.perf_counter() - began
    console.print(f"{heard:.1f} s of audio in {took:.2f} s; {real_time_factor(took, heard)}", style="dim")


class _Count(Stage):
    """Passes a file's sound on, and shows on the bar how far it is."""

    name = "count"
    lasting = True

    def __init__(self, bar: Progress, before: float) -> None:
        self.bar, self.before, self.seconds = bar, before, 0.0

    async def run(self, ctx: Context, audio: Input) -> AsyncIterator[Audio]:
        async for chunk in audio:
            assert isinstance(chunk, Audio)
            yield chunk
            self.seconds = chunk.end_seconds
            self.bar.update(self.bar.task_ids[0], completed=self.before + self.seconds)


async def _captions(graph: Chain, engine: Engine, outputs: Outputs, file: str) -> None:
    async with graph.session(engine=engine) as session:
        async for text in session.outputs():
            if isinstance(text, Text) and text.final and text.words:
                outputs.add(file, Final(text.words, text.end_seconds))
