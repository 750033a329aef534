"""Speech synthesis for files, on the calling thread: loaded models, and any number of texts one after the other or
several in one batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from ..codecs.resample import Samples
from ..models.cosyvoice.voice import Voice
from .engine import Engine, Lease
from .speech import PARTS, Part, Speech
from .synthesis import Piece, Step, Synthesis


class Places:
    """A session's slots in the three models."""

    def __init__(self, leases: Mapping[Part, Lease]) -> None:
        self.leases = leases

    @classmethod
    def open_sync(cls, engine: Engine, name: str = "speak") -> Places:
        """For files. Raises AtCapacity."""
        return cls({part: engine.open_sync(f"{name}.{part}") for part in PARTS})

    def ready(self, step: Step) -> Lease:
        """The lease to take this step with."""
        lease = self.leases[step.part]
        if step.fresh:
            lease.reset()
        lease.use(step.variant)
        return lease

    def close(self) -> None:
        """Give the slots back."""
        for lease in self.leases.values():
            lease.close()


class Synthesizer:
    """Loaded models for files, on the calling thread.

    sessions: utterances spoken at a time. Use as a context manager, or close it.
    """

    def __init__(self, speech: Speech, *, device: torch.device | str = "cpu", sessions: int = 1) -> None:
        self.speech, self.sessions = speech, sessions
        self.engine = Engine(device, inline=True)
        speech.install(self.engine, slots=sessions, measure=False)

    def register(self, name: str, voice: Voice) -> None:
        """See ``Speech.register``."""
        self.speech.register(self.engine, name, voice)

    def speak(
        self, text: str | Iterable[str], voice: str | None = None, seed: int = 0, *, arriving: bool = False
    ) -> Iterator[Piece]:
        """The sound of a text, or of one that comes in pieces, as it is made. Raises ValueError, AtCapacity."""
        synthesis = Synthesis(self.speech, voice, seed, arriving=arriving)
        texts = iter([text] if isinstance(text, str) else text)
        places = Places.open_sync(self.engine)
        try:
            for piece in texts:
                synthesis.push(piece)
                yield from self._work(synthesis, places)
            synthesis.finish()
            yield from self._work(synthesis, places)
        finally:
            places.close()

    def speak_many(self, syntheses: Sequence[Synthesis]) -> list[Samples]:
        """Utterances whose text was finished, ``sessions`` at a time in one batch: the sound of each."""
        waiting = deque(enumerate(syntheses))
        made: list[list[Samples]] = [[] for _ in syntheses]
        running: dict[int, tuple[Synthesis, Places]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.sessions:
                    number, synthesis = waiting.popleft()
                    running[number] = synthesis, Places.open_sync(self.engine)
                self._turn(list(running.values()))
                for number, (synthesis, places) in list(running.items()):
                    made[number] += [piece.samples for piece in synthesis.pieces()]
                    if synthesis.done:
                        places.close()
                        del running[number]
        finally:
            for _, places in running.values():
                places.close()
        return [np.concatenate([*pieces, np.zeros(0, np.float32)]) for pieces in made]

    def _work(self, synthesis: Synthesis, places: Places) -> Iterator[Piece]:
        """All that can be said of the text so far."""
        while self._turn([(synthesis, places)]):
            yield from synthesis.pieces()
        yield from synthesis.pieces()

    def _turn(self, sessions: Sequence[tuple[Synthesis, Places]]) -> bool:
        """One step of every part that has something to do, of all sessions together; False when there was none."""
        steps = [
            (synthesis, step, places.ready(step))
            for synthesis, places in sessions
            for part in PARTS
            if (step := synthesis.next(part)) is not None
        ]
        rows = self.engine.run_sync([(lease, step.inputs) for _, step, lease in steps])
        for (synthesis, step, _), row in zip(steps, rows, strict=True):
            synthesis.take(step, row)
        return bool(steps)

    def close(self) -> None:
        """Free the models."""
        self.engine.close()

    def __enter__(self) -> Synthesizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
