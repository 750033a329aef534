"""The cache-aware streaming FastConformer encoder (arXiv 2312.17279; block of Conformer, arXiv 2005.08100)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.linear import Linear
from ..layers.packing import pack
from ..streaming import Specs, State, TensorSpec
from .attention import RelativeAttention
from .config import SUBSAMPLING, ConformerConfig
from .context import Context, StreamStep, WholeUtterance, chunk_mask, sinusoids
from .subsampling import Subsampling


class FeedForward(nn.Module):
    """Two linear layers around SiLU."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.up = Linear(config.width, config.feedforward, bias=config.bias)
        self.down = Linear(config.feedforward, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, n, d] -> [B, n, d]``."""
        return self.down(self.dropout(F.silu(self.up(x))))


class Convolution(nn.Module):
    """Gated pointwise, causal depthwise, norm, SiLU, pointwise."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.expand = Linear(config.width, 2 * config.width, bias=config.conv_bias)
        self.depthwise = nn.Conv1d(
            config.width, config.width, config.kernel, groups=config.width, bias=config.conv_bias
        )
        self.norm: nn.Module = (
            nn.BatchNorm1d(config.width) if config.conv_norm == "batch_norm" else nn.LayerNorm(config.width)
        )
        self.project = Linear(config.width, config.width, bias=config.conv_bias)

    def forward(self, x: Tensor, layer: int, context: Context) -> Tensor:
        """``[B, n, d] -> [B, n, d]``."""
        x = F.glu(self.expand(x)) * context.valid
        x = self.depthwise(context.history(layer, x).transpose(1, 2))
        x = self.norm(x).transpose(1, 2) if isinstance(self.norm, nn.BatchNorm1d) else self.norm(x.transpose(1, 2))
        return self.project(F.silu(x))


class Block(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, each on a normalised residual branch."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.norm_before = nn.LayerNorm(config.width)
        self.before = FeedForward(config)
        self.norm_attention = nn.LayerNorm(config.width)
        self.attention = RelativeAttention(config)
        self.norm_conv = nn.LayerNorm(config.width)
        self.conv = Convolution(config)
        self.norm_after = nn.LayerNorm(config.width)
        self.after = FeedForward(config)
        self.norm_out = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layer: int, context: Context) -> Tensor:
        """``[B, n, d] -> [B, n, d]``."""
        x = x + 0.5 * self.dropout(self.before(self.norm_before(x)))
        x = x + self.dropout(self.attention(self.norm_attention(x), layer, context))
        x = x + self.dropout(self.conv(self.norm_conv(x), layer, context))
        x = x + 0.5 * self.dropout(self.after(self.norm_after(x)))
        result: Tensor = self.norm_out(x)
        return result


class ConformerEncoder(nn.Module):
    """Log-mel frames (10 ms) to encoder frames (80 ms), a whole utterance or a chunk of many sessions at a time."""

    tables: Tensor | None

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.subsampling = Subsampling(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.scale = config.width**0.5 if config.scale_input else 1.0
        self.register_buffer("tables", None, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, the states and the frames."""
        return self.subsampling.linear.weight.dtype

    def forward(self, mel: Tensor, lengths: Tensor, lookahead: int | None = None) -> tuple[Tensor, Tensor]:
        """Whole utterances, as the model is trained: each frame sees what it would see when streaming.

        mel: ``[B, T, mels]``; lengths: ``[B]`` int64 mel frames of each row, what lies past them is ignored.
        lookahead: in encoder frames; None lets every frame see the whole utterance.
        Returns frames ``[B, T', d]`` and their number per row ``[B]``. Rows are meaningless past their number.
        """
        x, lengths = self.subsampling(mel, lengths)
        return self.encode(x, lengths, chunk_mask(x.shape[1], self.config, lookahead, x.device)), lengths

    def encode(self, x: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Subsampled ``[B, n, d]`` through the blocks under any ``[n, n]`` attention mask (True: may attend)."""
        return self._through(x, WholeUtterance(self.config, mask, lengths, x.dtype))

    def _through(self, x: Tensor, context: Context) -> Tensor:
        x = self.dropout(x * self.scale)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, context)
        return x

    @torch.no_grad()
    def prepare(self) -> ConformerEncoder:
        """Make the step ready: eval mode, position tables, packed weights. Call again when weights or device change."""
        self.eval()
        pack(self)
        device = self.subsampling.linear.weight.device
        distances = torch.arange(1 - self.config.longest, self.config.ring, device=device)
        embeddings = sinusoids(distances, self.config.width).to(self.dtype)
        projected = [cast(Block, block).attention.project_positions(embeddings) for block in self.blocks]
        self.tables = torch.stack(projected).contiguous()
        return self

    def state_spec(self) -> Specs:
        """Of one session. It does not depend on the lookahead, which may change at any chunk."""
        config, dtype = self.config, self.dtype
        rings = (config.layers, config.ring, 2, config.heads, config.width // config.heads)
        return {
            "encoder.seen": TensorSpec((), torch.int64),
            **self.subsampling.state_spec(dtype),
            "encoder.rings": TensorSpec(rings, dtype),
            "encoder.tails": TensorSpec((config.layers, config.kernel - 1, config.width), dtype),
        }

    @torch.no_grad()
    def step(self, mel: Tensor, mel_end: Tensor, state: State, slots: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Advance ``B`` sessions by one chunk of ``n`` encoder frames, ``n - 1`` the lookahead.

        mel: ``[B, 8n, mels]``. A session that has made k frames gets its mel frames ``8k - 7`` to ``8(k + n) - 8``;
        those before 0 or past the end are ignored.
        mel_end: ``[B]`` int64, mel frames of the whole utterance, or 2**40 until that is known.
        state, slots, active: as in :class:`~antiphon.models.streaming.StreamingModel`.
        Returns frames ``[B, n, d]`` and which of them lie within the utterance ``[B, n]`` bool.
        """
        if self.tables is None:
            raise RuntimeError("the encoder is not ready to stream: call prepare() once its weights are loaded")
        frames = mel.shape[1] // SUBSAMPLING
        longest = self.config.longest
        if mel.shape[1] != frames * SUBSAMPLING or not 1 <= frames <= longest:
            raise ValueError(f"a chunk has 1 to {longest} times {SUBSAMPLING} mel frames, not {mel.shape[1]}")
        seen = state["encoder.seen"].index_select(0, slots)
        target = torch.where(active, slots, state["encoder.seen"].shape[0] - 1)
        state["encoder.seen"].index_copy_(0, target, seen + frames)
        start = seen * SUBSAMPLING - (SUBSAMPLING - 1)
        x, total = self.subsampling.step(mel, start, mel_end, state, slots, target)
        context = StreamStep(self.config, self.tables, state, slots, target, seen, total, frames)
        x = self._through(x, context)
        state["encoder.tails"].index_copy_(0, target, context.tails())
        return x, context.valid[..., 0] > 0
