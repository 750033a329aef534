"""PersonaPlex's saved voices: written as its code writes them, read back as the codes they were made of."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_moshi import tiny_lm
from torch import Tensor

from antiphon.models.files import CheckpointError
from antiphon.models.moshi.lm import MoshiLM
from antiphon.models.moshi.persona import TONE
from antiphon.models.moshi.saved_voice import read

WIDTH, CARD, FRAMES = 256, 2048, 12
VOICE = np.random.default_rng(0).integers(0, CARD, (8, FRAMES))


@lru_cache
def model(delay: int = 1, seed: int = 0, rank: int = WIDTH) -> MoshiLM:
    """Embeddings with much in common, as trained ones have. rank: directions in which they differ."""
    changes: dict[str, Any] = {"dim": WIDTH, "card": CARD, "num_layers": 1, "delays": [0, *[0, *[delay] * 7] * 2]}
    lm = tiny_lm(seed, **changes)
    with torch.no_grad():
        lm.embedding.weight[:, rank:] = 0
        lm.embedding.weight += torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) * WIDTH**-0.5
    return lm


def saved(lm: MoshiLM, voice: NDArray[np.int64], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A frame at a time: tokens go to the cache where they will be read, and all calls but the first read a place."""
    delays, size = lm.config.delays, max(lm.config.delays) + 3
    initial = lm.delays.initial
    cache, sums = torch.full((1, 17, size), -2), []
    for offset, codes in enumerate(voice.T.tolist()):
        for stream, (token, delay) in enumerate(zip([3, *codes, *TONE], delays, strict=True)):
            cache[0, stream, (offset + delay) % size] = token
        for stream, delay in enumerate(delays):
            if offset <= delay:
                cache[0, stream, offset % size] = initial[stream]
        if offset == 0:
            cache[0, :, 0] = initial
            continue
        total = torch.zeros(WIDTH, dtype=dtype)
        for stream in (*range(1, 17), 0):
            token = int(cache[0, stream, (offset - 1) % size])
            total = total + lm.embedding.weight[lm.offsets[stream] + token].detach().to(dtype)
        sums.append(total[None, None])
    return {"embeddings": torch.stack(sums), "cache": cache}


def known(voice: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first frame's codes are 0: its places read the start."""
    return np.concatenate((np.zeros_like(voice[:, :1]), voice[:, 1:]), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("frames", "delay"), [(FRAMES, 1), (FRAMES, 2), (FRAMES, 0), (3, 1), (2, 1)])
def test_its_codes_come_back(tmp_path: Path, frames: int, delay: int, dtype: torch.dtype) -> None:
    lm, voice = model(delay), VOICE[:, :frames]
    torch.save(saved(lm, voice, dtype), tmp_path / "NATF2.pt")
    assert np.array_equal(read(tmp_path / "NATF2.pt", lm), known(voice))


def test_codes_that_are_hard_to_tell_apart(tmp_path: Path) -> None:
    lm = model(rank=128)
    torch.save(saved(lm, VOICE, torch.bfloat16), tmp_path / "NATF2.pt")
    assert np.array_equal(read(tmp_path / "NATF2.pt", lm), known(VOICE))


def test_what_is_no_voice_of_this_model(tmp_path: Path) -> None:
    lm, file = model(), tmp_path / "NATF2.pt"
    good = saved(lm, VOICE)
    other = saved(lm, VOICE[:, ::-1])
    with pytest.raises(ValueError, match="not made for prompts"):
        read(file, tiny_lm())
    bad: list[tuple[Any, str]] = [
        (saved(model(seed=1), VOICE), "not this model's"),
        (good | {"embeddings": torch.randn_like(good["embeddings"])}, "not this model's"),
        (good | {"embeddings": good["embeddings"] * torch.nan}, "not this model's"),
        (good | {"cache": other["cache"]}, "do not belong together"),
        (good | {"cache": good["cache"][..., :3]}, r"a cache of \(1, 17, 3\)"),
        (good | {"embeddings": good["embeddings"][..., :-1]}, r"embeddings of \(11, 1, 1, 255\)"),
        (good | {"embeddings": good["embeddings"][:0]}, "embeddings of"),
        ({"embeddings": good["embeddings"]}, "lacks 'cache'"),
        ([1, 2], "NATF2"),
    ]
    broken = good["cache"].clone()
    broken[0, 2, FRAMES % 4] = -2
    bad.append((good | {"cache": broken}, "no code"))
    for content, told in bad:
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=told):
            read(file, lm)
