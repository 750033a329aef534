"""``antiphon voice``: voices to speak with, made of clips."""

from __future__ import annotations

from pathlib import Path

from ...codecs.audio_file import AudioError
from ...models.cosyvoice.flow_config import FlowLimits
from ...models.files import CheckpointError
from ...pipelines import speech_checkpoint
from .. import voices
from .console import CommandError, stderr
from .transcribe import check_device

LIMITS = FlowLimits(voices=1, prompt=1)  # nothing is spoken


def make(clip: str, *, output: str, text: str, model: str | None, device: str | None) -> None:
    """See ``antiphon voice make --help``. Raises CommandError."""
    check_device(device)
    console = stderr()
    try:
        path = voices.place(output)
        with console.status("Listening to the clip"):
            speech_checkpoint.read_clip(clip)  # before the model is loaded
        with console.status("Loading the model"):
            loaded = speech_checkpoint.load(model, device=device or "cpu", limits=LIMITS)
        with console.status("Making the voice"):
            voice = voices.from_clip(loaded, Path(clip), text=text, name=path.stem)
            path.parent.mkdir(parents=True, exist_ok=True)
            voice.save(path)
    except (CheckpointError, AudioError, ImportError, OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    seconds = len(voice.prompt_mel) / 50
    told = "" if text else "; with --text, what is said in it, it sounds closer to the clip"
    console.print(f"{path}: a voice of {seconds:.1f} s{told}", style="dim")
