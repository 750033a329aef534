"""CosyVoice 2's text-speech language model as one step: tokens in, the next speech token out (arXiv 2412.10117, 2.2).

The backbone reads one sequence of text and speech, all looked up in one table; the head knows speech only. A step reads
a token, or several where text or a prompt comes in, and draws what follows the last of them. A burst goes on from
there: it reads what it drew and draws again, a turn of the step for each token, without the host. Turns are alike, so
that sessions draw together wherever each of them is in its burst. What to read next is :mod:`.stream`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.linear import Linear
from ..layers.norm import RMSNorm
from ..layers.packing import pack
from ..layers.transformer import Transformer
from ..streaming import Specs, State, StreamingModel, TensorSpec
from .lm_config import TOKEN_SECONDS, Burst, LMConfig
from .sampling import HISTORY, NONE, draw


class SpeechLM(StreamingModel):
    """The language model over slots. A variant is how many tokens a step has room for, or a ``Burst``."""

    def __init__(self, config: LMConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LMConfig()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.transformer = Transformer(config.transformer)
        self.norm = RMSNorm(config.width, config.eps)
        self.head = Linear(config.width, config.classes)

    @property
    def variants(self) -> tuple[int | Burst, ...]:
        return self.config.variants

    def tick(self, variant: Hashable) -> float:
        """At most; a step that reads makes one token."""
        return TOKEN_SECONDS * self.turns(variant)

    def turns(self, variant: Hashable) -> int:
        """The most draws of a burst."""
        return variant.tokens if isinstance(variant, Burst) else 1

    def turns_of(self, variant: Hashable, inputs: Mapping[str, Any]) -> int:
        """Those of one session."""
        return max(1, min(int(inputs["draws"]), self.turns(variant)))

    def prepare(self) -> None:
        self.eval()
        pack(self)

    def state_spec(self) -> Specs:
        """``lm.drawn`` lives from turn to turn of a burst."""
        spec = self.transformer.state_spec("lm")
        if not self.config.bursts:
            return spec
        return {**spec, "lm.drawn": TensorSpec((HISTORY + max(self.config.bursts),), torch.int64, NONE)}

    def input_spec(self, variant: Hashable) -> Specs:
        if isinstance(variant, Burst):
            special = TensorSpec((variant.tokens,), torch.int64, NONE)
            reads = {"token": TensorSpec((), torch.int64), "draws": TensorSpec((), torch.int64, 1)}
        elif isinstance(variant, int):
            special = TensorSpec((), torch.int64, NONE)
            reads = {"tokens": TensorSpec((variant,), torch.int64), "count": TensorSpec((), torch.int64, 1)}
        else:
            raise TypeError(f"a variant of the language model is the tokens of a step or a Burst, got {variant!r}")
        return {
            **reads,
            "special": special,
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
        if isinstance(variant, Burst):
            inputs["token"].random_(0, self.config.speech, generator=generator)
            inputs["draws"].fill_(variant.tokens)
        else:
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

        A burst's inputs: ``token [B]``, of speech; ``draws [B]``, how many are wanted; ``special [B, n]`` of each draw;
        the others as above. It returns ``drawn [B, n]``: what as many steps of one token would have drawn, -1 behind
        the first that is not speech.
        """
        if "draws" not in inputs:
            target = torch.where(active, slots, state["lm.seen"].shape[0] - 1)
            read = (inputs["tokens"], inputs["count"])
            return {"token": self._draw(*read, inputs["special"], inputs["recent"], inputs, state, slots, target)}
        outputs: dict[str, Tensor] = {}
        for index in range(inputs["special"].shape[1]):
            outputs = self.step_turn(torch.full_like(slots, index), inputs, state, slots, active)
        return outputs

    @torch.no_grad()
    def step_turn(self, turn: Tensor, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """Draw number ``turn [B]`` of each row's burst; returns what ``step`` does, as far as it has come."""
        scratch, length = state["lm.seen"].shape[0] - 1, inputs["special"].shape[1]
        window, fresh = state["lm.drawn"].index_select(0, slots), turn[:, None] == 0
        begin = torch.full_like(window, NONE)
        begin[:, :HISTORY] = inputs["recent"]
        window = torch.where(fresh, begin, window)
        at = turn[:, None] + HISTORY
        token = torch.where(fresh, inputs["token"][:, None], window.gather(1, at - 1))
        going = active & (inputs["draws"] > turn) & ((token >= 0) & (token < self.config.speech))[:, 0]
        special = inputs["special"].gather(1, turn[:, None])[:, 0]
        recent = window.gather(1, turn[:, None] + torch.arange(HISTORY, device=turn.device))
        target = torch.where(going, slots, scratch)
        drawn = self._draw(token.clamp(min=0), torch.ones_like(turn), special, recent, inputs, state, slots, target)
        window = window.scatter(1, at, torch.where(going, drawn, NONE)[:, None])
        state["lm.drawn"].index_copy_(0, torch.where(active, slots, scratch), window)
        return {"drawn": window[:, HISTORY : HISTORY + length].clone()}

    def _draw(
        self,
        tokens: Tensor,
        count: Tensor,
        special: Tensor,
        recent: Tensor,
        inputs: State,
        state: State,
        slots: Tensor,
        target: Tensor,
    ) -> Tensor:
        """Read the first ``count`` of ``tokens``, and draw."""
        seen = state["lm.seen"].index_select(0, slots)
        x = self.transformer.step("lm", self.embedding(tokens), state, slots, target, count)
        last = (count - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2])
        logits = self.head.after(self.norm, x.gather(1, last)[:, 0])
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        extra = torch.arange(self.config.speech, self.config.classes, device=logits.device)
        logits[:, self.config.speech :].masked_fill_(extra != special[:, None], -math.inf)
        names = ("temperature", "top_p", "top_k", "window", "repeats")
        chosen = {name: inputs[name] for name in names}
        return draw(logits, recent, inputs["seed"], seen + count, **chosen)
