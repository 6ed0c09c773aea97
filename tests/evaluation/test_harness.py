"""`qwen-moe evaluate tasks` against the harness's own model of transformers on the same directory, in every layout, killed
and continued."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_moe.cli import main
from qwen_moe.generation.sampling import Sampling
from tests.evaluation.harness_models import model_folder, write_tasks

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A model, and the YAML files of tasks."""
    folder = tmp_path_factory.mktemp("harness")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    return model_folder(folder), write_tasks(folder / "tasks")


def by_transformers(model: Path, names: list[str], chat: bool = False, shots: int | None = None) -> Any:
    """What the harness finds with its own model of the directory, one text at a time."""
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM

    reference = HFLM(pretrained=str(model), dtype="float32", batch_size=1, device="cpu")
    with pytest.MonkeyPatch.context() as patch:  # a survey of the machine, which takes longer than all else
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
        return lm_eval.evaluator.simple_evaluate(
            model=reference, tasks=list(names), apply_chat_template=chat, fewshot_as_multiturn=chat, num_fewshot=shots
        )


def run(model: Path, names: list[str], output: Path, *options: str) -> dict[str, Any]:
    arguments = ["--checkpoint", str(model), "--tasks", ",".join(names), "--output", str(output), "--dtype", "fp32"]
    assert main(["evaluate", "tasks", *arguments, *options]) == 0
    return json.loads((output / f"results-{model.name}.json").read_text())


