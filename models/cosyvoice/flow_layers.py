"""Layers that the flow's encoder and its UNet share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.linear import Linear
from .flow_context import Context


class CausalConv(Linear):
    """A convolution over the last ``kernel`` positions, kept as one matrix ``[outputs, kernel * inputs]``.

    ``columns`` are its place among the channels that the owner's convolutions remember, see ``number``.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(kernel * inputs, outputs)
        self.inputs, self.kernel = inputs, kernel
        self.columns = slice(0, inputs)

    def convolve(self, x: Tensor, context: Context) -> Tensor:
        """``[B, n, inputs] -> [B, n, outputs]``."""
        return self.along(context.history(self.columns, x, self.kernel - 1))

    def along(self, x: Tensor) -> Tensor:
        """``[B, kernel - 1 + n, inputs] -> [B, n, outputs]``: without padding."""
        n = x.shape[1] - self.kernel + 1
        return self(torch.cat([x[:, step : step + n] for step in range(self.kernel)], 2))


def number(module: nn.Module) -> int:
    """Give every causal convolution of a module columns of its own; returns how many there are."""
    columns = 0
    for child in module.modules():
        if isinstance(child, CausalConv):
            child.columns = slice(columns, columns + child.inputs)
            columns += child.inputs
    return columns
