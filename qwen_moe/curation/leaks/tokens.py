"""Text to the tokens that are compared: words of normalized text, or a tokenizer's tokens of it.

Normalized text is lower case in Unicode's form NFKC, and everything that is not a letter, a digit or a mark on a letter is a
space. Each Chinese character is a word, because Chinese puts no spaces between words.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from qwen_moe.errors import UserError

Token = str | int
_ASCII = bytes(ord(chr(byte).lower()) if byte < 128 and chr(byte).isalnum() else 32 for byte in range(256))
_IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")


@functools.cache
def _word() -> re.Pattern[str]:
    """A run of letters, digits and combining marks, such as the vowels of Hindi. (To `re`, marks are no part of a word.)"""
    marks = [code for code in range(0x10000) if unicodedata.category(chr(code)) in ("Mn", "Mc")]
    ranges = []
    for _, run in itertools.groupby(enumerate(marks), lambda pair: pair[1] - pair[0]):
        codes = [code for _, code in run]
        ranges.append(f"\\u{codes[0]:04x}-\\u{codes[-1]:04x}")
    return re.compile(f"(?:[^\\W_]|[{''.join(ranges)}])+")


def words(text: str) -> list[str]:
    """The words of a text, normalized."""
    if text.isascii():
        return text.encode().translate(_ASCII).decode().split()
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    if _IDEOGRAPH.search(text):
        text = _IDEOGRAPH.sub(r" \g<0> ", text)
    return _word().findall(text)


def normalized(text: str) -> str:
    """The words of a text with single spaces between them."""
    return " ".join(words(text))


class Tokens(Protocol):
    """How text becomes tokens."""

    def of(self, text: str) -> Sequence[Token]: ...

    def shown(self, tokens: Sequence[Token]) -> list[str]:
        """What to show for each token; joined, they are the text."""


class Words:
    """Words of normalized text."""

    def of(self, text: str) -> Sequence[Token]:
        return words(text)

    def shown(self, tokens: Sequence[Token]) -> list[str]:
        return [f"{token} " for token in tokens]


class Tokenized:
    """A tokenizer's tokens of normalized text. Raises UserError if there is no tokenizer in ``folder``."""

    def __init__(self, folder: Path) -> None:
        from qwen_moe.data.tokenizer import load_tokenizer

        self._tokenizer = load_tokenizer(folder)

    def of(self, text: str) -> Sequence[Token]:
        ids: Sequence[int] = self._tokenizer.encode(normalized(text), add_special_tokens=False).ids
        return ids

    def shown(self, tokens: Sequence[Token]) -> list[str]:
        return [self._tokenizer.decode([int(token)], skip_special_tokens=False) for token in tokens]


def tokens_of(folder: Path | None) -> Tokens:
    """Words or, with the folder of a tokenizer, its tokens."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"--tokenizer {folder} is no folder: give one with a tokenizer.json, or leave it out for words")
    return Words() if folder is None else Tokenized(folder)
