"""Text to the tokens that are compared: words of normalized text (`qwen_moe.data.words`), or a tokenizer's tokens of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from qwen_moe.data.words import normalized, words
from qwen_moe.errors import UserError

Token = str | int


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
