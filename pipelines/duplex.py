"""A full-duplex dialogue model as one step: 80 ms of sound in, 80 ms of sound and a text token out.

Mimi's encoder, Moshi's temporal and depth transformers and Mimi's decoder run in one ``step``, so the engine captures
the whole frame in one CUDA graph, and only samples and a token cross its borders. The variant is that of ``MoshiLM``:
one frame to converse, more to read a log of tokens back into a fresh slot.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..codecs import mimi_checkpoint
from ..codecs.loudness import loudness
from ..codecs.mimi import Mimi, MimiDecoder, MimiEncoder, Whole
from ..codecs.voice_clip import check as check_clip
from ..models.conformer.tokenizer import WORD_START, Source, Tokenizer
from ..models.files import CheckpointError, reading
from ..models.moshi import checkpoint, persona
from ..models.moshi.config import UNSET
from ..models.moshi.lm import MoshiLM
from ..models.moshi.sampling import Sampling
from ..models.streaming import Specs, State, StreamingModel, TensorSpec
from .chunk import Stale
from .engine import Lease
from .graph import did_you_mean

PUBLISHED = "moshiko"  # what is loaded where the package embeds no dialogue model
PUBLISHED_WRITER = "stt-1b-en_fr-candle"
PREFILL = 64  # frames that a model which reads logs or prompts takes at once
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Duplex(StreamingModel):
    """Codec and language model over slots. ``frame`` samples at ``rate`` Hz go in and come out.

    A language model that only writes what it hears (Kyutai's speech to text) has no ``decoder``: no sound comes out.
    voices: names and Mimi's codes ``[spoken, frames]`` of the voices that ``prompt`` knows.
    """

    def __init__(self, lm: MoshiLM, mimi: Mimi, tokenizer: Tokenizer) -> None:
        """Raises ValueError where the parts do not fit together."""
        super().__init__()
        config = lm.config
        if config.card != mimi.config.bins:
            raise ValueError(f"the codec has codes of {mimi.config.bins}, the language model of {config.card}")
        if not config.heard:
            raise ValueError("this model hears no codebooks: it cannot converse")
        self.lm, self.tokenizer = lm, tokenizer
        self.encoder = MimiEncoder(mimi, config.heard)
        self.decoder = MimiDecoder(mimi, config.spoken) if config.spoken else None
        self.frame, self.rate = mimi.config.frame, mimi.config.sample_rate
        self.voices: dict[str, NDArray[np.int64]] = {}

    @property
    def variants(self) -> tuple[int, ...]:
        return self.lm.variants

    def tick(self, variant: Hashable) -> float:
        if not isinstance(variant, int):
            raise TypeError(f"a variant is the number of frames of a step, got {variant!r}")
        return variant * self.frame / self.rate

    def prepare(self) -> None:
        for part in self._parts():
            part.prepare()

    def _parts(self) -> tuple[StreamingModel, ...]:
        return (self.lm, self.encoder) if self.decoder is None else (self.lm, self.encoder, self.decoder)

    def state_spec(self) -> Specs:
        return {name: spec for part in self._parts() for name, spec in part.state_spec().items()}

    def input_spec(self, variant: Hashable) -> Specs:
        spec = dict(self.lm.input_spec(variant))
        if "codes" in spec:
            del spec["codes"]
            spec["pcm"] = TensorSpec((self.frame,))
        return spec

    def probe_inputs(self, variant: Hashable, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise to hear, for measuring which batch sizes are exact."""
        inputs = self.lm.probe_inputs(variant, rows, generator)
        if inputs.pop("codes", None) is not None:
            inputs["pcm"] = torch.randn(rows, self.frame, generator=generator) * 0.1
        return inputs

    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """``pcm [B, frame]`` float32 and what ``MoshiLM.step`` takes beside codes.

        Returns ``pcm [B, frame]`` and ``text [B]``, which count where ``valid [B]`` (not at a session's first step),
        ``sampled`` and ``heard``: the tokens of this step for a :class:`TokenLog`. A model that only writes returns no
        sound, and its ``heads`` where it has some.
        """
        if "log" in inputs:
            return self.lm.step(inputs, state, slots, active)
        # The model never sees the user's first frame, and in training the second was the codec's first.
        begun = state["temporal.seen"].index_select(0, slots) > 0
        heard = self.encoder.step({"pcm": inputs["pcm"]}, state, slots, active & begun)["codes"][..., 0]
        made = self.lm.step({**inputs, "codes": heard}, state, slots, active)
        if self.decoder is None:
            return {**{name: made[name] for name in made if name != "codes"}, "heard": heard}
        valid = made["valid"]
        codes = torch.where(valid[:, None], made["codes"], 0)[..., None]
        pcm = self.decoder.step({"codes": codes}, state, slots, valid)["pcm"]
        pcm = torch.where(valid[:, None], pcm, 0.0)
        return {"pcm": pcm, "text": made["text"], "valid": valid, "sampled": made["sampled"], "heard": heard}

    def inputs(self, sampling: Sampling) -> dict[str, NDArray[np.generic]]:
        """What a step takes beside sound, the same for a whole session; nothing is forced."""
        return {**sampling.inputs(), "force": np.full(1 + self.lm.config.spoken, UNSET, np.int64)}

    def add_voice(self, name: str, pcm: NDArray[np.float32]) -> None:
        """A voice for ``prompt``, from a clip of 1 to 30 seconds at ``rate`` Hz.

        Raises ValueError for a clip of which no voice is made, and as ``prompt`` does.
        """
        self._check_prompts()
        check_clip(pcm, self.rate)
        if (level := loudness(pcm, self.rate)) == -math.inf:
            raise ValueError("the clip is silent but for a moment: record it louder")
        gain = np.float32(10 ** ((persona.LOUDNESS - level) / 20))
        whole = np.pad(pcm * gain, (0, -len(pcm) % self.frame))
        weight = self.encoder.quantizer.semantic.into.weight
        with torch.inference_mode():
            latents = self.encoder.network(torch.from_numpy(whole)[None].to(weight), Whole())
            codes = self.encoder.quantizer.encode(latents, self.lm.config.spoken)
        self.voices[name] = codes[0].cpu().numpy()

    def prompt(self, text: str = "", voice: str = "") -> NDArray[np.int64]:
        """Who the model is to be, as the beginning of a ``TokenLog``: for finetunes that take prompts (PersonaPlex).

        voice: one of ``voices``; a suffix that it does not have is left out, since PersonaPlex's clients name files.
        Raises ValueError for other models and voices, and for a model that was loaded without ``prefill``.
        """
        self._check_prompts()
        codes = None
        if voice:
            codes = self.voices.get(voice, self.voices.get(PurePath(voice).stem))
            if codes is None:
                raise ValueError(f"no voice {voice[:80]!r}{did_you_mean(voice[:80], self.voices)}")
        tokens = self.tokenizer.encode(persona.marked(text)) if text.strip() else ()
        return persona.prompt(tokens, self.lm.config, codes)

    def _check_prompts(self) -> None:
        if max(self.variants) == 1:
            raise ValueError("this model takes no prompts: it is no PersonaPlex, or was loaded without prefill")
        persona.check(self.lm.config)


def default() -> str:
    """The name of the embedded dialogue model, or of a published one where there is none."""
    return next(iter(checkpoint.embedded()), PUBLISHED)


def load(
    name: str | PathLike[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    window: int | None = None,
    sinks: int = 0,
    prefill: int | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Duplex:
    """A checkpoint's language model, codec and tokenizer, by name or folder; options as in
    ``MoshiConfig.changed``. name: see ``models.moshi.checkpoint.find``; None for ``default()``. prefill: None for what
    the model needs: ``PREFILL`` where it takes prompts, else 1.

    Raises CheckpointError.
    """
    files = checkpoint.find(default() if name is None else name)
    if files.tokenizer is None:
        raise CheckpointError(f"{files.folder}: holds no tokenizer ({checkpoint.TOKENIZER})")
    if files.mimi is None and not files.transformers:
        raise CheckpointError(f"{files.folder}: holds no codec ({checkpoint.MIMI})")
    with reading(files.tokenizer):
        content = files.tokenizer.read_bytes()
        json = files.tokenizer.suffix == ".json"
        tokenizer = Tokenizer(Source("tokenizer.json" if json else "tokenizer.model", content))
    if prefill is None:
        prefill = PREFILL if files.settings.get("model_type") == checkpoint.PERSONAPLEX else 1
    lm = checkpoint.load(
        files, device=device, dtype=dtype, window=window, sinks=sinks, prefill=prefill, kv_dtype=kv_dtype
    )  # fmt: skip
    if files.mimi is None:
        settings = files.settings.get(f"{checkpoint.HF_CODEC}_config") or {}
        mimi = mimi_checkpoint.load_part(
            files.folder, settings, f"{checkpoint.HF_CODEC}.", steps=(1,), device=device
        )  # fmt: skip
    else:
        mimi = mimi_checkpoint.load(files.mimi, steps=(1,), device=device)
    with reading(files.folder):
        return Duplex(lm, mimi, tokenizer)


class TokenLog:
    """The last tokens of a session, ``frames`` at most: small enough to keep beside every session, and enough to
    restart it in a fresh slot, of this engine or of another, as if it had begun with the first of them."""

    def __init__(self, frames: int, prompt: NDArray[np.int64] | None = None) -> None:
        """prompt: ``[steps, streams]`` that come first, and stay (see ``Duplex.prompt``)."""
        if frames < 1:
            raise ValueError(f"a log of {frames} frames: keep at least 1")
        self._prompt = [] if prompt is None else list(prompt)
        self._steps: deque[NDArray[np.int64]] = deque(maxlen=frames)

    def __len__(self) -> int:
        """Frames, the prompt's left out."""
        return len(self._steps)

    def __bool__(self) -> bool:
        return bool(self._prompt or self._steps)

    def add(self, sampled: Tensor, heard: Tensor) -> None:
        """One step's tokens, as ``Duplex.step`` returns them for one session."""
        self._steps.append(np.concatenate((sampled.numpy(), heard.numpy())))

    def clear(self) -> None:
        """Forget all but the prompt."""
        self._steps.clear()

    def blocks(self, frames: int) -> list[dict[str, NDArray[np.int64]]]:
        """Inputs of the variant ``frames`` that read the log into a fresh slot."""
        blocks = []
        steps = [*self._prompt, *self._steps]
        for first in range(0, len(steps), frames):
            part = np.stack(steps[first : first + frames])
            filled = np.full((frames, part.shape[1]), UNSET, np.int64)
            filled[: len(part)] = part
            blocks.append({"log": filled, "count": np.array(len(part), np.int64)})
        return blocks


async def restart(model: Duplex, lease: Lease, log: TokenLog) -> None:
    """Reset a lease of ``model`` and read a log into it; the codec's state begins afresh.

    Raises ValueError where the model was loaded without ``prefill``.
    """
    frames = max(model.variants)
    if frames == 1:
        raise ValueError("to restart from a log, load the model with prefill frames at a time, such as 64")
    await lease.switch(frames)
    try:
        while True:
            lease.reset()
            try:
                for block in log.blocks(frames):
                    await lease.step(block)
                return
            except Stale:  # an interruption took a block away
                continue
    finally:
        await lease.switch(1)


def read_sync(model: Duplex, lease: Lease, log: TokenLog) -> None:
    """Read a log into a fresh lease of ``model``, and block until it is read: for files, without an event loop."""
    frames = max(model.variants)
    lease.use(frames)
    for block in log.blocks(frames):
        lease.step_sync(block)
    lease.use(1)


class Utterance(NamedTuple):
    """What was said so far without a pause, and whether that is all of it.

    began: frame of its first token. words: each with its first frame and the one after its last.
    """

    text: str
    began: int
    final: bool
    words: tuple[tuple[str, int, int], ...]


@dataclass
class Monologue:
    """A session's text tokens as text, utterance by utterance.

    pause: frames of padding that end one; longest: characters that end one at the next word. split: whether padding
    ends a word, whatever follows.
    """

    tokenizer: Tokenizer
    padding: tuple[int, ...]
    pause: int = 12
    longest: int = 400
    split: bool = False

    silent: int = 0  # frames since the last token of text
    _text: str = ""
    _began: int = 0
    _words: list[tuple[str, int, int]] = field(default_factory=list)
    _frame: int = 0
    _bytes: bytes = b""

    def add(self, token: int) -> Utterance | None:
        """The next frame's token: the utterance so far, or the one that it ends; None for no news."""
        frame = self._frame
        self._frame += 1
        if token in self.padding or not 0 <= token < len(self.tokenizer.pieces):
            self.silent += 1
            return self.end() if self.silent == self.pause else None
        parted, self.silent = self.split and self.silent > 0, 0
        piece = self.tokenizer.pieces[token]
        ended = None
        if len(self._text) >= self.longest and piece.startswith(WORD_START):
            ended = self.end()
        if not self._text:
            self._began, self._words = frame, []
        fresh = self._decoded(piece)
        if not fresh:
            return ended
        if parted and self._text and fresh[0] != " ":
            fresh = f" {fresh}"
        self._text += fresh
        if fresh[0] == " " or not self._words:
            self._words.append((fresh.strip(), frame, frame + 1))
        else:
            word, first, _ = self._words[-1]
            self._words[-1] = (word + fresh, first, frame + 1)
        return ended or self.open

    @property
    def open(self) -> Utterance | None:
        """The utterance so far; None where nothing was said."""
        return Utterance(self._text, self._began, False, tuple(self._words)) if self._text else None

    def end(self) -> Utterance | None:
        """The utterance, ended; None where nothing was said."""
        said = self.open
        self._text, self._bytes = "", b""
        return None if said is None else said._replace(final=True)

    def _decoded(self, piece: str) -> str:
        """A piece as text; a character that comes in several bytes when its last byte is there."""
        if found := _BYTE.fullmatch(piece):
            self._bytes += bytes.fromhex(found[1])
            try:
                whole = self._bytes.decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data" and len(self._bytes) < 4:
                    return ""
                whole = self._bytes.decode(errors="replace")
            self._bytes = b""
            return whole
        return piece.replace(WORD_START, " ")
