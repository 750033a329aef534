"""A linear layer with weights of its own for each step of a frame, as depth transformers have (RQ-Transformer)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .linear import plain_linear
from .packing import Packable, pack_weight, packed_linear

Depth = int | Tensor | None  # the weights to use: one set for all positions, ``[T]`` one a position, or no choice


class SteppedLinear(Packable):
    """``steps`` linear layers without bias, of one shape."""

    packed: tuple[Tensor, ...] | None = None

    def __init__(self, steps: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(steps, out_features, in_features))
        nn.init.uniform_(self.weight, -(in_features**-0.5), in_features**-0.5)

    def pack(self) -> None:
        packed = [pack_weight(weight) for weight in self.weight]
        self.packed = tuple(weight for weight in packed if weight is not None) or None

    def forward(self, x: Tensor, depth: Depth) -> Tensor:
        """``[B, T, in] -> [B, T, out]``; depth: which weights, an int for all positions or ``[T]`` int64."""
        weight = self.of(depth)
        if depth is None or isinstance(depth, Tensor):
            return torch.einsum("bti,toi->bto", x, weight)
        if self.packed is None or torch.is_grad_enabled():
            return plain_linear(x, weight, None)
        return packed_linear(x, self.packed[depth], None)

    def of(self, depth: Depth) -> Tensor:
        """The weights of one step ``[out, in]``, or of several. Raises ValueError for None."""
        if depth is None:
            raise ValueError("this layer has weights per depth step: say which step it is")
        return self.weight[depth]
