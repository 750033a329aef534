"""PersonaPlex's prompts (NVIDIA, a finetune of Moshi): who the model is to be, read before the conversation begins.

https://github.com/NVIDIA/personaplex, ``LMGen.step_system_prompts``: half a second of silence, the text, a token a
frame, and half a second of silence; all the while the model's own voice is silent, and the user's is a tone.
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


def marked(text: str) -> str:
    """The text between the marks that the model knows. Raises ValueError for one that is too long."""
    text = text.strip()
    if len(text) > LONGEST:
        raise ValueError(f"a prompt of {len(text)} characters: {LONGEST} at most")
    return text if text.startswith(MARK) and text.endswith(MARK) else f"{MARK} {text} {MARK}"


def prompt(tokens: Sequence[int], config: MoshiConfig) -> NDArray[np.int64]:
    """The tokens of ``marked`` text -> ``[steps, streams]``: what each step samples and hears.

    A step samples what is read at the next one; what is given for the very first is never read. Raises ValueError for
    a model that has not Moshi's streams.
    """
    if (config.spoken, config.heard) != (len(SILENCE), len(TONE)) or config.card <= max(*SILENCE, *TONE):
        raise ValueError("this model is not made for prompts: Moshi's 8 codebooks each way are wanted, of 2048 codes")
    padding = [config.padding] * PAUSE
    text = np.array([*padding[1:], *tokens, *padding, config.padding], np.int64)
    codes = np.array([*SILENCE, *TONE], np.int64)
    return np.concatenate((text[:, None], np.broadcast_to(codes, (len(text), len(codes)))), 1)
