"""``antiphon talk``: a full-duplex dialogue at the microphone and the loudspeaker, or with a recording."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from rich.console import Console

from ...codecs.audio_file import AudioError, AudioWarning, AudioWriter, info, stream
from ...codecs.resample import Resampler, Samples
from ...models.files import CheckpointError
from ...models.moshi.sampling import Sampling
from ...pipelines import duplex, voice_prompts
from ...pipelines.chunk import Audio, Text
from ...pipelines.duplex import Duplex, Monologue, TokenLog, Utterance
from ...pipelines.edge import Link
from ...pipelines.engine import Engine, EngineError
from ...pipelines.graph import Graph
from ...pipelines.session import Session
from ...pipelines.stage import Context, Input, Stage, StageError
from ...pipelines.stages.converse import Converse
from ...transport.devices import Device, DeviceError, find, takes
from ...transport.echo_cancel import EchoCancel
from ...transport.microphone import Microphone, Speaker
from .console import CommandError, quiet_libraries, stderr, warnings_as_lines
from .live import Shown
from .progress import progress, real_time_factor
from .transcribe import check_device

MODEL = "converse"  # its name in the engine
OWN: Literal["speaker"] = "speaker"  # for --echo-cancel: what is said here
CUSHION = 0.04  # seconds that the loudspeaker lags behind, so that frames may come a little late


def run(
    *,
    model: str | None,
    file: str | None,
    output: Path | None,
    record: Path | None,
    microphone: str | None,
    speaker: str | None,
    echo_of: str | None,
    seconds: float | None,
    sampling: Mapping[str, Any],
    compute: str | None,
    text_prompt: str = "",
    voice_prompt: Path | None = None,
) -> None:
    """See ``antiphon talk --help``. Raises CommandError.

    sampling: options of ``Sampling``; those that are None are the checkpoint's, seeds are drawn.
    """
    check_device(compute)
    if voice_prompt is not None and not voice_prompt.is_file():
        raise CommandError(f"--voice-prompt {voice_prompt}: no such file; give a clip of the voice")
    persona = _Persona(text_prompt.strip(), voice_prompt)
    if (file is None) != (output is None):
        raise CommandError("--file and -o go together: a recording to talk with, and a file for both sides")
    chosen = {name: value for name, value in sampling.items() if value is not None}
    device = compute or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        Sampling(**chosen)
        if file is not None and output is not None:
            _offline(file, output, model, persona, seconds, chosen, device)
        else:
            with quiet_libraries():
                ends = find(microphone, "input"), find(speaker, "output")
                echo = OWN if echo_of == OWN else None if echo_of is None else find(echo_of, "input")
                _live(*ends, echo, model, persona, record, seconds, chosen, device)
    except StageError as error:
        raise CommandError(str(error.__cause__ or error)) from error
    except (AudioError, CheckpointError, DeviceError, EngineError, ValueError) as error:
        raise CommandError(str(error)) from error


@dataclass(frozen=True)
class _Persona:
    """Who the model is to be. text: what it is told. voice: file of the voice that it is to have."""

    text: str
    voice: Path | None

    @property
    def options(self) -> dict[str, Any]:
        """Of ``Converse`` and of ``Duplex.prompt``; none where it is itself."""
        given = {"prompt": self.text, "voice": "" if self.voice is None else self.voice.stem}
        return given if any(given.values()) else {}


def _load(model: str | None, device: str, persona: _Persona, console: Console) -> Duplex:
    with console.status("Loading the model"):
        loaded = duplex.load(model, device=device)
    if loaded.decoder is None:
        raise CheckpointError(f"{model} only writes what it hears: use antiphon transcribe --model {model}")
    if persona.voice is not None:
        voice_prompts.add(loaded, persona.voice)
    return loaded


class Sides:
    """A recording of both sides: the user left, the model right, as late as it is heard at the earliest."""

    def __init__(self, path: Path, model: Duplex) -> None:
        self._writer = AudioWriter(path, model.rate, stereo=True)
        self._rate = model.rate
        self._resampler: Resampler | None = None
        self._sides = [np.zeros(0, np.float32), np.zeros(2 * model.frame, np.float32)]

    def heard(self, samples: Samples, rate: int) -> None:
        """What the user said next."""
        if rate != self._rate:
            self._resampler = self._resampler or Resampler(rate, self._rate)
            samples = self._resampler.push(samples)
        self._add(0, samples)

    def said(self, samples: Samples) -> None:
        """What the model said next, at its rate."""
        self._add(1, samples)

    def close(self) -> None:
        """Fill up the shorter side with silence, and end the file."""
        longest = max(map(len, self._sides))
        self._sides = [np.pad(side, (0, longest - len(side))) for side in self._sides]
        self._write()
        self._writer.close()

    def _add(self, side: int, samples: Samples) -> None:
        self._sides[side] = np.concatenate((self._sides[side], samples))
        self._write()

    def _write(self) -> None:
        count = min(map(len, self._sides))
        self._writer.write(np.stack([side[:count] for side in self._sides]))
        self._sides = [side[count:] for side in self._sides]


# ------------------------------------------------------------------------------------------------ with a recording


def _offline(
    file: str, output: Path, name: str | None, persona: _Persona, seconds: float | None, sampling: Mapping[str, Any],
    device: str,
) -> None:  # fmt: skip
    """``seconds`` of dialogue, silence after the recording's end; by default as long as the recording."""
    if output.resolve() == Path(file).resolve():
        raise CommandError(f"{output} is the recording itself: give another name for the dialogue")
    console = stderr()
    total = seconds or info(file).duration
    model = _load(name, device, persona, console)
    told = TokenLog(1, model.prompt(persona.text, persona.options["voice"])) if persona.options else None
    options = Converse(model=MODEL, **sampling).options
    heard, began = 0.0, time.perf_counter()
    with warnings_as_lines(AudioWarning), Engine(device, inline=True) as engine, progress(total) as bar:
        engine.add(MODEL, model, slots=1, variants=_variants(model, persona), buckets=(1,), exact=False)
        sides = Sides(output, model)
        lease = engine.open_sync(MODEL)
        if told is not None:
            duplex.read_sync(model, lease, told)
        constant = model.inputs(dataclasses.replace(model.lm.config.sampling, **options))
        config = model.lm.config
        monologue = Monologue(model.tokenizer, (config.padding, config.end_padding))
        for pcm in _frames(file, model, seconds):
            row = lease.step_sync({**constant, "pcm": pcm})
            sides.heard(pcm, model.rate)
            heard += model.frame / model.rate
            bar.update(bar.task_ids[0], completed=heard)
            if row["valid"]:
                sides.said(row["pcm"].numpy())
                _print(monologue.add(int(row["text"])))
        _print(monologue.end())
        sides.close()
    took = time.perf_counter() - began
    console.print(f"{heard:.1f} s of dialogue in {took:.2f} s; {real_time_factor(took, heard)}", style="dim")


