"""Moshi's language model as one step: the user's codes in, text and the model's own codes out.

The temporal transformer reads the sum of all streams' tokens, its output gives the text token (the inner monologue)
and, through the depth transformer, the spoken codebooks. Timing is that of Kyutai's ``LMGen``: at step ``t`` the model
reads what it sampled at ``t - 1``, codebook 0 of the user's frame ``t`` and the others as delayed.

Past the window the oldest positions go, as in training, and absolute positions grow on; with sinks, the first stay in
reach. The variant is how many frames a step takes: 1 to converse, more to read a log of tokens back in, after which a
session goes on as if it had lived through them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.linear import Linear
from ..layers.noise import gumbel
from ..layers.norm import RMSNorm
from ..layers.packing import pack
from ..layers.transformer import Transformer
from ..streaming import Specs, State, StreamingModel, TensorSpec
from .config import FRAME_RATE, HELD, UNSET, MoshiConfig
from .delays import Delays
from .depth import Depth, sinusoids
from .sampling import HISTORY, draw, penalise, remember, wide


@dataclass(frozen=True)
class Logits:
    """Of whole sequences: text ``[B, T, text_out]``, audio ``[B, K, T, card]``, and where audio is a prediction."""

    text: Tensor
    audio: Tensor
    mask: Tensor


class MoshiLM(StreamingModel):
    """Temporal and depth transformer over slots."""

    offsets: Tensor

    def __init__(self, config: MoshiConfig) -> None:
        super().__init__()
        self.config = config
        width, (heads, classes) = config.temporal.width, config.heads
        # One table for all streams, text first.
        sizes = torch.tensor([config.text_card + 1, *(config.card + 1,) * config.codebooks], device="cpu")
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)
        self.embedding = nn.Embedding(int(sizes.sum()), width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.temporal = Transformer(config.temporal)
        norm = RMSNorm if config.temporal.norm == "rms" else nn.LayerNorm
        self.norm = norm(width, config.temporal.eps)
        self.text_head = Linear(width, config.text_out, bias=False)
        self.depth = None if config.depth is None else Depth(config)
        self.heads = Linear(width, heads * classes, bias=False) if heads else None
        self.delays = Delays(config)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embedding.weight.dtype

    @property
    def variants(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((1, self.config.temporal.longest)))

    def tick(self, variant: Hashable) -> float:
        return _frames(variant) / FRAME_RATE

    def prepare(self) -> None:
        self.eval()
        pack(self)

    def state_spec(self) -> Specs:
        return {
            **self.temporal.state_spec("temporal"),
            "lm.tokens": TensorSpec((self.config.streams, self.delays.size), torch.int64, UNSET),
            "lm.seeds": TensorSpec((2,), torch.int64, UNSET),
            "lm.history": TensorSpec((HISTORY,), torch.int64, UNSET),
        }

    def input_spec(self, variant: Hashable) -> Specs:
        config = self.config
        if (frames := _frames(variant)) > 1:
            return {
                "log": TensorSpec((frames, config.streams), torch.int64, UNSET),
                "count": TensorSpec((), torch.int64),
            }
        return {
            "codes": TensorSpec((config.heard,), torch.int64),
            "force": TensorSpec((1 + config.spoken,), torch.int64, UNSET),
            "temperature": TensorSpec((2,)),
            "top_k": TensorSpec((2,), torch.int64),
            "seed": TensorSpec((2,), torch.int64),
            "penalty": TensorSpec((2,), reset=1.0),
            "padding_bonus": TensorSpec(()),
        }

    def probe_inputs(self, variant: Hashable, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random codes, drawn from at random, for measuring which batch sizes are exact."""
        spec = self.input_spec(variant)
        inputs = {name: one.new(rows) for name, one in spec.items()}
        name, least = "codes" if "codes" in spec else "log", min(self.config.card, self.config.text_card)
        inputs[name] = torch.randint(least, (rows, *spec[name].shape), generator=generator)
        if "count" in spec:
            inputs["count"].fill_(_frames(variant))
        else:
            inputs["temperature"].fill_(1.0)
        return inputs

    def forward(self, codes: Tensor) -> Logits:
        """Whole conversations, as in training: ``[B, streams, T]`` undelayed tokens, -1 for none.

        Logits stand where the tokens they predict stand.
        """
        delays, frames = self.delays.delays, codes.shape[2]
        start = self.delays.initial[:, None]
        position = torch.arange(frames + 1, device=codes.device)
        source = position - 1 - delays[:, None]  # [streams, T + 1]: position p reads token p - 1 - delay
        shifted = torch.where(source >= 0, codes.gather(2, source.clamp(min=0).expand(len(codes), -1, -1)), start)
        x = self.embed(shifted[..., :-1], position[None, :-1])
        heard = self.norm(self.temporal(x, self.temporal.whole(frames, x.device)))
        text = self.text_head(heard)
        if self.depth is None:
            nothing = codes.new_zeros(len(codes), 0, frames)
            return Logits(text, nothing[..., None].to(text.dtype), nothing.bool())
        spoken = self.config.spoken
        made = shifted[:, : 1 + spoken, 1:].transpose(1, 2).flatten(0, 1)
        audio = self.depth(heard.flatten(0, 1), made[:, 0], made[:, 1:]).unflatten(0, (len(codes), frames))
        place = position[:-1] + delays[1 : 1 + spoken, None]  # [K, T]: where token t of a codebook is predicted
        index = place.clamp(max=frames - 1)[None, ..., None].expand(len(codes), -1, -1, audio.shape[3])
        mask = (place < frames) & (codes[:, 1 : 1 + spoken] >= 0)
        return Logits(text, audio.transpose(1, 2).gather(2, index), mask)

    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """One frame, or a log of several.

        One frame: ``codes [B, heard]``, the user's; ``force [B, 1 + spoken]``, text and codebook tokens to take instead
        of drawing them (-2: draw, -1: none; text -3: draw, with the end of padding for a word's token), as sampled at
        this step; and ``Sampling.inputs``. Returns ``text [B]`` and ``codes [B, spoken]``, a frame without delays, that
        counts where ``valid [B]``; ``sampled [B, 1 + spoken]``, the tokens of this step; ``heads [B, n, classes]``,
        probabilities, for models that have such heads.

        A log: ``log [B, P, streams]``, tokens sampled and heard at each of the first ``count [B]`` steps. Returns
        ``seen [B]``, the positions that the session has lived through.
        """
        target = torch.where(active, slots, state["lm.tokens"].shape[0] - 1)
        if "log" in inputs:
            return self._read(inputs["log"].transpose(1, 2), inputs["count"], state, slots, target)
        seen = state["temporal.seen"].index_select(0, slots)
        ring = state["lm.tokens"].index_select(0, slots)
        history = state["lm.history"].index_select(0, slots)
        seeds = state["lm.seeds"].index_select(0, slots)
        seeds = torch.where(seeds < 0, inputs["seed"], seeds)
        codes, force = inputs["codes"], inputs["force"]
        tokens = torch.cat((force, codes), 1)[..., None]
        heard = self._think(self.delays.read(ring, seen, tokens), seen, state, slots, target)[:, 0]
        text = self._text(heard, inputs, history, seeds[:, 0], seen)
        sampled = self._audio(heard, text, inputs, seeds[:, 1], seen)
        tokens = torch.cat((sampled, codes), 1)[..., None]
        ring = self.delays.write(ring, seen, tokens, torch.ones_like(seen))
        state["lm.tokens"].index_copy_(0, target, ring)
        state["lm.seeds"].index_copy_(0, target, seeds)
        state["lm.history"].index_copy_(0, target, remember(history, text[:, None], self._words(text)[:, None]))
        frame, valid = self.delays.frame(ring, seen + 1)
        outputs = {"text": frame[:, 0], "codes": frame[:, 1:], "valid": valid & active, "sampled": sampled}
        if self.heads is not None:
            outputs["heads"] = self.heads(heard).unflatten(1, self.config.heads).softmax(2)
        return outputs

    def _read(self, tokens: Tensor, count: Tensor, state: State, slots: Tensor, target: Tensor) -> dict[str, Tensor]:
        seen = state["temporal.seen"].index_select(0, slots)
        ring = state["lm.tokens"].index_select(0, slots)
        history = state["lm.history"].index_select(0, slots)
        self._think(self.delays.read(ring, seen, tokens), seen, state, slots, target, count)
        text = tokens[:, 0]
        lived = torch.arange(text.shape[1], device=text.device) < count[:, None]
        state["lm.tokens"].index_copy_(0, target, self.delays.write(ring, seen, tokens, count))
        state["lm.history"].index_copy_(0, target, remember(history, text, self._words(text) & lived))
        return {"seen": seen + count}

    def _think(
        self, tokens: Tensor, seen: Tensor, state: State, slots: Tensor, target: Tensor, count: Tensor | None = None
    ) -> Tensor:
        """``[B, streams, T]`` tokens as read -> ``[B, T, d]``."""
        position = seen[:, None] + torch.arange(tokens.shape[2], device=seen.device)
        x = self.temporal.step("temporal", self.embed(tokens, position), state, slots, target, count)
        heard: Tensor = self.norm(x)
        return heard

    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        """``[B, streams, T]`` -> ``[B, T, d]``: the sum over streams; negative tokens add nothing."""
        found = F.embedding(tokens.clamp(min=0) + self.offsets[:, None], self.embedding.weight)
        x = (found * (tokens >= 0)[..., None]).sum(1)
        return x + sinusoids(position, x.shape[2]).to(x.dtype) if self.config.sinusoids else x

    def _text(self, heard: Tensor, inputs: State, history: Tensor, seed: Tensor, seen: Tensor) -> Tensor:
        logits = wide(self.text_head(heard))
        penalty, context = inputs["penalty"].unbind(1)
        logits = penalise(logits, history, context, penalty)
        temperature = inputs["temperature"][:, 0]
        # The bonus is of the probability after the temperature.
        bonus = inputs["padding_bonus"] * torch.where(temperature > 0, temperature, 1.0)
        logits[:, self.config.padding] += bonus
        noise = gumbel(seed, seen, 0, logits.shape[1])
        token = draw(logits, noise, temperature, inputs["top_k"][:, 0])
        force = inputs["force"][:, 0]
        held = torch.where(self._words(token), self.config.end_padding, token)
        return torch.where(force == HELD, held, torch.where(force == UNSET, token, force))

    def _audio(self, heard: Tensor, text: Tensor, inputs: State, seed: Tensor, seen: Tensor) -> Tensor:
        """``[B, 1 + spoken]``: text and codebooks."""
        if self.depth is None:
            return text[:, None]
        card, force = self.config.card, inputs["force"]
        noise = gumbel(seed, seen, self.config.text_out, self.config.spoken * card).unflatten(1, (-1, card))

        def choose(step: int, logits: Tensor) -> Tensor:
            return draw(logits, noise[:, step], inputs["temperature"][:, 1], inputs["top_k"][:, 1], force[:, 1 + step])

        return torch.cat((text[:, None], self.depth.draw(heard, text, choose)), 1)

    def _words(self, text: Tensor) -> Tensor:
        """Which tokens are text: not padding, nor a start."""
        return (
            (text >= 0)
            & (text != self.config.padding)
            & (text != self.config.end_padding)
            & (text < self.config.text_card)
        )


def _frames(variant: Hashable) -> int:
    if not isinstance(variant, int):
        raise TypeError(f"a variant of Moshi is the number of frames of a step, got {variant!r}")
    return variant
