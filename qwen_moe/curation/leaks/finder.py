"""Decides whether a document is a leak, of which test, and what both share: first by the index, then by the exact rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_moe.curation.leaks.edits import least_edits
from qwen_moe.curation.leaks.index import Index, Seeds
from qwen_moe.curation.leaks.lcs import Masks, alignment, common, masks_of
from qwen_moe.curation.leaks.sequences import Sequences
from qwen_moe.curation.leaks.settings import LEAST_TOKENS, Rule, least_common, most_edits
from qwen_moe.curation.leaks.tokens import Token, Tokens

_AROUND = 10  # tokens that are shown before and after what is common


@dataclass(frozen=True)
class Match:
    """What a document has in common with test number ``test``: ``common`` tokens, of ``shorter`` that the shorter of the two
    has. ``document`` and ``of_test``: where the compared parts begin and end."""

    test: int
    common: int
    shorter: int
    document: tuple[int, int]
    of_test: tuple[int, int]

    @property
    def share(self) -> float:
        return self.common / self.shorter


def windows(longer: int, shorter: int) -> list[tuple[int, int]]:
    """Where windows of twice ``shorter`` tokens in a text of ``longer`` tokens begin and end. Each begins ``shorter`` tokens
    after the one before, so every stretch of ``shorter`` tokens is in one of them. The last one ends with the text."""
    starts = [0, *range(shorter, longer - shorter, shorter)]
    return [(start, min(start + 2 * shorter, longer)) for start in starts]


class Finder:
    """Finds leaks of ``sequences``, whose tokens are ``tokens`` of their texts."""

    def __init__(self, sequences: Sequences, tokens: Tokens, seeds: Seeds, rule: Rule) -> None:
        self.sequences, self.tokens, self.rule = sequences, tokens, rule
        self._numbers: dict[Token, int] = {}
        numbered = [
            np.array([self._numbers.setdefault(token, len(self._numbers) + 1) for token in tokens.of(one.text)])
            for one in sequences.found
        ]
        self._order = sorted(range(len(numbered)), key=lambda test: (len(numbered[test]), test))
        self._tests = [numbered[test] for test in self._order]
        self._index = Index(self._tests, len(self._numbers), seeds, whole=rule == "report")
        self._masks: list[Masks | None] = [None] * len(self._tests)

    def numbers(self, tokens: Sequence[Token]) -> np.ndarray:
        """The number of each token; 0 for tokens that no test has."""
        get = self._numbers.get
        return np.array([get(token, 0) for token in tokens], np.int64)

    def matches(self, tokens: Sequence[Token], first: bool = False) -> list[Match]:
        """Every test that a document of these tokens leaks, by its best window; the largest share first. ``first``: one of
        them is enough."""
        numbers = self.numbers(tokens)
        document = numbers.tolist()
        found = []
        for at, starts in self._index.candidates(numbers):
            if (match := self._match(document, at, starts)) is not None:
                found.append(match)
                if first:
                    break
        return sorted(found, key=lambda match: (-match.share, match.test))

    def _match(self, document: list[int], at: int, starts: list[int]) -> Match | None:
        size, length = len(document), len(self._tests[at])
        if self.rule == "report":
            return self._best(document, at, [(0, size)], (0, length))
        if length <= size:
            spans = [(n * length, min((n + 2) * length, size)) for n in starts if n == 0 or (n + 1) * length < size]
            return self._best(document, at, spans, (0, length))
        best: Match | None = None
        for start, end in windows(length, size):
            match = self._best(document, at, [(0, size)], (start, end))
            if match is not None and (best is None or match.common > best.common):
                best = match
        return best

    def _best(
        self, document: list[int], at: int, spans: list[tuple[int, int]], of_test: tuple[int, int]
    ) -> Match | None:
        """The best of some parts of the document against a part of a test, if it is a leak."""
        start, end = of_test
        length = end - start
        if length == len(self._tests[at]):
            masks = self._masks[at]
            if masks is None:
                masks = self._masks[at] = masks_of(self._tests[at].tolist())
        else:
            masks = masks_of(self._tests[at][start:end].tolist())
        shorter = min(len(document), len(self._tests[at]))
        best, where = least_common(shorter) - 1, None
        for begin, stop in spans:
            rows = [masks[token] for token in document[begin:stop] if token in masks]
            if len(rows) > best and (found := common(masks, length, rows)) > best:
                if self.rule == "close" and not self._is_close(document, at, (begin, stop), of_test):
                    continue
                best, where = found, (begin, stop)
        if where is None:
            return None
        return Match(test=self._order[at], common=best, shorter=shorter, document=where, of_test=of_test)

    def _is_close(self, document: list[int], at: int, span: tuple[int, int], of_test: tuple[int, int]) -> bool:
        """Whether few edits turn a stretch of the longer text's window into the shorter text."""
        part, test = document[slice(*span)], self._tests[at]
        if len(test) <= len(document):
            masks = self._masks[at]
            assert masks is not None
            return least_edits(masks, len(test), part) <= most_edits(len(test))
        return least_edits(masks_of(part), len(part), test[slice(*of_test)].tolist()) <= most_edits(len(part))

    def described(self, text: str, tokens: Sequence[Token], matches: Sequence[Match]) -> dict[str, Any]:
        """What is written about a dropped document: the best match, and how many other tests matched."""
        match = matches[0]
        test = self.sequences.found[match.test]
        theirs = self.tokens.of(test.text)
        (begin, stop), (start, end) = match.document, match.of_test
        numbers = self.numbers(tokens[begin:stop]).tolist()
        pairs = alignment(self.numbers(theirs[start:end]).tolist(), numbers)
        passage = _segments(self.tokens.shown(tokens[begin:stop]), [row for _, row in pairs])
        return {
            "test_file": test.file,
            "test_line": test.line,
            "common": match.common,
            "shorter": match.shorter,
            "share": round(match.share, 4),
            "other_tests": len(matches) - 1,
            "matched": "".join(passage[1::2]).strip(),
            "passage": passage,
            "test_passage": _segments(self.tokens.shown(theirs[start:end]), [column for column, _ in pairs]),
        }

    def leak(self, text: str) -> tuple[dict[str, Any] | None, list[int]]:
        """What is written about a document if it is a leak, otherwise None; and the numbers of all tests that it matches
        (with rule ``report``, of the first one that is found)."""
        tokens = self.tokens.of(text)
        if len(tokens) < LEAST_TOKENS:
            return None, []
        matches = self.matches(tokens, first=self.rule == "report")
        if not matches:
            return None, []
        return self.described(text, tokens, matches), [match.test for match in matches]


def _segments(shown: list[str], matched: list[int]) -> list[str]:
    """Text that is not common, text that is, and so on by turns; with a few tokens before and after what is common."""
    places = set(matched)
    segments = [""]
    for place in range(max(0, matched[0] - _AROUND), min(len(shown), matched[-1] + 1 + _AROUND)):
        if (place in places) != (len(segments) % 2 == 0):
            segments.append("")
        segments[-1] += shown[place]
    return segments