def _variants(model: Duplex, persona: _Persona) -> tuple[int, ...]:
    """The steps that such a dialogue takes."""
    return model.variants if persona.options else (1,)


def _frames(file: str, model: Duplex, seconds: float | None) -> Iterator[Samples]:
    """The recording in frames, cut or filled up with silence to ``seconds``."""
    wanted = None if seconds is None else math.ceil(seconds * model.rate / model.frame)
    pieces = chain(stream(file, model.rate, model.frame / model.rate), repeat(np.zeros(0, np.float32), wanted or 0))
    for piece in islice(pieces, wanted):
        yield np.pad(piece, (0, model.frame - len(piece)))


def _print(said: Utterance | None) -> None:
    """An utterance, once it has ended."""
    if said is not None and said.final:
        print(said.text.strip())


# ------------------------------------------------------------------------------------------------ at the microphone


def _live(
    microphone: Device,
    speaker: Device,
    echo: Device | Literal["speaker"] | None,
    name: str | None,
    persona: _Persona,
    record: Path | None,
    seconds: float | None,
    sampling: Mapping[str, Any],
    device: str,
) -> None:
    console = stderr()
    model = _load(name, device, persona, console)
    sides = None if record is None else Sides(record, model)
    shown = _Shown(microphone, seconds, console, model, sides)
    try:
        with Engine(device) as engine:
            with console.status("Warming the model"):
                engine.add(MODEL, model, slots=1, variants=_variants(model, persona), buckets=(1,), exact=False)
            _warn_if_slow(engine, model, console)
            graph = _graph(microphone, speaker, echo, shown, Converse(model=MODEL, **sampling, **persona.options))
            asyncio.run(shown.follow(graph.session(engine=engine)))
    finally:
        shown.close()
        if sides is not None:
            sides.close()
    console.print(shown.summary, style="dim")


