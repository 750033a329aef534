"""An LSTM that is trained over sequences and stepped token by token, and may be packed (see :mod:`.packing`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .packing import Packable, pack_weight, packed_linear


class LSTM(Packable, nn.LSTM):
    """``nn.LSTM`` of one direction with ``step`` and ``pack()``."""

    packed: tuple[tuple[Tensor, Tensor | None], ...] | None = None

    def pack(self) -> None:
        self.packed = None
        packed = []
        for layer in range(self.num_layers):
            weight = pack_weight(torch.cat([getattr(self, f"weight_{part}_l{layer}") for part in ("ih", "hh")], 1))
            if weight is None:
                return
            biases = [getattr(self, f"bias_{part}_l{layer}") for part in ("ih", "hh")] if self.bias else []
            packed.append((weight, sum(biases).detach() if biases else None))
        self.packed = tuple(packed)

    def step(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """x ``[B, input]`` of one token, memory (h and c) ``[B, 2, layers, hidden]`` -> ``[B, hidden]``, memory."""
        hidden, cell = [], []
        for layer in range(self.num_layers):
            x, c = self._cell(layer, x, memory[:, 0, layer], memory[:, 1, layer])
            hidden.append(x)
            cell.append(c)
        return x, torch.stack((torch.stack(hidden, 1), torch.stack(cell, 1)), 1)

    def _cell(self, layer: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.packed is None or torch.is_grad_enabled():
            return torch.lstm_cell(x, (h, c), *self.all_weights[layer])
        weight, bias = self.packed[layer]
        enter, forget, value, leave = packed_linear(torch.cat((x, h), 1), weight, bias).chunk(4, 1)
        c = forget.sigmoid_() * c + enter.sigmoid_() * value.tanh_()
        return leave.sigmoid_() * c.tanh(), c
