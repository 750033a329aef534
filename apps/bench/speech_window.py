"""``antiphon bench speech_window``: what the flow's look back costs a session in memory, and what looking back less
costs in quality.

A voice writes its speech tokens once; the flow then draws the same tokens with the same noise through the stage's own
steps, with all frames kept, as trained, and with rolling windows of so many seconds. Twice over: ``spoken`` in the
passages that the voice makes of the texts, and ``joined`` with all tokens of a text in one passage, which is longer
than this voice speaks, for voices that do. Every other text is written as it arrives. Of each window:

- the distance of its mel frames from the exact ones, in the mel's own units (natural logarithms): root mean square over
  all frames, and over the worst second;
- how much the seam score (``codecs/seam.py``) at a join of its hops rises above the exact sound's there, at most;
- PLCMOS of its sound, 1 to 5, with the mean change from the exact sound and that mean's standard error, where
  ``speechmos`` is installed; and words that whisper mishears, in percent, where ``--whisper`` is given: it hears each
  passage of the voice by itself, of joined ones too, because long ones lead it astray now and then;
- CPU time of the flow's steps a second of speech;
- bytes that the flow keeps for a session: of this voice, and of CosyVoice2-0.5B's sizes in bfloat16. Where all frames
  are kept those of the longest passage.

A row named "other noise" keeps all frames and draws them from other noise: a difference that is as good a voice. With
random weights the distances mean nothing: choose a window on a checkpoint that speaks.

    antiphon bench speech_window [--model NAME] [--voice NAME] [--seconds 1 2 4 8] [--texts FILE] [--whisper FOLDER]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from ...codecs.resample import Samples
from ...codecs.seam import seam_scores
from ...models.cosyvoice.flow import FlowMatching
from ...models.cosyvoice.flow_config import FRAME_SECONDS, RATE, FlowConfig, FlowLimits
from ...models.cosyvoice.flow_hops import Hops
from ...models.cosyvoice.flow_stream import StreamingFlow
from ...models.cosyvoice.voice import Voice
from ...pipelines import speech_checkpoint
from ...pipelines.engine import Engine
from ...pipelines.speech import Speech
from ...pipelines.synthesizer import Synthesizer
from ..train.tts_eval import Heard, Judges, Utterance
from ..voices import find
from .common import RESULTS, command_line, told, write_result

MODEL = "antiphon-speech-en-18m"
WINDOWS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)  # seconds
EXACT = 60.0  # seconds of the longest passage
SECOND = round(1 / FRAME_SECONDS)  # frames
OTHER_NOISE = 5000  # frames that the table of noise is turned by
AT_ONCE = 4  # texts written in one batch
NAME = "flow"
TEXTS = (
    "The old lighthouse keeper climbed the winding stairs every evening, lit the great lamp with a steady hand, and "
    "watched the ships go by until the sky turned grey. The wind went on about the windows and the sea below, and "
    "nobody in the village could remember a night on which the lamp had not been burning.",
    "If you follow the river for about an hour, past the mill and the two stone bridges, you will come to a village "
    "where they still bake bread in the square. On Saturdays the whole valley comes to buy it, and nobody there has "
    "ever been in a hurry, not even the baker, who begins his work at three in the morning.",
    "She read the letter twice, folded it along its worn creases, and put it back into the drawer, because some "
    "answers are better given in person, slowly, and after sleep. In the morning the kettle was on, the door was "
    "shut, and she had made up her mind to take the early train and say it all herself.",
    "Nothing about the machine was new, except that for the first time all of its parts had been made to the same "
    "measure, by people who never met. Any one of them could be taken out and replaced by a person who had never seen "
    "it before, and that small change was the beginning of everything that followed.",
    "When the first snow fell over the mountains, the herders brought their animals down to the lower fields and "
    "counted them at the gate, one after another. Two were missing, as there were every year, and the youngest of "
    "the dogs ran back up the path before anyone had told it what to look for.",
    "The museum keeps its oldest clock in a small room on the upper floor, where the light is weak and the air is dry "
    "through the whole year. It loses about a minute in a week, and every Monday the same woman climbs the ladder, "
    "opens the glass, and moves the hand forward with one finger.",
    "A good bridge is mostly a matter of patience, the engineer used to say, because the river will show you where it "
    "wants to be crossed if you wait. He spent one summer and one winter watching the water from a tent, and only "
    "then did he drive the first stake into the ground.",
    "There were seven houses on the island, and in six of them somebody played an instrument, so that on quiet "
    "evenings the music went around the bay. The seventh house belonged to a retired captain who played nothing at "
    "all, but he had the best chairs, and sooner or later everyone came to sit in them.",
    "The market opens before sunrise, when the streets are still wet, and the first people to arrive are always the "
    "cooks of the small restaurants by the harbour. They speak very little, they touch everything, and by the time "
    "the rest of the town wakes up the best fish has already been carried away.",
    "My grandmother planted an apple tree for each of her children, and she wrote their names on little signs that "
    "the rain washed clean within a year. It did not matter, because the trees had taken after the children by then, "
    "and you could tell at a glance which of them was which.",
    "The train was late, as it often was in autumn, and the passengers stood under the narrow roof and looked along "
    "the track into the fog without a word. Then somebody laughed, nobody knew why, and a moment later they were all "
    "talking to each other as if they had been friends for years.",
    "To find the garden you must walk through the library, down the stone steps behind the last shelf, and along a "
    "passage that smells of paper and rain. There is a bench at the far end, under a fig tree, and if you sit there "
    "long enough you will hear the bells of three different churches.",
)

Tokens = list[int]


@dataclass(frozen=True)
class Written:
    """A passage of the voice."""

    text: str
    tokens: Tokens


@dataclass(eq=False)
class Drawn:
    """A text as the flow drew it: the mel frames of each hop, by passage, and the sound of it all."""

    passages: list[list[Tensor]] = field(default_factory=list)
    sound: Samples = field(default_factory=lambda: np.zeros(0, np.float32))
    joins: list[int] = field(default_factory=list)  # where a hop's frames begin to sound

    @property
    def mel(self) -> Tensor:
        return torch.cat([frames for passage in self.passages for frames in passage])


def write(speech: Speech, name: str, voice: Voice, texts: Sequence[str], device: str = "cpu") -> list[list[Written]]:
    """The passages of each text."""
    speech = speech.with_room_for([voice])
    speech.reader.voices.clear()
    with Synthesizer(speech, device=device, sessions=min(AT_ONCE, len(texts))) as models:
        models.register(name, voice)
        written = [Heard(speech, name, seed, arriving=seed % 2 == 1) for seed in range(len(texts))]
        for one, text in zip(written, texts, strict=True):
            one.push(text)
            one.finish()
        models.speak_many(written)
    return [
        [Written(passage.text, list(passage.stream.speech)) for _, passage in sorted(one.passages.items())]
        for one in written
    ]


def draw(
    speech: Speech,
    limits: FlowLimits,
    voice: Voice,
    texts: Sequence[Sequence[Tokens]],
    device: str = "cpu",
    tick: Callable[[], None] = lambda: None,
) -> tuple[list[Drawn], float]:
    """What each text sounds like, and CPU seconds that the flow's steps took."""
    prompt = voice.prompt_tokens.tolist()
    limits = replace(limits, voices=1, prompt=max(1, len(prompt)))
    flow = StreamingFlow(speech.flow.flow, limits)
    schedule = limits.schedule or sorted(limits.hops)
    drawn, took = [], 0.0
    with Engine(device, inline=True) as engine:
        engine.add(NAME, flow, slots=1, buckets=(1,), measure=False)
        known = engine.ask_sync(partial(flow.add_voice, prompt, voice.prompt_mel, voice.embedding))
        lease = engine.open_sync(NAME)
        for seed, passages in enumerate(texts):
            one = Drawn()
            for tokens in passages:
                hops = Hops(known, flow.config, limits, schedule)
                began = time.process_time()
                frames = []
                lease.reset()
                for hop in (*hops.push(tokens), *hops.finish()):
                    lease.use(hop.variant)
                    (row,) = engine.run_sync([(lease, hop.inputs)])
                    frames.append(row["mel"][hop.skip : hop.frames].float().cpu())
                took += time.process_time() - began
                _sound(speech, one, [hop for hop in frames if len(hop)], seed, device)
            drawn.append(one)
            tick()
    return drawn, took


