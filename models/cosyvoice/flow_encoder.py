"""The flow's encoder: speech tokens (25 Hz) to what the mel frames (50 Hz) should be like.

Transformer blocks with relative positions (Transformer-XL, arXiv 1901.02860 section 3.3), first over tokens that were
mixed with the three after them, then over frames; ``cosyvoice/transformer/upsample_encoder.py`` upstream.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.linear import Linear
from .flow_config import RATE, FlowConfig
from .flow_context import CacheShape, Context
from .flow_layers import CausalConv

BEHIND = 3  # kernel of the convolution behind the lookahead
UPSAMPLE = 2 * RATE + 1  # kernel of the convolution behind the repetition of frames


class Positions:
    """The sines of one call's positions, for scores by distance.

    The embedding of a distance i - j has sin((i - j) r) and cos((i - j) r) for each rate r. With the addition theorems
    a product with it becomes a product of a vector turned by i and the sines of j, whatever the distance.
    """

    def __init__(self, context: Context, width: int, dtype: torch.dtype) -> None:
        origin = context.queries[:, :1]
        index = torch.arange(0, width, 2, dtype=torch.float64, device=origin.device)
        rates = torch.exp(index * -(math.log(10000.0) / width))
        queries, keys = (
            (positions - origin).double()[..., None] * rates for positions in (context.queries, context.keys)
        )
        self.sin, self.cos = queries.sin().to(dtype)[:, :, None], queries.cos().to(dtype)[:, :, None]
        self.keys = torch.cat((keys.cos(), keys.sin()), 2).to(dtype).transpose(1, 2)

    def scores(self, x: Tensor) -> Tensor:
        """``[B, n, H, width]``, factors of each sine and cosine in turn, to ``[B, H, n, m]``."""
        sines, cosines = x[..., 0::2], x[..., 1::2]
        turned = torch.cat((sines * self.sin + cosines * self.cos, cosines * self.sin - sines * self.cos), 3)
        scores: Tensor = (turned.flatten(1, 2) @ self.keys).unflatten(1, turned.shape[1:3])
        return scores.transpose(1, 2)


class RelativeAttention(nn.Module):
    """Scores are ``((q + u) k + (q + v) p) / sqrt(dk)``, ``p`` the projected embedding of the distance."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.position = nn.Parameter(torch.empty(heads, self.head_width, width).normal_(std=width**-0.5))
        self.bias_u = nn.Parameter(torch.zeros(heads, self.head_width))
        self.bias_v = nn.Parameter(torch.zeros(heads, self.head_width))

    def forward(self, x: Tensor, layer: int, context: Context, positions: Positions) -> Tensor:
        """``[B, n, d] -> [B, n, d]``."""
        rows, n, width = x.shape
        projected = self.qkv(x).view(rows, n, 3, self.heads, self.head_width)
        query = projected[:, :, 0]
        keys, values = context.remember(layer, projected[:, :, 1:]).transpose(1, 3).unbind(2)
        by_head = (query + self.bias_v).flatten(0, 1).transpose(0, 1) @ self.position
        scale = self.head_width**-0.5
        bias = positions.scores(by_head.transpose(0, 1).unflatten(0, (rows, n))) * scale + context.bias
        query = (query + self.bias_u).transpose(1, 2)
        heard = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale)
        return self.out(heard.transpose(1, 2).reshape(rows, n, width))


class EncoderBlock(nn.Module):
    """Attention and a feed-forward with SiLU, each on a normalised residual branch."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-12)
        self.attention = RelativeAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-12)
        self.up = Linear(config.width, config.feedforward)
        self.down = Linear(config.feedforward, config.width)

    def forward(self, x: Tensor, layer: int, context: Context, positions: Positions) -> Tensor:
        """``[B, n, d] -> [B, n, d]``."""
        x = x + self.attention(self.norm1(x), layer, context, positions)
        return x + self.down(F.silu(self.up(self.norm2(x))))


class Entrance(nn.Module):
    """Linear, norm and scale in front of a stack of blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.scale = math.sqrt(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, n, d] -> [B, n, d]``."""
        normed: Tensor = self.norm(self.linear(x))
        return normed * self.scale


class FlowEncoder(nn.Module):
    """Tokens to mel-sized vectors, two a token."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embedding = nn.Embedding(config.vocabulary, width)
        self.entrance = Entrance(width)
        self.ahead = CausalConv(width, width, config.lookahead + 1)
        self.behind = CausalConv(width, width, BEHIND)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.layers))
        self.upsample = CausalConv(width, width, UPSAMPLE)
        self.up_entrance = Entrance(width)
        self.up_blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.up_layers))
        self.norm = nn.LayerNorm(width)
        self.project = Linear(width, config.mels)

    @property
    def caches(self) -> tuple[CacheShape, CacheShape]:
        """What streaming keeps at token and at frame rate."""
        config = self.config
        sizes = (config.heads, config.width // config.heads)
        return (
            CacheShape("tokens", 1, config.layers, *sizes, keep=BEHIND - 1, columns=config.width),
            CacheShape("frames", RATE, config.up_layers, *sizes, keep=UPSAMPLE - 1, columns=config.width),
        )

    def forward(self, tokens: Tensor, at_tokens: Context, at_frames: Context) -> Tensor:
        """tokens: ``[B, n + lookahead]`` int64, -1 where there is none. Returns ``[B, 2n, mels]``."""
        x = self.entrance(self.embedding(tokens.clamp_min(0)))
        # Silence follows the end: the convolution ahead must not hear what padding is embedded as.
        x = torch.where((tokens >= 0)[..., None], x, 0.0)
        ahead = F.leaky_relu(self.ahead.along(x))
        x = x[:, : x.shape[1] - self.config.lookahead] + self.behind.convolve(ahead, at_tokens)
        x = self._through(self.blocks, x, at_tokens)
        x = self.upsample.convolve(x.repeat_interleave(RATE, 1), at_frames)
        x = self._through(self.up_blocks, self.up_entrance(x), at_frames)
        mu: Tensor = self.project(self.norm(x))
        return mu

    def _through(self, blocks: nn.ModuleList, x: Tensor, context: Context) -> Tensor:
        positions = Positions(context, self.config.width, x.dtype)
        for layer, block in enumerate(blocks):
            x = block(x, layer, context, positions)
        return x
