"""``antiphon bench window``: what the flow's look back costs a session in memory, and what looking back less costs in
quality.

The same speech tokens of the same voice, through the stage's own steps: with all frames kept, as trained, and with
windows of so many seconds beside the voice's prompt. Of each: the distance of its mel frames from the exact ones, in
hundredths of their spread; the worst seam score (``codecs/seam.py``) at the joins of its hops; PLCMOS of its sound, 1
to 5, where ``speechmos`` is installed; and the bytes that the flow keeps for a session, where it keeps all frames those
of the longest passage. With random weights the distances mean nothing: choose a window on the checkpoint that will
speak.

    antiphon bench window --model NAME [--voice NAME] [--seconds 1 2 4 8] [--texts FILE]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...codecs.resample import Samples, resample
from ...codecs.seam import seam_scores
from ...models.cosyvoice.flow_config import FRAME_SECONDS, RATE, FlowLimits
from ...models.cosyvoice.flow_hops import Hop
from ...models.cosyvoice.flow_stream import StreamingFlow
from ...models.cosyvoice.voice import Voice
from ...pipelines import speech_checkpoint
from ...pipelines.speech import Speech
from ...pipelines.synthesis import Step, Synthesis
from ...pipelines.synthesizer import Synthesizer
from ..voices import find
from .common import RESULTS, command_line, write_result

WINDOWS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds
EXACT = 60.0  # seconds of the longest passage
AT_ONCE = 4
MOS_RATE = 16000
TEXTS = (
    "The old lighthouse keeper climbed the winding stairs every evening, lit the great lamp with a steady hand, and "
    "watched the ships go by until the sky turned grey, while the wind went on about the windows and the sea below.",
    "If you follow the river for about an hour, past the mill and the two stone bridges, you will come to a village "
    "where they still bake bread in the square on Saturdays, and where nobody has ever been in a hurry.",
    "She read the letter twice, folded it along its worn creases, and put it back into the drawer, because some "
    "answers are better given in person, slowly, and after a good night's sleep, with the kettle on and the door shut.",
    "Nothing about the machine was new, except that for the first time all of its parts had been made to the same "
    "measure, so that any one of them could be taken out and replaced by a person who had never seen it before.",
)


class Drawn(Synthesis):
    """Keeps the mel frames and where its hops and passages begin."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.mel: list[Tensor] = []

    def take(self, step: Step, outputs: Mapping[str, Tensor]) -> None:
        if isinstance(hop := step.detail, Hop) and hop.frames > hop.skip:
            self.mel.append(outputs["mel"][hop.skip : hop.frames].float().cpu())
        super().take(step, outputs)


def measure(
    speech: Speech, name: str, voice: Voice, texts: Sequence[str], windows: Sequence[float], device: str = "cpu"
) -> dict[str, Any]:
    """A row for all frames and one for each window, in seconds. Raises ValueError for a window of less than a token."""
    frames = [_frames(seconds) for seconds in windows]
    limits = replace(speech.flow.limits, left=_frames(EXACT), rolling=False)
    exact, sounds = _speak(speech, limits, name, voice, texts, device)
    spread = float(torch.cat([mel for one in exact for mel in one.mel]).std())
    judge = _plcmos()
    longest = max(sum(map(len, one.mel)) for one in exact)
    rows = []
    for seconds, left in zip((None, *windows), (limits.left, *frames), strict=True):
        kept, drawn = replace(limits, left=left, rolling=seconds is not None), exact
        if seconds is not None:
            drawn, sounds = _speak(speech, kept, name, voice, texts, device)
        errors = torch.cat([_error(one, right) for one, right in zip(drawn, exact, strict=True)])
        row = {
            "seconds": seconds,
            "session_mb": round(_bytes(speech, replace(kept, left=min(kept.left, longest))) / 1e6, 2),
            "mel_error_percent": round(float(errors.mean()) / spread * 100, 3),
            "mel_error_p99_percent": round(float(errors.quantile(0.99)) / spread * 100, 3),
            "worst_seam": round(max(_seams(speech, one, pcm) for one, pcm in zip(drawn, sounds, strict=True)), 2),
        }
        if judge is not None:
            row["plcmos"] = round(float(np.mean([judge(pcm, speech.rate) for pcm in sounds])), 3)
        rows.append(row)
    second = replace(limits, left=_frames(1.0))
    return {
        "passages": len(texts),
        "seconds": round(sum(map(len, sounds)) / speech.rate, 1),
        "longest_seconds": round(longest * FRAME_SECONDS, 2),
        "mb_a_second_kept": round((_bytes(speech, second) - _bytes(speech, replace(limits, left=RATE))) / 1e6, 2),
        "rows": rows,
    }


