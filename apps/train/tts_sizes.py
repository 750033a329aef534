"""What the embedded voice is: its networks' sizes, its voices, and the characters it reads."""

from __future__ import annotations

from dataclasses import dataclass

from ...codecs.hift import HiFTConfig
from ...codecs.speech_tokenizer import SpeechTokenizerConfig
from ...models.cosyvoice.flow_config import FlowConfig
from ...models.cosyvoice.lm_config import LMConfig
from .voices import RATE

TOKEN = RATE // 25
"""Samples of a speech token: 960. Utterances of the bank begin and end at multiples of it."""
FRAME = TOKEN // 2
"""Samples of a mel frame."""


@dataclass(frozen=True)
class Speaker:
    """Who speaks a voice's part of the bank: a teacher and its voice; share: of the hours."""

    teacher: str
    voice: str
    share: float


VOICES = {
    "heart": Speaker("hibari", "heart", 16.0),
    "michael": Speaker("kokoro", "am_michael", 1.0),
    "emma": Speaker("kokoro", "bf_emma", 1.0),
}
"""By name; the first is the default. A voice's number is its place."""

ALPHABET = " abcdefghijklmnopqrstuvwxyz.,?!'-;:"
"""The text tokens, in order from 0. ``tts_bank.written`` brings a text into them."""
VOICE_TOKENS = tuple(f"<{name}>" for name in VOICES)
"""Text tokens behind the alphabet: the language model reads that of the voice first, as the voice's prompt text."""
TEXT = 64
"""Text tokens there is room for: alphabet, voices and the tokenizer's special tokens."""

TOKENIZER = SpeechTokenizerConfig(mels=80, width=256, heads=4, layers=4, digits=6)
"""Sound to speech tokens; only training needs it."""
LM = LMConfig(
    text=TEXT,
    speech=TOKENIZER.vocabulary,
    width=256,
    layers=7,
    heads=4,
    kv_heads=2,
    feedforward=1024,
    theta=10000.0,
    capacity=1024,
    mix=(12, 15),
    extent=(0.6, 8.0),
    passage=160,
)
FLOW = FlowConfig(
    vocabulary=TOKENIZER.vocabulary,
    speaker=16,
    width=192,
    heads=4,
    feedforward=768,
    layers=4,
    up_layers=2,
    channels=160,
    unet_heads=5,
    unet_head_width=32,
    stage_blocks=1,
    middle_stages=4,
)
VOCODER = HiFTConfig(width=192, pitch_width=192, dilations=(1, 3))
