"""CosyVoice 2's text tokens: Qwen2's byte-level BPE and nineteen special tokens behind it, in the order of training."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from ..files import CheckpointError

END_OF_TEXT = "<|endoftext|>"
END_OF_PROMPT = "<|endofprompt|>"  # between an instruction and the text
SPECIALS = (
    "<|im_start|>",
    "<|im_end|>",
    END_OF_PROMPT,
    "[breath]",
    "<strong>",
    "</strong>",
    "[noise]",
    "[laughter]",
    "[cough]",
    "[clucking]",
    "[accent]",
    "[quick_breath]",
    "<laughter>",
    "</laughter>",
    "[hissing]",
    "[sigh]",
    "[vocalized-noise]",
    "[lipsmack]",
    "[mn]",
)
# What Qwen2 takes for a word before it looks for pairs.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TextTokenizer:
    """Text to tokens and back. ``end_of_prompt`` (151646 as published) is the token between an instruction and text."""

    def __init__(self, folder: Path) -> None:
        """folder: with ``vocab.json`` and ``merges.txt``, as CosyVoice-BlankEN has them, or a ``tokenizer.json``.

        Raises CheckpointError for files that are missing, damaged or of another tokenizer.
        """
        single, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        pair = vocab.is_file() and merges.is_file()
        if not pair and not single.is_file():
            raise CheckpointError(f"{folder}: holds neither {vocab.name} and {merges.name} nor {single.name}")
        try:
            self._bpe = _qwen2(vocab, merges) if pair else Tokenizer.from_file(str(single))
        except Exception as error:  # the package raises nothing more particular
            raise CheckpointError(f"{folder}: no tokenizer can be made of its files ({error})") from error
        self._bpe.add_special_tokens([AddedToken(token, special=True) for token in (END_OF_TEXT, *SPECIALS)])
        known = self._bpe.get_vocab(with_added_tokens=True)
        ids = [known[token] for token in (END_OF_TEXT, *SPECIALS)]
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise CheckpointError(f"{folder}: its special tokens are {ids}, CosyVoice 2's follow one another")
        self.end_of_prompt = known[END_OF_PROMPT]

    def __len__(self) -> int:
        """Tokens there are; the model's table may have room for more."""
        return self._bpe.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; special tokens may be spelled in it."""
        return list(self._bpe.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without the special ones."""
        return self._bpe.decode(tokens, skip_special_tokens=True)


def _qwen2(vocab: Path, merges: Path) -> Tokenizer:
    made = Tokenizer(BPE.from_file(str(vocab), str(merges)))
    made.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    made.decoder = decoders.ByteLevel()
    return made
