"""The words of a text, by which texts are compared: normalized, so that case, punctuation and spaces do not count.

Normalized text is lower case in Unicode's form NFKC, and everything that is not a letter, a digit or a mark on a letter is a
space. Each Chinese character is a word, because Chinese puts no spaces between words.
"""

import functools
import hashlib
import itertools
import re
import unicodedata

_HASH_DIGITS = 16
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


def hash_of(text: str) -> str:
    """A short hash of a test's normalized text: 64 bits, so that two of a million tests are unlikely to share one."""
    return hashlib.sha256(normalized(text).encode()).hexdigest()[:_HASH_DIGITS]
