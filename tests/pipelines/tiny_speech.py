"""Tiny random models that speak: CosyVoice 2's three networks, a tokenizer of a few words, and two voices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from antiphon.codecs.hift import HiFT, HiFTConfig
from antiphon.models.cosyvoice.flow import FlowMatching
from antiphon.models.cosyvoice.flow_config import FlowConfig, FlowLimits
from antiphon.models.cosyvoice.flow_stream import StreamingFlow
from antiphon.models.cosyvoice.lm import SpeechLM
from antiphon.models.cosyvoice.lm_config import LMConfig
from antiphon.models.cosyvoice.tokenizer import TextTokenizer
from antiphon.models.cosyvoice.voice import Voice
from antiphon.pipelines.speech import Reader, Speech
from antiphon.pipelines.speech_checkpoint import save

SPEECH, TEXT, MELS = 50, 320, 8
CHUNK = 5
LM = LMConfig(
    text=TEXT, speech=SPEECH, width=32, layers=1, heads=2, kv_heads=1, feedforward=48, capacity=512, prefill=(8, 64)
)
FLOW = FlowConfig(
    vocabulary=SPEECH, mels=MELS, speaker=6, chunk=CHUNK, width=32, heads=2, feedforward=48, layers=1, up_layers=1,
    channels=16, unet_heads=2, unet_head_width=8, stage_blocks=1, middle_stages=1, steps=2,
)  # fmt: skip
LIMITS = FlowLimits(hops=(25, 50, 100), left=600, voices=8, prompt=40)
VOCODER = HiFTConfig(
    mels=MELS, width=16, pitch_width=8, harmonics=2, block_kernels=(3,), source_kernels=(3, 3, 3), dilations=(1,)
)
WORDS = "it was the best of times it was the worst of times we had everything before us and so on"


@lru_cache
def tokenizer_json() -> str:
    """A byte-level BPE of a few pairs."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([WORDS] * 4, trainer)
    text: str = made.to_str()
    return text


def networks(seed: int = 0, bursts: tuple[int, ...] = ()) -> tuple[SpeechLM, FlowMatching, HiFT]:
    """Random weights; the language model ends most passages before it has to."""
    generator = torch.Generator().manual_seed(seed)
    lm, flow, vocoder = SpeechLM(replace(LM, bursts=bursts)), FlowMatching(FLOW), HiFT(VOCODER)
    with torch.no_grad():
        for network in (lm, flow, vocoder):
            for name, weight in network.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                centre = 1.0 if ("norm" in name and name.endswith("weight")) or name.endswith("alpha") else 0.0
                spread = 0.1 if weight.dim() < 2 else 0.7 * weight[0].numel() ** -0.5
                weight.copy_(centre + noise * spread)
        lm.embedding.weight.copy_(torch.randn(lm.embedding.weight.shape, generator=generator))
        vocoder.f0_predictor.classifier.weight.mul_(2000)
        vocoder.m_source.l_linear.weight.mul_(30)
        vocoder.conv_post.weight.mul_(0.3)
    return lm.eval(), flow.eval(), vocoder.eval()


def voice(seed: int = 0, tokens: int = 13, text: str = "it was the worst") -> Voice:
    generator = torch.Generator().manual_seed(seed)
    return Voice(
        torch.randint(SPEECH, (tokens,), generator=generator),
        torch.randn(2 * tokens, MELS, generator=generator),
        torch.randn(FLOW.speaker, generator=generator),
        text,
    )


def write(folder: Path, manner: Mapping[str, Any] | None = None, *, voices: bool = True) -> Path:
    """The models in our layout, with the voices ``ada`` and ``bob``. manner: other settings."""
    save(folder, *networks(), {"voice": "bob", **(manner or {})})
    (folder / "tokenizer.json").write_text(tokenizer_json())
    if voices:
        (folder / "voices").mkdir()
        voice(1).save(folder / "voices" / "ada.safetensors")
        voice(2, 18, "").save(folder / "voices" / "bob.safetensors")
    return folder


def tiny_speech(folder: Path, limits: FlowLimits = LIMITS, bursts: tuple[int, ...] = ()) -> Speech:
    """folder: for the tokenizer's file."""
    (folder / "tokenizer.json").write_text(tokenizer_json())
    lm, flow, vocoder = networks(bursts=bursts)
    return Speech(Reader(lm, TextTokenizer(folder)), StreamingFlow(flow, limits), vocoder)