def samples(output: Path, model: Path, task: str) -> list[dict[str, Any]]:
    lines = (output / "samples" / model.name / f"{task}.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda row: row["doc_id"])


def compare(results: dict[str, Any], output: Path, model: Path, theirs: Any) -> None:
    """Every answer, every score and every standard error."""
    for task, found in theirs["results"].items():
        ours = {f"{one['metric']},{one['filter']}": one for one in results["tasks"][task]["metrics"]}
        values = {key: value for key, value in found.items() if "," in key and "_stderr" not in key}
        assert set(ours) == set(values)
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            error = found[f"{metric}_stderr,{chosen}"]
            assert ours[key]["value"] == pytest.approx(value, rel=1e-5)
            assert ours[key]["stderr"] == (None if error == "N/A" else pytest.approx(error, rel=1e-5))
        rows = sorted(theirs["samples"][task], key=lambda row: row["doc_id"])
        for mine, row in zip(samples(output, model, task), rows, strict=True):
            assert mine["doc_hash"] == row["doc_hash"] and mine["prompt_hash"] == row["prompt_hash"]
            for one, other in zip(mine["resps"], row["resps"], strict=True):
                a, b = one[0], other[0]
                if isinstance(b, tuple):
                    assert a[0] == pytest.approx(b[0], rel=0, abs=1e-5) and bool(a[1]) == bool(b[1])
                elif isinstance(b, float):
                    assert a == pytest.approx(b, rel=1e-6, abs=1e-5)  # of a whole text
                else:
                    assert a == b


def test_numbers_are_those_of_the_harness_with_transformers(
    world: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, names = world
    results = run(model, names, tmp_path)
    printed = capsys.readouterr()
    compare(results, tmp_path, model, by_transformers(model, names))
    generated = {row["resps"][0][0] for row in samples(tmp_path, model, "own_answer")}
    assert len(generated) > 5, "the answers hardly differ, so that equal ones show little"
    assert results["tasks"]["own_choice"]["version"] == 2.5 and results["tasks"]["own_choice"]["samples"] == 15
    assert results["checkpoint"]["dtype"] == "float32" and results["harness"]
    assert "own_choice" in printed.out and "acc_norm" in printed.out
    assert "were longer than the 48 tokens that the model reads" in printed.err


def test_chat_and_examples_as_the_harness_makes_them(world: tuple[Path, list[str]], tmp_path: Path) -> None:
    model, names = world
    names = [names[0], names[2]]
    options = ("--chat", "--num-fewshot", "1", "--max-length", "48")
    compare(run(model, names, tmp_path, *options), tmp_path, model, by_transformers(model, names, chat=True, shots=1))
    assert "<assistant>" in samples(tmp_path, model, "own_answer")[0]["arguments"][0][0]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts and prompts the model is asked for, call by call."""
    from qwen_moe.generation.session import Session

    asked: list[int] = []
    for name in ("likelihoods", "generate"):
        ask = getattr(Session, name)

        def counting(self: Any, texts: Any, *args: Any, ask: Any = ask, **kwargs: Any) -> Any:
            asked.append(len(texts))
            return ask(self, texts, *args, **kwargs)

        monkeypatch.setattr(Session, name, counting)
    return asked


def test_a_second_time_nothing_is_computed(
    world: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, names = world
    asked = counted(monkeypatch)
    first = run(model, names, tmp_path)
    whole = sum(asked)
    asked.clear()
    assert run(model, names, tmp_path) == first and whole > 60 and asked == []
    changed = run(model, names[:1], tmp_path, "--dtype", "fp64")
    assert sum(asked) > 40 and set(changed["tasks"]) == {"own_choice"}, "another way of computing is another evaluation"


def test_each_sampled_answer_of_a_request_is_kept_and_greedy_ones_are_one() -> None:
    """Otherwise a score over several draws, as pass@k, would be of one of them. A second start finds the same ones."""
    from qwen_moe.evaluation.harness.model import HarnessModel

    model = object.__new__(HarnessModel)
    model._identity = {"weights": "some"}
    drawn, greedy = Sampling(temperature=0.7), Sampling(temperature=0.0)
    asked = ([[1, 2]] * 5, [drawn] * 3 + [greedy] * 2)
    keys = model._generation_keys(*asked)
    assert len(set(keys)) == 4 and keys[3] == keys[4] not in keys[:3]
    assert model._generation_keys(*asked) == keys


def test_the_token_that_is_only_predicted_does_not_make_a_text_too_long() -> None:
    """A model that reads 5 tokens scores the sixth. A seventh pushes the first out, and that is counted."""
    from qwen_moe.evaluation.harness.model import HarnessModel

    model = object.__new__(HarnessModel)
    model.max_length, model.counts, model.tokenizer = 5, Counter(), SimpleNamespace(unk_token_id=None)
    assert model._scored(("a", "b"), [1, 2, 3], [4, 5, 6]).tokens == [1, 2, 3, 4, 5, 6]
    assert model.counts["truncated"] == 0
    assert model._scored(("a", "b"), [0, 1, 2, 3], [4, 5, 6]).tokens == [1, 2, 3, 4, 5, 6]
    assert model.counts["truncated"] == 1


def test_other_tasks_of_the_same_checkpoint_stay(world: tuple[Path, list[str]], tmp_path: Path) -> None:
    model, names = world
    first = run(model, names[:1], tmp_path)
    both = run(model, names[1:2], tmp_path)
    assert both["tasks"]["own_choice"] == first["tasks"]["own_choice"] and set(both["tasks"]) == {
        "own_choice",
        "own_text",
    }


KILLED = """
import os, signal, sys
from qwen_moe.evaluation.harness.answers import RequestAnswers
from qwen_moe.generation import session
plan = session.in_passes
session.in_passes = lambda lengths, limit: plan(lengths, 100)  # several forward passes
add, left = RequestAnswers.add, [int(sys.argv.pop(1))]
def killing(self, answers):
    add(self, answers)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
RequestAnswers.add = killing
from qwen_moe.cli import main
sys.exit(main())
"""


def test_a_kill_loses_nothing_that_was_answered(
    world: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, names = world
    expected = run(model, names, tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, "3", "evaluate", "tasks", "--checkpoint", str(model), "--dtype", "fp32"]
    ended = subprocess.run(
        [*command, "--tasks", ",".join(names), "--output", str(out)], capture_output=True, timeout=200
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    answers = out / f"answers-{model.name}.jsonl"
    kept = len(answers.read_text().splitlines())
    assert kept > 3 and not (out / f"results-{model.name}.json").exists()
    with answers.open("ab") as file:
        file.write(b'{"key": "cut o')  # the line that a kill cut off
    asked = counted(monkeypatch)
    assert run(model, names, out)["tasks"] == expected["tasks"]
    whole = len((tmp_path / "whole" / answers.name).read_text().splitlines())
    assert sum(asked) == whole - kept and len(answers.read_text().splitlines()) == whole
    asked.clear()
    assert run(model, names, out)["tasks"] == expected["tasks"] and asked == []


# Numbers in more layouts: tests/generation/test_likelihood.py.
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("--tp", "2"), marks=pytest.mark.slow),
        pytest.param(("--pp", "2"), marks=pytest.mark.slow),
        ("--dp", "2", "--ep", "2"),
    ],
    ids="".join,
)
def test_layouts_answer_as_one_process(world: tuple[Path, list[str]], tmp_path: Path, layout: tuple[str, ...]) -> None:
    model, names = world
    one = run(model, names, tmp_path / "one")
    command = [sys.executable, "-m", "qwen_moe", "evaluate", "tasks", "--checkpoint", str(model), "--dtype", "fp32"]
    command += ["--tasks", ",".join(names), "--output", str(tmp_path / "two"), *layout, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    two = json.loads(ended.stdout)
    for task, record in one["tasks"].items():
        for metric, other in zip(record["metrics"], two["tasks"][task]["metrics"], strict=True):
            assert metric["value"] == pytest.approx(other["value"], rel=1e-5)
        ours, theirs = samples(tmp_path / "one", model, task), samples(tmp_path / "two", model, task)
        if task == "own_answer":
            assert [row["resps"] for row in ours] == [row["resps"] for row in theirs]


def test_two_commands_do_not_write_to_one_folder(
    world: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwen_moe.evaluation.harness.answers import RequestAnswers

    model, names = world
    with RequestAnswers(tmp_path / f"answers-{model.name}.jsonl"):
        arguments = ["--checkpoint", str(model), "--tasks", names[0], "--output", str(tmp_path)]
        assert main(["evaluate", "tasks", *arguments]) == 2
    assert "is being written by another process" in capsys.readouterr().err