def _speak(
    speech: Speech, limits: FlowLimits, name: str, voice: Voice, texts: Sequence[str], device: str
) -> tuple[list[Drawn], list[Samples]]:
    flow = StreamingFlow(speech.flow.flow, limits, together=speech.flow.together)
    made = replace(speech, flow=flow).with_room_for([voice])
    made.reader.voices.clear()
    with Synthesizer(made, device=device, sessions=min(AT_ONCE, len(texts))) as models:
        models.register(name, voice)
        drawn = [Drawn(made, name, seed) for seed in range(len(texts))]
        for one, text in zip(drawn, texts, strict=True):
            one.push(text)
            one.finish()
        return drawn, models.speak_many(drawn)


def _error(made: Drawn, right: Drawn) -> Tensor:
    """Mean distance of each frame."""
    return (torch.cat(made.mel) - torch.cat(right.mel)).abs().mean(1)


def _seams(speech: Speech, drawn: Drawn, pcm: Samples) -> float:
    """The worst score where a hop's frames begin to sound."""
    joins = np.cumsum([len(frames) for frames in drawn.mel])[:-1] * speech.vocoder.config.frame
    return max(seam_scores(pcm, speech.rate, joins.tolist()), default=0.0)


def _bytes(speech: Speech, limits: FlowLimits) -> int:
    flow = StreamingFlow(speech.flow.flow, replace(limits, voices=1, prompt=1))
    return sum(spec.bytes for spec in flow.state_spec().values())


def _frames(seconds: float) -> int:
    frames = round(seconds / FRAME_SECONDS / RATE) * RATE
    if frames < RATE:
        raise ValueError(f"a window of {seconds:g} s is less than a speech token: give at least 0.04")
    return frames


def _plcmos() -> Callable[[Samples, int], float] | None:
    if importlib.util.find_spec("speechmos") is None:
        return None
    module: Any = importlib.import_module("speechmos.plcmos")
    return lambda pcm, rate: float(module.run(np.clip(resample(pcm, rate, MOS_RATE), -1, 1), MOS_RATE)["plcmos"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="antiphon bench window", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", help="embedded or hub name, or a path")
    parser.add_argument("--voice", help="one of the model's, or a file of antiphon voice make")
    parser.add_argument("--seconds", type=float, nargs="+", default=WINDOWS)
    parser.add_argument("--texts", type=Path, help="a file with a text a line")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(given)
    texts = TEXTS
    if options.texts is not None:
        texts = tuple(filter(None, options.texts.read_text(encoding="utf-8").splitlines()))
    loaded = speech_checkpoint.load(options.model, device=options.device, limits=FlowLimits(voices=1, prompt=1))
    name, voice = find(loaded, options.voice)
    told = {"model": loaded.name, "voice": name}
    numbers = told | measure(loaded.speech, name, voice, texts, options.seconds, options.device)
    print(f"{loaded.name}, {name}: {numbers['seconds']} s of speech; {numbers['mb_a_second_kept']} MB a second kept")
    print(f"{'window':>8}{'MB a session':>14}{'mel error %':>13}{'99th':>8}{'worst seam':>12}{'PLCMOS':>8}")
    for row in numbers["rows"]:
        window = "all" if row["seconds"] is None else f"{row['seconds']:g} s"
        print(
            f"{window:>8}{row['session_mb']:>14.1f}{row['mel_error_percent']:>13.2f}{row['mel_error_p99_percent']:>8.2f}"
            f"{row['worst_seam']:>12.2f}{row.get('plcmos', float('nan')):>8.3f}"
        )
    print(write_result("window", command_line("antiphon.apps.bench.window", given), numbers, options.out))


if __name__ == "__main__":
    main()
