"""A text as hashed words and pairs of neighboring words, which a small classifier reads.

A word is a run of letters and digits in lower case, a letter of a script that has no spaces, or a punctuation mark. Its
CRC-32 decides its bucket, so that nothing but the text decides the features. Weights are 1 + log(count), divided so that the
sum of their squares is 1.
"""

import re
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

_NO_SPACES = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+|[^\w\s]")
_KNOWN = 1_000_000  # words whose hashes are remembered
_FIRST, _SECOND, _MIX = np.uint64(0x9E3779B1), np.uint64(0x85EBCA77), np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Features:
    """``buckets`` in ascending order, int64, and their ``weights``, float32."""

    buckets: np.ndarray
    weights: np.ndarray


class Hasher:
    """Makes features of ``buckets`` numbers from the first ``words`` words of a text."""

    def __init__(self, buckets: int, words: int) -> None:
        self._buckets, self._words = np.uint64(buckets), words
        self._known = _Codes()

    def __call__(self, text: str) -> Features:
        hashes = self._hashes(text)
        if not len(hashes):
            return Features(np.zeros(0, np.int64), np.zeros(0, np.float32))
        pairs: np.ndarray = (hashes[:-1] * _FIRST + hashes[1:] * _SECOND) & _MIX
        pairs ^= pairs >> np.uint64(15)
        every = np.concatenate([hashes, pairs]) % self._buckets
        found, counts = np.unique(every, return_counts=True)
        weights = 1 + np.log(counts)
        weights /= np.sqrt((weights**2).sum())
        return Features(found.astype(np.int64), weights.astype(np.float32))

    def _hashes(self, text: str) -> Any:
        # A word has a few letters: what lies far behind the last word that counts is not looked at.
        words = _WORD.findall(text[: 64 * self._words].lower())[: self._words]
        return np.fromiter(map(self._known.__getitem__, words), np.uint64, len(words))


class _Codes(dict[str, int]):
    """The CRC-32 of words, remembered for the first `_KNOWN` of them."""

    def __missing__(self, word: str) -> int:
        code = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        if len(self) < _KNOWN:
            self[word] = code
        return code
