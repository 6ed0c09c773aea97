"""Recipes of walks: mistakes are named together, before anything is done; what a recipe leaves out is found."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_moe.cli import main
from qwen_moe.config import load_config, parse_config
from qwen_moe.config.load import RECIPES
from qwen_moe.errors import UserError
from qwen_moe.posttraining.command import NAMES
from qwen_moe.posttraining.figures import of_run
from qwen_moe.posttraining.recipe import STEPS, load_walk, merged
from qwen_moe.posttraining.steps import Context, steps_of, that_follow
from qwen_moe.posttraining.walk import Walk
from qwen_moe.workflow.state import State, differences
from tests.posttraining.walks import recipe_values, write_recipe


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


def walk(here: Path, *overrides: str) -> Walk:
    return Walk(load_walk(here, overrides), here.name)


def refusal(here: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        walk(here, *overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["sfft={}"], "unknown key 'sfft'; did you mean 'sft'?"),
        (["pairs.rul=all"], "unknown key 'pairs.rul'; did you mean 'rule'?"),
        (["sft=null"], "rollout has no model to begin from: give the section sft, or start"),
        (["rollout=null"], "pairs are made of sampled answers"),
        (["common.rollout.samples=8"], "common.rollout is not a section that steps share"),
        (["dpo.run_dir=x"], "dpo.run_dir is that of the whole walk"),
        (["dpo.objective=sft"], "this step's is dpo"),
        (["pairs=null"], "dpo: data: there is nothing to read"),
        (["reward_model=null"], "rollout.reward_model is 'step', and this walk has no reward_model"),
        (["grpo.rollout=null"], "grpo: the section rollout is missing"),
        (["measure.rewards=[exat]"], "measure.queries: "),
        (["measure.rewards=[nope:f]"], "No module named 'nope'"),
        (["measure.queries=gone.jsonl"], "measure.queries: gone.jsonl cannot be read: No such file"),
        (["measure.max_new_tokens=0"], "measure.max_new_tokens = 0"),
        (["start=nowhere", "sft=null"], "start: nowhere does not exist: give a checkpoint"),
    ],
)
def test_a_mistake_is_named(here: Path, overrides: list[str], named: str) -> None:
    assert named in refusal(here, *overrides)


def test_all_mistakes_are_in_one_message_before_anything_is_done(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here.parent / "held.jsonl").write_text('{"prompt": "1+1="}\n')
    mistakes = ["dpo.optimizer.learning_rate=-1", "grpo.rollout.samples=1", "measure.rewards=[exact]"]
    assert main(["post-train", str(here), *mistakes]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    for named in ("dpo: optimizer.learning_rate = -1", "grpo: rollout.samples = 1", "held.jsonl, line 1: reward exact"):
        assert named in message, message
    assert not (here.parent / "run").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 0, "prompt": "again"}', 'held.jsonl, line 31: id "0" is also that of line 1'),
        ('{"id": 1.5, "prompt": "half"}', "held.jsonl, line 31: id is 1.5, expected text or a whole number"),
        ('{"messages": []}', "held.jsonl, line 31: messages is []: ask something"),
        ('{"question": "which?"}', "held.jsonl, line 31 has no prompt"),
        ('{"prompt": "a", "tokens": [1]}', "held.jsonl, line 31 has prompt and tokens"),
    ],
)
def test_queries_that_cannot_be_asked_are_found_first(here: Path, line: str, message: str) -> None:
    with (here.parent / "held.jsonl").open("a") as file:
        file.write(f"{line}\n")
    assert message in refusal(here)


@pytest.mark.parametrize("option", ["--until", "--redo"])
def test_a_step_that_is_left_out_is_no_end(here: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main(["post-train", str(here), "dpo=null", option, "dpo"]) == 2
    assert f"{option} dpo: {here} has no such step; it has sft, rollout, pairs, reward_model, grpo" in (
        capsys.readouterr().err
    )
    assert not (here.parent / "run").exists()


def inputs(here: Path, name: str, *overrides: str, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of the step ``name``, which was done with the inputs ``before``."""
    found = walk(here, *overrides)
    (step,) = [one for one in steps_of(found) if one.name == name]
    state = State(found.run_dir, {name: {"inputs": before}} if before else {})
    return step.inputs(Context(walk=found, state=state, lock=None))  # type: ignore[arg-type]


def test_other_epochs_are_another_setting(here: Path) -> None:
    before = inputs(here, "sft")
    other = inputs(here, "sft", "sft.training.epochs=5", before=before)
    assert differences(before, other) == ["training.epochs was 4, is now 5"]
    del before["training.epochs"]  # as earlier versions recorded it
    assert differences(before, inputs(here, "sft", "sft.training.epochs=5", before=before)) == []


