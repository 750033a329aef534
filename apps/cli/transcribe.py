"""``antiphon transcribe``: files to text or subtitles, several at a time, or live at the pace of their media."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.live import Live
from rich.text import Text as Styled

from ...codecs.audio_file import STDIN, AudioError, AudioWarning, info
from ...models.conformer.checkpoint import CheckpointError
from ...pipelines.captions import Final
from ...pipelines.chunk import Chunk, Text
from ...pipelines.clock import Clock
from ...pipelines.engine.errors import EngineError
from ...pipelines.stage import StageError
from ...pipelines.stages.transcribe import Transcribe
from ...pipelines.transcription import End, Transcriber
from ...transport.files import FileSource
from . import dictate
from .console import CommandError, complain, stderr, warnings_as_lines
from .outputs import Outputs
from .progress import progress, real_time_factor


@dataclass
class Recording:
    """One input. stated: its seconds as the file says, if it does; heard: seconds so far."""

    path: str
    stated: float | None
    heard: float = 0.0

    @property
    def seconds(self) -> float:
        return self.heard if self.stated is None else self.stated


def run(
    files: Sequence[str],
    *,
    model: str | None,
    lookahead: float | None,
    format: str,
    realtime: bool,
    output: Path | None,
    language: str | None,
    device: str | None,
    decoder: str | None = None,
) -> None:
    """See ``antiphon transcribe --help``. Raises CommandError, after captioning what can be captioned."""
    if realtime and STDIN in files:
        raise CommandError("standard input cannot be played at its own pace: save it to a file, or omit --realtime")
    check_device(device)
    outputs = Outputs(files, format, output, in_turn=realtime)
    recordings = _readable(files)
    if model is not None and dictate.writes(model):
        if realtime or lookahead is not None or decoder is not None or language is not None:
            raise CommandError(
                f"{model} writes as it hears: --realtime, --lookahead, --decoder, --language are not for it"
            )
        stated = [one.stated for one in recordings]
        dictate.run(
            [one.path for one in recordings],
            None if None in stated else sum(filter(None, stated)),
            outputs,
            model,
            device,
        )
        return
    console = stderr()
    try:
        with console.status("Loading the model"):
            transcriber = Transcriber(model, lookahead, device=device, decoder=decoder, language=language)
            transcriber.recognizer.constant_inputs(language)
    except (CheckpointError, ValueError) as error:
        raise CommandError(str(error)) from error
    failed = 0
    with warnings_as_lines(AudioWarning), outputs, transcriber:
        try:
            if realtime:
                stage = Transcribe(model="asr", lookahead=lookahead, language=language)
                said = asyncio.run(_live(recordings, outputs, transcriber, stage))
            else:
                said, failed = _batch(recordings, outputs, transcriber)
        except (AudioError, EngineError) as error:
            raise CommandError(str(error)) from error
        except StageError as error:
            raise CommandError(str(error.__cause__ or error)) from error
    console.print(said, style="dim")
    failed += len(files) - len(recordings)
    if failed:
        raise CommandError(f"{failed} of {len(files)} files could not be read")


def check_device(device: str | None) -> None:
    """Raises CommandError for a device that does not exist here."""
    kind, _, index = (device or "cpu").partition(":")
    if kind == "cuda" and (index or "0").isdecimal():
        if int(index or 0) >= torch.cuda.device_count():
            raise CommandError(f"there is no {device} here: {torch.cuda.device_count()} CUDA devices; use --device cpu")
    elif device not in (None, "cpu"):
        raise CommandError(f"no device {device!r}: use cpu, cuda or cuda:1")


def _readable(files: Sequence[str]) -> list[Recording]:
    """The files that can be opened, before the model is loaded; a line for each of the others."""
    recordings = []
    for path in files:
        try:
            recordings.append(Recording(path, None if path == STDIN else info(path).duration))
        except AudioError as error:
            if len(files) == 1:
                raise CommandError(str(error)) from error
            complain(str(error))
    if not recordings:
        raise CommandError("none of the files could be read")
    return recordings


def _batch(recordings: list[Recording], outputs: Outputs, transcriber: Transcriber) -> tuple[str, int]:
    """As fast as the device allows, several files in one batch. Returns the closing line and how many files failed."""
    began = time.perf_counter()
    first: float | None = None
    failed = 0
    stated = [one.stated for one in recordings if one.stated is not None]
    with progress(sum(stated) if len(stated) == len(recordings) else None) as bar:
        for number, event in transcriber.transcribe_many([one.path for one in recordings]):
            recording = recordings[number]
            if isinstance(event, End):
                recording.heard = recording.stated = event.seconds
                if event.error is not None:
                    if len(recordings) == 1:
                        raise event.error
                    complain(str(event.error))
                    failed += 1
                outputs.close(recording.path, event.seconds)
                continue
            first = time.perf_counter() - began if first is None else first
            recording.heard = max(recording.heard, event.at)
            bar.update(bar.task_ids[0], completed=sum(one.heard for one in recordings))
            if isinstance(event, Final):
                outputs.add(recording.path, event)
    took = time.perf_counter() - began
    seconds = sum(one.heard for one in recordings)
    shown = "no speech found" if first is None else f"first partial after {first:.2f} s, final after {took:.2f} s"
    return f"{seconds:.1f} s of audio in {took:.2f} s; {real_time_factor(took, seconds)}; {shown}", failed


@dataclass
class Latency:
    """Of each caption, seconds from when its words were spoken to when they were shown; medians in text."""

    first: list[float] = field(default_factory=list)
    finals: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.first:
            return "no speech found"
        first = f"first partial {statistics.median(self.first):.2f} s after its word began"
        if not self.finals:
            return first
        return f"{first}, final {statistics.median(self.finals):.2f} s after its last word"


async def _live(recordings: list[Recording], outputs: Outputs, transcriber: Transcriber, stage: Transcribe) -> str:
    """One file after the other through the graph that live audio takes. Returns the closing line."""
    latency = Latency()
    for recording in recordings:
        graph = FileSource(recording.path, realtime=True) >> stage
        async with graph.session(engine=transcriber.engine) as session:
            await show(session.outputs(), session.clock, recording, outputs, latency)
        outputs.close(recording.path, recording.seconds)
    seconds = sum(one.seconds for one in recordings)
    lanes = transcriber.engine.metrics()["models"]["asr"]["variants"].values()
    busy = sum(times["median"] * times["count"] for lane in lanes for times in lane["steps"].values())
    return f"{seconds:.1f} s of audio; {real_time_factor(busy, seconds)}; {latency}"


async def show(
    texts: AsyncIterator[Chunk], clock: Clock, recording: Recording, outputs: Outputs, latency: Latency
) -> None:
    """What may still change in grey, below what is final."""
    began, new = clock.now(), True
    console = stderr()
    with Live(console=console, auto_refresh=False, transient=True, redirect_stdout=sys.stdout.isatty()) as live:
        async for text in texts:
            if not isinstance(text, Text) or not text.words:
                continue
            at = recording.heard = clock.now() - began
            if new:
                latency.first.append(at - text.words[0].start)
            new = text.final
            if text.final:
                latency.finals.append(at - text.words[-1].end)
                outputs.add(recording.path, Final(text.words, at))
            if console.is_terminal:
                live.update(Styled("" if text.final else text.text, style="bright_black"), refresh=True)
