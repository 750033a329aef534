"""What a dialogue model is made to say: text that takes the place of its own in the inner monologue.

Moshi's text stands where it is spoken (arXiv 2410.00037, section 3.4.4): a word's tokens a frame each from where the
word begins, padding while it sounds, and a token that ends the padding just before the next word. So a word is forced
token by token, and when the next one begins is left to the model: where it would go on with a word of its own, the
script's comes. All the sound is drawn as ever.
"""

from __future__ import annotations

from collections import deque

from ..models.conformer.tokenizer import WORD_START, Tokenizer
from ..models.moshi.config import HELD, UNSET, MoshiConfig

LONGEST = 500  # tokens that wait
PATIENCE = 12  # frames of padding between two words, at most


class Script:
    """One session's. ``force`` is the text token of the next step, ``advance`` tells what that step took."""

    def __init__(self, tokenizer: Tokenizer, config: MoshiConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._word: deque[int] = deque()  # what is left of the one that is being said
        self._words: deque[deque[int]] = deque()
        self._waited = PATIENCE  # frames since the last word

    def __len__(self) -> int:
        """Tokens that are not said yet."""
        return len(self._word) + sum(map(len, self._words))

    def add(self, text: str) -> bool:
        """Text to say after what waits; whether there was something to say and room for it."""
        silent = (self._config.padding, self._config.end_padding)  # end_padding is what unknown characters become
        tokens = [token for token in self._tokenizer.encode(text) if token not in silent]
        if not tokens or len(self) + len(tokens) > LONGEST:
            return False
        if not self:
            self._waited = PATIENCE  # the first word comes at once
        for number, token in enumerate(tokens):
            if not number or self._tokenizer.pieces[token].startswith(WORD_START):
                self._words.append(deque())
            self._words[-1].append(token)
        return True

    def clear(self) -> int:
        """Forget what is not said yet: so many tokens."""
        dropped = len(self)
        self._word.clear()
        self._words.clear()
        return dropped

    @property
    def force(self) -> int:
        """The text token of the next step, ``UNSET`` where the script has nothing to say, ``HELD`` between words."""
        if self._word:
            return self._word[0]
        if not self._words:
            return UNSET
        return HELD if self._waited < PATIENCE else self._config.end_padding

    def advance(self, token: int) -> None:
        """A step took this text token."""
        if self._word:
            self._word.popleft()
            self._waited = 0
        elif self._words and (token != self._config.padding or self._waited >= PATIENCE):
            self._word = self._words.popleft()
        else:
            self._waited += 1
