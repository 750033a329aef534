"""A linear layer that may be packed (see :mod:`.packing`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels import few_rows
from .norm import RMSNorm
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

    def after(self, norm: RMSNorm, x: Tensor) -> Tensor:
        """Of the norm of ``x``; for a few rows of 16 bits in one kernel."""
        if x.dtype.itemsize != 2 or not few_rows(x, self.weight):
            return self(norm(x))
        from .triton_thin import thin

        return thin(x, self.weight, self.bias, norm=norm.weight, eps=norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = super().__call__(x)
        return result


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[..., in] -> [..., out]``; a few rows by a kernel of their own."""
    if not few_rows(x, weight):
        return F.linear(x, weight, bias)
    if x.dtype.itemsize == 2:
        from .triton_thin import thin

        return thin(x, weight, bias)
    from .triton_few import few

    return few(x, weight, bias)
