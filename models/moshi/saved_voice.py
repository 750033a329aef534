"""PersonaPlex's saved voices (``NATF2.pt``): sums of token embeddings, and the codes that they are sums of.

https://github.com/NVIDIA/personaplex, ``LMGen.load_voice_prompt_embeddings``: of a voice prompt of ``n`` frames,
``embeddings [n - 1, 1, 1, width]``, what its positions but the last read; and ``cache [1, streams, delay + 3]``, the
tokens of the newest positions, by position modulo its length. A sum tells which codes it is of, since it has far more
numbers than there are codebooks: they are sought one codebook after the other until none changes, from other beginnings
where that leads nowhere, and have to give the sum again and what the cache holds. So a voice is codes wherever it comes
from; one that was saved with other weights is refused.
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

SWEEPS, ATTEMPTS = 50, 20
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
    tables = [lm.embedding.weight[start : start + config.card].float() for start in lm.offsets[1 : 1 + config.spoken]]
    sought = read[1 : 1 + config.spoken].to(sums.device) == ZERO
    made = read.to(sums.device)
    left = torch.arange(len(sums), device=sums.device)
    random = torch.Generator().manual_seed(0)
    for attempt in range(ATTEMPTS):  # from the tables' means, then for what is left from codes at random
        where = sought[:, left, None]
        drawn = torch.randint(config.card, (len(tables), len(left)), generator=random).to(left.device)
        start = [table[one] if attempt else table.mean(0) for table, one in zip(tables, drawn, strict=True)]
        parts = torch.stack([one * at for one, at in zip(start, where, strict=True)])
        codes, parts = _descend(rest[left], tables, parts, where)
        made[1 : 1 + config.spoken, left] = torch.where(where[..., 0], codes, made[1 : 1 + config.spoken, left])
        off = (rest[left] - parts.sum(0)).norm(dim=1) / sums[left].norm(dim=1)
        left = left[~(off <= TOLERANCE)]
        if not len(left):
            return made.cpu()
    raise ValueError("its embeddings are not this model's: use the weights it was saved with, or a clip")


def _descend(wanted: Tensor, tables: list[Tensor], parts: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[books, positions]`` and their embeddings, no one of which could be changed alone for the better."""
    codes = torch.full(parts.shape[:2], ZERO, device=parts.device)
    for _ in range(SWEEPS):
        before = codes.clone()
        for book, table in enumerate(tables):
            alone = wanted - parts.sum(0) + parts[book]
            codes[book] = (alone @ table.T - table.square().sum(1) / 2).argmax(1)  # the nearest
            parts[book] = table[codes[book]] * where[book]
        if torch.equal(codes, before):
            break
    return codes, parts
