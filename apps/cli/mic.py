"""``antiphon mic``: the sound devices of this computer, and a test of a microphone's level."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ...pipelines.chunk import Audio
from ...pipelines.stage import StageError
from ...transport.devices import Device, DeviceError, devices, find, rates
from ...transport.microphone import Microphone
from .console import CommandError, quiet_libraries, stderr
from .level import Level

COLUMNS = ("number", "name", "in", "out", "kHz", "default")


@quiet_libraries()
def run(*, list_devices: bool, device: str | None, seconds: float) -> None:
    """See ``antiphon mic --help``. Raises CommandError."""
    try:
        if list_devices:
            _list()
        else:
            asyncio.run(_test(find(device, "input"), seconds))
    except DeviceError as error:
        raise CommandError(str(error)) from error
    except StageError as error:
        raise CommandError(str(error.__cause__ or error)) from error


def _list() -> None:
    """A table on a terminal, tab-separated fields elsewhere."""
    rows = [_row(device) for device in devices()]
    if not rows:
        raise DeviceError("there are no sound devices here: connect one, or start the sound server")
    if not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in rows))
        return
    table = Table(*COLUMNS, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def _row(device: Device) -> tuple[str, ...]:
    able = rates(device, "input") or rates(device, "output")
    uses = [use for use, chosen in zip(("input", "output"), device.default, strict=True) if chosen]
    return (
        str(device.index),
        device.name,
        str(device.inputs),
        str(device.outputs),
        " ".join(f"{rate / 1000:g}" for rate in able),
        " ".join(uses),
    )


async def _test(device: Device, seconds: float) -> None:
    """Show the level for a while, and a line on it."""
    level, console, rate = Level(), stderr(), device.rate
    console.print(f"listening to {device.name} for {seconds:g} s", style="dim")
    with Live(console=console, transient=True, auto_refresh=False) as live:
        async with Microphone(device=device.index, rate=rate).session() as session:
            async for chunk in session.outputs():
                assert isinstance(chunk, Audio)
                level.add(chunk.samples)
                if console.is_terminal:
                    live.update(level.bar(), refresh=True)
                if chunk.end_seconds >= seconds:
                    break
            lost = losses(session.counters, rate)
    print(level.summary + lost)


def losses(counters: Mapping[str, int], rate: int) -> str:
    """What to add to a closing line where sound was lost: for a microphone at ``rate`` hertz."""
    overruns, dropped = counters.get("microphone.xruns", 0), counters.get("microphone.dropped", 0)
    if not overruns and not dropped:
        return ""
    return f"; the computer was too busy: {overruns} overruns, {dropped / rate:.2f} s of sound dropped"
