"""Numbers of things as text: one thing is not "1 things". Each package that may import no other has its own function."""

import re
from pathlib import Path
from types import ModuleType

import pytest

import launchers.counted
import parallel.counted
import scaling_laws.counted

ROOT = Path(__file__).parents[2]
THINGS = (
    "answers|conversations|documents|epochs|experts|files|layers|lines|names|nodes|numbers|pairs|processes|prompts|queries|"
    "questions|ranks|rewards|rows|runs|samples|seconds|shards|stages|steps|tasks|tests|texts|tokens|tries|values|weights"
)


@pytest.mark.parametrize("module", [launchers.counted, parallel.counted, scaling_laws.counted])
def test_one_thing_is_not_things(module: ModuleType) -> None:
    cases = [
        (1, "query", "1 query"),
        (0, "query", "0 queries"),
        (2000, "day", "2,000 days"),
        (1.0, "second", "1 second"),
    ]
    cases += [
        (2, "epoch", "2 epochs"),
        (2, "launch", "2 launches"),
        (0.25, "second", "0.25 seconds"),
        (2, "process", "2 processes"),
        (3, "batch", "3 batches"),
    ]
    for count, one, text in cases:
        assert module.counted(count, one) == text
    assert [module.counted(n, "index is", "indices are") for n in (1, 2)] == ["1 index is", "2 indices are"]


def test_a_reason_is_in_the_number_of_what_it_is_of() -> None:
    reasons = ["rows without text", "truncated answers", "not JSON", "answers nearly equal to two rows"]
    assert [launchers.counted.tallied(1, one) for one in reasons] == [
        *("1 row without text", "1 truncated answer", "1 not JSON", "1 answer nearly equal to two rows"),
    ]
    assert launchers.counted.tallied(1200, "rows without text") == "1,200 rows without text"


@pytest.mark.parametrize("package", ["launchers", "parallel", "qwen_moe", "scaling_laws"])
def test_no_length_stands_before_a_plural(package: str) -> None:
    plain = re.compile(rf"\{{len\([^A-Z{{}}\n]*\)(:,)?\}} ([a-z-]+ )?({THINGS})\b")
    for path in sorted((ROOT / package).rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [match[0] for line in lines if "assert " not in line for match in plain.finditer(line)]
        assert not found, f"{path}: {found}: write `counted(len(...), ...)`"
