"""What a recogniser's tokens mean: a SentencePiece model or a ``tokenizer.json``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import sentencepiece
import tokenizers

WORD_START = "\u2581"  # what SentencePiece writes for a space
END_OF_UTTERANCE = "<EOU>"
# <en-US>, <de>, <EOU>, <EOB>, <blank>; unknown text <unk> and byte pieces such as <0x0A> are text.
TAG = re.compile(r"<(?!unk)(?:[a-z]{2,3}(?:-[A-Za-z]{2,4})?|EOU|EOB|blank|pad|/?s)>")


@dataclass(frozen=True)
class Source:
    """The file that a tokenizer was read from."""

    name: Literal["tokenizer.model", "tokenizer.json"]
    content: bytes


class Tokenizer:
    """Token ids to text. ``pieces[id]`` is a token as the model spells it."""

    def __init__(self, source: Source) -> None:
        """Raises ValueError where the file is not what its name says."""
        self.source = source
        if source.name == "tokenizer.model":
            self._sentencepiece = sentencepiece.SentencePieceProcessor()
            try:
                self._sentencepiece.LoadFromSerializedProto(source.content)
            except RuntimeError as error:
                raise ValueError(f"not a SentencePiece model ({error})") from error
            ids = range(self._sentencepiece.GetPieceSize())
            self.pieces: Sequence[str] = tuple(self._sentencepiece.IdToPiece(id) for id in ids)
            special = {id for id in ids if self._sentencepiece.IsControl(id) or self._sentencepiece.IsUnused(id)}
        else:
            try:
                self._json = tokenizers.Tokenizer.from_buffer(source.content)
            except Exception as error:  # the package raises nothing more particular
                raise ValueError(f"not a tokenizer.json ({error})") from error
            by_id = {id: piece for piece, id in self._json.get_vocab(with_added_tokens=True).items()}
            # Ids from the blank on, which comes after all text, are no labels.
            blank = self._json.token_to_id("<blank>")
            count = max(by_id, default=-1) + 1 if blank is None else blank
            self.pieces = tuple(by_id.get(id, "") for id in range(count))
            added = self._json.get_added_tokens_decoder()
            special = {id for id, token in added.items() if token.special and token.content != "<unk>"}
        self._special = special | {id for id, piece in enumerate(self.pieces) if TAG.fullmatch(piece)}
        self._ends = {id for id, piece in enumerate(self.pieces) if piece == END_OF_UTTERANCE}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        if self.source.name == "tokenizer.model":
            ids: list[int] = self._sentencepiece.EncodeAsIds(text)
            return ids
        found: list[int] = self._json.encode(text, add_special_tokens=False).ids
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without the special ones."""
        text = [token for token in tokens if token not in self._special]
        if self.source.name == "tokenizer.model":
            decoded: str = self._sentencepiece.DecodeIds(text)
            return decoded
        return self._json.decode(text, skip_special_tokens=True)

    def starts_word(self, token: int) -> bool:
        """Whether a space comes before the token."""
        return self.pieces[token].startswith(WORD_START)

    def is_special(self, token: int) -> bool:
        """Whether the token is no text: a language tag, the end of an utterance or of a backchannel, a control."""
        return token in self._special

    def ends_utterance(self, token: int) -> bool:
        """Whether the token says that the speaker has finished."""
        return token in self._ends