@torch.no_grad()
def _sound(speech: Speech, drawn: Drawn, frames: list[Tensor], seed: int, device: str) -> None:
    """A passage more."""
    pcm = speech.vocoder(torch.cat(frames).to(device)[None], seed=torch.tensor([seed], device=device))[0]
    ends = np.cumsum([len(hop) for hop in frames]) * speech.vocoder.config.frame + len(drawn.sound)
    drawn.joins += ends[:-1].tolist()
    drawn.passages.append(frames)
    drawn.sound = np.concatenate((drawn.sound, pcm.float().cpu().numpy()))


def compare(
    speech: Speech,
    voice: Voice,
    texts: Sequence[Sequence[Written]],
    windows: Sequence[float],
    judges: Judges,
    device: str = "cpu",
    tick: Callable[[str], None] = lambda what: None,
    *,
    joined: bool = False,
) -> dict[str, Any]:
    """A row for all frames, one for each window and one for other noise. tick: told after each text."""
    parts = [[one.tokens for one in passages] for passages in texts]
    written = [[list(chain.from_iterable(tokens))] for tokens in parts] if joined else parts
    longest = RATE * max(len(tokens) for passages in written for tokens in passages)
    base = replace(speech.flow.limits, left=_frames(EXACT), rolling=False)
    arms: list[tuple[str, float | None, FlowLimits]] = [
        ("all", None, base),
        *((f"{seconds:g} s", seconds, replace(base, left=_frames(seconds), rolling=True)) for seconds in windows),
        ("other noise", None, base),
    ]
    rows: list[dict[str, Any]] = []
    exact: list[Drawn] = []
    scores: list[float] = []
    frame = speech.vocoder.config.frame
    for name, seconds, limits in arms:
        with _noise(speech.flow.flow, OTHER_NOISE if name == "other noise" else 0):
            drawn, took = draw(speech, limits, voice, written, device, partial(tick, name))
        exact = exact or drawn
        errors = [(one.mel - right.mel).square().mean(1) for one, right in zip(drawn, exact, strict=True)]
        kept = replace(limits, left=min(limits.left, longest))
        row: dict[str, Any] = {
            "window": name,
            "seconds": seconds,
            "session_mb": round(flow_bytes(speech.flow.flow, kept) / 1e6, 2),
            "mel_rms": round(float(torch.cat(errors).mean().sqrt()), 4),
            "mel_rms_worst_second": round(max(map(_worst, errors)), 4),
            "seam_rise": round(max(chain(*map(partial(_rises, speech.rate), drawn, exact)), default=0.0), 2),
            "cpu_seconds_a_second": round(took / (sum(map(len, errors)) * FRAME_SECONDS), 3),
        }
        sounds = [one.sound for one in drawn]
        heard = [
            Utterance(passage.text, sound)
            for passages, whole in zip(texts, sounds, strict=True)
            for passage, sound in zip(passages, _apart(whole, passages, frame * RATE), strict=True)
        ]
        wrong, _ = judges.wer(heard)
        if wrong is not None:
            row["wer"] = wrong
        mine = [score for sound in sounds if (score := judges.plcmos([sound])) is not None]
        if mine:
            scores = scores or mine
            changes = [one - right for one, right in zip(mine, scores, strict=True)]
            error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0
            row |= {"plcmos": round(mean(mine), 3), "plcmos_change": round(mean(changes), 3)}
            row["plcmos_error"] = round(error, 3)
        rows.append(row)
    lengths = [RATE * len(tokens) * FRAME_SECONDS for passages in written for tokens in passages]
    return {
        "passages": len(lengths),
        "seconds": round(sum(lengths), 1),
        "median_seconds": round(float(np.median(lengths)), 2),
        "longest_seconds": round(max(lengths), 2),
        "mel_std": round(float(torch.cat([one.mel for one in exact]).std()), 3),
        "rows": rows,
    }


