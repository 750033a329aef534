"""What the language model reads next: the host's side of :mod:`.lm` for one utterance (arXiv 2412.10117 section 2.4).

Text that is known as a whole stands before the speech. Text that still arrives is read in blocks, as published five
tokens of text for fifteen of speech; a block ends where the model draws ``fill``, at the latest when its speech is
full, and what is left of the text when it is finished stands before the rest of the speech. A prompt, a clip's text and
speech, comes first in either layout. ``fill`` is only drawn: next after it, text is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .lm_config import Burst, LMConfig
from .sampling import HISTORY, NONE, Sampling

IGNORED = -1
"""As a target: nothing is to be drawn here."""


@dataclass(frozen=True)
class Feed:
    """One step: its variant and its inputs."""

    variant: int | Burst
    inputs: dict[str, NDArray[np.generic]]


class TextStream:
    """One utterance's text on its way into the language model, and its speech tokens out of it.

    Call ``feed`` for the next step and ``take`` with the token that it drew (``take_all`` with those of a burst), in
    turn, until ``end`` is set; ``feed`` returns None while more text is needed.

    Text and prompt are tokens of the tokenizer, as ``push`` takes them.

    known: the text as a whole; otherwise it arrives by ``push`` until ``finish``.
    block, lengths: instead of the configuration's ``mix`` and ``extent``. The fewest speech tokens are asked of text
    known as a whole only, as upstream does; the most bound both, arriving text once it is finished.

    ``end`` is "said" when the model drew its end, "length" where the longest is reached, "capacity" where the session
    is full: what is then left of the text is in ``rest``. Raises ValueError for a prompt that leaves no room.
    """

    def __init__(
        self,
        config: LMConfig,
        known: Sequence[int] | None = None,
        *,
        prompt_text: Sequence[int] = (),
        prompt_speech: Sequence[int] = (),
        sampling: Sampling | None = None,
        block: tuple[int, int] | None = None,
        lengths: tuple[float, float] | None = None,
    ) -> None:
        block, lengths = block or config.mix, lengths or config.extent
        if min(block) < 1 or not 0 <= lengths[0] <= lengths[1]:
            raise ValueError(f"a block has text and speech, got {block}; lengths are a rising pair, got {lengths}")
        if any(not 0 <= token < config.speech for token in prompt_speech):
            raise ValueError(f"a prompt's speech tokens go from 0 to {config.speech - 1}")
        self.config, self.block, self.lengths = config, block, lengths
        self._sampling = (sampling or Sampling()).inputs()
        self._text = [config.text_id(token) for token in prompt_text]
        self._prompt = list(prompt_speech)
        self._due = (len(self._prompt) // block[1] + 1) * block[1] - len(self._prompt)
        self._drawn: list[int] = []  # what was drawn, fills included
        self._pending = [config.start]
        self._flying = 0  # tokens of the step that is under way
        self._read = self._pushed = self._spoken = 0
        self._known = known is not None
        self._finished = self._closing = self._drawing = False
        self.end: Literal["said", "length", "capacity"] | None = None
        if known is not None:
            self.push(known)
            self._finished = True
            self._close()
        if (needed := 1 + len(self._text) + len(self._pending) + len(self._prompt)) > config.capacity:
            raise ValueError(
                f"prompt and text are {needed} tokens, the sessions were made for {config.capacity}: shorten the "
                "prompt, split the text, or raise the capacity"
            )

    @property
    def rest(self) -> tuple[int, ...]:
        """Text that was not read, as tokens of the tokenizer."""
        first = self.config.text_id(0)
        return tuple(token - first for token in (*self._pending, *self._text) if token >= first)

    @property
    def speech(self) -> list[int]:
        """All speech tokens so far."""
        return [token for token in self._drawn if token < self.config.speech]

    def push(self, text: Iterable[int]) -> None:
        """More text. Raises RuntimeError when it was finished."""
        if self._finished:
            raise RuntimeError("this utterance's text was finished: start another stream for more")
        tokens = [self.config.text_id(token) for token in text]
        self._text += tokens
        self._pushed += len(tokens)

    def finish(self) -> None:
        """There is no more text."""
        self._finished = True

    def feed(self, wanted: int = 1) -> Feed | None:
        """The next step, or None while there is nothing to read: more text is needed, or the end is reached.

        wanted: speech tokens that there is use for at once; for more than one it may be a burst, of as many draws
        as it has room for. Raises RuntimeError while a step is under way.
        """
        if self._flying:
            raise RuntimeError("the last step's token was not taken yet")
        if self.end is None and not self._drawing:
            self._arrange()
        self._bound()
        # Before text allows to draw, all can be read but what the first draw follows.
        ready = len(self._pending) - (not self._drawing)
        if self.end is not None or ready < 1:
            return None
        recent = np.full(HISTORY, NONE, np.int64)
        if tail := self._drawn[-HISTORY:]:
            recent[-len(tail) :] = tail
        drawn = ready == 1 and self._drawing and self._pending[0] < self.config.speech
        if drawn and (size := self._burst(wanted)) > 1:
            self._flying = 1
            special = np.array([self._special(ahead) for ahead in range(size)])
            draws = np.array(min(size, wanted, self._draws()))
            inputs = {"token": np.array(self._pending[0]), "draws": draws, "special": special, "recent": recent}
            return Feed(Burst(size), inputs | self._sampling)
        lengths = self.config.lengths
        variant = next((length for length in lengths if length >= ready), lengths[-1])
        self._flying = count = min(variant, ready)
        tokens = np.zeros(variant, np.int64)
        tokens[:count] = self._pending[:count]
        inputs = {"tokens": tokens, "count": np.array(count), "special": np.array(self._special()), "recent": recent}
        return Feed(variant, inputs | self._sampling)

    def take(self, token: int) -> int | None:
        """What the step drew; returns it where it is speech. Raises RuntimeError without a step under way."""
        if not self._flying:
            raise RuntimeError("no step is under way")
        self._read += self._flying
        self._pending = self._pending[self._flying :]
        self._flying = 0
        if self._pending:
            return None  # the step read a part
        if token == self.config.end:
            self.end, self._drawing = "said", False
            return None
        self._drawn.append(token)
        if token == self.config.fill:
            self._block_ended()
            return None
        self._pending = [token]
        self._spoken += 1
        if not self._closing and len(self._drawn) == self._due:
            self._drawn.append(self.config.fill)
            self._block_ended()
        return token

    def take_all(self, drawn: Iterable[int]) -> list[int]:
        """What a burst drew; returns what of it is speech. Raises RuntimeError without a step under way."""
        spoken = []
        for token in drawn:
            if token == NONE:
                break
            if (one := self.take(token)) is None:
                break
            spoken.append(one)
            self._flying = 1
        self._flying = 0
        return spoken

    def _burst(self, wanted: int) -> int:
        """Room of the step that gives so many in the fewest steps: the least, since one step costs about what the
        host needs from one to the next."""
        wanted = min(wanted, self._draws())
        return min(self.config.bursts or (1,), key=lambda size: (-(-wanted // size), size))

    def _draws(self) -> int:
        """Draws until it is decided here what comes next."""
        most = int(self._pushed * self.lengths[1]) - self._spoken if self._closing else self._due - len(self._drawn)
        return min(most, self.config.capacity - self._read)

    def _arrange(self) -> None:
        """Move text, and the prompt's speech, to where they are read."""
        text, speech = self.block
        while self._prompt and len(self._text) >= text:
            self._pending += self._text[:text] + self._prompt[:speech]
            self._text, self._prompt = self._text[text:], self._prompt[speech:]
        if not self._prompt and not self._drawn and self._read + len(self._pending) > 1:
            self._drawing = True  # in the middle of the prompt's last block
        elif not self._prompt and len(self._text) >= text:
            self._pending += self._text[:text]
            self._text = self._text[text:]
            self._drawing = True
        elif self._finished:
            self._close()

    def _close(self) -> None:
        """What is left of the text stands before the rest of the speech."""
        self._pending += [*self._text, self.config.task, *self._prompt]
        self._text, self._prompt = [], []
        self._closing = self._drawing = True

    def _block_ended(self) -> None:
        self._due = len(self._drawn) + self.block[1]
        self._drawing = False

    def _bound(self) -> None:
        """End where the utterance is too long."""
        if self.end is not None:
            return
        if self._closing and self._spoken >= int(self._pushed * self.lengths[1]):
            self.end = "length"
        elif self._read + len(self._pending) > self.config.capacity:
            self.end = "capacity"

    def _special(self, ahead: int = 0) -> int:
        """What beside speech may be drawn, after ``ahead`` more of it."""
        if not self._closing:
            return self.config.fill
        shortest = int(self._pushed * self.lengths[0]) if self._known else 0
        return NONE if self._spoken + ahead < shortest else self.config.end


def lay_out(
    config: LMConfig, text: Sequence[int], speech: Sequence[int], block: tuple[int, int] | None = None
) -> tuple[list[int], list[int]]:
    """A sequence to train on: what is read, and what is to be drawn after each of it (``IGNORED`` after most text).

    text: tokens of the tokenizer. block: None for text before speech, otherwise as it is read when text arrives, for
    which the speech must be longer than the text in the block's proportion: raises ValueError.
    """
    ids = [config.text_id(token) for token in text]
    read, drawn = [config.start], [IGNORED]
    speech = list(speech)
    if block is not None:
        some, much = block
        if len(speech) * some <= len(ids) * much:
            raise ValueError(f"{len(ids)} text tokens in blocks of {block} need more than {len(speech)} speech tokens")
        while len(ids) >= some:
            read += ids[:some] + speech[:much]
            drawn += [IGNORED] * (some - 1) + speech[:much] + [config.fill]
            ids, speech = ids[some:], speech[much:]
    return [*read, *ids, config.task, *speech], [*drawn, *[IGNORED] * len(ids), *speech, config.end]