def _warn_if_slow(engine: Engine, model: Duplex, console: Console) -> None:
    steps = engine.metrics()["models"][MODEL]["variants"][1]["steps"]
    took, frame = max((times["median"] for times in steps.values()), default=0.0), model.tick(1)
    if took > frame:
        console.print(
            f"this computer takes {took:.2g} s for a frame of {frame:.2g} s: the dialogue will falter; use a GPU "
            "(--compute cuda) or a smaller model"
        )


def _graph(
    microphone: Device, speaker: Device, echo: Device | Literal["speaker"] | None, shown: _Shown, converse: Converse
) -> Graph:
    """Microphone to model to loudspeaker, without what ``echo``, a monitor, says is played, or what is said here."""
    rate = shown.model.rate
    near_rate = rate if takes(microphone, "input", rate) else microphone.rate
    far_rate = rate if takes(speaker, "output", rate) else speaker.rate
    near = Microphone(device=microphone.index, rate=near_rate)
    loudspeaker = Speaker(device=speaker.index, rate=far_rate, reference=echo == OWN)
    heard, said = _Heard(shown), _Said(shown, far_rate)
    talk: Graph = (heard >> converse) | (converse["audio"] >> said["audio"]) | (said >> loudspeaker)
    if echo == OWN:
        clean = EchoCancel()
        talk |= loudspeaker["played"] >> Link(feedback=True, policy="drop_oldest") >> clean["reference"]
        return talk | (near >> clean["audio"]) | (clean >> heard)
    if echo is None:
        return talk | (near >> heard)
    monitor = Microphone(device=echo.index, rate=near_rate).named("reference")
    return talk | ([near, monitor] >> EchoCancel() >> heard)


class _Heard(Stage):
    """Passes the user's sound on and shows it, until it is enough."""

    name = "heard"
    lasting = True

    def __init__(self, shown: _Shown) -> None:
        self.shown = shown

    async def run(self, ctx: Context, audio: Input) -> AsyncIterator[Audio]:
        async for chunk in audio:
            assert isinstance(chunk, Audio)
            yield chunk
            if not self.shown.more(chunk):
                return


class _Said(Stage):
    """Passes the model's sound on, at the loudspeaker's rate, with a cushion of silence before it."""

    name = "said"

    def __init__(self, shown: _Shown, rate: int) -> None:
        self.shown, self.rate = shown, rate

    async def run(self, ctx: Context, audio: Input) -> AsyncIterator[Audio]:
        resampler = None if self.rate == self.shown.model.rate else Resampler(self.shown.model.rate, self.rate)
        cushion, position = np.zeros(round(CUSHION * self.rate), np.float32), 0
        async for chunk in audio:
            assert isinstance(chunk, Audio)
            if self.shown.sides is not None:
                self.shown.sides.said(chunk.samples)
            samples = chunk.samples if resampler is None else resampler.push(chunk.samples)
            if not position:
                samples = np.concatenate((cushion, samples))
            yield Audio(samples=samples, rate=self.rate, start=position, final=chunk.final, epoch=chunk.epoch)
            position += len(samples)


@dataclass
class _Shown(Shown):
    """What is being said, below it the level, and each utterance when it has ended."""

    invitation: ClassVar[str] = "talk, Ctrl-C ends"

    model: Duplex
    sides: Sides | None
    saying: str = ""  # the utterance that goes on
    words: int = 0

    async def follow(self, session: Session) -> None:
        try:
            await super().follow(session)
        finally:
            if dry := session.counters.get("speaker.dry", 0):
                self.lost += f"; the model was late {dry} times"

    def more(self, chunk: Audio) -> bool:
        if self.sides is not None:
            self.sides.heard(chunk.samples, chunk.rate)
        return super().more(chunk)

    def take(self, text: Text, now: float) -> None:
        self.saying = text.text
        if text.final:
            self.close()

    def open(self) -> str:
        return self.saying.strip()

    def close(self) -> None:
        """Write the utterance that goes on."""
        if self.saying:
            print(self.saying.strip())
            self.words += len(self.saying.split())
            self.saying = ""

    @property
    def summary(self) -> str:
        return f"{self.heard:.1f} s of dialogue; the model said {self.words} words; {self.level.summary}{self.lost}"
