"""How far a command is through its audio, and how fast it was."""

from __future__ import annotations

import sys

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .console import stderr


def progress(seconds: float | None) -> Progress:
    """A bar in seconds of audio, its task added; where their number is unknown it only moves."""
    console = stderr()
    bar = Progress(
        BarColumn(),
        TextColumn("{task.completed:.0f} s of audio"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),
    )
    bar.add_task("", total=seconds)
    return bar


def real_time_factor(took: float, seconds: float) -> str:
    """What closing lines say of the time that so many seconds of audio took."""
    return f"real-time factor {took / seconds:.3f}" if seconds else "no audio"
