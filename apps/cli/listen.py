"""``antiphon listen``: live captions from a microphone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ...codecs.audio_file import AudioError, AudioWriter
from ...models.conformer.checkpoint import CheckpointError
from ...pipelines.captions import Final
from ...pipelines.chunk import Audio, Text, Word
from ...pipelines.engine.errors import EngineError
from ...pipelines.graph import Chain
from ...pipelines.recognizer import SAMPLE_RATE
from ...pipelines.stage import Context, Input, Stage, StageError
from ...pipelines.stages.transcribe import Transcribe
from ...pipelines.transcription import Transcriber
from ...transport.devices import Device, DeviceError, find, takes
from ...transport.echo_cancel import EchoCancel
from ...transport.microphone import Microphone
from .console import CommandError, quiet_libraries, stderr
from .live import Shown
from .outputs import Outputs
from .transcribe import Latency, check_device

BEHIND = 20_000.0  # milliseconds that captions may fall behind on a busy computer before sound is lost


@quiet_libraries()
def run(
    *,
    device: str | None,
    model: str | None,
    lookahead: float | None,
    format: str,
    output: Path | None,
    language: str | None,
    record: Path | None,
    echo_of: str | None,
    seconds: float | None,
    compute: str | None,
) -> None:
    """See ``antiphon listen --help``. Raises CommandError, after writing the captions that were there."""
    check_device(compute)
    console = stderr()
    try:
        microphone = find(device, "input")
        echo = None if echo_of is None else find(echo_of, "input")
        name = str(record or microphone.name)
        outputs = Outputs([name], format, output, in_turn=True)
        with console.status("Loading the model"):
            transcriber = Transcriber(model, lookahead, device=compute, language=language)
            transcriber.recognizer.constant_inputs(language)
        recording = None if record is None else AudioWriter(record, usual_rate(microphone))
    except (DeviceError, CheckpointError, AudioError, ValueError) as error:
        raise CommandError(str(error)) from error
    shown = _Shown(microphone, seconds, console, name, outputs, recording)
    listening = sound(microphone, echo) >> _Tap(shown) >> Transcribe(lookahead=lookahead, language=language)
    with outputs, transcriber:
        try:
            asyncio.run(shown.follow(listening.session(engine=transcriber.engine)))
        except (AudioError, EngineError) as error:
            raise CommandError(str(error)) from error
        except StageError as error:
            raise CommandError(str(error.__cause__ or error)) from error
        finally:
            if recording is not None:
                recording.close()
            shown.close()
    console.print(shown.summary, style="dim")


def usual_rate(device: Device) -> int:
    """The recogniser's rate where the microphone has it, else the one that the microphone prefers."""
    return SAMPLE_RATE if takes(device, "input", SAMPLE_RATE) else device.rate


def sound(microphone: Device, echo: Device | None) -> Chain:
    """The microphone, without what ``echo`` (a monitor or loopback device) says is played."""
    rate = usual_rate(microphone)
    near = Microphone(device=microphone.index, rate=rate, buffer_ms=BEHIND)
    if echo is None:
        return near
    return [near, Microphone(device=echo.index, rate=rate, buffer_ms=BEHIND).named("reference")] >> EchoCancel()


class _Tap(Stage):
    """Passes the sound on, shows its level and records it, until it is enough."""

    name = "level"
    lasting = True

    def __init__(self, shown: _Shown) -> None:
        self.shown = shown

    async def run(self, ctx: Context, audio: Input) -> AsyncIterator[Audio]:
        async for chunk in audio:
            assert isinstance(chunk, Audio)
            yield chunk
            if not self.shown.hear(chunk, ctx.now):
                return


@dataclass
class _Shown(Shown):
    """Captions as they come, and below them what is not final, and the level."""

    invitation: ClassVar[str] = "Ctrl-C ends"

    name: str
    outputs: Outputs
    recording: AudioWriter | None
    latency: Latency = field(default_factory=Latency)
    began: float = float("inf")  # clock time of the first sample
    words: tuple[Word, ...] = ()  # of the caption that may still change

    def hear(self, chunk: Audio, now: float) -> bool:
        """Take what was heard; False when it is enough."""
        self.began = min(self.began, now - chunk.end_seconds)
        if self.recording is not None:
            self.recording.write(chunk.samples)
        return self.more(chunk)

    def take(self, text: Text, now: float) -> None:
        if not text.words:
            return
        at = now - self.began
        if not self.words:
            self.latency.first.append(at - text.words[0].start)
        self.words = () if text.final else text.words
        if text.final:
            if not self.stopping:
                self.latency.finals.append(at - text.words[-1].end)
            self.outputs.add(self.name, Final(text.words, at))

    def open(self) -> str:
        return " ".join(word.text for word in self.words)

    def beside(self) -> str:
        return f"  captions {self.latency.finals[-1]:.1f} s after the word" if self.latency.finals else ""

    def close(self) -> None:
        """Write what is not final yet, and end the output."""
        if self.words:
            self.outputs.add(self.name, Final(self.words, self.heard))
            self.words = ()
        self.outputs.close(self.name, self.heard)

    @property
    def summary(self) -> str:
        return f"{self.heard:.1f} s of audio; {self.latency}; {self.level.summary}{self.lost}"