def test_every_file_that_a_step_reads_is_an_input(here: Path) -> None:
    folder = here.parent
    (folder / "chats").mkdir()
    for name in ("chats/a.jsonl", "mine.bin", "mine.idx"):
        (folder / name).write_text("1")
    (folder / "own.py").write_text("def f(prompt, completion, row):\n    return 1.0\n")
    own = [*("sft.data.prepare.input=[chats]", "dpo.data.train=[{prefix: mine}]"), "rollout.rewards=[own:f]"]
    own += ["measure.rewards=[own:f]", "grpo.rollout.rewards=[own:f]"]
    reads = {
        "sft": ["chats"],
        "dpo": ["mine.bin", "mine.idx"],
        "rollout": ["own.py"],
        "measure sft": ["own.py"],
        "grpo": ["own.py"],
    }
    before = {step: inputs(here, step, *own) for step in reads}
    for name in ("chats/a.jsonl", "mine.bin", "mine.idx"):
        (folder / name).write_text("2")
    (folder / "own.py").write_text("def f(prompt, completion, row):\n    return 2.0\n")
    for step, names in reads.items():
        found = differences(before[step], inputs(here, step, *own, before=before[step]))
        assert found == [f"{name} has changed" for name in names], step
    (folder / "own.py").unlink()
    (folder / "held.jsonl").rename(folder / "other.jsonl")
    found = differences(before["measure sft"], inputs(here, "measure sft", "measure.queries=other.jsonl"))
    assert "held.jsonl is not there, or no longer read" in found and "other.jsonl is new" in found


def test_a_folder_of_something_else_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here.parent / "run").mkdir()
    (here.parent / "run" / "thesis.tex").touch()
    assert main(["post-train", str(here)]) == 2
    assert "run_dir run contains thesis.tex and no state.json" in capsys.readouterr().err
    assert [path.name for path in (here.parent / "run").iterdir()] == ["thesis.tex"]


def test_steps_that_are_left_out_are_passed_over(here: Path) -> None:
    short = walk(here, "rollout=null", "pairs=null", "dpo=null", "reward_model=null", "grpo.rollout.variances=null",
                 "grpo.rollout.reward_model=null")  # fmt: skip
    assert [step.name for step in steps_of(short)] == ["sft", "measure sft", "grpo", "measure grpo"]
    assert short.runs["grpo"].checkpoint.load_from == Path("run/1-sft")
    assert walk(here).runs["grpo"].checkpoint.load_from == Path("run/4-dpo")
    assert short.runs["grpo"].run_dir == Path("run/6-grpo")  # numbers do not change, so that steps can be added later
    assert [step.name for step in steps_of(walk(here, "measure=null"))] == list(STEPS)
    assert STEPS == NAMES


def test_a_walk_may_begin_from_a_model(here: Path) -> None:
    folder = here.parent / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    found = walk(here, "start=model", "sft=null")
    assert [step.name for step in steps_of(found)][:3] == ["measure start", "rollout", "pairs"]
    for step in ("dpo", "reward_model"):
        assert found.runs[step].checkpoint.load_from == found.runs[step].data.tokenizer == Path("model")
    tuned = walk(here, "start=model", "sft.data.prepare.train_tokenizer=false")
    assert tuned.runs["sft"].checkpoint.load_from == Path("model")
    assert tuned.runs["dpo"].checkpoint.load_from == Path("run/1-sft")


def test_what_follows_a_step(here: Path) -> None:
    found = walk(here)
    assert [step.name for step in that_follow(found, "reward_model")] == ["reward_model", "grpo", "measure grpo"]
    assert [step.name for step in that_follow(found, "sft")] == [step.name for step in steps_of(found)]
    plain = walk(here, "grpo.rollout.reward_model=null")
    assert [step.name for step in that_follow(plain, "reward_model")] == ["reward_model"]


def test_own_data_are_not_replaced_by_pairs(here: Path) -> None:
    found = walk(here, "dpo.data.train=[{prefix: mine}]")
    assert [one.prefix for one in found.runs["dpo"].data.train] == [Path("mine")]
    assert found.reads("dpo") == ("sft",) and found.reads("reward_model") == ("sft", "pairs")


def test_merged_goes_into_sections_and_replaces_lists() -> None:
    below: dict[str, Any] = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merged(below, {"a": {"c": [3]}, "e": 2}) == {"a": {"b": 1, "c": [3]}, "d": 1, "e": 2}
    assert below == {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merged({"a": {"b": 1}}, {"a": 5}) == {"a": 5}


def test_a_written_recipe_is_the_recipe(here: Path) -> None:
    """A step's recipe read from its file is what the walk compares with."""
    found = walk(here)
    for step, values in found.recipes.items():
        path = here.parent / f"{step}.yaml"
        path.write_text(yaml.safe_dump(values))
        assert load_config(path) == found.runs[step] == parse_config(values, step)


def test_the_demonstration_is_a_walk_of_the_other_demonstrations() -> None:
    """Its model and tasks are those of sft_demo and grpo_demo."""
    found = Walk(load_walk(RECIPES / "post_training_demo.yaml"), "demo")
    assert found.config.steps == STEPS and found.config.measured == ("sft", "dpo", "grpo")
    for name, step in (("sft_demo", "sft"), ("grpo_demo", "grpo")):
        alone = load_config(RECIPES / f"{name}.yaml")
        assert alone.model == found.runs[step].model
    assert recipe_values()["model"] != found.config.model


def test_steps_that_had_nothing_to_learn_from_are_on_the_page(here: Path) -> None:
    config = walk(here).runs["grpo"]
    config.run_dir.mkdir(parents=True)
    records = [{"step": n, "loss": 0.0, "reward": 0.5, "used_answers": 0.5 * (n % 3 == 0)} for n in range(1, 7)]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (config.run_dir / "attempts.jsonl").write_text("{}\n")
    said = of_run(config)["learned_from"]
    assert said.endswith("each; nothing in 4 of 6 steps, where all answers to each query had the same reward")
