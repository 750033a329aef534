"""Text tokens: Qwen2's words and pairs, the special tokens behind them, text in words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from antiphon.models.cosyvoice.tokenizer import END_OF_PROMPT, END_OF_TEXT, SPECIALS, TextTokenizer
from antiphon.models.files import CheckpointError

SPACE = "\u0120"  # how byte-level BPE spells a space
PAIRS = ("t h", "th e", f"{SPACE} the", f"{SPACE} t", f"{SPACE}t h", f"{SPACE}th e", "1 2", "' s", "c a", "ca t")
TEXTS = (
    "the cat's 12 the  the\n\nthe, the!",
    " the the ",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 the caf\u00e9 cafe\u0301",
    "the<|endofprompt|>cat [laughter] the <strong>the</strong>",
    "",
)


def write(folder: Path) -> Path:
    """256 bytes, a few pairs, the end of text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    vocabulary = [*map(chr, plain), *(chr(256 + index) for index in range(256 - len(plain)))]
    vocabulary += [pair.replace(" ", "") for pair in PAIRS if pair.replace(" ", "") not in vocabulary]
    numbered = {token: index for index, token in enumerate(dict.fromkeys([*vocabulary, END_OF_TEXT]))}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(numbered), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(PAIRS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(write(tmp_path_factory.mktemp("tokenizer")))


def test_special_tokens_follow_in_order(tokenizer: TextTokenizer) -> None:
    assert len(SPECIALS) == 19
    (end,) = tokenizer.encode(END_OF_TEXT)
    assert [tokenizer.encode(token) for token in SPECIALS] == [[end + 1 + index] for index in range(19)]
    assert len(tokenizer) == end + 20
    # Qwen2 has 151643 tokens before them.
    assert tokenizer.end_of_prompt - end + 151643 == 151646
    assert tokenizer.encode(f"the{END_OF_PROMPT}the")[1] == tokenizer.end_of_prompt


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back(tokenizer: TextTokenizer, text: str) -> None:
    plain = text
    for special in SPECIALS:
        plain = plain.replace(special, "")
    assert tokenizer.decode(tokenizer.encode(text)) == plain.replace("e\u0301", "\u00e9")


def test_words_are_qwens(tokenizer: TextTokenizer) -> None:
    spelled = {token: text for text, token in tokenizer._bpe.get_vocab().items()}
    pieces = [spelled[token] for token in tokenizer.encode("the cat's 12 the")]
    # A word takes its space along, digits stand alone, an apostrophe's ending is a word.
    assert pieces == ["the", SPACE, "cat", "'s", SPACE, "1", "2", f"{SPACE}the"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_arrives_by_words_has_the_tokens_of_the_whole(tokenizer: TextTokenizer, text: str) -> None:
    """No token, special or not, spans words: what ``Synthesis`` goes by."""
    words = re.split(r"(?<=\S)(?= \S)", text)
    assert [token for word in words for token in tokenizer.encode(word)] == tokenizer.encode(text)


def test_files_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither vocab\.json and merges\.txt nor tokenizer\.json"):
        TextTokenizer(tmp_path)
    folder = write(tmp_path / "damaged")
    (folder / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="no tokenizer can be made"):
        TextTokenizer(folder)
    folder = write(tmp_path / "other")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary |= {"another": len(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(CheckpointError, match="follow one another"):
        TextTokenizer(folder)


def test_a_single_file_does_too(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer._bpe.save(str(tmp_path / "tokenizer.json"))
    again = TextTokenizer(tmp_path)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
