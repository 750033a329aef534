"""``antiphon speak``: text to a file or the loudspeaker."""

from __future__ import annotations

import asyncio
import codecs
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ...codecs.audio_file import AudioError, AudioWriter
from ...models.cosyvoice.flow_config import FlowLimits
from ...models.cosyvoice.voice import Voice
from ...pipelines import speech_checkpoint
from ...pipelines.chunk import Text
from ...pipelines.engine import Engine, EngineError
from ...pipelines.session import Session
from ...pipelines.speech_checkpoint import Loaded
from ...pipelines.stage import Inlet, StageError
from ...pipelines.stages.speak import Speak
from ...pipelines.synthesizer import Synthesizer
from ...transport.devices import DeviceError, find
from ...transport.microphone import Speaker
from .. import voices
from ..serve.server import apart
from .console import CommandError, quiet_libraries, stderr
from .progress import progress, real_time_factor
from .transcribe import check_device

# One session has memory to speak sentences of 24 s as trained; of longer ones the oldest frames are forgotten.
LIMITS = FlowLimits(left=1200, rolling=True, voices=1, prompt=1)
PIECE = 4096  # bytes of standard input at once
NOTHING = "there is nothing to say in this text"


def run(
    text: str,
    *,
    output: Path | None,
    voice: str | None,
    model: str | None,
    seed: int,
    stream_from_stdin: bool,
    speaker: str | None,
    device: str | None,
) -> None:
    """See ``antiphon speak --help``. Raises CommandError."""
    check_device(device)
    piped = not text and not sys.stdin.isatty()
    if (text and stream_from_stdin) or not (text or stream_from_stdin or piped):
        raise CommandError("give the text to speak, or --stream-from-stdin for text that comes on standard input")
    if output is not None and speaker is not None:
        raise CommandError("-o writes a file, --speaker plays: give one of them")
    console = stderr()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if output is None:
            with quiet_libraries():
                find(speaker, "output")
        with console.status("Loading the model"):
            loaded = speech_checkpoint.load(model, device=device, limits=LIMITS)
            name, chosen = voices.find(loaded, voice)
        loaded = replace(loaded, speech=loaded.speech.with_room_for([chosen]))
        said = iter([text]) if text else pieces()
        if output is None:
            line = _play(loaded, name, chosen, device, said, speaker, seed, arriving=stream_from_stdin)
        else:
            line = _write(loaded, name, chosen, device, said, output, seed, arriving=stream_from_stdin)
    except StageError as error:
        raise CommandError(str(error.__cause__ or error)) from error
    except (AudioError, DeviceError, EngineError, ImportError, RuntimeError, ValueError) as error:
        raise CommandError(str(error)) from error
    console.print(f"{line}; {loaded.name}, voice {name}, seed {seed}", style="dim")


def pieces() -> Iterator[str]:
    """Standard input as it comes. What is typed is said line by line: each ends as a sentence does."""
    if sys.stdin.isatty():
        for line in map(str.rstrip, sys.stdin):
            yield f"{line}.\n" if line[-1:].isalnum() else f"{line}\n"
        return
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while data := sys.stdin.buffer.read1(PIECE):  # type: ignore[union-attr]
        yield decoder.decode(data)
    yield decoder.decode(b"", True)


def _write(
    loaded: Loaded,
    name: str,
    voice: Voice,
    device: str,
    text: Iterator[str],
    output: Path,
    seed: int,
    *,
    arriving: bool,
) -> str:
    """Returns the closing line."""
    samples, first, rate = 0, 0.0, loaded.speech.rate
    with (
        AudioWriter(output, rate) as writer,
        Synthesizer(loaded.speech, device=device) as models,
        progress(None) as bar,
    ):
        models.register(name, voice)
        began = time.perf_counter()
        for piece in models.speak(text, name, seed, arriving=arriving):
            first = first or time.perf_counter() - began
            writer.write(piece.samples)
            samples += len(piece.samples)
            bar.update(bar.task_ids[0], completed=samples / rate)
        took = time.perf_counter() - began
    if not samples:
        raise CommandError(NOTHING)
    return f"{samples / rate:.1f} s of audio; first after {first:.2f} s; {real_time_factor(took, samples / rate)}"


def _play(
    loaded: Loaded, name: str, voice: Voice, device: str, text: Iterator[str], speaker: str | None, seed: int, *,
    arriving: bool,
) -> str:  # fmt: skip
    """Returns the closing line."""
    inlet, speak = Inlet().named("text"), Speak(voice=name, seed=seed, arriving=arriving)
    graph = (inlet >> speak["text"]) | (speak["audio"] >> Speaker(device=speaker))
    with Engine(device) as engine, quiet_libraries():
        loaded.speech.install(engine, slots=1, measure=False)
        loaded.speech.register(engine, name, voice)
        seconds, first = asyncio.run(_run(graph.session(engine=engine), text, loaded.speech.rate))
    if not seconds:
        raise CommandError(NOTHING)
    return f"{seconds:.1f} s of audio; first after {first:.2f} s"


async def _run(session: Session, text: Iterator[str], rate: int) -> tuple[float, float]:
    """Seconds of sound, and to the first of it."""
    seconds, first = 0.0, 0.0
    async with session:
        began = session.clock.now()

        async def send() -> None:
            async for piece in _apart(text):
                await session.send(Text(text=piece, rate=rate), "text")
            session.finish()

        sending = asyncio.create_task(send())
        try:
            async for chunk in session.outputs():
                first = first or session.clock.now() - began
                seconds = chunk.end_seconds
        finally:
            sending.cancel()
    return seconds, first


async def _apart(text: Iterator[str]) -> AsyncIterator[str]:
    """An iterator that blocks, without holding up the event loop."""
    while (piece := await apart(partial(next, text, None))) is not None:
        yield piece
