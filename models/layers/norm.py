"""Root mean square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, computed in at least float32."""

    def __init__(self, width: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d] -> [..., d]``."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
