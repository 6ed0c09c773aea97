"""Rewards of answers, one interface for `qwen-moe rollout` and for training with GRPO.

A reward is named by a text:

========================  =======================================================================================
``exact``                 1 if the normalized completion equals row["answer"]
``contains``              1 if the normalized completion contains row["answer"] as whole words
``number``                1 if the last number in the completion equals row["answer"], compared as rational numbers
``math``                  1 if math-verify says that the completion's answer equals row["answer"] (extra ``rl``)
``format:REGEX``          1 if the regular expression is found in the completion (``.`` matches line ends, too)
``python``                1 if the completion's code passes row["tests"] (Python code, or a list of such)
``MODULE:FUNCTION``       what ``function(prompt, completion, row)`` returns
========================  =======================================================================================

Several are added up with weights. What may hang or run foreign code (``format``, ``math``, ``python``, functions) runs in
processes with limits of time and memory (`qwen_moe.rollout.sandbox`). Each answer is scored by itself, so the number of
processes changes nothing.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from launchers.counted import counted
from qwen_moe.data.sources import Tally
from qwen_moe.errors import UserError
from qwen_moe.packages import check_installed
from qwen_moe.rollout.matching import code_of, contains, is_exact, is_number, number_of
from qwen_moe.rollout.sandbox import Failure, Job, Sandbox

OnFailure = Literal["error", "zero"]
_COMPARISONS: dict[str, Callable[[str, Any], bool]] = {"exact": is_exact, "contains": contains, "number": is_number}
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
KINDS = "exact, contains, number, math, format:REGEX, python or MODULE:FUNCTION"


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Which rewards, and how they are computed. Raises UserError for values out of range.

    ``weights``: one for each of ``rewards``, by default 1. ``on_failure``: what a reward counts that hangs, throws or
    returns no finite number: an error, or zero. ``seconds``: wall-clock time for one answer. ``memory_mib``: address space
    of each process. ``workers``: processes, 0 for one per core; no result depends on them.
    """

    rewards: tuple[str, ...]
    weights: tuple[float, ...] = ()
    on_failure: OnFailure = "error"
    seconds: float = 10.0
    memory_mib: int = 4096
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.rewards:
            raise UserError(f"there is no reward: give {KINDS}")
        for reward in self.rewards:
            _check_name(reward)
        if len(set(self.rewards)) < len(self.rewards):
            raise UserError(f"a reward is named twice in {', '.join(self.rewards)}: give it once, with a larger weight")
        if self.weights and len(self.weights) != len(self.rewards):
            raise UserError(
                f"there are {counted(len(self.weights), 'weight')} for {counted(len(self.rewards), 'reward')}: give "
                "one for each, or none"
            )
        if not all(math.isfinite(weight) for weight in self.weights):
            raise UserError(f"the weights of rewards are {self.weights}: give finite numbers")
        if self.on_failure not in ("error", "zero"):
            raise UserError(f"on_failure is {self.on_failure!r}: give error or zero")
        if not 0 < self.seconds < math.inf or self.memory_mib < 64 or self.workers < 0:
            raise UserError(
                f"a reward's limits are {counted(self.seconds, 'second')}, {self.memory_mib} MiB and "
                f"{counted(self.workers, 'process')}: give a "
                "positive number of seconds, at least 64 MiB, and 0 processes (one per core) or more"
            )

    def weight(self, index: int) -> float:
        return self.weights[index] if self.weights else 1.0


def is_function(reward: str) -> bool:
    """Whether ``reward`` is `MODULE:FUNCTION`."""
    return FUNCTION.fullmatch(reward) is not None and not reward.startswith("format:")


def _check_name(reward: str) -> None:
    kind, _, rest = reward.partition(":")
    if kind == "format" and rest:
        try:
            re.compile(rest, re.DOTALL)
        except re.error as error:
            raise UserError(f"reward {reward!r} is not a regular expression: {error}") from None
    elif reward == "math":
        check_installed("reward math", "math_verify", otherwise="use the reward number")
    elif reward not in (*_COMPARISONS, "python") and not is_function(reward):
        raise UserError(f"reward {reward!r} is not known: give {KINDS}")


