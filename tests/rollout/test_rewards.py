"""Rewards: what they are worth, and what becomes of those that hang, throw, lie or use too much."""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_moe.errors import UserError
from qwen_moe.rollout.matching import code_of, contains, is_exact, is_number, normalized, numbers
from qwen_moe.rollout.rewards import Item, Rewarder, RewardFailure, RewardSettings, Score

FUNCTION = "tests.rollout.functions:"


def item(completion: str, **row: Any) -> Item:
    return Item(prompt="question", completion=completion, row=row)


def scores(items: list[Item], *rewards: str, **settings: Any) -> list[Score]:
    with Rewarder(RewardSettings(rewards=rewards, **{"workers": 2} | settings)) as rewarder:
        return rewarder.score(items)


def running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
    except FileNotFoundError:
        return False


def test_texts_are_compared_as_their_reward_says() -> None:
    assert normalized(" The\u00a0 \ufb01rst\n") == "The first"
    assert is_exact(" 4\n2 ", "4 2") and is_exact("42", 42) and is_exact("b", ["a", "b"])
    assert not is_exact("Paris", "paris") and not is_exact("42.", "42")
    assert contains("It is  Paris.", "Paris") and contains("a+b", "a+b") and not contains("Parisian", "Paris")
    assert not contains("15", 5)


def test_words_of_scripts_without_spaces_are_found() -> None:
    """All between two spaces was one word, so no Chinese answer was ever found in a sentence."""
    for text, answer in [
        ("首都是北京。", "北京"), ("首都是北京市", "北京"), ("東京タワーです", "東京タワー"), ("수도는 파리입니다", "파리"),
        ("เมืองหลวงคือกรุงเทพครับ", "กรุงเทพ"), ("我用Python写", "Python"), ("共有12个", 12), ("นี่คือ12ครับ", "12"),
    ]:  # fmt: skip
        assert contains(text, answer)
    for text, answer in [
        ("首都是东京。", "北京"),
        ("我用Pythonic写", "Python"),
        ("共有123个", 12),
        ("шестьсот", "сто"),
    ]:
        assert not contains(text, answer)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("12", "12"), ("so -3.5.", "-7/2"), ("1,234,567 people", "1234567"), ("1, 2", "2"), ("2e3", "2000"),
        ("3/4", "3/4"), ("3 / 4", "3/4"), ("50%", "1/2"), ("$5.", "5"), ("7-3", "3"), ("x=-3", "-3"), ("(2)-4", "4"),
        ("\u22128", "-8"), (".5", "1/2"), ("+6", "6"), ("12,34", "34"), ("\\boxed{18}", "18"), ("**9**", "9"),
        ("0.1", "1/10"), ("1e-3", "1/1000"), ("007", "7"), ("2024-01-05", "5"), ("5, 6, and 7", "7"),
        ("答案是12", "12"), ("答案是-3。", "-3"), ("等于.5", "1/2"), ("第1课有3人", "3"), ("答えは4/6です", "2/3"),
        ("총12명", "12"), ("คือ-7ครับ", "-7"), ("等于7-3", "3"), ("الجواب \u0661\u0662", "12"), ("是x2和5", "5"),
    ],
)  # fmt: skip
def test_the_last_number(text: str, found: str) -> None:
    assert next(iter(numbers(text))) == Fraction(found)


@pytest.mark.parametrize("text", ["", "none", "x2", "1/0", "9" * 5000, "e5"])
def test_no_number(text: str) -> None:
    assert list(numbers(text)) == [] and not is_number(text, "0")


def test_numbers_do_not_take_long() -> None:
    begin = time.perf_counter()
    assert not is_number("1e999999999", "1") and not is_number("1," * 20_000, "2") and is_number("9" * 900, "9" * 900)
    assert time.perf_counter() - begin < 2


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_every_way_to_write_a_number_is_that_number(above: int, below: int) -> None:
    wanted = Fraction(above, below)
    assert is_number(f"I get {above}/{below}.", f"{wanted.numerator}/{wanted.denominator}")
    assert is_number(f"first 17, then {above:,}", str(above)) and not is_number(f"= {above}", str(above + 1))
    assert is_number(f"{above / 8} meters", str(Fraction(above, 8)))


def test_code_is_taken_from_the_last_block() -> None:
    assert code_of("x = 1") == "x = 1"
    assert code_of("a\n```python\nx = 1\n```\nb\n```py\ny = 2\nz = 3\n```\nend") == "y = 2\nz = 3"
    assert code_of("```python\nx\n```\n```text\nout\n```") == "x"
    assert code_of("```\nx\n```") == "x" and code_of("```python\nx = 1\n") == "x = 1\n"


