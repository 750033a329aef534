"""The three models that speak together, and the voices they share (CosyVoice 2, arXiv 2412.10117): a language model
writes speech tokens, the flow draws mel frames, the vocoder sounds them. Each is a model of the engine with slots and a
stream of its own, so that one session's tokens are written while another's frames are drawn: small batches of any of
them wait for memory and launches most of their time.
"""

from __future__ import annotations

import math
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..codecs.hift import HiFT
from ..models.cosyvoice.flow_stream import StreamingFlow
from ..models.cosyvoice.flow_voices import FlowVoice
from ..models.cosyvoice.lm import SpeechLM
from ..models.cosyvoice.lm_config import STARTS, TOKEN_SECONDS, Burst
from ..models.cosyvoice.sampling import Sampling
from ..models.cosyvoice.voice import Voice
from ..models.streaming import Specs, State, StreamingModel
from .engine import Engine, default_buckets
from .engine.runner import EXACT_ROWS
from .graph import did_you_mean

Part = Literal["lm", "flow", "vocoder"]

PARTS: tuple[Part, ...] = ("lm", "flow", "vocoder")
TICKS: Mapping[Part, float] = {"lm": 0.0, "flow": 0.005, "vocoder": 0.005}  # seconds between two starts of a model
BUDGETS: Mapping[Part, float] = {"lm": 0.2, "flow": 0.6, "vocoder": 0.6}  # seconds; half may be spent waiting
PATIENT: tuple[Part, ...] = ("lm",)  # whose steps wait where they can, see ``Engine.add``
PRIORITIES: Mapping[Part, int] = {"lm": 0, "flow": 0, "vocoder": 0}  # of the streams
MOST: Mapping[Part, int] = {"lm": 256, "flow": 8, "vocoder": 16}  # sessions of a batch
MOST_ON_A_CPU = 8  # which carries fewer in real time; larger batches would only take long to make ready


