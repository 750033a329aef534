"""PersonaPlex's prompts, token by token: what each position reads is what upstream's cache holds there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_moshi import SETTINGS, TEXT, tiny_lm

from antiphon.models.moshi.config import UNSET
from antiphon.models.moshi.persona import SILENCE, TONE, prompt

PAD, CARD = 3, 2048
VOICE = np.random.default_rng(0).integers(0, CARD, (8, 9))
WORDS = [7, 8, 9, 10]


def frames(voice: NDArray[np.int64]) -> list[list[int]]:
    """Text, own codes and heard codes of each frame of a prompt: voice, silence, text, silence."""
    return [
        *([PAD, *codes, *TONE] for codes in voice.T.tolist()),
        *([token, *SILENCE, *TONE] for token in [*[PAD] * 6, *WORDS, *[PAD] * 6]),
    ]


@pytest.mark.parametrize("voice", [VOICE, VOICE[:, :1], None], ids=["voice", "one frame", "no voice"])
@pytest.mark.parametrize("delay", [1, 2, 0])
def test_every_position_reads_the_frame_of_its_delay(voice: NDArray[np.int64] | None, delay: int) -> None:
    changes: dict[str, Any] = {"card": CARD, "delays": [0, *[0, *[delay] * 7] * 2]}
    lm = tiny_lm(**changes)
    rows = prompt(WORDS, lm.config, voice)
    wanted = frames(VOICE[:, :0] if voice is None else voice)
    assert len(rows) == len(wanted)
    tokens, ring = torch.from_numpy(rows).T[None], torch.full((1, 17, delay + 2), UNSET)
    nothing = torch.zeros(1, dtype=torch.int64)
    read = lm.delays.read(ring, nothing, tokens)[0]
    initial = [TEXT, *[CARD] * 16]
    for position in range(len(wanted)):
        for stream, late in enumerate(changes["delays"]):
            expected = initial[stream] if position <= late else wanted[position - late][stream]
            assert int(read[stream, position]) == expected, (position, stream)
    # The first position after it: what of the prompt's last frames comes late, and silence.
    ring = lm.delays.write(ring, nothing, tokens, torch.tensor([len(rows)]))
    after = lm.delays.read(ring, torch.tensor([len(rows)]), torch.full((1, 17, 1), UNSET))[0, :, 0]
    assert after[:9].tolist() == [PAD, *SILENCE]
    assert after[10:].tolist() == (list(TONE[1:]) if delay else [UNSET] * 7)


def test_a_model_of_other_streams_has_no_prompts() -> None:
    with pytest.raises(ValueError, match="not made for prompts"):
        prompt(WORDS, tiny_lm().config, VOICE)
    assert SETTINGS["card"] < CARD
