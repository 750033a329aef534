"""From a recogniser's tokens to captions: words with times, partial and final events.

Greedy RNN-T and CTC never retract a token, so a caption only grows: every word but the last is settled as soon as the
next one starts. Beam search has open tokens besides, which a partial caption shows but which may still change. A
caption becomes final after ``endpoint`` seconds without a token and none open (sherpa-onnx's trailing-silence rule), at
an end-of-utterance token, or at ``longest`` seconds, where it is cut before its last settled word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .chunk import Word


@dataclass(frozen=True, slots=True)
class Caption:
    """What was said so far in one stretch of speech, by word: when its first and last tokens were heard.

    at: seconds of media consumed when this was known.
    """

    words: tuple[Word, ...]
    at: float

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def start(self) -> float:
        return self.words[0].start if self.words else self.at

    @property
    def end(self) -> float:
        return self.words[-1].end if self.words else self.at


@dataclass(frozen=True, slots=True)
class Partial(Caption):
    """A caption that may still grow. settled: words at its beginning that stay as they are."""

    settled: int = 0


@dataclass(frozen=True, slots=True)
class Final(Caption):
    """A caption that will not change; the next one starts empty."""


class Vocabulary(Protocol):
    """What captions need of a tokenizer."""

    def starts_word(self, token: int) -> bool: ...

    def is_special(self, token: int) -> bool:
        """A token that is no text: a language tag, <EOU>, <EOB>."""
        ...

    def ends_utterance(self, token: int) -> bool: ...

    def decode(self, tokens: list[int]) -> str: ...


class Captioner:
    """Builds one session's captions.

    endpoint: seconds without a token after which a caption is final. longest: seconds after which it is cut.
    """

    def __init__(
        self, vocabulary: Vocabulary, *, frame: float = 0.08, endpoint: float = 1.0, longest: float = 20.0
    ) -> None:
        if endpoint <= 0 or longest <= 0:
            raise ValueError(f"endpoint and longest must be positive seconds, got {endpoint} and {longest}")
        self._vocabulary = vocabulary
        self._frame, self._endpoint, self._longest = frame, endpoint, longest
        self._words: list[Word] = []
        self._pieces: list[int] = []
        self._first = self._last = 0.0
        self._shown: tuple[int, ...] = ()  # open tokens of the last partial caption

    def add(
        self,
        tokens: Iterable[tuple[int, float]],
        frames: float,
        at: float,
        open_tokens: Sequence[tuple[int, float]] = (),
    ) -> Iterator[Caption]:
        """Take the tokens ``(id, frame)`` of one step and yield what they change.

        frames: of ``frame`` seconds, seen so far, these included. at: seconds of media consumed so far.
        open_tokens: those that follow but may still change.
        """
        changed = False
        for token, frame in tokens:
            if self._vocabulary.ends_utterance(token):
                yield from self.finish(at)
                changed = False
            elif not self._vocabulary.is_special(token):
                yield from self._settle(frame, at)
                if self._vocabulary.starts_word(token) or not self._pieces:
                    self._close_word()
                    self._first = frame
                self._pieces.append(token)
                self._last = frame
                changed = True
        shown = tuple(token for token, _ in open_tokens)
        if not shown and self._open and (frames - 1 - self._last) * self._frame >= self._endpoint:
            yield from self.finish(at)
        elif changed or shown != self._shown:
            yield Partial(self._so_far(open_tokens), at, len(self._words))
        self._shown = shown

    def finish(self, at: float) -> Iterator[Final]:
        """The speech has ended: what is open becomes final."""
        self._close_word()
        if self._words:
            yield Final(tuple(self._words), at)
            self._words = []

    @property
    def _open(self) -> bool:
        return bool(self._words or self._pieces)

    def _settle(self, frame: float, at: float) -> Iterator[Final]:
        """Before a token at ``frame``: end the caption if a long pause lies between, or if it has grown too long."""
        if self._open and (frame - self._last) * self._frame >= self._endpoint:
            yield from self.finish(at)
        elif self._words and frame * self._frame - self._words[0].start >= self._longest:
            yield Final(tuple(self._words), at)
            self._words = []

    def _so_far(self, open_tokens: Sequence[tuple[int, float]]) -> tuple[Word, ...]:
        words, pieces, first, last = list(self._words), list(self._pieces), self._first, self._last
        for token, frame in open_tokens:
            if self._vocabulary.is_special(token):
                continue
            if self._vocabulary.starts_word(token) or not pieces:
                words += self._word(pieces, first, last)
                pieces, first = [], frame
            pieces.append(token)
            last = frame
        return (*words, *self._word(pieces, first, last))

    def _word(self, pieces: list[int], first: float, last: float) -> tuple[Word, ...]:
        text = self._vocabulary.decode(pieces).strip() if pieces else ""
        if not text:
            return ()
        return (Word(text, round(first * self._frame, 3), round((last + 1) * self._frame, 3)),)

    def _close_word(self) -> None:
        self._words.extend(self._word(self._pieces, self._first, self._last))
        self._pieces = []