class Tokenizes(Protocol):
    """Text to tokens."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""


@dataclass(frozen=True, eq=False)
class Registered:
    """A voice that the models know: its caches lie in the flow, once for all sessions."""

    voice: Voice
    flow: FlowVoice
    prompt_text: tuple[int, ...]

    @property
    def prompt_speech(self) -> tuple[int, ...]:
        """What the language model reads of the clip: nothing where it is not known what is said in it."""
        return tuple(self.voice.prompt_tokens.tolist()) if self.prompt_text else ()


class Reader(StreamingModel):
    """The language model with its tokenizer and the voices registered by name; the first is the default.

    sampling: how speech tokens are drawn where nothing else is asked for.
    """

    def __init__(
        self, lm: SpeechLM, tokenizer: Tokenizes, language: str = "en", sampling: Sampling | None = None
    ) -> None:
        super().__init__()
        self.lm, self.tokenizer, self.language, self.sampling = lm, tokenizer, language, sampling or Sampling()
        self.voices: dict[str, Registered] = {}

    @property
    def variants(self) -> tuple[int | Burst, ...]:
        return self.lm.variants

    def tick(self, variant: Hashable) -> float:
        return self.lm.tick(variant)

    def prepare(self) -> None:
        self.lm.prepare()

    def state_spec(self) -> Specs:
        return self.lm.state_spec()

    def input_spec(self, variant: Hashable) -> Specs:
        return self.lm.input_spec(variant)

    def probe_inputs(self, variant: Hashable, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """See ``SpeechLM``."""
        return self.lm.probe_inputs(variant, rows, generator)

    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """See ``SpeechLM``."""
        return self.lm.step(inputs, state, slots, active)

    def turns(self, variant: Hashable) -> int:
        """See ``SpeechLM``."""
        return self.lm.turns(variant)

    def turns_of(self, variant: Hashable, inputs: Mapping[str, Any]) -> int:
        """See ``SpeechLM``."""
        return self.lm.turns_of(variant, inputs)

    def step_turn(self, turn: Tensor, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """See ``SpeechLM``."""
        return self.lm.step_turn(turn, inputs, state, slots, active)

    def voice(self, name: str | None) -> Registered:
        """A registered voice; None for the first. Raises ValueError."""
        if name is None and self.voices:
            return next(iter(self.voices.values()))
        if name not in self.voices:
            if not self.voices:
                raise ValueError("no voice was registered: give one, made by antiphon voice make")
            raise ValueError(f"no voice {name!r}{did_you_mean(name or '', self.voices)}")
        return self.voices[name]


@dataclass(frozen=True, eq=False)
class Speech:
    """The models that speak together. Raises ValueError where they do not fit together."""

    reader: Reader
    flow: StreamingFlow
    vocoder: HiFT

    def __post_init__(self) -> None:
        lm, flow, vocoder = self.reader.lm.config, self.flow.config, self.vocoder.config
        if lm.speech != flow.vocabulary:
            raise ValueError(f"the language model writes {lm.speech} tokens, the flow reads {flow.vocabulary}")
        if flow.mels != vocoder.mels:
            raise ValueError(f"the flow draws {flow.mels} mels, the vocoder sounds {vocoder.mels}")

    @property
    def rate(self) -> int:
        """Hertz of the sound."""
        return self.vocoder.config.sample_rate

    @property
    def parts(self) -> dict[Part, StreamingModel]:
        """The models by part."""
        return {"lm": self.reader, "flow": self.flow, "vocoder": self.vocoder}

    def with_room_for(self, voices: Iterable[Voice]) -> Speech:
        """The same networks, with tables for so many voices and prompts as long as theirs; before ``install``."""
        lengths = [len(voice.prompt_tokens) for voice in voices]
        limits = replace(self.flow.limits, voices=max(1, len(lengths)), prompt=max((1, *lengths)))
        return replace(self, flow=StreamingFlow(self.flow.flow, limits, together=self.flow.together))

    def install(
        self,
        engine: Engine,
        name: str = "speak",
        *,
        slots: int,
        buckets: Mapping[Part, Sequence[int]] | None = None,
        patient: Container[Part] = PATIENT,
        priorities: Mapping[Part, int] = PRIORITIES,
        **options: Any,
    ) -> None:
        """Add the models to an engine, as ``name.lm``, ``name.flow`` and ``name.vocoder``. Blocks.

        slots: sessions. buckets: batch sizes of each; by default powers of two, the flow's and the vocoder's few, so
        that nobody waits long for a step of others, and one of a model that computes row by row. A lone slot has no
        neighbours to sound the same beside: its batches are of one. patient: parts whose steps wait where they can.
        priorities: of the parts' streams. options: as of ``Engine.add``.
        """
        for part, model in self.parts.items():
            most = MOST[part] if engine.device.type != "cpu" else min(MOST[part], MOST_ON_A_CPU)
            most = most if slots > 1 and getattr(model, "batched", True) else 1
            sizes = buckets[part] if buckets else default_buckets(min(most, max(slots, EXACT_ROWS)))
            settings: dict[str, Any] = {
                "tick": TICKS[part], "budget": BUDGETS[part], "stream": part, "priority": priorities[part],
                "patient": part in patient,
            }  # fmt: skip
            engine.add(f"{name}.{part}", model, slots=slots, buckets=sizes, **settings | options)

    def register(self, engine: Engine, name: str, voice: Voice) -> None:
        """Make a voice known under a name, in the engine's thread, where the models must be by now. Blocks.

        Raises ValueError for a voice that does not fit the models, or a name that is taken, and RuntimeError when the
        flow has no room for more.
        """
        if name in self.reader.voices:
            raise ValueError(f"there is a voice {name!r} already: give another name")
        tokens, lm = voice.prompt_tokens.tolist(), self.reader.lm.config
        text = tuple(self.reader.tokenizer.encode(voice.prompt_text)) if voice.prompt_text else ()
        least = len(text) + len(tokens) * bool(text) + STARTS + math.ceil(lm.passage * (1 + lm.extent[0]))
        if least > lm.capacity:
            raise ValueError(
                f"the voice {name!r} says {len(text)} tokens of text in {len(tokens) * TOKEN_SECONDS:.1f} s: with a "
                f"passage that is {least} tokens, a session has room for {lm.capacity}; make it of a shorter clip"
            )
        add = partial(self.flow.add_voice, tokens, voice.prompt_mel, voice.embedding)
        made = engine.ask_sync(add)
        self.reader.voices[name] = Registered(voice, made, text)

    @classmethod
    def of(cls, engine: Any, name: str = "speak") -> Speech:
        """What ``install`` added. Raises ValueError for names that are not there, TypeError for other models."""
        found = [engine.model(f"{name}.{part}") for part in PARTS]
        reader, flow, vocoder = found
        if isinstance(reader, Reader) and isinstance(flow, StreamingFlow) and isinstance(vocoder, HiFT):
            return cls(reader, flow, vocoder)
        raise TypeError(f"the models {name!r} do not speak: {', '.join(type(model).__name__ for model in found)}")