def measure(
    speech: Speech,
    name: str,
    voice: Voice,
    texts: Sequence[str],
    windows: Sequence[float],
    judges: Judges,
    device: str = "cpu",
    tick: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Both ways of speaking the texts, and what a window takes. Raises ValueError for one of less than a token."""
    frames = [_frames(seconds) for seconds in windows]
    written = write(speech, name, voice, texts, device)
    with torch.device("meta"):
        published = FlowMatching(FlowConfig()).to(torch.bfloat16)
    memory = [
        {
            "seconds": seconds,
            "frames": left,
            "session_mb": round(flow_bytes(speech.flow.flow, FlowLimits(left=left)) / 1e6, 2),
            "published_mb": round(flow_bytes(published, FlowLimits(left=left)) / 1e6, 1),
        }
        for seconds, left in zip(windows, frames, strict=True)
    ]
    return {
        "texts": len(texts),
        "memory": memory,
        "spoken": compare(speech, voice, written, windows, judges, device, tick),
        "joined": compare(speech, voice, written, windows, judges, device, tick, joined=True),
    }


def flow_bytes(flow: FlowMatching, limits: FlowLimits) -> int:
    """Of a session's state."""
    made = StreamingFlow(flow, replace(limits, voices=1, prompt=1))
    return sum(spec.bytes for spec in made.state_spec().values())


@contextmanager
def _noise(flow: FlowMatching, turned: int) -> Iterator[None]:
    """Noise of other frames, for a while."""
    before = flow.noise.clone()
    flow.noise.copy_(before.roll(turned, 0))
    try:
        yield
    finally:
        flow.noise.copy_(before)


def _worst(errors: Tensor) -> float:
    """The root of the greatest mean over a second of squared errors, or over all where they are fewer."""
    size = min(SECOND, len(errors))
    return float(errors.unfold(0, size, 1).mean(1).max().sqrt())


def _rises(rate: int, drawn: Drawn, exact: Drawn) -> list[float]:
    """Of the seam score at each join."""
    scores = (seam_scores(one.sound, rate, one.joins) for one in (drawn, exact))
    return [mine - right for mine, right in zip(*scores, strict=True)]


def _apart(sound: Samples, passages: Sequence[Written], token: int) -> list[Samples]:
    """The sound of each passage, of ``token`` samples a token."""
    ends = np.cumsum([len(one.tokens) * token for one in passages])
    return np.split(sound, ends[:-1])


def _frames(seconds: float) -> int:
    frames = round(seconds / FRAME_SECONDS / RATE) * RATE
    if frames < RATE:
        raise ValueError(f"a window of {seconds:g} s is less than a speech token: give at least 0.04")
    return frames


def show(numbers: dict[str, Any], console: Console) -> None:
    """Tables."""
    memory = Table("window", "MB a session", "MB, CosyVoice2-0.5B", title=f"{numbers['model']}: what the flow keeps")
    for row in numbers["memory"]:
        memory.add_row(f"{row['seconds']:g} s", f"{row['session_mb']:.1f}", f"{row['published_mb']:.0f}")
    console.print(memory)
    keys = {"mel_rms": "mel, rms", "mel_rms_worst_second": "worst second", "seam_rise": "seam rise",
            "plcmos": "PLCMOS", "plcmos_change": "change", "plcmos_error": "±", "wer": "WER %",
            "cpu_seconds_a_second": "CPU s a s"}  # fmt: skip
    for kind in ("spoken", "joined"):
        found = numbers[kind]
        shown = [key for key in keys if key in found["rows"][0]]
        title = f"{kind}: {found['passages']} passages, the longest of {found['longest_seconds']} s"
        table = Table("window", *(keys[key] for key in shown), title=title)
        for row in found["rows"]:
            table.add_row(row["window"], *(f"{row[key]:g}" for key in shown))
        console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="antiphon bench speech_window", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default=MODEL, help="embedded or hub name, or a path")
    parser.add_argument("--voice", help="one of the model's, or a file of antiphon voice make")
    parser.add_argument("--seconds", type=float, nargs="+", default=WINDOWS)
    parser.add_argument("--texts", type=Path, help="a file with a text a line")
    parser.add_argument("--whisper", type=Path, help="a folder of faster-whisper's, which counts words")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(given)
    texts = TEXTS
    if options.texts is not None:
        texts = tuple(filter(None, options.texts.read_text(encoding="utf-8").splitlines()))
    console = Console()
    loaded = speech_checkpoint.load(options.model, device=options.device, limits=FlowLimits(voices=1, prompt=1))
    name, voice = find(loaded, options.voice)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("writing", total=2 * (len(options.seconds) + 2) * len(texts))
        found = measure(
            loaded.speech, name, voice, texts, options.seconds, Judges(options.whisper, None), options.device,
            lambda what: progress.update(task, advance=1, description=what),
        )  # fmt: skip
    numbers = {"model": loaded.name, "voice": name, "device": options.device, **found}
    show(numbers, console)
    path = write_result("speech_window", command_line("antiphon.apps.bench.speech_window", given), numbers, options.out)
    told(path, "plot_speech_window", console)


if __name__ == "__main__":
    main()
