"""A voice from a clip of a speaker: its tokens, its mel frames and the speaker's embedding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.cosyvoice.voice import Voice
from . import prompt_mel, speech_tokenizer
from .resample import resample

Samples = NDArray[np.float32]

SHORTEST, LONGEST = 1.0, 30.0
"""Seconds of a clip; 3 to 10 are enough."""
SILENT = 0.003
"""Peak below which nothing is heard."""


def check(pcm: Samples, rate: int) -> None:
    """Raises ValueError for a clip that no voice is made of, with the remedy."""
    seconds = len(pcm) / rate
    if not SHORTEST <= seconds <= LONGEST:
        remedy = "cut it" if seconds > LONGEST else "record more"
        raise ValueError(f"the clip lasts {seconds:.1f} s: {remedy}, a voice takes {SHORTEST:g} to {LONGEST:g} s")
    if np.abs(pcm).max() < SILENT:
        raise ValueError("the clip is silent: record it louder, or look whether the microphone was muted")


def voice_from_clip(
    pcm: Samples,
    rate: int,
    *,
    tokenizer: speech_tokenizer.Tokenizes,
    speaker: Callable[[Samples], Tensor],
    mel: prompt_mel.PromptMel | None = None,
    prompt_text: str = "",
    name: str = "",
) -> Voice:
    """
    pcm: ``[n]`` mono samples at ``rate`` hertz, 1 to 30 s, which the tokenizer sees at once. speaker: a
    :class:`~.speaker.SpeakerEmbedding`. mel: the features of the flow that the voice is for, by default CosyVoice 2's.
    prompt_text: what the clip says.
    Raises ValueError for a clip that is too short, too long or silent.
    """
    check(pcm, rate)
    heard = resample(pcm, rate, speech_tokenizer.SAMPLE_RATE)
    tokens = tokenizer.tokenize(heard)
    frames = (mel or prompt_mel.PromptMel())(torch.from_numpy(resample(pcm, rate, prompt_mel.SAMPLE_RATE))[None])
    return Voice.of(tokens, frames[0], speaker(heard), prompt_text, name)
