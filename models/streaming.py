"""The contract between models and the engine: a model is a pure step over slots of preallocated state.

State is declared, never hidden: ``state_spec`` names every tensor a session owns, the engine allocates each with a
leading slot axis, and ``step`` reads and writes rows of them. Reset, snapshot, restore and fork are then the same few
lines for every model (``pipelines/engine/slots.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorSpec:
    """Shape without the slot (or batch) axis, dtype, and the value a fresh slot (or a padding row) holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    reset: float = 0.0

    def new(self, rows: int, device: torch.device | str = "cpu") -> Tensor:
        """A tensor ``[rows, *shape]`` filled with the reset value."""
        return torch.full((rows, *self.shape), self.reset, dtype=self.dtype, device=device)

    @property
    def bytes(self) -> int:
        """Bytes of one row."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


Specs = Mapping[str, TensorSpec]
State = Mapping[str, Tensor]


class StreamingModel(nn.Module, ABC):
    """A network stepped by the engine for many sessions at once.

    A *variant* is what the engine batches by: rows of one call share it (for a recogniser, the lookahead). It fixes
    the input shapes and the media time of a step; it is never stored on the model.
    """

    @property
    @abstractmethod
    def variants(self) -> tuple[Hashable, ...]:
        """Every variant that ``step`` accepts; the first is the default."""

    @abstractmethod
    def tick(self, variant: Hashable) -> float:
        """Seconds of media that one step of this variant consumes or makes."""

    @abstractmethod
    def state_spec(self) -> Specs:
        """Name -> one session's state tensor. The same for all variants."""

    @abstractmethod
    def input_spec(self, variant: Hashable) -> Specs:
        """Name -> one row's input tensor. ``reset`` is what padding rows hold."""

    def prepare(self) -> None:
        """Make tables, packed weights and the like. The engine calls it once the weights are final and in place."""

    @abstractmethod
    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """Advance ``B`` sessions by one chunk.

        inputs: name -> ``[B, ...]`` as in ``input_spec``; the variant follows from the shapes.
        state: name -> ``[S + 1, ...]``; row ``S`` is scratch. Updated in place at ``slots``.
        slots: ``[B]`` int64. Padding rows point at the scratch slot, so only they may repeat.
        active: ``[B]`` bool; rows with False leave their slot as it was (padding rows may scribble on scratch).
        Returns name -> ``[B, ...]``, freshly allocated, of fixed shapes given the variant.

        No host synchronisation on CUDA and no data-dependent shapes: the engine captures the call in a CUDA graph. On
        the CPU a loop may end early. A row's result must not depend on the other rows.
        """
