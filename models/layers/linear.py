"""A linear layer that may be packed (see :mod:`.packing`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels import use_kernels
from .packing import Packable, pack_weight, packed_linear


class Linear(Packable, nn.Linear):
    """``nn.Linear`` with ``pack()``."""

    packed: Tensor | None = None

    def pack(self) -> None:
        self.packed = pack_weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        if self.packed is None or torch.is_grad_enabled():
            return plain_linear(x, self.weight, self.bias)
        return packed_linear(x, self.packed, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = super().__call__(x)
        return result


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[..., in] -> [..., out]``; a few rows of float32 by a kernel of their own."""
    if use_kernels(x) and x.dtype == weight.dtype == torch.float32:
        from .triton_few import FEW, LONGEST, few

        if 0 < x.numel() <= FEW * x.shape[-1] and x.shape[-1] <= LONGEST:
            return few(x, weight, bias)
    return F.linear(x, weight, bias)
