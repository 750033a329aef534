"""Split residual vector quantisation (Mimi, arXiv 2410.00037, section 3.3.3).

The semantic codebooks and the acoustic ones quantise the same latent, each through projections of their own, and what
they stand for is added up. Within a branch each codebook quantises what the ones before left (arXiv 2107.03312).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.layers.kernels import use_kernels
from ..models.layers.linear import Linear
from ..models.layers.packing import Packable, pack_weight, packed_linear


class Codebooks(Packable):
    """``count`` codebooks of ``bins`` entries of ``width`` numbers."""

    embedding: Tensor
    packed: tuple[Tensor, tuple[Tensor | None, ...]] | None = None

    def __init__(self, count: int, bins: int, width: int) -> None:
        super().__init__()
        self.bins = bins
        self.register_buffer("embedding", torch.zeros(count, bins, width))

    def pack(self) -> None:
        """Make what the search needs beside the entries, on any device and in any precision."""
        self.packed = self._offsets(), tuple(map(pack_weight, self.embedding))

    def encode(self, x: Tensor, count: int) -> Tensor:
        """``[N, width]`` -> the codes of the first ``count`` codebooks, ``[count, N]`` int64."""
        offsets, packed = self.packed or (self._offsets(), (None,) * len(self.embedding))
        codes = []
        for entries, offset, weight in zip(self.embedding[:count], offsets, packed, strict=False):
            # The nearest entry e has the largest x.e - |e|^2 / 2.
            scores = torch.addmm(offset, x, entries.t()) if weight is None else packed_linear(x, weight, offset)
            code, x = _nearest(scores, entries, x)
            codes.append(code)
        return torch.stack(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """The sum of the entries: ``[B, K, n]``, K no more than there are, ``-> [B, n, width]``.

        Whatever is not a code, such as -1, stands for nothing, so that rows may have different numbers of codebooks.
        """
        first = torch.arange(codes.shape[1], device=codes.device)[:, None] * self.bins
        real = (codes >= 0) & (codes < self.bins)
        entries = F.embedding(torch.where(real, codes + first, 0), self.embedding.flatten(0, 1))
        return (entries * real[..., None]).sum(1)

    def _offsets(self) -> Tensor:
        return self.embedding.square().sum(2) * -0.5


def _nearest(scores: Tensor, entries: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which entry scores most, ``[N]`` int64, and ``x`` less that entry."""
    if use_kernels(x):
        from ..models.layers.triton_nearest import nearest

        return nearest(scores, entries, x)
    code = scores.argmax(1)
    return code, x - F.embedding(code, entries)


class ResidualQuantizer(nn.Module):
    """Codebooks behind a projection, and the way back."""

    def __init__(self, width: int, count: int, bins: int, code_width: int) -> None:
        super().__init__()
        self.into = Linear(width, code_width, bias=False)
        self.codebooks = Codebooks(count, bins, code_width)
        self.back = Linear(code_width, width, bias=False)

    def encode(self, latents: Tensor, count: int) -> Tensor:
        """``[B, n, d] -> [B, count, n]`` int64."""
        codes = self.codebooks.encode(self.into(latents).flatten(0, 1), count)
        return codes.view(count, *latents.shape[:2]).transpose(0, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """``[B, K, n] -> [B, n, d]``."""
        return self.back(self.codebooks.decode(codes))


class SplitQuantizer(nn.Module):
    """``semantic`` codebooks beside ``count - semantic`` acoustic ones."""

    def __init__(self, width: int, count: int, semantic: int, bins: int, code_width: int) -> None:
        super().__init__()
        self.count, self.split = count, semantic
        self.semantic = ResidualQuantizer(width, semantic, bins, code_width)
        self.acoustic = ResidualQuantizer(width, count - semantic, bins, code_width)

    def check(self, codebooks: int) -> None:
        """Raises ValueError for a number of codebooks that there is not."""
        if not self.split <= codebooks <= self.count:
            raise ValueError(f"this codec has {self.split} to {self.count} codebooks, not {codebooks}")

    def encode(self, latents: Tensor, codebooks: int) -> Tensor:
        """``[B, n, d] -> [B, codebooks, n]`` int64. The first codes do not depend on how many are asked for."""
        semantic = self.semantic.encode(latents, self.split)
        if codebooks == self.split:
            return semantic
        return torch.cat((semantic, self.acoustic.encode(latents, codebooks - self.split)), 1)

    def decode(self, codes: Tensor) -> Tensor:
        """``[B, codebooks, n] -> [B, n, d]``; what is not a code counts as nothing."""
        latents = self.semantic.decode(codes[:, : self.split])
        return latents + self.acoustic.decode(codes[:, self.split :]) if codes.shape[1] > self.split else latents
