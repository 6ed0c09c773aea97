"""Which pairs of a document and a test may be leaks: an index of the tests' n-grams. The rule itself decides afterwards.

Two texts that have much in common share n-grams. Let the shorter text have s tokens, and so s - n + 1 n-grams. At least g of
them appear in the window of the other text that holds the copy:

* Seeds "3-grams": g = s - 2 - 3 * floor(s / 5), if at most a fifth of the tokens of a copy were replaced, because each
  replaced token spoils at most three 3-grams (the q-gram lemma: Jokinen and Ukkonen, 1991). Copies with more changes may be
  lost.
* Seeds "words" (1-grams): g is the least length of the common subsequence, because each of its tokens is in both. No pair is
  lost.

Frequent n-grams say little and cost much. So the index leaves out the g - k n-grams of a text that are most frequent in the
test set. At least k of the others still appear in the window. A pair that shares k or more is a candidate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qwen_moe.curation.leaks.settings import LEAST_TOKENS, least_common

Ints = np.ndarray
_FIT = 24  # bits of the table that says quickly that an n-gram is in no test
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio
_EMPTY = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Seeds:
    """How long n-grams are, how many two texts share at least, and how many are asked for."""

    kind: Literal["words", "3-grams"]

    @property
    def n(self) -> int:
        return 1 if self.kind == "words" else 3

    def shared(self, tokens: int) -> int:
        """How many n-grams of a sequence of ``tokens`` tokens are in the other text at least (g above)."""
        return least_common(tokens) if self.kind == "words" else tokens - 2 - 3 * (tokens // 5)

    def wanted(self, tokens: int) -> int:
        """How many of those that are not left out make a candidate (k above). More make the index faster, and lose more of
        the copies that are changed by more than was assumed."""
        return min(self.shared(tokens), max(1, tokens // (5 if self.kind == "words" else 16)))

    def kept(self, tokens: int) -> int:
        """How many n-grams are not left out, the least frequent ones."""
        return tokens - self.n + 1 - self.shared(tokens) + self.wanted(tokens)


class _Postings:
    """Tests by n-gram."""

    def __init__(self, grams: list[Ints], tests: list[int], count: int) -> None:
        sizes = [len(found) for found in grams]
        flat = np.concatenate(grams) if grams else _EMPTY
        owners = np.repeat(np.array(tests, np.int32), sizes)
        order = np.lexsort((owners, flat))
        self.tests = owners[order]
        self.starts = np.searchsorted(flat[order], np.arange(count + 1))
        self.lengths = np.diff(self.starts)

    def of(self, grams: Ints) -> tuple[Ints, Ints]:
        """(which of ``grams``, test) for every test that has an n-gram of ``grams``."""
        lengths = self.lengths[grams]
        total = int(lengths.sum())
        ends = np.cumsum(lengths)
        which = np.repeat(np.arange(len(grams)), lengths)
        return which, self.tests[np.arange(total) + (self.starts[grams] - ends + lengths)[which]]


class Index:
    """The n-grams of tests. A test is a sequence of numbers from 1 on, and no shorter than 13. They come in the order of
    their lengths. ``whole``: documents are compared as wholes, not in windows."""

    def __init__(self, tests: Sequence[Ints], vocabulary: int, seeds: Seeds, whole: bool = False) -> None:
        self.seeds, self.whole = seeds, whole
        self.sizes = np.array([len(test) for test in tests], np.int64)
        assert len(tests) and self.sizes[0] >= LEAST_TOKENS and (np.diff(self.sizes) >= 0).all()
        self._base = np.uint64(vocabulary + 1)
        keys = [self._keys(test) for test in tests]
        self._known, numbers, self._frequency = np.unique(np.concatenate(keys), return_inverse=True, return_counts=True)
        self._fits = np.zeros(1 << _FIT, bool)
        self._fits[self._slots(self._known)] = True
        ends = np.cumsum([len(key) for key in keys])
        every = np.split(numbers.ravel(), ends[:-1])
        self._wanted = np.array([seeds.wanted(size) for size in self.sizes.tolist()])
        count, owners = len(self._known), list(range(len(tests)))
        self._of_tests = _Postings([self._rare(grams, len(test)) for grams, test in zip(every, tests)], owners, count)
        self._all = _Postings([np.unique(grams) for grams in every], owners, count)

    def _keys(self, tokens: Ints) -> Ints:
        """A number for each n-gram; exact while the vocabulary has fewer than 2**21 tokens, a hash beyond."""
        size = max(0, len(tokens) - self.seeds.n + 1)
        unsigned = tokens.astype(np.uint64)
        keys = unsigned[:size]
        for shift in range(1, self.seeds.n):
            keys = keys * self._base + unsigned[shift : size + shift]
        return keys

    def _slots(self, keys: Ints) -> Ints:
        slots: Ints = (keys * _MIX) >> np.uint64(64 - _FIT)
        return slots

    def _rare(self, grams: Ints, tokens: int) -> Ints:
        """The n-grams of a sequence that are not left out; each once."""
        order = np.lexsort((grams, self._frequency[grams]))
        found: Ints = np.unique(grams[order[: self.seeds.kept(tokens)]])
        return found

    def _grams(self, tokens: Ints) -> tuple[Ints, Ints]:
        """Places and numbers of the n-grams of a document that some test has. Token 0 is in no test."""
        keys = self._keys(tokens)
        places = np.flatnonzero(self._fits[self._slots(keys)])
        keys = keys[places]
        numbers = np.minimum(np.searchsorted(self._known, keys), len(self._known) - 1)
        right = self._known[numbers] == keys
        return places[right], numbers[right]

    def candidates(self, tokens: Ints) -> Iterator[tuple[int, list[int]]]:
        """(test, windows) of a document that may be leaks, the most promising test first. Windows of a document that is at
        least as long as the test begin at window * (length of the test); otherwise ``windows`` is empty and the whole
        test is in question."""
        size = len(tokens)
        if size < LEAST_TOKENS:
            return
        places, grams = self._grams(tokens)
        if not len(grams):
            return
        longer = int(np.searchsorted(self.sizes, size, side="right"))  # the first test that is longer
        found: list[tuple[int, int, list[int]]] = []
        if longer:
            found += self._in_document(places, grams, longer)
        if longer < len(self.sizes):
            found += self._in_tests(grams, size, longer)
        for _, test, windows in sorted(found, key=lambda one: (-one[0], one[1])):
            yield test, windows

    def _in_document(self, places: Ints, grams: Ints, longer: int) -> list[tuple[int, int, list[int]]]:
        """(shared n-grams, test, windows) of tests that are no longer than the document."""
        which, tests = self._of_tests.of(grams)
        which, tests = which[tests < longer], tests[tests < longer]
        counts = np.bincount(tests, minlength=longer)
        wanted = self._wanted[:longer]
        if self.whole:
            return [(int(counts[test]), int(test), [0]) for test in np.flatnonzero(counts >= wanted)]
        enough = (counts >= wanted)[tests]
        which, tests = which[enough], tests[enough]
        # Key: test and block, where a block has as many tokens as the test, and a window is two neighboring blocks.
        keys = np.sort(tests.astype(np.int64) << 32 | places[which] // self.sizes[tests])
        blocks, counts = np.unique(keys, return_counts=True)
        windows = np.unique(np.concatenate((blocks, blocks[(blocks & 0xFFFFFFFF) > 0] - 1)))
        total = _at(blocks, counts, windows) + _at(blocks, counts, windows + 1)
        passed = windows[total >= self._wanted[windows >> 32]]
        most = total[total >= self._wanted[windows >> 32]]
        result: dict[int, tuple[int, int, list[int]]] = {}
        for key, shared in zip(passed.tolist(), most.tolist()):
            test = key >> 32
            before = result.get(test, (0, test, []))
            result[test] = (max(before[0], shared), test, [*before[2], key & 0xFFFFFFFF])
        return list(result.values())

    def _in_tests(self, grams: Ints, size: int, longer: int) -> list[tuple[int, int, list[int]]]:
        """(shared n-grams, test, no windows) of tests that are longer than the document."""
        # N-grams that are in no test are the rarest: they take their part of those that are kept.
        kept = self.seeds.kept(size) - (size - self.seeds.n + 1 - len(grams))
        if kept < self.seeds.wanted(size):
            return []
        order = np.lexsort((grams, self._frequency[grams]))
        _, tests = self._all.of(grams[order[:kept]])
        counts = np.bincount(tests, minlength=longer)[longer:]
        return [(int(counts[at]), longer + int(at), []) for at in np.flatnonzero(counts >= self.seeds.wanted(size))]


def _at(keys: Ints, values: Ints, wanted: Ints) -> Ints:
    """The values of ascending ``keys`` at ``wanted``; 0 for others."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
