"""Beam search of a transducer over slots, in step with the sound (time-synchronous; after arXiv 1211.3711 section 2.3).

A session keeps ``width`` transcripts. In every frame each may take up to ``symbols`` labels and then the blank; equal
transcripts are added up. A language model may have its say in every label, and the transducer's own, seen with no
sound, may be taken off. Labels of the best transcript that are older than ``settle`` frames are final: transcripts that
disagree are dropped. So what a session carries over is bounded, and what was handed out is never taken back.

Any chunking gives the same labels, and a row does not depend on the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..streaming import Specs, State, TensorSpec
from .config import BeamConfig
from .language_model import LanguageModel
from .transducer import Transducer

PRIME = 1000003  # of the rolling hash that tells transcripts apart


@dataclass
class Transcripts:
    """``[B, K, ...]``: the transcripts of a batch of sessions; those with a score of -inf are none."""

    score: Tensor  # log probability, less that of the best
    hash: Tensor  # of all labels
    count: Tensor  # of labels that are not final
    labels: Tensor  # [B, K, H] those labels
    times: Tensor  # [B, K, H] the frames they were heard in
    memory: Tensor  # of the prediction network
    predicted: Tensor  # its output
    ahead: Tensor  # [B, K, V] what is added to the score of each next label
    thought: Tensor  # the language model's memory

    def pick(self, index: Tensor) -> Transcripts:
        """Those at ``[B, K']`` indices of axis 1."""

        def gather(x: Tensor) -> Tensor:
            at = index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])
            return x.gather(1, at)

        return Transcripts(*(gather(getattr(self, name)) for name in NAMES))

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Labels and times ``[B, 1, H]`` and count ``[B, 1]`` of the likeliest."""
        at = self.score.argmax(1, keepdim=True)
        wide = at[..., None].expand(-1, -1, self.labels.shape[2])
        return self.labels.gather(1, wide), self.times.gather(1, wide), self.count.gather(1, at)

    def where(self, rows: Tensor, other: Transcripts) -> Transcripts:
        """These in ``rows`` (``[B]`` bool), the other's elsewhere."""

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (mine.dim() - 1)), mine, theirs)

        return Transcripts(*(choose(getattr(self, name), getattr(other, name)) for name in NAMES))

    def beside(self, other: Transcripts) -> Transcripts:
        """``[B, K + K', ...]``."""
        return Transcripts(*(torch.cat((getattr(self, name), getattr(other, name)), 1) for name in NAMES))


NAMES = tuple(field.name for field in fields(Transcripts))


