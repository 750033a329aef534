"""What commands at the microphone have in common: a display of what is heard, until the time is up or Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text as Styled

from ...pipelines.chunk import Audio, Text
from ...pipelines.session import Session
from ...transport.devices import Device
from .level import Level
from .mic import losses


@dataclass
class Shown(ABC):
    """What a command shows while it hears ``device``: ``open``, what may still change, and the level."""

    invitation: ClassVar[str]  # said once there is sound

    device: Device
    seconds: float | None
    console: Console
    level: Level = field(default_factory=Level, kw_only=True)
    heard: float = field(default=0.0, kw_only=True)  # seconds
    rate: int = field(default=0, kw_only=True)  # of what is heard
    stopping: bool = field(default=False, kw_only=True)
    lost: str = field(default="", kw_only=True)  # what to say of it in the summary

    async def follow(self, session: Session) -> None:
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
                        if isinstance(text, Text):
                            self.take(text, session.clock.now())
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            self.lost = losses(session.counters, self.rate or self.device.rate)

    @abstractmethod
    def take(self, text: Text, now: float) -> None:
        """What the session gives."""

    @abstractmethod
    def open(self) -> str:
        """What is being said, and may still change."""

    def beside(self) -> str:
        """What stands beside the level and the device's name."""
        return ""

    def more(self, chunk: Audio) -> bool:
        """Take what was heard; False when it is enough."""
        if not self.heard:
            self.console.print(f"listening to {self.device.name}; {self.invitation}", style="dim")
        self.heard, self.rate = chunk.end_seconds, chunk.rate
        self.level.add(chunk.samples)
        self.stopping = self.stopping or (self.seconds is not None and self.heard >= self.seconds)
        return not self.stopping

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._lines(options)

    def _lines(self, options: ConsoleOptions) -> Iterator[Styled]:
        if text := self.open():
            yield Styled(text, style="bright_black")
        line = Styled.assemble(self.level.bar(), (f"  {self.device.name}{self.beside()}", "dim"))
        line.truncate(options.max_width, overflow="ellipsis")
        yield line

    def _interrupt(self) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
