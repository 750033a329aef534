"""Sizes of CosyVoice 2's flow matching, and what a streaming session may keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch

RATE = 2  # mel frames per speech token
FRAME_SECONDS = 0.02
TOKEN_SECONDS = RATE * FRAME_SECONDS


def _positive(settings: object, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be positive, got {getattr(settings, name)}")


@dataclass(frozen=True)
class FlowConfig:
    """The networks; the defaults are those of CosyVoice2-0.5B.

    ``chunk`` (tokens) is the attention mask's: a frame sees its own chunk and all before it, positions counted from
    the start of the voice's prompt. ``lookahead`` tokens are heard ahead of a token. ``steps`` are Euler steps.
    """

    vocabulary: int = 6561
    mels: int = 80
    speaker: int = 192
    chunk: int = 25
    lookahead: int = 3
    width: int = 512
    heads: int = 8
    feedforward: int = 2048
    layers: int = 6
    up_layers: int = 4
    channels: int = 256
    unet_heads: int = 8
    unet_head_width: int = 64
    stage_blocks: int = 4
    middle_stages: int = 12
    steps: int = 10
    guidance: float = 0.7

    def __post_init__(self) -> None:
        _positive(self, *(name for name in self.__dataclass_fields__ if name not in ("guidance", "middle_stages")))
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of twice the {self.heads} heads")
        if self.guidance < 0 or self.middle_stages < 0:
            raise ValueError(f"guidance {self.guidance} and middle_stages {self.middle_stages} must be at least 0")

    def shared(self, prompt: int) -> int:
        """Tokens of a prompt whose frames are the same whatever is said after it: whole chunks with lookahead."""
        return max(0, prompt - self.lookahead) // self.chunk * self.chunk

    def late(self, prompt: int, first: int) -> int:
        """Tokens by which ``first`` tokens after a prompt's miss the chunk before: those that it can begin later, for
        them to end with a chunk. 0 where less than a chunk would be left of it."""
        late = (prompt + first) % self.chunk
        return late if prompt - late >= self.chunk else 0


@dataclass(frozen=True)
class FlowLimits:
    """What streaming allocates.

    hops: tokens a step may take, the first being the default; a step may be given fewer.
    schedule: tokens of an utterance's hops, as of ``Hops``; by default ``hops``, the shortest first. Where the first
    hop's steps, longer by what is left of a voice's clip, are of a length of their own, they wait for no later ones.
    left: mel frames a session keeps behind its voice's shared prompt.
    rolling: False keeps every frame, exactly as trained, and a session ends at ``left``; True forgets the oldest,
    so that a frame sees the prompt and ``left`` frames before its chunk, for ever.
    voices, prompt: how many voices may be registered, and the longest prompt of one in tokens.
    kept: dtype of cached keys and values, None for the weights'.
    early: cut less than a chunk off the beginning of a voice's clip, so that an utterance's first hop ends with a chunk
    after just the tokens that the schedule gives it. Otherwise it may take nearly a chunk more.
    """

    hops: tuple[int, ...] = (25, 50, 100)
    left: int = 1500
    rolling: bool = False
    voices: int = 4
    prompt: int = 250
    kept: torch.dtype | None = None
    schedule: tuple[int, ...] = ()
    early: bool = False

    def __post_init__(self) -> None:
        _positive(self, "left", "voices", "prompt")
        if self.left % RATE:
            raise ValueError(f"left must be whole tokens of {RATE} frames, got {self.left} frames")
        if not self.hops or min(self.hops) < 1 or len(set(self.hops)) != len(self.hops):
            raise ValueError(f"hops must be distinct token counts of at least 1, got {self.hops}")

    @property
    def first(self) -> int:
        """Tokens of an utterance's first hop, at least."""
        return (self.schedule or tuple(sorted(self.hops)))[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest step."""
        return max(self.hops)
