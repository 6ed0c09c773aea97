"""Prompts against RULER's description and a solver that knows nothing of how they are made."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from scipy.special import zeta

from qwen_moe.data import passkey as wording
from qwen_moe.errors import UserError
from qwen_moe.evaluation.plan import Evaluation, Item, check, depths
from qwen_moe.evaluation.scoring import clean
from qwen_moe.evaluation.tasks import coded_words, common_words, documents, niah, passkey, variables
from qwen_moe.evaluation.tasks.haystack import NOISE, read_essay, sentences
from qwen_moe.evaluation.tasks.ruler import NAMES, OFFLINE, chosen, ruler_tasks
from qwen_moe.evaluation.tasks.task import Task, fit
from tests.evaluation.solver import Solver, misses_depths, solve

NO_FILES: dict[str, Path | None] = {"qa_1": None, "qa_2": None}


def evaluation(tasks: dict[str, Task], lengths: tuple[int, ...], **changes: Any) -> Evaluation:
    values: dict[str, Any] = {"kind": "ruler", "depths": (None,), "samples": 2, "seed": 0, "asked": {}}
    return Evaluation(**(values | {"tasks": tasks, "lengths": lengths} | changes))


def offline(samples: int = 2) -> dict[str, Task]:
    return ruler_tasks(OFFLINE, read_essay(None), NO_FILES, samples)


def passkeys(
    encode: Callable[[str], list[int]], lengths: tuple[int, ...], count: int = 5, digits: int = 5
) -> Evaluation:
    task = passkey.passkey_task(digits, encode)
    return evaluation({"passkey": task}, lengths, kind="passkey", depths=depths(count), samples=1)


@pytest.mark.parametrize("length", [1024, 3000, 4096, 12000])
def test_every_task_is_solvable_and_as_long_as_asked(length: int, tokenizer: Any) -> None:
    """A perfect reader gets 100 percent, with no more tokens than allowed; one more unit would be too long."""
    solver = Solver(tokenizer)
    asked = evaluation(offline(), (length,))
    for item in asked.items():
        task = asked.tasks[item.task]
        tokens, answers = asked.prompt(item, solver.encode)
        draft = asked.draft(item, solver.encode)
        size, again = fit(draft, solver.encode, length - task.new_tokens)
        assert tokens == again and len(tokens) + task.new_tokens <= length
        spare = length - len(tokens) - task.new_tokens
        assert spare == 0 or len(solver.encode(draft.text(size + 1))) + task.new_tokens > length
        written = solver.encode(solve(solver.decode(tokens)))[: task.new_tokens]
        assert task.score(clean(solver.decode(written)), answers) == 1, item


@pytest.mark.parametrize("length", [128, 512, 5000])
def test_passkeys_are_found_at_every_depth(length: int, tokenizer: Any) -> None:
    solver = Solver(tokenizer)
    asked = passkeys(solver.encode, (length,))
    places = []
    for item in asked.items():
        tokens, answers = asked.prompt(item, solver.encode)
        text = solver.decode(tokens)
        assert length - 6 <= len(tokens) + asked.tasks["passkey"].new_tokens <= length  # noise sentences have at most 6
        assert text.startswith("There is an important info hidden") and text.endswith(
            "\nWhat is the pass key? The pass key is"
        )
        assert text.count(answers[0]) == 2 and len(answers[0]) == 5 and answers[0] in solve(text)
        noise = text.split(wording.TASK)[1].split("What is")[0]
        before = noise.index("The pass key is")
        places.append(before / (len(noise) - len(wording.INFORMATION.format(key="12345"))))
    assert np.allclose(places, [0, 0.25, 0.5, 0.75, 1], atol=24 / (length / 3))
    assert wording.noise(7) == f"{NOISE} The grass is green. The sky is blue."
    assert depths(1) == (0.5,) and depths(3) == (0, 0.5, 1)


def test_keys_have_room_in_every_tokenizer(tokenizer: Any) -> None:
    """Tokens that a tokenizer puts around a text are none of the key; some have several tokens for a digit."""
    encode = Solver(tokenizer).encode
    assert passkey.passkey_task(5, encode).new_tokens == 7
    assert passkey.passkey_task(5, lambda text: [1, *encode(text)]).new_tokens == 7
    assert passkey.passkey_task(5, lambda text: encode(text) * 2).new_tokens == 12


def test_a_seed_decides_and_nothing_else_does(tokenizer: Any) -> None:
    """The prompt of an item is the same in any evaluation that has it."""
    encode = Solver(tokenizer).encode
    for name in OFFLINE:
        item = Item(name, 1500, None, 1)
        few, many = offline(2), offline(9)
        first = evaluation({name: few[name]}, (1500,)).prompt(item, encode)
        assert first == evaluation(many, (900, 1500, 2000), samples=9).prompt(item, encode)
        assert first != evaluation(few, (1500,), seed=1).prompt(item, encode)
        assert first[1] != evaluation(few, (1500,)).prompt(Item(name, 1500, None, 0), encode)[1]


# SHA-256 of template and answer prefix (scripts/data/synthetic/constants.py of github.com/NVIDIA/RULER, commit c3f5e3b),
# formatted with context C, query Q, type_needle_v K and num_v N; niah's also in the singular, as niah.py makes it.
TEMPLATES = {
    "67e1438c270fa0ce": niah.TEMPLATE.format(kind="K", context="C", query="Q"),
    "8edf24529a5e1b04": niah.TEMPLATE_OF_ONE.format(kind="K", context="C", query="Q"),
    "ab8650bdb63798eb": variables.TEMPLATE.format(context="C", value="Q", count="N"),
    "6fdd67d5e5140c97": common_words.TEMPLATE.format(context="C"),
    "cbf6e2c4e9cbf0e6": coded_words.TEMPLATE.format(context="C"),
    "b4d25d28a140b511": documents.TEMPLATE.format(context="C", query="Q"),
}


@pytest.mark.parametrize("digest", TEMPLATES)
def test_templates_are_rulers(digest: str) -> None:
    assert hashlib.sha256(TEMPLATES[digest].encode()).hexdigest()[:16] == digest


def test_new_tokens_are_rulers() -> None:
    wanted = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}
    assert {task.name.split("_")[0]: task.new_tokens for task in offline().values()} == wanted
    assert documents.NEW_TOKENS == 32


@pytest.mark.parametrize(
    ("name", "hidden", "asked", "key", "value"),
    [
        ("niah_single_1", 1, 1, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_single_2", 1, 1, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_single_3", 1, 1, r"[a-z]+-[a-z]+", r"[0-9a-f-]{36}"),
        ("niah_multikey_1", 4, 1, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multikey_2", None, 1, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multikey_3", None, 1, r"[0-9a-f-]{36}", r"[0-9a-f-]{36}"),
        ("niah_multivalue", 4, 4, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multiquery", 4, 4, r"[a-z]+-[a-z]+", r"\d{7}"),
    ],
)
def test_needles_are_rulers(name: str, hidden: int | None, asked: int, key: str, value: str, tokenizer: Any) -> None:
    one = evaluation(offline(), (3000,))
    tokens, answers = one.prompt(Item(name, 3000, None, 0), Solver(tokenizer).encode)
    text = tokenizer.decode(tokens)
    needles = re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.", text)
    assert len(answers) == asked and {answer for _, answer in needles} >= set(answers)
    assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for k, v in needles)
    if hidden is None:
        assert len(needles) > 20 and text.split("afterwards.\n")[1].split("\nWhat")[0].count("\n") == len(needles) - 1
    else:
        assert len(needles) == hidden
    assert (NOISE in text) == (name == "niah_single_1")
    queries = {k for k, v in needles if v in answers}
    assert len(queries) == (4 if name == "niah_multiquery" else 1)


def test_needles_in_essays_lie_at_rulers_depths() -> None:
    """Needles lie between sentences, at 40 equally spaced depths."""
    essay = read_essay(None)
    assert (len(niah.DEPTHS), niah.DEPTHS[:4], niah.DEPTHS[-2:]) == (40, (0, 3, 5, 8), (97, 100))
    parts = sentences(essay.text(3000))
    for depth in (0, 50, 100):
        text = niah._in_essay(essay, 3000, ["NEEDLE."], [depth])
        before, after = text.split("NEEDLE.")
        assert before.strip() == " ".join(parts[: int(len(parts) * depth / 100)])
        assert f"{before.strip()} {after.strip()}".strip() == " ".join(parts)


def test_variables_have_a_solved_example_and_one_chain(tokenizer: Any) -> None:
    one = evaluation(offline(), (2000,))
    tokens, answers = one.prompt(Item("vt", 2000, None, 0), Solver(tokenizer).encode)
    example, problem = tokenizer.decode(tokens).split("\n\nMemorize")
    assert all(re.fullmatch(r"[A-Z]{5}", name) for name in answers) and len(set(answers)) == 5
    links = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+) ?$", problem, re.M)
    assert [name for name, _ in links] == list(answers) and [v for _, v in links[1:]] == list(answers[:-1])
    names = example.split("they are:  ")[1].split()
    assert len(names) == 5 and all(re.fullmatch(r"[A-Z]{3}", name) for name in names)
    assert 430 < len(tokenizer(example)["input_ids"]) < 520


def test_the_smallest_list_has_an_answer(tokenizer: Any) -> None:
    """Ten words of eleven come more often than the last."""
    draft = evaluation(offline(), (500,)).draft(Item("cwe", 500, None, 0), Solver(tokenizer).encode)
    listed = draft.text(draft.least).split("most often.\n")[-1].split("\nQuestion:")[0]
    counted = Counter(re.findall(r"\d+\. (\w+)", listed))
    assert sorted(counted.values()) == [1, *[6] * 10] and {w for w, n in counted.items() if n == 6} == set(
        draft.answers
    )


@pytest.mark.parametrize(("length", "often", "seldom", "example"), [(4095, 6, 1, 3), (4096, 30, 3, 10)])
def test_common_words_come_as_often_as_rulers(
    length: int, often: int, seldom: int, example: int, tokenizer: Any
) -> None:
    one = evaluation(offline(), (length,))
    tokens, answers = one.prompt(Item("cwe", length, None, 0), Solver(tokenizer).encode)
    lists = [part.split("\nQuestion:")[0] for part in tokenizer.decode(tokens).split("most often.\n")[1:]]
    solved, counted = (Counter(re.findall(r"\d+\. (\w+)", text)) for text in lists)
    assert {word for word, count in counted.items() if count == often} == set(answers) and len(answers) == 10
    assert set(counted.values()) == {often, seldom}
    assert max(solved.values()) == example and len(solved) == (20 if length < 4096 else 40)


def test_a_million_tokens_of_different_words() -> None:
    """Longer lists than there are words continue with pairs of words."""
    words = common_words._List(Random(0), 30, 3).different(60_000)
    assert len(set(words)) == 60_000 and all(word.isalpha() for word in words)


@pytest.mark.parametrize("total", [53, 54, 60, 72, 500, 20_000])
def test_coded_words_follow_the_zeta_distribution(total: int) -> None:
    ranks = np.arange(1, 200)
    expected = (total * ranks**-2.0 / zeta(2.0)).astype(int)
    found = coded_words.counts(total, 199)
    assert found == expected[expected > 0].tolist() and found[3] > ([*found, 0][4])


def test_fewer_coded_words_would_be_ambiguous() -> None:
    assert all(len({*coded_words.counts(52, 9)[3:5]}) == 1 for _ in "1") and coded_words.LEAST == 53


def test_the_smallest_length_is_named_and_works(tokenizer: Any) -> None:
    solver = Solver(tokenizer)
    tasks = offline()
    with pytest.raises(UserError) as caught:
        check(evaluation(tasks, (100, 9000)), solver)
    message = str(caught.value)
    assert message.startswith("--lengths 100 is too short, in this tokenizer's tokens, for niah_single_1 (at least ")
    named = {name: int(least) for name, least in re.findall(r"(\w+) \(at least (\d+)\)", message)}
    assert set(named) == set(OFFLINE)
    for name, least in named.items():
        check(evaluation({name: tasks[name]}, (least,)), solver)
        with pytest.raises(UserError, match=rf"for {name} \(at least {least}\)"):
            check(evaluation({name: tasks[name]}, (least - 1,)), solver)


def test_a_tokenizer_that_cannot_write_the_key_is_refused(tokenizer: Any) -> None:
    class Spaced(Solver):
        def decode(self, tokens: list[int]) -> str:
            return re.sub(r"(\d)", r"\1 ", super().decode(tokens))

    asked = passkeys(Solver(tokenizer).encode, (300,))
    with pytest.raises(
        UserError, match=r"cannot write '\d{5}', an answer of passkey: its tokens read '\d \d \d \d \d'"
    ):
        check(asked, Spaced(tokenizer))


def test_a_length_beyond_the_model_is_refused(tokenizer: Any) -> None:
    solver = Solver(tokenizer, reach=512)
    check(passkeys(solver.encode, (300, 512)), solver)
    with pytest.raises(UserError, match="--lengths 513 is beyond the model's reach of 512 tokens"):
        check(passkeys(solver.encode, (300, 513)), solver)


@pytest.mark.parametrize(
    ("names", "files", "message"),
    [
        (
            ["niah_singel_1"],
            {},
            r"'niah_singel_1' is no task of RULER: did you mean niah_single_1\? Choose from niah_si",
        ),
        (["vt", "qa_1"], {}, "task qa_1 needs a file: give --squad FILE"),
        (["vt"], {"qa_2": Path("x")}, "task qa_2 is not in --tasks: leave --hotpot out"),
        ([""], {}, "'' is no task of RULER: Choose"),
    ],
)
def test_tasks_that_cannot_be_chosen(names: list[str], files: dict[str, Path | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(names, NO_FILES | files)


def test_tasks_by_default() -> None:
    assert chosen(None, NO_FILES) == list(OFFLINE) and len(OFFLINE) == 11
    assert chosen(None, {"qa_1": Path("x"), "qa_2": Path("y")}) == list(NAMES) and len(NAMES) == 13
    assert chosen(["fwe", "vt", "vt"], NO_FILES) == ["vt", "fwe"]


def test_essays(tmp_path: Path) -> None:
    ours = read_essay(None)
    assert len(ours.words) > 30_000 and ours.source.startswith("help topics of Python 3.")
    (tmp_path / "essay.txt").write_text("One two.\n\n=====\nThree four! Five")
    essay = read_essay(tmp_path / "essay.txt")
    assert essay.text(7) == "One two. Three four! Five One two." and essay.source == "essay.txt"
    assert sentences(essay.text(5)) == ["One two.", "Three four!", "Five"] and sentences(" ") == []
    (tmp_path / "empty.txt").write_text(" \n===")
    with pytest.raises(UserError, match="holds no words"):
        read_essay(tmp_path / "empty.txt")


def test_the_solver_can_miss(tokenizer: Any) -> None:
    """A stand-in that could not fail would prove nothing."""
    solver = Solver(tokenizer, misses=misses_depths(0.4, 0.6))
    asked = passkeys(solver.encode, (600,))
    missed = [solver.misses(solver.decode(asked.prompt(item, solver.encode)[0])) for item in asked.items()]
    assert missed == [False, False, True, False, False]
