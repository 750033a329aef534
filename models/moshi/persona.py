"""PersonaPlex's prompts (NVIDIA, a finetune of Moshi): who the model is to be, read before the conversation begins.

https://github.com/NVIDIA/personaplex, ``LMGen.step_system_prompts``: a voice, as sound that the model is made to have
said without a word; half a second of silence; the text, a token a frame, in silence; and half a second of silence.
All the while the user's sound is a tone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .config import FRAME_RATE, MoshiConfig

SILENCE = (948, 243, 1178, 546, 1736, 1030, 1978, 2008)  # Mimi's codes
TONE = (430, 1268, 381, 1611, 1095, 1495, 56, 472)
PAUSE = int(0.5 * FRAME_RATE)
MARK = "<system>"
LONGEST = 4000  # characters
LOUDNESS = -24.0  # LUFS of a voice's sound


def marked(text: str) -> str:
    """The text between the marks that the model knows. Raises ValueError for one that is too long."""
    text = text.strip()
    if len(text) > LONGEST:
        raise ValueError(f"a prompt of {len(text)} characters: {LONGEST} at most")
    return text if text.startswith(MARK) and text.endswith(MARK) else f"{MARK} {text} {MARK}"


def check(config: MoshiConfig) -> None:
    """Raises ValueError for a model that has not Moshi's streams."""
    if (config.spoken, config.heard) != (len(SILENCE), len(TONE)) or config.card <= max(*SILENCE, *TONE):
        raise ValueError("this model is not made for prompts: Moshi's 8 codebooks each way are wanted, of 2048 codes")


def prompt(
    tokens: Sequence[int], config: MoshiConfig, voice: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:  # fmt: skip
    """The tokens of ``marked`` text, and Mimi's codes of a voice, ``[8, frames]``, -> ``[steps, streams]``: what each
    step samples and hears.

    A step samples what is read at the next one; what is given for the very first is never read. Raises ValueError as
    ``check`` does.
    """
    check(config)
    said = np.zeros((len(SILENCE), 0), np.int64) if voice is None else voice
    padding = [config.padding] * PAUSE
    text = np.array([*[config.padding] * said.shape[1], *padding, *tokens, *padding, config.padding], np.int64)
    spoken = np.repeat(np.array(SILENCE, np.int64)[:, None], len(text), 1)
    spoken[:, : said.shape[1]] = said
    read_at = np.arange(1, len(text))[:, None]
    frame = np.maximum(read_at - np.array(config.delays[: 1 + len(SILENCE)]), 0)
    made = np.concatenate((text[None], spoken))[np.arange(len(spoken) + 1), frame]
    return np.concatenate((made, np.broadcast_to(TONE, (len(made), len(TONE)))), 1)