@dataclass(frozen=True, kw_only=True)
class Item:
    """An answer to be scored. ``prompt``: the text of the prompt's tokens. ``completion``: the answer's text without its end
    token. ``row``: the values of the query's line. ``finish_reason``: "stop" or "length"."""

    prompt: str
    completion: str
    row: Mapping[str, Any]
    finish_reason: str = "stop"


@dataclass(frozen=True, kw_only=True)
class Score:
    """``value``: the weighted sum. ``parts``: the value of each reward before its weight. ``why``: what there is to say,
    such as the test that failed. ``failed``: the rewards that hung, threw or gave no number, and count as zero."""

    value: float
    parts: dict[str, float]
    why: str = ""
    failed: tuple[str, ...] = ()


class RewardFailure(UserError):
    """Rewards failed and ``on_failure`` is "error". ``scores`` are those of all answers, with zero for what failed."""

    def __init__(self, message: str, scores: list[Score]) -> None:
        super().__init__(message)
        self.scores = scores


@dataclass(frozen=True)
class _Value:
    value: float
    why: str = ""
    failure: str = ""  # what went wrong, for counting; empty if nothing did


@dataclass
class Rewarder:
    """Scores answers. A context manager: `close` ends its processes.

    Functions are imported at construction, in another process; raises UserError for one that cannot be. ``failures`` counts
    what failed so far, by reward and kind; ``timeouts`` the answers whose code took too long, which is worth 0 and no
    failure.
    """

    settings: RewardSettings
    failures: Counter[str] = field(default_factory=Counter)
    timeouts: int = 0

    def __post_init__(self) -> None:
        settings = self.settings
        self._sandbox: Sandbox | None = None
        self._files: dict[str, str] = {}
        self._hashes: dict[str, str] = {}  # of the files as they were imported
        if any(reward not in _COMPARISONS for reward in settings.rewards):
            self._sandbox = Sandbox(seconds=settings.seconds, memory_mib=settings.memory_mib, workers=settings.workers)
            try:
                self._load(self._sandbox)
            except BaseException:
                self._sandbox.close()
                raise

    def _load(self, sandbox: Sandbox) -> None:
        functions = [reward for reward in self.settings.rewards if reward not in (*_COMPARISONS, "python")]
        self._files = {function: sandbox.load(function) for function in functions}
        self._hashes = {name: _hash(path) for name, path in self._files.items() if path}

    def import_changed(self) -> None:
        """Import functions anew if a file of one has changed. Raises UserError."""
        if self._sandbox is not None and any(_hash(self._files[name]) != held for name, held in self._hashes.items()):
            self._sandbox.close()  # its processes begin again
            self._load(self._sandbox)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()

    def identity(self) -> dict[str, Any]:
        """What decides the scores, for a record: the settings, and a hash of the file of each function as it was
        imported."""
        settings = self.settings
        return {
            "rewards": list(settings.rewards),
            "weights": [settings.weight(index) for index in range(len(settings.rewards))],
            "on_failure": settings.on_failure,
            "seconds": settings.seconds,
            "memory_mib": settings.memory_mib,
            "functions": dict(self._hashes),
        }

    def check(self, row: Mapping[str, Any]) -> None:
        """Raise UserError if a query's values lack what a reward needs. Call it before anything is sampled."""
        check_values(self.settings, row)

    def score(self, items: Sequence[Item]) -> list[Score]:
        """The scores of ``items``, in their order. Raises RewardFailure, after all are scored, if a reward fails and
        ``on_failure`` is "error"."""
        columns = [self._column(reward, items) for reward in self.settings.rewards]
        scores, tally = [], Tally()
        for place, item in enumerate(items):
            values = dict(zip(self.settings.rewards, (column[place] for column in columns), strict=True))
            failed = tuple(reward for reward, one in values.items() if one.failure)
            for reward in failed:
                self.failures[f"{reward}: {values[reward].failure}"] += 1
                name = f"query {item.row['id']}" if "id" in item.row else f"{item.completion[:40]!r}"
                tally.add(f"times {reward} {values[reward].failure}", f"{name}: {values[reward].why}")
            scores.append(self._total(values, failed))
        if tally.counts and self.settings.on_failure == "error":
            raise RewardFailure(
                f"rewards failed: {tally}. Correct the reward, or count failures as zero (--on-reward-failure zero)",
                scores,
            )
        return scores

    def _total(self, values: dict[str, _Value], failed: tuple[str, ...]) -> Score:
        value = math.fsum(self.settings.weight(index) * one.value for index, one in enumerate(values.values()))
        return Score(
            value=value,
            parts={reward: one.value for reward, one in values.items()},
            why="; ".join(f"{reward}: {one.why}" for reward, one in values.items() if one.why),
            failed=failed,
        )

    def _column(self, reward: str, items: Sequence[Item]) -> list[_Value]:
        """The value of one reward for each item."""
        if reward in _COMPARISONS:
            return [_Value(float(_COMPARISONS[reward](item.completion, item.row["answer"]))) for item in items]
        assert self._sandbox is not None
        if reward == "python":
            programs = [Job(code=code_of(item.completion), tests=_tests(item.row)) for item in items]
            return [self._of_code(outcome) for outcome in self._sandbox.run(programs)]
        calls = [Job(function=reward, arguments=(item.prompt, item.completion, dict(item.row))) for item in items]
        return [_of_function(outcome) for outcome in self._sandbox.run(calls)]

    def _of_code(self, outcome: "float | Failure") -> _Value:
        """Code that fails, hangs or crashes is a wrong answer. Only a test that cannot be run is the reward's failure."""
        if isinstance(outcome, Failure):
            self.timeouts += outcome.kind == "took too long"
            return _Value(0.0, outcome.text)
        return _Value(outcome)


