"""The CTC head, greedy: most likely label per frame, repeats merged, blanks dropped."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.linear import Linear
from ..streaming import Specs, State, TensorSpec


class CTCHead(nn.Module):
    """``vocabulary`` labels and the blank after them."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.blank = vocabulary
        self.linear = Linear(width, vocabulary + 1)

    def forward(self, frames: Tensor) -> Tensor:
        """``[B, n, d] -> [B, n, vocabulary + 1]`` logits."""
        return self.linear(frames)

    def state_spec(self) -> Specs:
        """The label of the last frame."""
        return {"ctc.label": TensorSpec((), torch.int64, self.blank)}

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
        """Greedy labels of one chunk, as :meth:`Transducer.decode`; a frame has one label at most.

        Returns tokens and times ``[B, n]`` and count ``[B]``.
        """
        rows, steps = valid.shape
        before = state["ctc.label"].index_select(0, slots)
        labels = torch.where(valid, self(frames).argmax(-1), self.blank)
        previous = torch.cat((before[:, None], labels[:, :-1]), 1)
        emit = (labels != self.blank) & (labels != previous)
        target = torch.where(active, slots, state["ctc.label"].shape[0] - 1)
        last = torch.cat((before[:, None], labels), 1).gather(1, valid.sum(1, keepdim=True))[:, 0]
        state["ctc.label"].index_copy_(0, target, last)
        # Emissions to the front, in order; what is left over goes to a column that is cut off.
        column = torch.where(emit, emit.cumsum(1) - 1, steps)
        times = torch.arange(steps, device=frames.device).expand(rows, -1)
        empty = torch.full((rows, steps + 1), -1, dtype=torch.int64, device=frames.device)
        return (
            empty.scatter(1, column, labels)[:, :-1],
            empty.scatter(1, column, times)[:, :-1],
            emit.sum(1),
        )
