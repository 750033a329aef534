"""The depth transformer: the codebooks of one frame, one after the other (RQ-Transformer, arXiv 2203.01941).

Step ``k`` takes a projection of the temporal output plus the embedding of the token before (the text token, then the
codebook before) and gives the logits of codebook ``k``. The last codebook is never an input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..layers.kernels import use_kernels
from ..layers.linear import Linear
from ..layers.stepped import SteppedLinear
from ..layers.transformer import Transformer
from .config import MoshiConfig

Choose = Callable[[int, Tensor], Tensor]


class Embedding(nn.Embedding):
    """Token embeddings; negative tokens embed to zero. low_rank: their width before a projection."""

    def __init__(self, tokens: int, width: int, low_rank: int | None = None) -> None:
        super().__init__(tokens, low_rank or width)
        nn.init.normal_(self.weight, std=width**-0.5)
        self.project = None if low_rank is None else Linear(low_rank, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[...]`` int64 -> ``[..., width]``."""
        found = super().forward(tokens.clamp(min=0)) * (tokens >= 0)[..., None]
        return found if self.project is None else self.project(found)


class Depth(nn.Module):
    """Temporal output and text token in, spoken codebooks out."""

    places: Tensor | None
    chosen: Tensor

    def __init__(self, config: MoshiConfig) -> None:
        super().__init__()
        if (depth := config.depth) is None:
            raise ValueError("this model has no depth transformer")
        self.sets, self.shared = depth.sets, depth.shared_input
        width, steps = depth.transformer.width, len(depth.sets)
        self.enter = Linear(config.temporal.width, width * (1 if self.shared else depth.count), bias=False)
        self.text = Embedding(config.text_card + 1, width, depth.low_rank)
        self.audio = nn.ModuleList(Embedding(config.card + 1, width, depth.low_rank) for _ in range(steps - 1))
        self.transformer = Transformer(depth.transformer)
        self.heads = SteppedLinear(steps, width, config.card)
        places = sinusoids(torch.arange(steps, device="cpu"), width) if depth.sinusoids else None
        self.register_buffer("places", places, persistent=False)
        # On the device from the start: a training step that is captured in a graph may not copy anything there.
        self.register_buffer("chosen", torch.tensor(depth.sets, device="cpu"), persistent=False)

    def forward(self, heard: Tensor, text: Tensor, audio: Tensor) -> Tensor:
        """Whole frames: temporal output ``[N, d]``, text ``[N]``, codebooks ``[N, K]`` -> logits ``[N, K, card]``."""
        tokens = [embed(token) for embed, token in zip(self._embeddings(), (text, *audio.unbind(1)), strict=False)]
        x = torch.stack(self._entered(heard), 1) + torch.stack(tokens, 1) + self._place(slice(None), heard)
        x = self.transformer(x, self.transformer.whole(len(self.sets), x.device), self.chosen)
        logits: Tensor = self.heads(x, torch.arange(len(self.sets), device=x.device))
        return logits

    def draw(self, heard: Tensor, text: Tensor, choose: Choose) -> Tensor:
        """Frames step by step: temporal output ``[B, d]``, text ``[B]`` -> codebooks ``[B, K]``.

        choose: codebook and its logits ``[B, card]`` -> tokens ``[B]``.
        """
        frame = self.transformer.frame(len(heard), len(self.sets), heard.device)
        entered = self._entered(heard)
        token, tokens = text, []
        for step, embed in enumerate(self._embeddings()):
            x = self.transformer(self._input(step, entered[step], embed, token)[:, None], frame, self.sets[step])
            token = choose(step, self.heads(x, step)[:, 0])
            tokens.append(token)
        return torch.stack(tokens, 1)

    def _input(self, step: int, entered: Tensor, embed: nn.Module, token: Tensor) -> Tensor:
        """``[B, width]``: the step's projection of the temporal output, and the token before."""
        if self.places is None and use_kernels(entered) and isinstance(embed, Embedding) and embed.project is None:
            from ..layers.triton_fused import looked_up

            return looked_up(entered, embed.weight, token)
        found: Tensor = embed(token)
        return entered + found + self._place(step, entered)

    def _embeddings(self) -> list[nn.Module]:
        return [self.text, *self.audio]

    def _entered(self, heard: Tensor) -> list[Tensor]:
        """``[N, d]`` -> each step's projection ``[N, width]``: one product for all."""
        parts = self.enter(heard).split(self.transformer.config.width, -1)
        return [parts[0 if self.shared else chosen] for chosen in self.sets]

    def _place(self, steps: int | slice, like: Tensor) -> Tensor | float:
        return 0.0 if self.places is None else self.places[steps].to(like.dtype)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Position embeddings added to the input: ``[...]`` -> ``[..., width]`` float64, all cosines before all sines."""
    half = width // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / (half - 1))
    angles = positions[..., None] * rates
    return torch.cat((angles.cos(), angles.sin()), -1)
