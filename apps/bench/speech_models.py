"""The models that ``bench speech`` measures: CosyVoice 2's sizes, random weights, voices of noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...codecs.hift import HiFT, HiFTConfig
from ...models.cosyvoice.flow import FlowMatching
from ...models.cosyvoice.flow_config import RATE, TOKEN_SECONDS, FlowConfig, FlowLimits
from ...models.cosyvoice.flow_stream import StreamingFlow
from ...models.cosyvoice.lm import SpeechLM
from ...models.cosyvoice.lm_config import LMConfig
from ...models.cosyvoice.voice import Voice
from ...pipelines.engine import Engine
from ...pipelines.speech import PARTS, PATIENT, PRIORITIES, Part, Reader, Speech
from .speech_load import text_of

NAME = "speak"  # of the models in the engine
TOKENS_A_WORD = 5  # of speech
VOICES = 4


@dataclass(frozen=True)
class Shape:
    """Sizes of the networks, and tokens of a voice's clip, of what is said in it and of an utterance."""

    lm: LMConfig
    flow: FlowConfig
    vocoder: HiFTConfig
    prompt: int
    prompt_text: int
    words: int


SHAPES = {
    "tiny": Shape(
        LMConfig(text=64, speech=50, width=32, layers=2, heads=4, kv_heads=2, feedforward=48),
        FlowConfig(
            vocabulary=50, speaker=6, chunk=5, width=32, heads=2, feedforward=48, layers=1, up_layers=1,
            channels=16, unet_heads=2, unet_head_width=8, stage_blocks=1, middle_stages=1, steps=2,
        ),
        HiFTConfig(
            width=16, pitch_width=8, harmonics=2, block_kernels=(3,), source_kernels=(3, 3, 3), dilations=(1,)
        ),
        prompt=15, prompt_text=4, words=9,
    ),
    "0.5b": Shape(LMConfig(), FlowConfig(), HiFTConfig(), prompt=125, prompt_text=15, words=40),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What serving chooses.

    hops: tokens of the flow's hops, in their order. left: mel frames that it looks back behind the voice's clip.
    kept: dtype of its keys and values, None for the weights'.
    bursts, prefill: of the language model. frames: of the vocoder's steps. rows: of the largest batch of a part.
    early: see ``FlowLimits``. patient, priorities: see ``Speech.install``.
    """

    hops: tuple[int, ...]
    left: int
    kept: str | None
    bursts: tuple[int, ...]
    prefill: tuple[int, ...]
    frames: tuple[int, ...]
    rows: dict[Part, int]
    early: bool = False
    patient: tuple[Part, ...] = PATIENT
    priorities: Mapping[Part, int] = field(default_factory=lambda: dict(PRIORITIES))


class Words:
    """A tokenizer that knows a token for every word, as long as the text does not need to be understood."""

    def __init__(self, count: int) -> None:
        self.count = count

    def encode(self, text: str) -> list[int]:
        """A token a word."""
        return [sum(map(ord, word)) % self.count for word in text.split()]


class Random:
    """Models of one shape with one set of random weights, for any number of engines."""

    def __init__(
        self, shape: Shape, settings: Settings, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> None:
        self.shape, self.settings, self.device, self.dtype = shape, settings, device, dtype
        self.tokens = shape.words * TOKENS_A_WORD
        read = shape.prompt_text + shape.words + 2 + shape.prompt
        capacity = -(-max(read + self.tokens, *settings.prefill, 64) // 64) * 64
        ratio = float(TOKENS_A_WORD)
        config = dataclasses.replace(
            shape.lm, capacity=capacity, extent=(ratio, ratio), passage=shape.words, bursts=settings.bursts,
            prefill=settings.prefill,
        )  # fmt: skip
        torch.manual_seed(seed)
        generator = torch.Generator(device).manual_seed(seed)
        with torch.device("meta"):
            self.lm = SpeechLM(config)
        self.lm.to_empty(device=device).to(dtype)
        for name, weight in self.lm.named_parameters():
            _fill(name, weight.data, generator)
        self.flow = FlowMatching(shape.flow).to(device, dtype).eval()
        self.vocoder = HiFT(shape.vocoder, settings.frames).to(device).eval()

    @property
    def seconds(self) -> float:
        """Of an utterance."""
        return self.tokens * TOKEN_SECONDS

    @property
    def limits(self) -> FlowLimits:
        hops = tuple(dict.fromkeys((*self.settings.hops, *self._rest)))
        kept = getattr(torch, self.settings.kept) if self.settings.kept else None
        return FlowLimits(
            hops, self.settings.left, rolling=True, voices=VOICES, prompt=self.shape.prompt, kept=kept,
            schedule=self.settings.hops, early=self.settings.early,
        )  # fmt: skip

    @property
    def _rest(self) -> tuple[int, ...]:
        """The first hop with what of the clip comes before it."""
        flow, prompt = self.shape.flow, self.shape.prompt
        if self.settings.early:
            prompt -= flow.late(prompt, self.settings.hops[0])
        shared = flow.shared(prompt)
        end = -(-(prompt + self.settings.hops[0]) // flow.chunk) * flow.chunk
        return (end - shared,)

    def speech(self) -> Speech:
        """For an engine."""
        flow = StreamingFlow(self.flow, self.limits, together=True)
        return Speech(Reader(self.lm, Words(self.shape.lm.text)), flow, self.vocoder)

    def install(self, engine: Engine, slots: int, rows: int | None = None) -> Speech:
        """The models in an engine, with voices. rows: of the only batch size there is, by default powers of two."""
        speech = self.speech()
        buckets = {part: (rows,) if rows else powers(min(slots, self.settings.rows[part])) for part in PARTS}
        speech.install(
            engine, NAME, slots=slots, buckets=buckets, patient=self.settings.patient,
            priorities=self.settings.priorities, exact=False,
        )  # fmt: skip
        for number in range(VOICES):
            speech.register(engine, f"voice {number}", self.voice(number))
        return speech

    def voice(self, number: int) -> Voice:
        """A clip."""
        shape, generator = self.shape, torch.Generator().manual_seed(number)
        return Voice(
            torch.randint(shape.lm.speech, (shape.prompt,), generator=generator),
            torch.randn(RATE * shape.prompt, shape.flow.mels, generator=generator),
            torch.randn(shape.flow.speaker, generator=generator),
            text_of(shape.prompt_text, number),
        )

    def slot_bytes(self) -> dict[Part, int]:
        """Of a session's state in each model."""
        parts = self.speech().parts
        return {part: sum(spec.bytes for spec in model.state_spec().values()) for part, model in parts.items()}

    def flow_bytes(self, lefts: Sequence[int]) -> dict[int, int]:
        """Of a session's state in the flow, by the frames that it keeps."""
        limits = [dataclasses.replace(self.limits, left=left, voices=1) for left in lefts]
        models = [StreamingFlow(self.flow, one) for one in limits]
        return {
            left: sum(spec.bytes for spec in model.state_spec().values())
            for left, model in zip(lefts, models, strict=True)
        }


def _fill(name: str, weight: Tensor, generator: torch.Generator) -> None:
    if weight.dim() < 2:
        weight.fill_(0.0 if name.endswith("bias") else 1.0)
    else:
        weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)


def powers(most: int) -> tuple[int, ...]:
    """1, 2, 4 and on, up to the first that is not below ``most``."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)
