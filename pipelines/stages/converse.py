"""Full-duplex dialogue: the model hears and speaks at the same time, a frame of 80 ms at a time."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np

from ...codecs.resample import Resampler
from ...models.moshi.sampling import Sampling
from ..chunk import Audio, Chunk, Event, Stale, Text
from ..duplex import Duplex, Monologue, TokenLog, Utterance, restart
from ..stage import Context, Input, Stage, select, stage

Out = tuple[str, Chunk]


@stage(outputs=("audio", "said"), optional=("control",))
class Converse(Stage):
    """Audio of any rate -> what the model says: ``audio`` at its own rate, a frame for every frame heard but the first,
    and ``said``, the words of its utterance so far, ``final`` where it pauses.

    When to speak, to stop and to listen is the model's own affair. An interruption from outside drops what it has said
    and nobody has heard yet; the conversation goes on. ``control`` takes events: ``pause`` (hear nothing and say
    nothing, time stands still), ``start`` (go on), ``restart`` (a new conversation), ``cancel`` (interrupt).

    model: its name in the engine. restart_after: seconds after which the model starts over from the tokens of the last
    ``restart_from`` seconds, every time; None leaves it to its rolling window. The other options are those of
    ``Sampling``; what is left out is the checkpoint's own, seeds are drawn. Raises ValueError, naming the option.
    """

    name = "converse"

    def __init__(
        self,
        *,
        model: str = "converse",
        text_temperature: float | None = None,
        text_top_k: int | None = None,
        audio_temperature: float | None = None,
        audio_top_k: int | None = None,
        penalty: float | None = None,
        penalty_context: int | None = None,
        padding_bonus: float | None = None,
        text_seed: int | None = None,
        audio_seed: int | None = None,
        restart_after: float | None = None,
        restart_from: float = 120.0,
    ) -> None:
        options: dict[str, Any] = {
            "text_temperature": text_temperature,
            "text_top_k": text_top_k,
            "audio_temperature": audio_temperature,
            "audio_top_k": audio_top_k,
            "penalty": penalty,
            "penalty_context": penalty_context,
            "padding_bonus": padding_bonus,
            "text_seed": secrets.randbits(62) if text_seed is None else text_seed,
            "audio_seed": secrets.randbits(62) if audio_seed is None else audio_seed,
        }
        self.options = {name: value for name, value in options.items() if value is not None}
        Sampling(**self.options)
        if restart_after is not None and not 0 < restart_from < restart_after:
            raise ValueError(f"restart_after={restart_after:g}: longer than restart_from={restart_from:g} seconds")
        self.model, self.restart_after, self.restart_from = model, restart_after, restart_from

    async def run(self, ctx: Context, audio: Input, control: Input) -> AsyncIterator[Out]:
        """See the class."""
        model = ctx.engine.model(self.model)
        if not isinstance(model, Duplex):
            raise TypeError(f"converse needs a full-duplex model; {self.model!r} is a {type(model).__name__}")
        if model.decoder is None:
            raise TypeError(f"the model {self.model!r} only writes: use the stage dictate")
        constant = model.inputs(dataclasses.replace(model.lm.config.sampling, **self.options))
        lease = await ctx.open(self.model)
        frames, said = Frames(model), _Said(model)
        kept = max(1, round(self.restart_from / model.tick(1)))
        log = TokenLog(kept)
        restart_at = None if self.restart_after is None else round(self.restart_after / model.tick(1))
        steps, paused = 0, False
        while ready := await select(control, audio):
            chunk = ready.get_nowait()
            if isinstance(chunk, Event):
                paused = {"pause": True, "start": False, "restart": False}.get(chunk.name, paused)
                if chunk.name == "restart":
                    lease.reset()
                    steps, log = 0, TokenLog(kept)
                    for text in said.end():
                        yield "said", text
                elif chunk.name == "cancel":
                    ctx.interrupt()
                continue
            if not isinstance(chunk, Audio):
                raise TypeError(f"converse takes audio and control events, got {chunk}")
            if paused:
                ctx.count("samples_paused", chunk.duration)
                continue
            for pcm in frames.push(chunk):
                if steps == restart_at:
                    await restart(model, lease, log)
                    steps = len(log)
                try:
                    row = await lease.step({**constant, "pcm": pcm})
                except Stale:
                    continue  # said after the interruption, or not at all
                steps += 1
                if restart_at is not None:
                    log.add(row["sampled"], row["heard"])
                if row["valid"]:
                    for out in said.take(row["pcm"].numpy(), int(row["text"])):
                        yield out
        for text in said.end():
            yield "said", text
        yield "audio", Audio(samples=np.zeros(0, np.float32), rate=model.rate, start=said.samples, final=True)


class Frames:
    """Cuts sound of any rate into a model's frames."""

    def __init__(self, model: Duplex) -> None:
        self._size, self._rate = model.frame, model.rate
        self._resampler: Resampler | None = None
        self._pending = np.zeros(0, np.float32)

    def push(self, chunk: Audio) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        """The frames that the chunk completes. Raises ValueError when the rate changes."""
        if self._resampler is None:
            self._resampler = Resampler(chunk.rate, self._rate)
        elif chunk.rate != self._resampler.source_rate:
            raise ValueError(f"audio at {self._resampler.source_rate} Hz went on at {chunk.rate} Hz; resample it first")
        joined = np.concatenate((self._pending, self._resampler.push(chunk.samples)))
        count = len(joined) // self._size * self._size
        self._pending = joined[count:]
        yield from joined[:count].reshape(-1, self._size)

    def rest(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A last frame: what is left over, then silence."""
        held = np.zeros(0, np.float32) if self._resampler is None else self._resampler.flush()
        joined = np.concatenate((self._pending, held))[: self._size]
        return np.pad(joined, (0, self._size - len(joined)))


class _Said:
    """What the model has said, as chunks: sound without a gap, and text by utterance."""

    def __init__(self, model: Duplex) -> None:
        config = model.lm.config
        self._rate, self._frame = model.rate, model.frame
        self._text = Monologue(model.tokenizer, (config.padding, config.end_padding))
        self.samples = 0

    def take(self, pcm: np.ndarray[Any, np.dtype[np.float32]], token: int) -> Iterator[Out]:
        """The next frame."""
        start, self.samples = self.samples, self.samples + len(pcm)
        yield "audio", Audio(samples=pcm, rate=self._rate, start=start)
        yield from (("said", text) for text in self._told(self._text.add(token)))

    def end(self) -> Iterator[Text]:
        """What had not ended."""
        return self._told(self._text.end())

    def _told(self, said: Utterance | None) -> Iterator[Text]:
        if said is not None:
            start = said.began * self._frame
            yield Text(text=said.text, rate=self._rate, start=start, duration=self.samples - start, final=said.final)
