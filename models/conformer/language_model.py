"""A language model over a recogniser's own pieces: an LSTM with tied embeddings, small enough to step beside it.

It is trained on text alone and joins the transducer in :mod:`.beam` (shallow fusion, arXiv 1503.03535).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.linear import Linear
from ..layers.lstm import LSTM
from ..layers.packing import pack
from .config import LanguageModelConfig


class LanguageModel(nn.Module):
    """Pieces ``0 .. vocabulary - 1``; one more index starts every sequence."""

    def __init__(self, config: LanguageModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.start = vocabulary
        self.embedding = nn.Embedding(vocabulary + 1, config.embedding)
        self.lstm = LSTM(config.embedding, config.width, 1, batch_first=True)
        self.project = Linear(config.width, config.embedding)
        self.dropout = nn.Dropout(config.dropout)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    @property
    def memory(self) -> tuple[int, ...]:
        """Shape of one sequence's memory."""
        return (2, 1, self.config.width)

    def forward(self, pieces: Tensor) -> Tensor:
        """``[B, T]`` pieces, the start first -> logits of the piece after each ``[B, T, vocabulary]``."""
        hidden, _ = self.lstm(self.dropout(self.embedding(pieces)))
        return self._logits(self.dropout(hidden))

    @torch.no_grad()
    def prepare(self) -> LanguageModel:
        """Make the step ready: eval mode, packed weights. Call again when weights change."""
        self.eval()
        pack(self)
        return self

    def step(self, piece: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """piece ``[B]``, memory ``[B, 2, 1, width]`` -> log probabilities ``[B, vocabulary]``, memory after it."""
        hidden, memory = self.lstm.step(self.embedding(piece), memory)
        return self._logits(hidden).log_softmax(-1), memory

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self.project(hidden), self.embedding.weight[: self.start], self.bias)