def check_values(settings: RewardSettings, row: Mapping[str, Any]) -> None:
    """Raise UserError if a query's values lack what a reward needs."""
    for reward in settings.rewards:
        if reward in (*_COMPARISONS, "math"):
            _check_answer(reward, row)
        elif reward == "python":
            _check_tests(row)


def _of_function(outcome: "float | Failure") -> _Value:
    if isinstance(outcome, Failure):
        return _Value(0.0, outcome.text, outcome.kind)
    if not math.isfinite(outcome):
        return _Value(0.0, f"it returned {outcome}", "returned no finite number")
    return _Value(outcome)


def _check_answer(reward: str, row: Mapping[str, Any]) -> None:
    answer = row.get("answer")
    answers = answer if isinstance(answer, list) and reward != "number" else [answer]
    right = (isinstance(one, str | int | float) and not isinstance(one, bool) and str(one).strip() for one in answers)
    if not answers or not all(right):
        raise UserError(
            f'reward {reward} needs "answer", a text or a number{"" if reward == "number" else " or a list of these"}; '
            f"it is {answer!r:.60}"
        )
    if reward == "number" and number_of(answer) is None:
        raise UserError(f'reward number needs an "answer" with one number; it is {answer!r:.60}')


def _tests(row: Mapping[str, Any]) -> tuple[str, ...]:
    tests = row["tests"]
    return (tests,) if isinstance(tests, str) else tuple(tests)


def _check_tests(row: Mapping[str, Any]) -> None:
    given = row.get("tests")
    tests = [given] if isinstance(given, str) else given
    if not isinstance(tests, list) or not tests or not all(isinstance(one, str) and one.strip() for one in tests):
        raise UserError(f'reward python needs "tests", Python code or a list of such; it is {given!r:.60}')
    for test in tests:
        try:
            compile(test, "tests", "exec")
        except (SyntaxError, ValueError) as error:
            raise UserError(f'its "tests" are not Python code: {error}') from None


def _hash(path: str) -> str:
    """Of a file; empty if there is none."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""
