"""Flow matching as a streaming step: a hop of speech tokens in, twice as many mel frames out.

Nothing before the hop is computed again: each Euler step keeps, for its two branches, the keys and values of every
attention and the tails of every convolution. A step comes in slices, the encoder first and then one per Euler step.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..layers.kernels import use_kernels
from ..layers.packing import pack
from ..streaming import Specs, State, StreamingModel, TensorSpec
from .flow import Condition, FlowMatching
from .flow_config import RATE, TOKEN_SECONDS, FlowLimits
from .flow_context import Cached, CacheShape, Call, InPlace
from .flow_voices import FlowVoice, Voices, check_prompt

NO_TOKEN = -1
HEADS = (16, 32, 64, 128)  # widths that kernels know


class StreamingFlow(StreamingModel):
    """The flow over slots. A variant is the number of tokens a step has room for.

    Voices are registered on the model and named by their row in every step's inputs, so that a session's state holds
    nothing of its voice; a snapshot goes on wherever the same voice is registered, in whatever row.
    """

    shifts: Tensor

    def __init__(self, flow: FlowMatching, limits: FlowLimits | None = None, *, together: bool | None = None) -> None:
        """together: compute the rows of a step together, in fixed shapes; by default on all devices but the CPU.

        On the CPU the frames of one session fill a matrix product: rows are computed one after another, each with as
        much of its caches as is filled and without padding.
        """
        super().__init__()
        self.flow = flow
        self.together = together
        self.limits = limits or FlowLimits()
        self.config = flow.config
        self._shapes: tuple[CacheShape, ...] = (*flow.encoder.caches, flow.estimator.cache)
        room = self.config.shared(self.limits.prompt) * RATE
        weight = flow.speaker.weight
        self.voices = Voices(self.config, self.limits, self._cache_spec(max(room, RATE)), weight)
        steps = (self.config.steps, self.config.middle_stages + 2, self.config.channels)
        self.register_buffer("shifts", weight.new_zeros(steps), persistent=False)

    @property
    def batched(self) -> bool:
        """Whether rows of a step are computed together; where not, a larger batch saves nothing."""
        return self.shifts.device.type != "cpu" if self.together is None else self.together

    @property
    def variants(self) -> tuple[int, ...]:
        return self.limits.hops

    def tick(self, variant: Hashable) -> float:
        return _hop(variant) * TOKEN_SECONDS

    def slices(self, variant: Hashable) -> int:
        """The encoder and the Euler steps."""
        return 1 + self.config.steps

    def _cache_spec(self, frames: int) -> dict[str, TensorSpec]:
        dtype = self.flow.dtype
        return {
            name: spec for shape in self._shapes for name, spec in shape.spec(frames, dtype, self.limits.kept).items()
        }

    def state_spec(self) -> Specs:
        """``flow.seen`` counts tokens behind the voice's shared prompt; ``flow.mu`` and ``flow.sample`` live from slice
        to slice."""
        return self._spec(self.limits.left, self.limits.longest)

    def _spec(self, frames: int, hop: int) -> dict[str, TensorSpec]:
        mel = TensorSpec((hop * RATE, self.config.mels), self.flow.sample_dtype)
        return {
            "flow.seen": TensorSpec((), torch.int64),
            "flow.mu": mel,
            "flow.sample": mel,
            **self._cache_spec(frames),
        }

    def input_spec(self, variant: Hashable) -> Specs:
        return {
            "tokens": TensorSpec((_hop(variant) + self.config.lookahead,), torch.int64, NO_TOKEN),
            "count": TensorSpec((), torch.int64, _hop(variant)),
            "voice": TensorSpec((), torch.int64),
        }

    def probe_inputs(self, variant: Hashable, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random tokens, for finding batch sizes that give equal bits."""
        inputs = {name: spec.new(rows) for name, spec in self.input_spec(variant).items()}
        inputs["tokens"].random_(0, self.config.vocabulary, generator=generator)
        return inputs

    @torch.no_grad()
    def prepare(self) -> None:
        self.eval()
        pack(self)
        times = torch.tensor(self.flow.times[:-1], dtype=self.flow.sample_dtype, device=self.shifts.device)
        self.shifts.copy_(self.flow.estimator.shifts(times))

    @torch.no_grad()
    def add_voice(self, tokens: Sequence[int], mel: Tensor, embedding: Tensor) -> FlowVoice:
        """Register a voice and make its caches; call in the thread that steps the model, after ``prepare``.

        tokens: of the prompt, none for a voice by embedding alone. mel: ``[2 * len(tokens), mels]``.
        embedding: ``[speaker]``. With ``limits.early`` less than a chunk of the prompt's beginning may be left out.
        Raises ValueError for shapes that do not fit and RuntimeError when all rows are taken.
        """
        check_prompt(tokens, mel, embedding, self.config, self.limits)
        if self.limits.early:
            late = self.config.late(len(tokens), self.limits.first)
            tokens, mel = tokens[late:], mel[RATE * late :]
        row = self.voices.take()
        device = self.shifts.device
        self.voices.introduce(row, mel.to(device), self.flow.project(embedding.to(device)))
        if shared := self.config.shared(len(tokens)):
            # One full step of a session of its own, with caches as long as the table's; nothing of it goes to scratch.
            specs = self._spec(self.config.shared(self.limits.prompt) * RATE, shared)
            state = {name: spec.new(1, device) for name, spec in specs.items()}
            slot = torch.zeros(1, dtype=torch.int64, device=device)
            heard = torch.tensor([tokens[: shared + self.config.lookahead]], device=device)
            self.step({"tokens": heard, "count": slot + shared, "voice": slot + row}, state, slot, slot == 0)
            self.voices.cache(row, shared, state)
        return FlowVoice(row, shared, tuple(tokens[shared:]))

    def remove_voice(self, voice: FlowVoice) -> None:
        """Free a voice's row; no session may use it any longer."""
        self.voices.give(voice.row)

    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """inputs: ``tokens [B, hop + lookahead]``, those of the hop, right behind them the ones after it as far as the
        utterance goes, then -1; ``count [B]`` tokens of the hop; ``voice [B]`` rows.

        Returns ``mel [B, 2 hop, mels]`` and ``frames [B]``, how many there are: 2 a token, fewer where a session's
        caches are full, and zeros behind them.
        """
        outputs: dict[str, Tensor] = {}
        for index in range(self.slices(inputs["tokens"].shape[1] - self.config.lookahead)):
            outputs = self.step_slice(index, inputs, state, slots, active)
        return outputs

    @torch.no_grad()
    def step_slice(self, index: int, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """Slice 0 encodes, slice ``i`` takes Euler step ``i - 1``, the last returns what ``step`` does."""
        if self.batched:
            return self._slice(index, self._call(inputs, state, slots, active), inputs["tokens"], state)
        rows, room = inputs["tokens"].shape
        mel = torch.zeros(rows, (room - self.config.lookahead) * RATE, self.config.mels, dtype=self.flow.sample_dtype)
        frames = torch.zeros(rows, dtype=torch.int64)
        for row in active.nonzero().flatten().tolist():
            one = slice(row, row + 1)
            cut = {name: tensor[one] for name, tensor in inputs.items()}
            cut["tokens"] = cut["tokens"][:, : max(1, int(inputs["count"][row])) + self.config.lookahead]
            call = self._call(cut, state, slots[one], active[one], alone=True)
            if made := self._slice(index, call, cut["tokens"], state):
                mel[row, : made["mel"].shape[1]] = made["mel"][0]
                frames[row] = made["frames"][0]
        return {"mel": mel, "frames": frames} if index == self.config.steps else {}

    def _slice(self, index: int, call: Call, tokens: Tensor, state: State) -> dict[str, Tensor]:
        if index == 0:
            self._encode(call, tokens, state)
            return {}
        sample = self._euler(call, index - 1, state)
        if index < self.config.steps:
            return {}
        state["flow.seen"].index_copy_(0, call.target, call.seen + call.count)
        made = call.made()
        return {"mel": torch.where(made[..., None], sample, 0.0), "frames": made.sum(1)}

    def _call(self, inputs: State, state: State, slots: Tensor, active: Tensor, *, alone: bool = False) -> Call:
        hop = inputs["tokens"].shape[1] - self.config.lookahead
        longest = state["flow.mu"].shape[1] // RATE
        if not 1 <= hop <= longest:
            raise ValueError(f"a step has room for 1 to {longest} tokens and {self.config.lookahead} ahead, not {hop}")
        scratch = state["flow.seen"].shape[0] - 1
        seen = state["flow.seen"].index_select(0, slots)
        count = inputs["count"].clamp(0, hop)
        if not self.limits.rolling:
            count = torch.minimum(count, state["flow.tokens.rings"].shape[4] - seen)
        voice = inputs["voice"]
        target = torch.where(active, slots, scratch)
        shared = self.voices.shared[voice]
        return Call(self.config, self.limits, hop, slots, target, scratch, voice, shared, seen, count, alone)

    def _encode(self, call: Call, tokens: Tensor, state: State) -> None:
        contexts = [Cached(shape, call, state, self.voices.caches) for shape in self._shapes[:2]]
        mu = self.flow.encoder(tokens, *contexts)
        for context in contexts:
            context.commit()
        state["flow.mu"][:, : mu.shape[1]].index_copy_(0, call.target, mu.to(self.flow.sample_dtype))
        noise = self.flow.noise_at(call.frames())
        state["flow.sample"][:, : mu.shape[1]].index_copy_(0, call.target, noise)

    def _euler(self, call: Call, index: int, state: State) -> Tensor:
        if use_kernels(self.shifts) and self.config.unet_head_width in HEADS:
            return self._euler_in_place(call, index, state)
        frames = call.hop * RATE
        mu, x = (state[name][:, :frames].index_select(0, call.slots) for name in ("flow.mu", "flow.sample"))
        prompt = self.voices.prompt(call.voice, call.frames())
        condition = Condition(mu, self.voices.speaker[call.voice], prompt)
        context = Cached(self._shapes[2], call, state, self.voices.caches, index)
        velocity = self.flow.guided(x, condition, self.shifts[index : index + 1], context)
        context.commit()
        x = x + (self.flow.times[index + 1] - self.flow.times[index]) * velocity
        state["flow.sample"][:, :frames].index_copy_(0, call.target, x)
        return x

    def _euler_in_place(self, call: Call, index: int, state: State) -> Tensor:
        """The same by kernels."""
        from .triton_euler import inputs, move
        from .unet_fused import velocity

        voices, sample = self.voices, state["flow.sample"]
        x = inputs(
            sample, state["flow.mu"], voices.speaker, voices.mel, voices.length,
            call.slots, call.voice, call.shared, call.seen, call.hop * RATE,
        )  # fmt: skip
        context = InPlace(self._shapes[2], call, state, voices.caches, index)
        velocities = velocity(self.flow.estimator, x, self.shifts[index : index + 1], context)
        context.commit()
        step = self.flow.times[index + 1] - self.flow.times[index]
        return move(sample, velocities, call.slots, call.target, self.config.guidance, step)


def _hop(variant: Hashable) -> int:
    if not isinstance(variant, int):
        raise TypeError(f"a flow's variant is the number of tokens of a step, got {variant!r}")
    return variant