def test_weights_add_up() -> None:
    found = scores(
        [item("12", answer="12"), item("a 12", answer="12")], "exact", "number", "format:^a", weights=(2, 1, -4)
    )
    assert [one.value for one in found] == [3, -3]
    assert found[1].parts == {"exact": 0, "number": 1, "format:^a": 1}


def test_a_function_gets_prompt_completion_and_row_whatever_the_number_of_workers() -> None:
    items = [item("x" * n, bonus=n % 3) for n in range(12)]
    one = [score.value for score in scores(items, FUNCTION + "length", workers=1)]
    assert one == [8 + 10 * n + 100 * (n % 3) for n in range(12)]
    random_numbers = [scores(items, FUNCTION + "chance", workers=workers) for workers in (1, 3)]
    assert random_numbers[0] == random_numbers[1] and len({score.value for score in random_numbers[0]}) == 12


def test_what_fails_is_named_and_counted(tmp_path: Path) -> None:
    asked = ["hang", "good", "throw", "exit", "nan", "infinite", "text", "none", "memory", "true", "good"]
    items = [item(text, pid=str(tmp_path / "pid")) for text in asked]
    settings = RewardSettings(
        rewards=(FUNCTION + "misbehaves",), on_failure="zero", seconds=4, memory_mib=2048, workers=2
    )
    with Rewarder(settings) as rewarder:
        found = rewarder.score(items)
    assert [score.value for score in found] == [0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert [bool(score.failed) for score in found] == [text not in ("good", "true") for text in asked]
    for score, why in zip(
        found, ["more than 4 seconds", "", "KeyError: 'no such thing'", "exit code 3", "nan", "inf", "'3'", "None",
                "MemoryError"], strict=False,
    ):  # fmt: skip
        assert why in score.why
    kinds = {name.rpartition(": ")[2]: count for name, count in rewarder.failures.items()}
    assert kinds == {"took too long": 1, "raised an exception": 2, "died": 1, "returned no finite number": 4}
    # The child had left the process group, and was killed all the same.
    assert not running(int((tmp_path / "pid").read_text()))


def test_an_error_names_the_answers_and_keeps_the_scores() -> None:
    with pytest.raises(
        RewardFailure, match=r"rewards failed: 2 times .*misbehaves raised an exception \(query 7: .*Key"
    ):
        scores([item("throw", id=7), item("good"), item("throw", id=8)], FUNCTION + "misbehaves")
    try:
        scores([item("throw"), item("good")], FUNCTION + "misbehaves")
    except RewardFailure as error:
        assert [score.value for score in error.scores] == [0, 1]


def test_a_regular_expression_that_never_ends_is_ended() -> None:
    (found,) = scores([item("a" * 60 + "!")], "format:^(a+)+$", on_failure="zero", seconds=1)
    assert found.failed == ("format:^(a+)+$",) and "more than 1 second" in found.why


TESTS = ["assert f(1) == 2", "assert f(5) == 6"]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("def f(x): return x + 1", ""),
        ("Sure:\n```python\ndef f(x):\n    return x + 1\n```", ""),
        ("def f(x): return 2", "test 2 of 2 raised AssertionError"),
        ("def f(x) return", "the code raised SyntaxError"),
        ("import os; os._exit(0)", "ended with exit code 0 before it answered"),
        ("raise SystemExit(0)", "the code raised SystemExit"),
        ("x = bytearray(8 << 30)", "the code raised MemoryError"),
        ("print('x' * 100); input()", "the code raised EOFError"),
        ("import os; print(os.environ['SECRET'])", "KeyError: 'SECRET'"),
        ("import os; assert os.listdir() == [], os.listdir()\nopen('f', 'w').write('x')\ndef f(x): return x + 1", ""),
        # Answers for its tests on every pipe it finds.
        ("import os\nfor n in range(3, 30):\n  try: os.write(n, b'{\"value\": 1.0}\\n')\n  except OSError: pass",
         "wrote to the pipe"),
    ],
)  # fmt: skip
def test_code_and_its_tests(code: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s")
    (found,) = scores([item(code, tests=TESTS)], "python", memory_mib=1024, seconds=5)
    assert found.value == (why == "") and why in found.why and not found.failed


def test_code_that_hangs_is_a_wrong_answer_and_leaves_nothing(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess, os\n"
        f"if os.fork() == 0:\n  os.setsid()\n  open({str(pid)!r}, 'w').write(str(os.getpid()))\n  while True: pass\n"
        "while True: pass"
    )
    with Rewarder(RewardSettings(rewards=("python",), seconds=1, workers=1)) as rewarder:
        (found,) = rewarder.score([item(code, tests=TESTS)])
        assert found.value == 0 and "more than 1 second" in found.why and rewarder.timeouts == 1
        assert not running(int(pid.read_text()))


def test_what_runs_ends_with_the_process_that_asked(tmp_path: Path) -> None:
    """Even if that is killed."""
    pid = tmp_path / "pid"
    code = f"open({str(pid)!r}, 'w').write(str(__import__('os').getpid()))\nwhile True: pass"
    if (child := os.fork()) == 0:
        try:
            scores([item(code, tests=TESTS)], "python", seconds=300, workers=1)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    inside = int(pid.read_text())
    os.kill(child, 9)
    os.waitpid(child, 0)
    while running(inside) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(inside)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": ()}, "there is no reward"),
        ({"rewards": ("exakt",)}, "reward 'exakt' is not known: give exact"),
        ({"rewards": ("format:",)}, "not known"),
        ({"rewards": ("format:(",)}, "not a regular expression"),
        ({"rewards": ("exact", "exact")}, "named twice"),
        ({"rewards": ("exact",), "weights": (1, 2)}, "2 weights for 1 reward:"),
        ({"rewards": ("exact",), "weights": (float("nan"),)}, "finite"),
        ({"rewards": ("exact",), "seconds": 0}, "positive number of seconds"),
        ({"rewards": ("no.such.module:f",)}, "No module named 'no'.*Give MODULE:FUNCTION"),
        ({"rewards": (FUNCTION + "nothing",)}, "has no nothing"),
        ({"rewards": (FUNCTION + "Row",)}, "too many positional|not a function|cannot be used"),
        ({"rewards": ("tests.small:changed",)}, "too many positional arguments"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rewarder(RewardSettings(**settings)).close()


@pytest.mark.parametrize(
    ("reward", "row", "message"),
    [
        ("exact", {}, 'needs "answer"'),
        ("exact", {"answer": " "}, 'needs "answer"'),
        ("contains", {"answer": []}, 'needs "answer"'),
        ("exact", {"answer": True}, "it is True"),  # would be compared as the text True
        ("contains", {"answer": ["yes", False]}, 'needs "answer"'),
        ("number", {"answer": "twelve"}, "with one number"),
        ("number", {"answer": "1 or 2"}, "with one number"),
        ("python", {}, 'needs "tests"'),
        ("python", {"tests": [3]}, 'needs "tests"'),
        ("python", {"tests": "assert ("}, "not Python code"),
    ],
)
def test_rows_that_lack_what_a_reward_needs(reward: str, row: dict[str, Any], message: str) -> None:
    with Rewarder(RewardSettings(rewards=(reward,))) as rewarder, pytest.raises(UserError, match=message):
        rewarder.check(row)


def test_math_verify() -> None:
    pytest.importorskip("math_verify")
    texts = ["so $\\frac{1}{2}$", "0.5", "0.4", "\\boxed{2/4}"]
    found = scores([item(text, answer="1/2") for text in texts], "math", seconds=30, workers=1)
    assert [score.value for score in found] == [1, 1, 0, 1]


def test_rewards_of_another_thread_are_the_same() -> None:
    """Limits by SIGALRM work on the main thread alone; elsewhere every reward became 0 (verl #5635, TRL #5281)."""
    kinds = ("number", "format:^[0-9 ]+$", FUNCTION + "length")
    items = [item("12", answer="12"), item("x 13", answer="12"), item("7", answer="7")]
    expected = scores(items, *kinds)
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(scores, items, *kinds).result() == expected
    assert len({one.value for one in expected}) > 1


def test_an_identity_changes_with_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for text in ("def f(p, c, r): return 1", "def f(p, c, r): return 2"):
        name = f"own_{random.getrandbits(64)}"
        (tmp_path / f"{name}.py").write_text(text)
        with Rewarder(RewardSettings(rewards=(f"{name}:f",), workers=1)) as rewarder:
            found.append(list(rewarder.identity()["functions"].values()))
    assert found[0] != found[1] and len(found[0][0]) == 64


# The hash was that of the file, while processes went on with the function that they had imported.
def test_a_changed_function_counts_once_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"own_{random.getrandbits(64)}"
    file = tmp_path / f"{name}.py"
    file.write_text("def f(p, c, r): return 1")
    with Rewarder(RewardSettings(rewards=(f"{name}:f",), workers=2)) as rewarder:
        before = rewarder.identity()
        file.write_text("def f(p, c, r): return 2000")
        assert rewarder.identity() == before
        rewarder.import_changed()
        assert rewarder.identity() != before
        assert [score.value for score in rewarder.score([item("a")] * 4)] == [2000] * 4
        file.unlink()
        with pytest.raises(UserError, match="cannot be used"):
            rewarder.import_changed()
