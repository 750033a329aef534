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

LONGEST = 30
"""Seconds of the longest clip."""


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
    pcm: ``[n]`` mono samples at ``rate`` hertz, at most 30 s, which the tokenizer sees at once. speaker: a
    :class:`~.speaker.SpeakerEmbedding`. mel: the features of the flow that the voice is for, by default CosyVoice 2's.
    prompt_text: what the clip says.
    Raises ValueError for a clip that is too short or too long.
    """
    if len(pcm) > LONGEST * rate:
        raise ValueError(f"a voice is made of a clip of up to {LONGEST} s, got {len(pcm) / rate:.1f} s: cut it")
    heard = resample(pcm, rate, speech_tokenizer.SAMPLE_RATE)
    tokens = tokenizer.tokenize(heard)
    frames = (mel or prompt_mel.PromptMel())(torch.from_numpy(resample(pcm, rate, prompt_mel.SAMPLE_RATE))[None])
    return Voice.of(tokens, frames[0], speaker(heard), prompt_text, name)
