"""What an objective asks of the model and of the recipe."""

import math
from typing import Any

import pytest

from qwen_moe.config import ModelConfig, RunConfig, dump_config, parse_config, stage_runs
from qwen_moe.errors import UserError
from tests.small import changed, model_values, small_model

BASE: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": model_values(),
    "data": {"train": [{"prefix": "d"}], "sequence_length": 16},
    "training": {"train_tokens": 1024, "micro_batch_size": 2, "global_batch_size": 4},
    "optimizer": {"learning_rate": 1e-3},
    "objective": {"kind": "reward_model"},
}
TWO = {"kind": "reward_model", "reward": {"criteria": ["helpful", "concise"], "weights": [1, 2]}}


def run(**changes: Any) -> RunConfig:
    return parse_config(changed(BASE, changes), "recipe")


def test_a_reward_model_scores_what_its_objective_judges() -> None:
    assert run().model.criteria == ("preference",)
    assert run(objective=TWO).model.criteria == ("helpful", "concise")
    assert run(objective={"kind": "dpo"}).model.criteria == ()
    again = RunConfig(**run(objective=TWO).model_dump() | {"model": small_model()})
    assert again.model.criteria == ("helpful", "concise")


def test_its_dump_is_the_same_run(tmp_path: Any) -> None:
    import yaml

    config = run(objective=TWO)
    assert parse_config(yaml.safe_load(dump_config(config)), "dump") == config


def test_every_stage_has_the_same_head() -> None:
    stages = [{"name": name, "tokens": 512} for name in ("short", "long")]
    config = run(objective=TWO, stages=stages)
    assert [stage.model.criteria for stage in stage_runs(config)] == [("helpful", "concise")] * 2


def test_its_loss_of_guessing_is_that_of_equal_scores() -> None:
    objective = run(objective=TWO).objective
    assert objective.unit == "nats per pair" and objective.loss_of_guessing(1000) == math.log(2)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "criteria without the objective": (
        {"objective": {"kind": "dpo"}, "model__criteria": ["a"]},
        r"model.criteria \['a'\] make a reward model, which objective.kind dpo cannot train",
    ),
    "other criteria": (
        {"model__criteria": ["a"]},
        r"model.criteria \['a'\] are not objective.reward.criteria \['preference'\]",
    ),
    "no criteria": ({"objective__reward": {"criteria": [], "weights": []}}, "reward.criteria is empty"),
    "a name twice": (
        {"objective__reward": {"criteria": ["a", "a"], "weights": [1, 1]}},
        "a name twice",
    ),
    "a name of two lines": ({"objective__reward": {"criteria": ["a\nb"]}}, "is not the name of a criterion"),
    "weights of others": ({"objective__reward": {"criteria": ["a", "b"]}}, "1 number and reward.criteria 2 names"),
    "a sample": ({"sample_prompt": "def "}, "a reward model writes no text"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused(what: str) -> None:
    changes, message = WRONG[what]
    with pytest.raises(UserError, match=message):
        run(**changes)


def test_models_of_earlier_versions_are_language_models() -> None:
    values = small_model(tie_word_embeddings=True).model_dump()
    del values["criteria"]
    model = ModelConfig(**values)
    assert model.criteria == () and model.tied_head and not model.has_lm_head
    scored = ModelConfig(**values, criteria=("a",))
    assert not scored.tied_head and not scored.has_lm_head