class BeamSearch(nn.Module):
    """Decodes like :class:`Transducer`, whose weights it shares.

    longest: most frames of a chunk. Call ``prepare`` once the weights are final.
    """

    start: Tensor | None

    def __init__(
        self, transducer: Transducer, config: BeamConfig, language_model: LanguageModel | None, longest: int
    ) -> None:
        super().__init__()
        self.transducer, self.config, self.language_model = transducer, config, language_model
        self.held = (config.settle + 1) * config.symbols  # most labels that are not final between frames
        self.longest = longest
        self.register_buffer("start", None, persistent=False)

    @torch.no_grad()
    def prepare(self) -> BeamSearch:
        """Make ``decode`` ready: packed weights and the state before the first label."""
        self.transducer.prepare()
        if self.language_model is not None:
            self.language_model.prepare()
        first = self.transducer.start
        assert first is not None
        width = self.transducer.config.joint_width
        thought = first.new_zeros(1, *self._thought)
        start = torch.full((1,), self.transducer.blank, device=first.device)
        ahead, thought = self._look_ahead(start, first[:, -width:], thought)
        self.start = torch.cat((first, ahead, thought.flatten(1)), 1)
        return self

    @property
    def _thought(self) -> tuple[int, ...]:
        return (2, 1, 1) if self.language_model is None else self.language_model.memory

    def state_spec(self) -> Specs:
        """The transcripts, and the frames heard."""
        transducer, width, dtype = self.transducer.config, self.config.width, self.transducer.head.weight.dtype
        return {
            "beam.frames": TensorSpec((), torch.int64),
            "beam.score": TensorSpec((width,), _wide(dtype)),
            "beam.hash": TensorSpec((width,), torch.int64),
            "beam.count": TensorSpec((width,), torch.int64),
            "beam.labels": TensorSpec((width, self.held), torch.int64),
            "beam.times": TensorSpec((width, self.held), torch.int64),
            "beam.memory": TensorSpec((width, 2, transducer.layers, transducer.width), dtype),
            "beam.predicted": TensorSpec((width, transducer.joint_width), dtype),
            "beam.ahead": TensorSpec((width, transducer.vocabulary), dtype),
            "beam.thought": TensorSpec((width, *self._thought), dtype),
        }

    @torch.no_grad()
    def decode(
        self, frames: Tensor, valid: Tensor, ended: Tensor, state: State, slots: Tensor, active: Tensor
    ) -> dict[str, Tensor]:
        """One chunk of ``B`` sessions.

        frames: ``[B, n, d]``; valid: ``[B, n]`` bool, a row's valid frames come first. ended: ``[B]`` bool, the
        utterance ends with this chunk, so that all labels are final.
        Returns ``tokens``, ``times`` (``[B, N]`` int64, -1 past the count; times count frames from the chunk's first
        and may be negative) and ``count`` of the labels that are final now, and ``open_tokens``, ``open_times`` and
        ``open_count`` of the best transcript's that are not. Raises ValueError for more frames than ``longest``.
        """
        rows, steps = valid.shape
        if steps > self.longest:
            raise ValueError(f"{steps} frames in one call, but the search was made for {self.longest}")
        heard = state["beam.frames"].index_select(0, slots)
        now = self._load(state, slots, heard == 0)
        projected = self.transducer.from_encoder(frames)
        settled = _Settled(rows, self.held + steps * self.config.symbols, frames.device)
        for step in range(steps):
            here = valid[:, step] & active
            if frames.device.type == "cpu" and not here.any():
                break
            at = heard + step
            after = self._frame(now, projected[:, step], at)
            now = self._settle(after, at - self.config.settle, settled, here).where(here, now)
        last = torch.where(ended, torch.iinfo(torch.int64).max, -1)
        now = self._settle(now, last, settled, ended & active)
        target = torch.where(active, slots, state["beam.frames"].shape[0] - 1)
        state["beam.frames"].index_copy_(0, target, heard + valid.sum(1))
        for name in NAMES:
            state[f"beam.{name}"].index_copy_(0, target, getattr(now, name))
        labels, times, count = now.best()
        return {
            "tokens": settled.labels[:, :-1],
            "times": torch.where(settled.labels < 0, -1, settled.times - heard[:, None])[:, :-1],
            "count": settled.count,
            "open_tokens": labels[:, 0],
            "open_times": times[:, 0] - heard[:, None],
            "open_count": count[:, 0],
        }

    def _load(self, state: State, slots: Tensor, fresh: Tensor) -> Transcripts:
        """The sessions' transcripts; a session that has not begun has one, without labels."""
        if self.start is None:
            raise RuntimeError("the beam search is not ready to decode: call prepare() once its weights are loaded")
        old = Transcripts(*(state[f"beam.{name}"].index_select(0, slots) for name in NAMES))
        parts = (old.memory, old.predicted, old.ahead, old.thought)
        first = self.start[0].split([part[0, 0].numel() for part in parts])
        begin = [value.view(1, 1, *part.shape[2:]).expand_as(part) for value, part in zip(first, parts, strict=True)]
        score = torch.full_like(old.score, -math.inf)
        score[:, 0] = 0.0
        zero = torch.zeros_like
        new = Transcripts(score, zero(old.hash), zero(old.count), zero(old.labels), zero(old.times), *begin)
        return new.where(fresh, old)

    def _frame(self, now: Transcripts, projected: Tensor, at: Tensor) -> Transcripts:
        """The transcripts after one more frame, ``projected`` ``[B, J]`` and numbered ``at`` ``[B]``."""
        width, blank = self.config.width, self.transducer.blank
        done: Transcripts | None = None
        for symbol in range(self.config.symbols + 1):
            logits = self.transducer.head(F.relu(projected[:, None] + now.predicted))
            chances = (logits.to(now.score.dtype) / self.config.temperature).log_softmax(-1)
            left = replace(now, score=now.score + chances[..., blank])
            done = left if done is None else _distinct(done.beside(left), width)
            if symbol == self.config.symbols:
                break
            total = now.score[..., None] + chances[..., :blank] + now.ahead
            score, index = total.flatten(1).topk(width, 1)
            good = score > done.score.amax(1, keepdim=True) - self.config.prune
            if score.device.type == "cpu" and not good.any():
                break
            score = torch.where(good, score, -math.inf)
            now = self._extend(now.pick(index // blank), index % blank, score, at)
        assert done is not None
        done.score = done.score - done.score.amax(1, keepdim=True)  # only differences count: keep them small for hours
        return done

    def _extend(self, old: Transcripts, label: Tensor, score: Tensor, at: Tensor) -> Transcripts:
        """Every transcript with one more label ``[B, K]``, heard in frame ``at``."""
        rows, width = label.shape
        place = old.count.clamp(max=self.held - 1)[..., None]  # those that are none may be full
        memory, predicted = self.transducer.advance(label.flatten(), old.memory.flatten(0, 1))
        ahead, thought = self._look_ahead(label.flatten(), predicted, old.thought.flatten(0, 1))
        return Transcripts(
            score,
            old.hash * PRIME + (label + 1),
            (old.count + 1).clamp(max=self.held),
            old.labels.scatter(2, place, label[..., None]),
            old.times.scatter(2, place, at[:, None, None].expand(rows, width, 1)),
            *(part.unflatten(0, (rows, width)) for part in (memory, predicted, ahead, thought)),
        )

    def _look_ahead(self, label: Tensor, predicted: Tensor, thought: Tensor) -> tuple[Tensor, Tensor]:
        """label ``[R]``, predicted ``[R, J]``, thought ``[R, ...]`` -> additions ``[R, V]``, the thought after it."""
        config, blank = self.config, self.transducer.blank
        ahead = predicted.new_full((len(label), blank), config.bonus)
        if self.language_model is not None:
            likely, thought = self.language_model.step(label, thought)
            ahead = ahead + config.language_model * likely
        if config.internal:
            silence = self.transducer.from_encoder.bias
            alone = self.transducer.head(F.relu(predicted if silence is None else predicted + silence))
            ahead = ahead - config.internal * (alone[:, :blank] / config.temperature).log_softmax(-1)
        return ahead, thought

    def _settle(self, now: Transcripts, until: Tensor, settled: _Settled, rows: Tensor) -> Transcripts:
        """Make the best transcript's labels of frames up to ``until`` ``[B]`` final, in ``rows`` ``[B]`` bool."""
        index = torch.arange(self.held, device=until.device)
        labels, times, count = now.best()
        final = (index < count[..., None]) & (times <= until[:, None, None]) & rows[:, None, None]
        number = final.sum(2)  # [B, 1]
        agrees = ((now.labels == labels) | ~final).all(2) & (now.count >= number)
        settled.add(labels[:, 0], times[:, 0], number)
        ahead = (index + number[..., None]).clamp(max=self.held - 1).expand_as(now.labels)
        return replace(
            now,
            score=torch.where(agrees, now.score, -math.inf),
            count=(now.count - number).clamp(min=0),
            labels=now.labels.gather(2, ahead),
            times=now.times.gather(2, ahead),
        )


class _Settled:
    """Final labels of a chunk, gathered row by row; the last column takes what is none."""

    def __init__(self, rows: int, most: int, device: torch.device) -> None:
        self.labels = torch.full((rows, most + 1), -1, dtype=torch.int64, device=device)
        self.times = self.labels.clone()
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)

    def add(self, labels: Tensor, times: Tensor, number: Tensor) -> None:
        """The first ``number`` ``[B, 1]`` of labels and times ``[B, H]``."""
        index = torch.arange(labels.shape[1], device=labels.device)
        column = torch.where(index < number, self.count[:, None] + index, self.labels.shape[1] - 1)
        self.labels.scatter_(1, column, labels)
        self.times.scatter_(1, column, times)
        self.count += number[:, 0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What log probabilities are added up in."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def _distinct(all_: Transcripts, width: int) -> Transcripts:
    """The best ``width``, equal ones added up."""
    there = all_.score > -math.inf
    same = (all_.hash[:, :, None] == all_.hash[:, None]) & there[:, None]
    summed = torch.where(same, all_.score[:, None], -math.inf).logsumexp(2)
    first = there & ~same.tril(-1).any(2)
    score, index = torch.where(first, summed, -math.inf).topk(width, 1)
    return replace(all_.pick(index), score=score)
