"""Which answers of a query make pairs of a chosen and a rejected one."""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qwen_moe.errors import UserError
from qwen_moe.rollout.matching import normalized
from qwen_moe.rollout.store import Row

Rule = Literal["best-worst", "pass-fail", "all"]
Truncated = Literal["drop", "rejected"]
NEAR_DUPLICATE = "answers nearly equal to another with the same reward"
TRUNCATED = "truncated answers"
FAILED = "answers whose reward failed"
SAME = "pairs of equal answers"
_NOT_WORDS = re.compile(r"[\W_]+")


@dataclass(frozen=True, kw_only=True)
class PairRules:
    """How pairs are chosen. Raises UserError for values out of range.

    ``rule``: the highest reward with the lowest, the second highest with the second lowest, ...; answers that pass (a reward
    of at least ``passing``) with answers that fail, drawn at random; or all pairs of different rewards. ``per_query``: the
    most pairs of a query, 0 for all; of the rule "all" they are drawn at random. ``truncated``: whether an answer that ended
    at its limit of tokens is left out, or may be rejected. It is never chosen.
    """

    rule: Rule = "best-worst"
    per_query: int = 1
    passing: float = 1.0
    truncated: Truncated = "drop"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in ("best-worst", "pass-fail", "all") or self.truncated not in ("drop", "rejected"):
            raise UserError(
                f"rule is {self.rule!r} and truncated is {self.truncated!r}: give best-worst, pass-fail or all, and drop or "
                "rejected"
            )
        if self.per_query < 0:
            raise UserError(f"per_query is {self.per_query}: give a positive number, or 0 for all")

    @property
    def lacking(self) -> str:
        """What is not among the answers that were not left out, if they make no pair."""
        if self.rule == "pass-fail":
            return (
                f"no query has a finished answer that passes (a reward of at least {self.passing:g}) and one that fails"
            )
        return "no finished answer has a higher reward than another answer to its query"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The numbers of two samples of a query, counted from 0."""

    chosen: int
    rejected: int


def pairs_of(row: Row, rules: PairRules, left_out: Counter[str]) -> list[Pair]:
    """The pairs of a query, the same for every order in which queries are read. ``left_out`` counts what was not used, by
    reason. The reward of a chosen answer is always higher than that of the rejected one, and their tokens differ."""
    samples = row["samples"]
    usable = _usable(samples, rules, left_out)
    draw = random.Random(hashlib.sha256(f"{rules.seed}/{row['id']}".encode()).digest())
    found: list[Pair] = []
    for chosen, rejected in _candidates(samples, usable, rules, draw):
        if samples[chosen]["tokens"] == samples[rejected]["tokens"]:
            left_out[SAME] += 1
            continue
        found.append(Pair(chosen=chosen, rejected=rejected))
        if len(found) == rules.per_query:
            break
    return found


def _usable(samples: Sequence[Row], rules: PairRules, left_out: Counter[str]) -> list[int]:
    """Samples without near-duplicates of an equal reward, of which the first is kept."""
    met: set[tuple[str, float, bool]] = set()
    usable = []
    for number, sample in enumerate(samples):
        truncated = sample["finish_reason"] == "length"
        key = (_words(sample["text"]), float(sample["reward"]), truncated)
        if sample["failed"]:
            left_out[FAILED] += 1
        elif truncated and rules.truncated == "drop":
            left_out[TRUNCATED] += 1
        elif key in met:
            left_out[NEAR_DUPLICATE] += 1
        else:
            met.add(key)
            usable.append(number)
    return usable


def _words(text: str) -> str:
    """A text without case, punctuation and white space, unless it has nothing else."""
    text = normalized(text).casefold()
    return _NOT_WORDS.sub("", text) or text


def _candidates(
    samples: Sequence[Row], usable: Sequence[int], rules: PairRules, draw: random.Random
) -> Iterator[tuple[int, int]]:
    """Pairs in the order in which they are taken."""
    reward = {number: float(samples[number]["reward"]) for number in usable}
    finished = [number for number in usable if samples[number]["finish_reason"] != "length"]
    if rules.rule == "best-worst":
        best = sorted(finished, key=lambda number: -reward[number])
        worst = sorted(usable, key=lambda number: reward[number])
        yield from ((c, r) for c, r in zip(best, worst) if reward[c] > reward[r])
    elif rules.rule == "pass-fail":
        passed = [number for number in finished if reward[number] >= rules.passing]
        failed = [number for number in usable if reward[number] < rules.passing]
        draw.shuffle(passed)
        draw.shuffle(failed)
        # Diagonals: no answer is used again before all of its kind have been used.
        wide = max(len(passed), len(failed))
        for shift in range(min(len(passed), len(failed))):
            for number in range(wide):
                other = (number + shift) % min(len(passed), len(failed))
                yield (passed[number], failed[other]) if len(passed) == wide else (passed[other], failed[number])
    else:
        every = [(c, r) for c in finished for r in usable if reward[c] > reward[r]]
        if rules.per_query:
            draw.shuffle(every)
        yield from every
