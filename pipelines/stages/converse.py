"""Full-duplex dialogue: the model hears and speaks at the same time, a frame of 80 ms at a time."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import numpy as np

from ...codecs.resample import Resampler
from ...models.moshi.sampling import Sampling
from ..chunk import Audio, Chunk, Event, Stale, Text
from ..duplex import Duplex, Monologue, TokenLog, Utterance, restart
from ..engine import AtCapacity, EngineError, Lease, Row, Snapshot
from ..script import Script
from ..stage import Context, Input, Stage, select, stage

Out = tuple[str, Chunk]


@stage(outputs=("audio", "said"), optional=("control",))
class Converse(Stage):
    """Audio of any rate -> what the model says: ``audio`` at its own rate, a frame for every frame heard but the first,
    and ``said``, the words of its utterance so far, ``final`` where it pauses.

    When to speak, to stop and to listen is the model's own affair. An interruption from outside drops what it has said
    and nobody has heard yet; the conversation goes on. ``control`` takes events: ``pause`` (hear nothing and say
    nothing, time stands still, and the place in the engine is another's: the conversation waits in the host's memory),
    ``start`` (go on, as soon as there is a place), ``restart`` (a new conversation), ``cancel`` (interrupt), and
    ``say``: its data's ``text`` is what the model says next, see ``Script``. An interruption and a new conversation
    drop what is not said yet; no text, or more than may wait, is refused; both are counted.

    model: its name in the engine. restart_after: seconds after which the model starts over from the tokens of the last
    ``restart_from`` seconds, every time, as it then does after a pause; None leaves it to its rolling window, and after
    a pause it goes on exactly. prompt, voice: who the model is to be, and the name of the voice that it is to have, for
    finetunes that take prompts (PersonaPlex; see ``Duplex.prompt``). The other options are those of ``Sampling``; what
    is left out is the checkpoint's own, seeds are drawn. Raises ValueError, naming the option.
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
        prompt: str = "",
        voice: str = "",
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
        self.prompt, self.voice = prompt.strip(), voice

    async def run(self, ctx: Context, audio: Input, control: Input) -> AsyncIterator[Out]:
        """See the class."""
        model = ctx.engine.model(self.model)
        if not isinstance(model, Duplex):
            raise TypeError(f"converse needs a full-duplex model; {self.model!r} is a {type(model).__name__}")
        if model.decoder is None:
            raise TypeError(f"the model {self.model!r} only writes: use the stage dictate")
        constant = model.inputs(dataclasses.replace(model.lm.config.sampling, **self.options))
        kept = max(1, round(self.restart_from / model.tick(1)))
        restart_at = None if self.restart_after is None else round(self.restart_after / model.tick(1))
        log = TokenLog(kept, model.prompt(self.prompt, self.voice) if self.prompt or self.voice else None)
        place = ctx.own(_Place(ctx, self.model, model, log, logs=restart_at is not None))
        await place.take()
        frames, said = Frames(model), _Said(model)
        paused = False
        while ready := await select(control, audio):
            chunk = ready.get_nowait()
            if isinstance(chunk, Event):
                paused = {"pause": True, "start": False, "restart": False}.get(chunk.name, paused)
                if chunk.name == "pause":
                    await place.park()
                elif chunk.name == "restart":
                    await place.reset()
                    for text in said.end():
                        yield "said", text
                elif chunk.name == "cancel":
                    ctx.interrupt()
                elif chunk.name == "say":
                    line = chunk.data.get("text")
                    if ctx.stale or not isinstance(line, str) or not place.script.add(line):
                        ctx.count("says_refused")
                continue
            if not isinstance(chunk, Audio):
                raise TypeError(f"converse takes audio and control events, got {chunk}")
            if paused or not await place.back():
                ctx.count("samples_paused", chunk.duration)
                continue
            for pcm in frames.push(chunk):
                if place.steps == restart_at:
                    await place.start_over()
                try:
                    row = await place.step({**constant, "pcm": pcm})
                except Stale:
                    continue  # said after the interruption, or not at all
                if row["valid"]:
                    for out in said.take(row["pcm"].numpy(), int(row["text"])):
                        yield out
        for text in said.end():
            yield "said", text
        yield "audio", Audio(samples=np.zeros(0, np.float32), rate=model.rate, start=said.samples, final=True)


class _Place:
    """A conversation's place in the engine, which may be given away and taken again.

    Meanwhile its state is kept in the host's memory, or if it ``logs`` its tokens, these alone, which are few. steps:
    frames since it began, or began with the log. script: what is to be said.
    """

    def __init__(self, ctx: Context, name: str, model: Duplex, log: TokenLog, *, logs: bool) -> None:
        self._ctx, self._name, self._model, self._log, self._logs = ctx, name, model, log, logs
        self._lease: Lease | None = None
        self._parked: Snapshot | None = None
        self.script = Script(model.tokenizer, model.lm.config)
        self.steps = 0

    async def take(self) -> None:
        """Take a place, and go on there. Raises AtCapacity."""
        lease: Lease = await self._ctx.session.lease(self._ctx.engine, self._name, {})
        try:
            if self._parked is not None:
                lease.restore(self._parked)
            else:
                await self._read(lease)
        except EngineError:
            lease.close()
            raise
        self._lease, self._parked = lease, None

    async def back(self) -> bool:
        """Whether there is a place, taking one where it was given away."""
        if self._lease is None:
            try:
                await self.take()
            except AtCapacity:
                self._ctx.count("starts_refused")
        return self._lease is not None

    async def park(self) -> None:
        """Give the place away."""
        if self._lease is not None:
            self._parked = None if self._logs else await self._lease.snapshot()
            self.close()
            self._lease = None

    async def step(self, inputs: Mapping[str, Any]) -> Row:
        """The next frame. Raises Stale."""
        assert self._lease is not None
        if saying := len(self.script):
            inputs = {**inputs, "force": np.array([self.script.force, *inputs["force"][1:]], np.int64)}
        row = await self._lease.step(inputs)
        if saying:
            self.script.advance(int(row["sampled"][0]))
        self.steps += 1
        if self._logs:
            self._log.add(row["sampled"], row["heard"])
        return row

    async def start_over(self) -> None:
        """Begin with the tokens that are kept. Raises ValueError where the model cannot read them."""
        assert self._lease is not None
        await self._read(self._lease)

    async def reset(self) -> None:
        """Forget everything but the prompt."""
        self._parked = None
        self._drop_script()
        self._log.clear()
        if self._lease is not None:
            self._lease.reset()
            await self._read(self._lease)

    async def _read(self, lease: Lease) -> None:
        self.steps = len(self._log)
        if self._log:
            await restart(self._model, lease, self._log)

    def _drop_script(self) -> None:
        if dropped := self.script.clear():
            self._ctx.count("tokens_unsaid", dropped)

    def fence(self, epoch: int) -> None:
        """See ``Context.own``."""
        self._drop_script()
        if self._lease is not None:
            self._lease.fence(epoch)

    def close(self) -> None:
        """See ``Context.own``."""
        if self._lease is not None:
            self._lease.close()


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
