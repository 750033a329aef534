"""The RNN transducer (arXiv 1211.3711): prediction LSTM, joint, and greedy decoding of many sessions at once.

Decoding loops over (frame, label) pairs with a frame pointer per row, as label-looping does (arXiv 2406.06220): a row
emits a label and stays on its frame, or meets the blank and moves on. A frame is finished within its chunk, so what a
session carries over is the prediction network's state alone, and any chunking gives the same labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.linear import Linear
from ..layers.lstm import LSTM
from ..layers.packing import pack
from ..streaming import Specs, State, TensorSpec
from .config import TransducerConfig


class Transducer(nn.Module):
    """Labels ``0 .. vocabulary - 1``; the blank comes after them and also starts every sequence."""

    start: Tensor | None

    def __init__(self, config: TransducerConfig) -> None:
        super().__init__()
        self.config = config
        self.blank = config.blank
        self.embedding = nn.Embedding(config.vocabulary + 1, config.width, padding_idx=config.blank)
        self.lstm = LSTM(
            config.width,
            config.width,
            config.layers,
            batch_first=True,
            dropout=config.dropout if config.layers > 1 else 0.0,
        )
        self.from_encoder = Linear(config.encoder_width, config.joint_width)
        self.from_prediction = Linear(config.width, config.joint_width)
        self.dropout = nn.Dropout(config.dropout)
        self.head = Linear(config.joint_width, config.vocabulary + 1)
        self.register_buffer("start", None, persistent=False)

    def predict(self, labels: Tensor) -> Tensor:
        """labels ``[B, U]`` -> ``[B, U + 1, joint_width]``: row u is the prediction after u labels."""
        hidden, _ = self.lstm(self.embedding(F.pad(labels, (1, 0), value=self.blank)))
        return self.from_prediction(self.dropout(hidden))

    def joint(self, frames: Tensor, predicted: Tensor) -> Tensor:
        """frames ``[B, T, d]``, predicted ``[B, U + 1, joint_width]`` -> logits ``[B, T, U + 1, vocabulary + 1]``."""
        summed = self.from_encoder(frames)[:, :, None] + predicted[:, None]
        return self.head(self.dropout(F.relu(summed)))

    @torch.no_grad()
    def prepare(self) -> Transducer:
        """Make ``decode`` ready: eval mode, the state after the start symbol. Call again when weights change."""
        self.eval()
        pack(self)
        weight = self.embedding.weight
        memory = weight.new_zeros(1, 2, self.config.layers, self.config.width)
        label = torch.full((1,), self.blank, dtype=torch.int64, device=weight.device)
        memory, predicted = self.advance(label, memory)
        self.start = torch.cat((memory.flatten(1), predicted), 1)
        return self

    def advance(self, label: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """label ``[B]``, memory (h and c) ``[B, 2, layers, width]`` -> memory after it, prediction ``[B, J]``."""
        hidden, memory = self.lstm.step(self.embedding(label), memory)
        return memory, self.from_prediction(hidden)

    def state_spec(self) -> Specs:
        """The prediction network's memory and its projected output, and whether the session has started."""
        config, dtype = self.config, self.embedding.weight.dtype
        return {
            "transducer.started": TensorSpec((), torch.bool),
            "transducer.memory": TensorSpec((2, config.layers, config.width), dtype),
            "transducer.predicted": TensorSpec((config.joint_width,), dtype),
        }

    @torch.no_grad()
    def decode(
        self,
        frames: Tensor,
        valid: Tensor,
        state: State,
        slots: Tensor,
        active: Tensor,
        max_symbols: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy labels of one chunk of ``B`` sessions.

        frames: ``[B, n, d]``; valid: ``[B, n]`` bool, a row's valid frames come first.
        max_symbols: most labels of one frame; the configuration's by default.
        Returns tokens and times ``[B, n * max_symbols]`` int64 (times count frames within the chunk; -1 past the
        count) and count ``[B]``.
        """
        if self.start is None:
            raise RuntimeError("the transducer is not ready to decode: call prepare() once its weights are loaded")
        rows, steps = valid.shape
        limit = max_symbols or self.config.max_symbols
        width = self.config.joint_width
        device = frames.device
        fresh = ~state["transducer.started"].index_select(0, slots)
        memory = state["transducer.memory"].index_select(0, slots)
        predicted = state["transducer.predicted"].index_select(0, slots)
        memory = torch.where(fresh[:, None, None, None], self.start[:, :-width].view(1, *memory.shape[1:]), memory)
        predicted = torch.where(fresh[:, None], self.start[:, -width:], predicted)
        projected = self.from_encoder(frames)
        # Rows that leave no trace have nothing to decode: the loop must not wait for them.
        length = torch.where(active, valid.sum(1), 0)
        zero = torch.zeros(rows, dtype=torch.int64, device=device)
        frame, symbols, count = zero, zero, zero
        # One column to spare takes the writes of rows that emit nothing.
        spare = steps * limit
        tokens = torch.full((rows, spare + 1), -1, dtype=torch.int64, device=device)
        times = tokens.clone()
        every_row = torch.arange(rows, device=device)
        may_stop = device.type == "cpu"
        for _ in range(spare):
            live = frame < length
            if may_stop and not live.any():
                break
            here = projected[every_row, frame.clamp(max=steps - 1)]
            label = self.head(F.relu(here + predicted)).argmax(-1)
            emit = live & (label != self.blank)
            column = torch.where(emit, count, spare)[:, None]
            tokens.scatter_(1, column, label[:, None])
            times.scatter_(1, column, frame[:, None])
            count = count + emit
            symbols = symbols + emit
            leave = live & (~emit | (symbols >= limit))
            frame = frame + leave
            symbols = torch.where(leave, zero, symbols)
            if may_stop and not emit.any():
                continue
            new_memory, new_predicted = self.advance(label, memory)
            memory = torch.where(emit[:, None, None, None], new_memory, memory)
            predicted = torch.where(emit[:, None], new_predicted, predicted)
        target = torch.where(active, slots, state["transducer.started"].shape[0] - 1)
        state["transducer.memory"].index_copy_(0, target, memory)
        state["transducer.predicted"].index_copy_(0, target, predicted)
        state["transducer.started"].index_fill_(0, target, True)
        return tokens[:, :spare], times[:, :spare], count
