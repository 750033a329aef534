"""CosyVoice 2's text-speech language model as one step: tokens in, the next speech token out (arXiv 2412.10117, 2.2).

The backbone reads one sequence of text and speech, all looked up in one table; the head knows speech only. A step reads
a token, or several where text or a prompt comes in, and draws what follows the last of them. What to read next is
:mod:`.stream`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from ..layers.linear import Linear
from ..layers.norm import RMSNorm
from ..layers.packing import pack
from ..layers.transformer import Transformer
from ..streaming import Specs, State, StreamingModel, TensorSpec
from .lm_config import TOKEN_SECONDS, LMConfig
from .sampling import HISTORY, NONE, draw


class SpeechLM(StreamingModel):
    """The language model over slots. A variant is how many tokens a step has room for."""

    def __init__(self, config: LMConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LMConfig()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.transformer = Transformer(config.transformer)
        self.norm = RMSNorm(config.width, config.eps)
        self.head = Linear(config.width, config.classes)

    @property
    def variants(self) -> tuple[int, ...]:
        return self.config.lengths

    def tick(self, variant: Hashable) -> float:
        """A step makes one token at most."""
        return TOKEN_SECONDS

    def prepare(self) -> None:
        self.eval()
        pack(self)

    def state_spec(self) -> Specs:
        return self.transformer.state_spec("lm")

    def input_spec(self, variant: Hashable) -> Specs:
        if not isinstance(variant, int):
            raise TypeError(f"a variant of the language model is the tokens of a step, got {variant!r}")
        return {
            "tokens": TensorSpec((variant,), torch.int64),
            "count": TensorSpec((), torch.int64, 1),
            "special": TensorSpec((), torch.int64, NONE),
            "recent": TensorSpec((HISTORY,), torch.int64, NONE),
            "temperature": TensorSpec(()),
            "top_p": TensorSpec((), reset=1.0),
            "top_k": TensorSpec((), torch.int64, 1),
            "window": TensorSpec((), torch.int64),
            "repeats": TensorSpec((), torch.int64, 1),
            "seed": TensorSpec((), torch.int64),
        }

    def probe_inputs(self, variant: Hashable, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random tokens, drawn from at random, for finding batch sizes that give equal bits."""
        inputs = {name: spec.new(rows) for name, spec in self.input_spec(variant).items()}
        inputs["tokens"].random_(0, self.config.vocabulary, generator=generator)
        inputs["count"].fill_(inputs["tokens"].shape[1])
        inputs["temperature"].fill_(1.0)
        inputs["top_k"].fill_(25)
        return inputs

    def forward(self, tokens: Tensor) -> Tensor:
        """Whole sequences, as in training: ``[B, T]`` int64 -> logits ``[B, T, classes]`` of what follows each."""
        x = self.transformer(self.embedding(tokens), self.transformer.whole(tokens.shape[1], tokens.device))
        return self.head(self.norm(x))

    @torch.no_grad()
    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """inputs: ``tokens [B, T]``, of which the first ``count [B]`` are read; ``special [B]``, which token beyond
        speech may be drawn (end or fill), or -1; ``recent [B, HISTORY]``, what was drawn before, newest last, -1 for
        none; and ``Sampling.inputs``.

        Returns ``token [B]``, drawn for the place after the last one read. It follows from the seed and the position,
        so reading the same in other portions draws the same. A session that reads past ``capacity`` loses its oldest
        positions: ``TextStream`` ends before.
        """
        target = torch.where(active, slots, state["lm.seen"].shape[0] - 1)
        tokens, count = inputs["tokens"], inputs["count"]
        seen = state["lm.seen"].index_select(0, slots)
        x = self.transformer.step("lm", self.embedding(tokens), state, slots, target, count)
        last = (count - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2])
        logits = self.head(self.norm(x.gather(1, last)[:, 0]))
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        extra = torch.arange(self.config.speech, self.config.classes, device=logits.device)
        logits[:, self.config.speech :].masked_fill_(extra != inputs["special"][:, None], -math.inf)
        names = ("temperature", "top_p", "top_k", "window", "repeats")
        chosen = {name: inputs[name] for name in names}
        return {"token": draw(logits, inputs["recent"], inputs["seed"], seen + count, **chosen)}
