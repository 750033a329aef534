"""PersonaPlex's saved voices (``NATF2.pt``): sums of token embeddings, and the codes that they are sums of.

https://github.com/NVIDIA/personaplex, ``LMGen.load_voice_prompt_embeddings``: of a voice prompt of ``n`` frames,
``embeddings [n - 1, 1, 1, width]``, what its positions but the last read; and ``cache [1, streams, delay + 3]``, the
tokens of the newest positions, by position modulo its length. A sum tells which codes it is of, since it has far more
numbers than there are codebooks: they are sought one codebook after the other until none changes, and then have to give
the sum again, and what the cache holds. So a voice is codes wherever it comes from; one that was saved with other
weights is refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..files import reading
from . import persona
from .config import ZERO
from .lm import MoshiLM

SWEEPS = 50
TOLERANCE = 0.02  # of a sum's length; that of 17 numbers in bfloat16 is rounded by less than 0.005


def read(path: Path, lm: MoshiLM) -> NDArray[np.int64]:
    """A voice's codes, ``[8, frames]``; those that no position reads are 0.

    Raises CheckpointError for what is no saved voice of this model, and ValueError as ``persona.check`` does.
    """
    persona.check(lm.config)
    width, shape = lm.config.temporal.width, (1, lm.config.streams, lm.config.delay + 3)
    with reading(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        sums, cache = saved["embeddings"], saved["cache"]
        if sums.ndim != 4 or not len(sums) or sums.shape[1:] != (1, 1, width) or cache.shape != shape:
            raise ValueError(
                f"embeddings of {tuple(sums.shape)} and a cache of {tuple(cache.shape)} are no voice for this model, "
                f"which has [n, 1, 1, {width}] and {shape}"
            )
        with torch.inference_mode():
            return _codes(sums[:, 0, 0].to(lm.embedding.weight.device).float(), cache[0].long(), lm)


def _codes(sums: Tensor, cache: Tensor, lm: MoshiLM) -> NDArray[np.int64]:
    """Raises ValueError where the sums and the cache are not of this model."""
    config, size = lm.config, cache.shape[1]
    frames = len(sums) + 1
    delays = torch.tensor(config.delays)[:, None]
    position = torch.arange(frames + config.delay)
    fixed = torch.tensor([config.padding, *[ZERO] * config.spoken, *persona.TONE])[:, None]
    read = torch.where(position > delays, fixed, lm.delays.initial.cpu()[:, None])  # [streams, positions]
    read[:, : len(sums)] = _filled(sums, read[:, : len(sums)], lm)
    # The cache has what follows, as far ahead as each stream is late, and two positions before that.
    for place in position[-size:].tolist():
        held, own = cache[:, place % size], read[:, place]
        there = place < frames + delays[:, 0]
        if bool((there & (own != ZERO) & (own != held)).any()):
            raise ValueError("its embeddings and its cache do not belong together: fetch it again, or use a clip")
        read[:, place] = torch.where(there, held, own)
    codes = [read[1 + book, delay : delay + frames] for book, delay in enumerate(config.delays[1 : 1 + config.spoken])]
    spoken = torch.stack(codes)
    if int(spoken.min()) < 0 or int(spoken.max()) > config.card:
        raise ValueError("its cache holds what is no code: fetch it again, or use a clip")
    return torch.where(spoken < config.card, spoken, 0).numpy()


def _filled(sums: Tensor, read: Tensor, lm: MoshiLM) -> Tensor:
    """``[streams, positions]`` tokens whose embeddings add up to the sums, with codes in place of ``ZERO``."""
    config = lm.config
    position = torch.arange(len(sums), device=sums.device)[None]
    rest = sums - lm.embed(read[None].to(sums.device), position)[0].float()
    made = read.clone()
    tables = [lm.embedding.weight[start : start + config.card].float() for start in lm.offsets[1 : 1 + config.spoken]]
    sought = (read[1 : 1 + config.spoken] == ZERO).to(sums.device)[..., None]
    parts = torch.stack([table.mean(0) * where for table, where in zip(tables, sought, strict=True)])
    for _ in range(SWEEPS):
        before = made.clone()
        for book, table in enumerate(tables):
            wanted = rest - parts.sum(0) + parts[book]
            nearest = (wanted @ table.T - table.square().sum(1) / 2).argmax(1)
            parts[book] = table[nearest] * sought[book]
            made[1 + book] = torch.where(sought[book, :, 0], nearest, made[1 + book].to(nearest)).cpu()
        if torch.equal(made, before):
            break
    if not bool(((rest - parts.sum(0)).norm(dim=1) <= TOLERANCE * sums.norm(dim=1)).all()):
        raise ValueError("its embeddings are not this model's: use the weights it was saved with, or a clip")
    return made
