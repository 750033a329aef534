"""``antiphon listen``: live captions from a microphone."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text as Styled

from ...codecs.audio_file import AudioError, AudioWriter
from ...models.conformer.checkpoint import CheckpointError
from ...pipelines.captions import Final
from ...pipelines.chunk import Audio, Text, Word
from ...pipelines.engine.errors import EngineError
from ...pipelines.graph import Chain
from ...pipelines.recognizer import SAMPLE_RATE
from ...pipelines.session import Session
from ...pipelines.stage import Context, Input, Stage, StageError
from ...pipelines.stages.transcribe import Transcribe
from ...pipelines.transcription import Transcriber
from ...transport.devices import Device, DeviceError, find, takes
from ...transport.echo_cancel import EchoCancel
from ...transport.microphone import Microphone
from .console import CommandError, quiet_libraries, stderr
from .level import Level
from .mic import losses
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
    shown = _Shown(name, microphone, outputs, recording, seconds, console)
    listening = sound(microphone, echo) >> _Tap(shown) >> Transcribe(lookahead=lookahead, language=language)
    with outputs, transcriber:
        try:
            asyncio.run(shown.captions(listening.session(engine=transcriber.engine)))
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
            if not self.shown.more(chunk, ctx.now):
                return


@dataclass
class _Shown:
    """What the command shows and writes: captions as they come, and below them what is not final, and the level."""

    name: str
    device: Device
    outputs: Outputs
    recording: AudioWriter | None
    seconds: float | None
    console: Console
    level: Level = field(default_factory=Level)
    latency: Latency = field(default_factory=Latency)
    heard: float = 0.0
    rate: int = SAMPLE_RATE
    began: float = float("inf")  # clock time of the first sample
    open: tuple[Word, ...] = ()  # of the caption that may still change
    stopping: bool = False
    lost: str = ""

    async def captions(self, session: Session) -> None:
        """Run the session until the time is up, Ctrl-C (a second one is not waited for) or an error."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            with Live(
                self,
                console=self.console,
                transient=True,
                auto_refresh=self.console.is_terminal,
                refresh_per_second=12,
                redirect_stdout=sys.stdout.isatty(),
            ):
                async with session:
                    async for text in session.outputs():
                        if isinstance(text, Text) and text.words:
                            self._caption(text, session.clock.now() - self.began)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            self.lost = losses(session.counters, self.rate)

    def more(self, chunk: Audio, now: float) -> bool:
        """Take what was heard; False when it is enough."""
        if not self.heard:
            self.console.print(f"listening to {self.device.name}; Ctrl-C ends", style="dim")
        self.rate = chunk.rate
        self.began = min(self.began, now - chunk.end_seconds)
        self.heard = chunk.end_seconds
        self.level.add(chunk.samples)
        if self.recording is not None:
            self.recording.write(chunk.samples)
        self.stopping = self.stopping or (self.seconds is not None and self.heard >= self.seconds)
        return not self.stopping

    def close(self) -> None:
        """Write what is not final yet, and end the output."""
        if self.open:
            self.outputs.add(self.name, Final(self.open, self.heard))
            self.open = ()
        self.outputs.close(self.name, self.heard)

    @property
    def summary(self) -> str:
        return f"{self.heard:.1f} s of audio; {self.latency}; {self.level.summary}{self.lost}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.open:
            yield Styled(" ".join(word.text for word in self.open), style="bright_black")
        last = f"  captions {self.latency.finals[-1]:.1f} s after the word" if self.latency.finals else ""
        line = Styled.assemble(self.level.bar(), ("  " + self.device.name + last, "dim"))
        line.truncate(options.max_width, overflow="ellipsis")
        yield line

    def _interrupt(self) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True

    def _caption(self, text: Text, at: float) -> None:
        if not self.open:
            self.latency.first.append(at - text.words[0].start)
        self.open = () if text.final else text.words
        if text.final:
            if not self.stopping:
                self.latency.finals.append(at - text.words[-1].end)
            self.outputs.add(self.name, Final(text.words, at))
