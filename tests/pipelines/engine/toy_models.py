"""A small model with every kind of state: a conv tail, an attention ring, a counter; and one whose step has slices."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.models.streaming import Specs, State, StreamingModel, TensorSpec

WIDTH, HEADS, RING, KERNEL = 64, 4, 12, 5


class Toy(StreamingModel):
    """One frame in, one frame out: causal conv, ring attention, MLP. The variant is the number of frames of a chunk."""

    def __init__(self, seed: int = 0, layers: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = layers
        self.conv = nn.Conv1d(WIDTH, WIDTH, KERNEL)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(layers))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    @property
    def variants(self) -> tuple[int, ...]:
        return (1, 3)

    def tick(self, variant: Hashable) -> float:
        assert isinstance(variant, int)
        return 0.08 * variant

    def state_spec(self) -> Specs:
        cache = (self.layers, HEADS, RING, WIDTH // HEADS)
        return {
            "keys": TensorSpec(cache),
            "values": TensorSpec(cache),
            "tail": TensorSpec((WIDTH, KERNEL - 1)),
            "frames": TensorSpec((), torch.int64),
            "level": TensorSpec((), reset=1.0),
        }

    def input_spec(self, variant: Hashable) -> Specs:
        assert isinstance(variant, int)
        return {"frames": TensorSpec((variant, WIDTH)), "gain": TensorSpec((), reset=1.0)}

    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        chunk = inputs["frames"] * inputs["gain"][:, None, None]
        joined = torch.cat([state["tail"][slots], chunk.transpose(1, 2)], 2)
        self._write(state["tail"], slots, active, joined[:, :, -(KERNEL - 1) :])
        hidden = self.conv(joined).transpose(1, 2)
        counts = []
        outputs = []
        for index in range(hidden.shape[1]):
            outputs.append(self._frame(hidden[:, index : index + 1], state, slots, active))
            counts.append(state["frames"][slots])
        self._write(state["level"], slots, active, state["level"][slots] * 0.5 + chunk.abs().mean((1, 2)))
        return {"frames": torch.cat(outputs, 1), "count": torch.stack(counts, 1), "level": state["level"][slots]}

    def _frame(self, hidden: Tensor, state: State, slots: Tensor, active: Tensor) -> Tensor:
        rows = len(slots)
        count = state["frames"][slots]
        place = count % RING
        index = torch.arange(RING, device=slots.device)
        filled = (index <= count[:, None]) | (count[:, None] >= RING)
        mask = torch.zeros(rows, 1, 1, RING, device=slots.device).masked_fill(~filled[:, None, None], float("-inf"))
        row = torch.arange(rows, device=slots.device)
        for layer in range(self.layers):
            query, key, value = self.qkv[layer](hidden).view(rows, 1, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            keys, values = state["keys"][slots, layer], state["values"][slots, layer]
            keys[row, :, place] = key[:, :, 0]
            values[row, :, place] = value[:, :, 0]
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            keep = active.view(-1, 1, 1, 1)
            state["keys"][slots, layer] = torch.where(keep, keys, state["keys"][slots, layer])
            state["values"][slots, layer] = torch.where(keep, values, state["values"][slots, layer])
            hidden = hidden + attended.transpose(1, 2).reshape(rows, 1, WIDTH)
            hidden = hidden + self.down[layer](F.gelu(self.up[layer](hidden)))
        state["frames"][slots] = count + active.long()
        return hidden

    @staticmethod
    def _write(tensor: Tensor, slots: Tensor, active: Tensor, value: Tensor) -> None:
        keep = active.view(-1, *[1] * (value.dim() - 1))
        tensor[slots] = torch.where(keep, value, tensor[slots])


class Null(StreamingModel):
    """Adds one to a number and to a counter."""

    def __init__(self, samples: int = 1) -> None:
        super().__init__()
        self.samples = samples

    @property
    def variants(self) -> tuple[str, ...]:
        return ("only",)

    def tick(self, variant: Hashable) -> float:
        return 0.08

    def state_spec(self) -> Specs:
        return {"count": TensorSpec((), torch.int64)}

    def input_spec(self, variant: Hashable) -> Specs:
        return {"x": TensorSpec((self.samples,))}

    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        count = state["count"][slots] + active.long()
        state["count"][slots] = count
        return {"y": inputs["x"] + 1, "count": count}


class Solver(Null):
    """Four slices: each adds the input to a sum kept in the state."""

    def state_spec(self) -> Specs:
        return {"sum": TensorSpec((1,))}

    def slices(self, variant: Hashable) -> int:
        return 4

    def step_slice(self, index: int, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        total = state["sum"][slots] + inputs["x"] * active[:, None]
        state["sum"][slots] = total
        return {"sum": total}

    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        for index in range(4):
            outputs = self.step_slice(index, inputs, state, slots, active)
        return outputs


class Breaks(Null):
    """Raises where an input is negative."""

    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        if bool((inputs["x"] < 0).any()):
            raise ValueError("negative input")
        return super().step(inputs, state, slots, active)


class Chain(Null):
    """As many turns as are wanted, at most six: each doubles a total that is kept in the state and adds the input. The
    first begins from nothing."""

    def turns(self, variant: Hashable) -> int:
        return 6

    def turns_of(self, variant: Hashable, inputs: Mapping[str, Any]) -> int:
        return int(inputs["wanted"])

    def state_spec(self) -> Specs:
        return {"total": TensorSpec((1,)), "turns": TensorSpec((), torch.int64)}

    def input_spec(self, variant: Hashable) -> Specs:
        return {"x": TensorSpec((1,)), "wanted": TensorSpec((), torch.int64, 1)}

    def step_turn(self, turn: Tensor, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        if not turn.is_cuda and bool((inputs["x"] < -9)[turn == 2].any()):
            raise ValueError("negative input")
        going = active & (turn < inputs["wanted"])
        before = torch.where(turn[:, None] > 0, state["total"][slots], 0.0)
        total = torch.where(going[:, None], before * 2 + inputs["x"], state["total"][slots])
        state["total"][slots] = total
        state["turns"][slots] = state["turns"][slots] + going.long()
        return {"total": total, "turns": state["turns"][slots]}

    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        for index in range(6):
            outputs = self.step_turn(torch.full_like(slots, index), inputs, state, slots, active)
        return outputs
