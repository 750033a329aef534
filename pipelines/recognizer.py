"""A streaming recogniser as one step: PCM in, tokens out.

Log-mel, FastConformer and greedy decoding run in one ``step``, so the engine captures them in one CUDA graph and only
samples go in and token ids come out. The variant is the lookahead in encoder frames of 80 ms.

A session's samples travel in blocks of ``1280 * (lookahead + 1)``. Block 0 starts at sample -1080 (those samples do not
exist and are zeros), so that each block ends with the last sample that its encoder frames need and no later.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..codecs.mel import UNKNOWN, LogMel, MelConfig
from ..models.conformer.beam import BeamSearch
from ..models.conformer.config import BeamConfig, encoder_frames
from ..models.conformer.ctc import CTCHead
from ..models.conformer.model import ConformerASR
from ..models.conformer.transducer import Transducer
from ..models.streaming import Specs, State, StreamingModel, TensorSpec
from .captions import Vocabulary

_MEL = MelConfig()  # number of mels aside, what every checkpoint hears with
SAMPLE_RATE = _MEL.sample_rate
FRAME_SAMPLES = _MEL.block(0)  # one encoder frame
FRAME_SECONDS = FRAME_SAMPLES / SAMPLE_RATE


class Recognizer(StreamingModel):
    """Log-mel, encoder and a decoder over slots.

    decoder: "rnnt" or "ctc", both greedy, or "beam", the transducer's search with the checkpoint's language model where
    it has one; by default what the checkpoint was made for, and of those the first that it has.
    Raises ValueError where the checkpoint lacks the decoder asked for.
    """

    def __init__(self, asr: ConformerASR, decoder: str | None = None) -> None:
        super().__init__()
        made = {"rnnt": asr.transducer is not None, "ctc": asr.ctc is not None, "beam": asr.transducer is not None}
        name = decoder or ("beam" if asr.config.beam else "rnnt" if asr.transducer else "ctc")
        if not made.get(name):
            have = ", ".join(key for key, there in made.items() if there)
            raise ValueError(f"this checkpoint has no {name!r} decoder; it has: {have}")
        self.asr = asr
        head = self._beam(asr) if name == "beam" else asr.ctc if name == "ctc" else asr.transducer
        assert head is not None
        self.head: BeamSearch | CTCHead | Transducer = head
        self.mel = LogMel(MelConfig.from_nemo(asr.mel)).to(next(asr.parameters()).device)

    @staticmethod
    def _beam(asr: ConformerASR) -> BeamSearch:
        assert asr.transducer is not None
        return BeamSearch(
            asr.transducer, asr.config.beam or BeamConfig(), asr.language_model, asr.config.encoder.longest
        )  # fmt: skip

    @property
    def vocabulary(self) -> Vocabulary:
        """What tokens mean."""
        return self.asr.vocabulary

    @property
    def variants(self) -> tuple[int, ...]:
        return self.asr.lookaheads

    def variant(self, lookahead: float | None) -> int:
        """The variant of a lookahead in milliseconds; None for the model's default.

        Raises ValueError naming those the model was trained for.
        """
        if lookahead is None:
            return self.variants[0]
        frames = lookahead / (1000 * FRAME_SECONDS)
        if frames not in self.variants:
            known = ", ".join(f"{1000 * FRAME_SECONDS * frames:g}" for frames in sorted(self.variants))
            raise ValueError(f"this model has no lookahead of {lookahead:g} ms; it has: {known}")
        return int(frames)

    def constant_inputs(self, language: str | None) -> dict[str, np.int64]:
        """Inputs that stay the same for a session. Raises ValueError for a language the model lacks."""
        if self.asr.prompt is not None:
            return {"language": np.int64(self.asr.prompt.index(language))}
        if language is not None:
            raise ValueError(f"this model has no choice of language, got {language!r}: leave it out")
        return {}

    def tick(self, variant: Hashable) -> float:
        return (_lookahead(variant) + 1) * FRAME_SECONDS

    def prepare(self) -> None:
        self.asr.prepare()
        if isinstance(self.head, BeamSearch):
            self.head.prepare()

    def state_spec(self) -> Specs:
        parts = (self.mel.state_spec(), self.asr.encoder.state_spec(), self.head.state_spec())
        spec = {name: tensor for part in parts for name, tensor in part.items()}
        if len(spec) != sum(map(len, parts)):
            raise ValueError("two parts of the recogniser name the same state tensor")
        return spec

    def input_spec(self, variant: Hashable) -> Specs:
        spec = {
            "pcm": TensorSpec((_MEL.block(_lookahead(variant)),)),
            "end": TensorSpec((), torch.int64, UNKNOWN),
        }
        if self.asr.prompt is not None:
            spec["language"] = TensorSpec((), torch.int64, self.asr.prompt.default)
        return spec

    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """inputs: ``pcm [B, 1280 (R + 1)]`` float32, ``end [B]`` total samples (2**40 while unknown), and for models
        with a language prompt ``language [B]``.

        Returns ``tokens [B, N]`` (-1 padded), ``times [B, N]`` (frame in the chunk), ``count [B]``, ``frames [B]``
        (encoder frames that exist: fewer than R + 1 only at an utterance's end); of beam search also what is not final,
        see :meth:`~antiphon.models.conformer.beam.BeamSearch.decode`.
        """
        mel, mel_end = self.mel.step(inputs["pcm"], inputs["end"], state, slots, active)
        frames, valid = self.asr.encoder.step(mel.to(self.asr.dtype), mel_end, state, slots, active)
        if self.asr.prompt is not None:
            frames = self.asr.prompt(frames, inputs["language"])
        if isinstance(self.head, BeamSearch):
            ended = inputs["end"] < UNKNOWN
            found = self.head.decode(frames, valid, ended, state, slots, active)
        else:
            tokens, times, count = self.head.decode(frames, valid, state, slots, active)
            found = {"tokens": tokens, "times": times, "count": count}
        return {**found, "frames": valid.sum(1)}


def _lookahead(variant: Hashable) -> int:
    if not isinstance(variant, int):
        raise TypeError(f"a recogniser's variant is its lookahead in frames, got {variant!r}")
    return variant


@dataclass(frozen=True, slots=True)
class Block:
    """One step's samples, the utterance's length where it is known, and the samples heard by its end."""

    pcm: NDArray[np.float32]
    end: int
    heard: int


class Blocks:
    """Cuts a session's samples into a recogniser's blocks; holds less than a block between calls.

    ``lookahead`` may be changed between blocks.
    """

    def __init__(self, lookahead: int) -> None:
        self.lookahead = lookahead
        self.samples = 0
        self._sent_frames = 0
        self._size = _MEL.lead_samples
        self._pending = [np.zeros(self._size, np.float32)]

    def push(self, pcm: NDArray[np.float32]) -> list[Block]:
        """Take mono 16 kHz samples of any length; returns the blocks they complete."""
        self._pending.append(pcm)
        self._size += len(pcm)
        self.samples += len(pcm)
        if self._size < self._want:
            return []
        joined = np.concatenate(self._pending)
        blocks = []
        while len(joined) >= self._want:
            block, joined = joined[: self._want], joined[self._want :]
            self._sent_frames += self.lookahead + 1
            blocks.append(Block(block, UNKNOWN, self.samples - len(joined)))
        self._pending, self._size = [joined], len(joined)
        return blocks

    def finish(self) -> list[Block]:
        """The blocks that flush the utterance: the samples left over and zeros, with its end marked."""
        total = encoder_frames(self.samples // _MEL.hop)
        joined = np.concatenate(self._pending)
        blocks = []
        while self._sent_frames < total:
            block = np.zeros(self._want, np.float32)
            head, joined = joined[: self._want], joined[self._want :]
            block[: len(head)] = head
            self._sent_frames += self.lookahead + 1
            blocks.append(Block(block, self.samples, self.samples))
        self._pending, self._size = [], 0
        return blocks

    @property
    def _want(self) -> int:
        return _MEL.block(self.lookahead)
