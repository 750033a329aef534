"""Multi-head attention with relative positions (Transformer-XL, arXiv 1901.02860 section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.linear import Linear
from .config import ConformerConfig
from .context import Context


class RelativeAttention(nn.Module):
    """Scores are ``((q + u) k + (q + v) p) / sqrt(dk)``, ``p`` the projected embedding of the distance."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.heads, self.head_width = config.heads, config.width // config.heads
        self.qkv = Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = Linear(config.width, config.width, bias=config.bias)
        self.position = Linear(config.width, config.width, bias=False)
        self.bias_u = nn.Parameter(torch.zeros(self.heads, self.head_width))
        self.bias_v = nn.Parameter(torch.zeros(self.heads, self.head_width))
        self.dropout = config.attention_dropout

    def project_positions(self, embeddings: Tensor) -> Tensor:
        """``[P, d] -> [H, dk, P]``."""
        return self.position(embeddings).view(-1, self.heads, self.head_width).permute(1, 2, 0)

    def forward(self, x: Tensor, layer: int, context: Context) -> Tensor:
        """``[B, n, d] -> [B, n, d]``."""
        rows, frames, width = x.shape
        projected = self.qkv(x).view(rows, frames, 3, self.heads, self.head_width)
        query = projected[:, :, 0]
        keys, values = context.remember(layer, projected[:, :, 1:]).transpose(1, 3).unbind(2)
        scale = self.head_width**-0.5
        bias = context.position_scores(self, layer, (query + self.bias_v).transpose(1, 2)) * scale
        heard = F.scaled_dot_product_attention(
            (query + self.bias_u).transpose(1, 2),
            keys,
            values,
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
            scale=scale,
        )
        return self.out(heard.transpose(1, 2).reshape(rows, frames, width))
