"""Recipes: strict, with one message that names every problem."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qwen_moe.config import RunConfig, dump_config, load_config, parse_config
from qwen_moe.config.load import load_as
from qwen_moe.config.recipe_verbs import VERBS
from qwen_moe.curation.recipe import CurateConfig
from qwen_moe.errors import UserError
from qwen_moe.posttraining.recipe import WalkConfig

DEMO = Path(__file__).parents[2] / "recipes" / "demo.yaml"


def minimal(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run_dir": "runs/x",
        "model": {"preset": "demo"},
        "data": {"train": [{"prefix": "d"}], "sequence_length": 128},
        "training": {"train_tokens": 10_000, "micro_batch_size": 2, "global_batch_size": 4},
        "optimizer": {"learning_rate": 1e-3},
    }
    for dotted, value in changes.items():
        node = values
        *parents, leaf = dotted.split("__")
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return values


def message(**changes: Any) -> str:
    with pytest.raises(UserError) as error:
        parse_config(minimal(**changes), "recipe")
    return str(error.value)


def test_the_demo_recipe_is_valid() -> None:
    config = load_config(DEMO)
    assert config.model.num_experts >= 8 and config.launch.nproc == 2


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("runs_dir", "run_dir"),
        ("optimizer__learning_rat", "learning_rate"),
        ("model__num_expert", "num_experts"),
        ("training__micro_batchsize", "micro_batch_size"),
        ("data__sequence_len", "sequence_length"),
        ("data__prepare", None),
        ("balance__scop", "scope"),
        ("checkpoint__keeps", "keep"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str | None) -> None:
    if nearest is None:
        text = message(data__prepare={"input": ["a"], "output": "b", "train_tokeniser": True})
        assert "'data.prepare.train_tokeniser'" in text and "'train_tokenizer'" in text
        return
    text = message(**{key: 1})
    assert f"unknown key {key.replace('__', '.')!r}" in text and f"did you mean {nearest!r}" in text


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model__num_experts_per_tok": 17}, ["num_experts_per_tok 17", "num_experts 16"]),
        ({"model__num_key_value_heads": 3}, ["num_attention_heads 8", "num_key_value_heads 3"]),
        ({"model__hidden_size": 250}, ["hidden_size 250", "num_attention_heads 8"]),
        ({"model__head_dim": 31}, ["head_dim 31", "even"]),
        ({"model__mlp_only_layers": [9]}, ["layer 9", "0 to 5"]),
        ({"model__mlp_only_layers": [0, 1, 2, 3, 4, 5]}, ["no layer is MoE"]),
        ({"model__shared_expert_intermediate_size": 0}, ["shared_expert_intermediate_size", "qwen3_moe"]),
        ({"model__preset": "qwen3-30b-a3"}, ["qwen3-30b-a3b"]),
        ({"model__vocab_size": "many"}, ["model.vocab_size", "many"]),
        ({"model__vocab_size": 12.5}, ["model.vocab_size", "12.5"]),
        ({"training__global_batch_size": 5}, ["global_batch_size 5", "micro_batch_size 2"]),
        ({"training__train_tokens": 100}, ["train_tokens 100", "512"]),
        ({"training__train_tokens": -3}, ["training.train_tokens", "-3"]),
        ({"data__sequence_length": 4096}, ["sequence_length 4096", "2048"]),
        ({"data__train": []}, ["data.prepare"]),
        ({"schedule__kind": "wsd"}, ["decay_tokens"]),
        ({"schedule__decay_tokens": 5}, ["decay_tokens", "wsd"]),
        ({"schedule__warmup_tokens": 20_000}, ["warmup_tokens 20000", "train_tokens 10000"]),
        ({"schedule__min_learning_rate": 0.1}, ["min_learning_rate 0.1", "0.001"]),
        ({"precision": {"compute": "fp32", "master": "bf16"}}, ["bf16", "fp32"]),
        ({"precision": {"compute": "fp4"}}, ["precision.compute", "fp4"]),
        ({"precision": {"fp8": {"recipe": "delayed"}}}, ["precision.fp8", "compute is bf16"]),
        ({"precision": {"compute": "fp8", "fp8": {"recipe": "mxfp8", "margin": 1}}}, ["fp8.margin", "delayed"]),
        ({"precision": {"compute": "fp8", "fp8": {"recipe": "nvfp4"}}}, ["precision.fp8.recipe", "nvfp4"]),
        ({"precision": {"compute": "fp8", "fp8": {"last_layers_in_bf16": 99}}}, ["last_layers_in_bf16 99", "bf16"]),
        ({"balance__bias_update_rate": 0.001}, ["export_hf"]),
        ({"optimizer__learning_rate": "nan"}, ["optimizer.learning_rate"]),
        ({"optimizer__beta2": 1.0}, ["optimizer.beta2"]),
        ({"optimizer": {}}, ["'optimizer.learning_rate' is missing"]),
    ],
)
def test_impossible_values_are_named_with_what_was_expected(changes: dict[str, Any], parts: list[str]) -> None:
    text = message(**changes)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    "value", [True, False, "nan", "inf", float("nan"), float("inf"), "1e999", 10**400, "x" * 10_000]
)
@pytest.mark.parametrize(
    "key",
    ["optimizer__learning_rate", "optimizer__beta1", "optimizer__weight_decay", "training__train_tokens", "seed",
     "training__spike_nats", "balance__coefficient", "parallel__tp", "model__rope_theta", "data__seed", "launch__nproc",
     "parallel__collective_timeout_minutes", "model__num_hidden_layers", "checkpoint__keep"],
)  # fmt: skip
def test_a_number_is_finite_and_no_boolean(key: str, value: object) -> None:
    changes = {"model": {**parse_config(minimal(), "x").model.model_dump()}} if key.startswith("model") else {}
    found = message(**changes, **{key: value})
    assert key.replace("__", ".") in found and len(found) < 1000


def test_every_number_of_a_recipe_refuses_booleans_and_what_is_not_finite() -> None:
    """By the schema, for fields that nobody has thought of yet too."""
    from typing import get_args

    from pydantic import BaseModel

    seen = 0

    def numbers(section: type[BaseModel]) -> None:
        nonlocal seen
        for name, field in section.model_fields.items():
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    numbers(kind)
            if field.annotation not in (int, float):
                continue
            seen += 1
            for value in (True, float("nan"), float("inf"), 10**400, -(10**30)):
                with pytest.raises(ValidationError):
                    section.__pydantic_validator__.validate_assignment(section.model_construct(), name, value)
                    pytest.fail(f"{section.__name__}.{name} took {value!r:.30}")

    numbers(RunConfig)
    assert seen > 50


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"data__split": "nan,1,0"}, "data.split: 'nan,1,0' is not of the form"),
        ({"data__split": "inf"}, "is not of the form"),
        ({"data__split": "99,nan"}, "is not of the form"),
        ({"data__split": "-1,1"}, "is not of the form"),
        ({"data__split": "0,1"}, "is not of the form"),
        ({"data__split": "a"}, "is not of the form"),
        ({"data__split": "9.9e1,1"}, "give up to three plain numbers"),
        ({"data__train": [{"prefix": "a", "weight": 1e308}, {"prefix": "b", "weight": 1e308}]}, "sum to infinity"),
        ({"run_dir": ""}, "run_dir: '' is not a path"),
        ({"run_dir": "a\0b"}, "is not a path"),
        ({"checkpoint__load_from": ""}, "checkpoint.load_from: '' is not a path"),
        ({"data__train": [{"prefix": "."}]}, "is not a prefix"),
        ({"optimizer__learning_rate": 1e300}, "optimizer.learning_rate = 1e+300: Input should be less than or equal to 100"),
        ({"parallel__collective_timeout_minutes": 1e300}, "less than or equal to 43200"),
        ({"parallel__stages_per_rank": 10**9}, "less than or equal to 10000"),
        ({"launch__threads": 10**18}, "less than or equal to 4096"),
        ({"data__seed": 2**32}, "less than or equal to 4294967295"),
        ({"training__train_tokens": 2**63}, "less than or equal to"),
    ],
)  # fmt: skip
def test_values_that_would_be_taken_for_others(changes: dict[str, Any], part: str) -> None:
    assert part in message(**changes)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(DEMO.read_text() + "\noptimizer:\n  learning_rate: 1.0e-4\n")
    with pytest.raises(UserError, match=r"recipe.yaml: 'optimizer' is given twice, in lines \d+ and \d+: keep one"):
        load_config(recipe)
    with pytest.raises(UserError, match="seed is given twice, as seed=1 and as seed=2: keep one"):
        load_config(DEMO, ["seed=1", "training.micro_batch_size=2", "seed=2"])
    assert load_config(DEMO, ["seed=7", "seed=7"]).seed == 7
    with pytest.raises(UserError, match="'a' is given twice"):
        load_config(DEMO, ["parallel={a: 1, a: 2}"])


def test_all_problems_are_in_one_message() -> None:
    text = message(optimizer__lr=1, training__micro_batch_size=0, balance__scope="everywhere")
    assert "optimizer.lr" in text and "training.micro_batch_size" in text and "balance.scope" in text


def test_a_dense_family_refuses_experts() -> None:
    dense = {"family": "qwen2", "vocab_size": 99, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text = message(model=dense | {"num_attention_heads": 2, "num_experts": 4})
    assert "num_experts is 4" in text and "qwen2_moe" in text


def test_overrides(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(minimal()))
    config = load_config(
        recipe,
        ["training.train_tokens=2e6", "model.mlp_only_layers=[1, 2]", "schedule.kind=constant", "optimizer.eps=1e-5"],
    )
    assert config.training.train_tokens == 2_000_000 and config.model.mlp_only_layers == (1, 2)
    assert config.schedule.kind == "constant" and config.optimizer.eps == 1e-5
    for bad, expected in (
        ("seed", "not of the form"),
        ("seed.x=1", "not a section"),
        ("data.split=[", "not valid YAML"),
    ):
        broken = [bad] if bad != "seed.x=1" else ["seed=3", bad]
        with pytest.raises(UserError, match=expected):
            load_config(recipe, broken)


@pytest.mark.parametrize(
    ("content", "expected"), [("a: [", "not valid YAML"), ("- 1", "mapping"), ("", "mapping"), (None, "does not exist")]
)
def test_unreadable_recipes(tmp_path: Path, content: str | None, expected: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    with pytest.raises(UserError, match=expected):
        load_config(recipe)


def test_a_config_cannot_be_changed() -> None:
    config = parse_config(minimal(), "recipe")
    with pytest.raises(ValidationError):
        config.seed = 5  # type: ignore[misc]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    rate=st.floats(1e-8, 1.0),
    sequence=st.integers(1, 2048),
    scope=st.sampled_from(["none", "micro_batch", "sequence", "global_batch", "huggingface"]),
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=3),
)
def test_a_dumped_config_reads_back_equal(
    tmp_path: Path, rate: float, sequence: int, scope: str, weights: list[float]
) -> None:
    config: RunConfig = parse_config(
        minimal(
            optimizer__learning_rate=rate,
            data__sequence_length=sequence,
            balance__scope=scope,
            data__train=[{"prefix": f"p {i}", "weight": w} for i, w in enumerate(weights)],
        ),
        "recipe",
    )
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


RECIPES = {"qwen-moe train": RunConfig, "qwen-moe post-train": WalkConfig, "qwen-moe data curate": CurateConfig}


@pytest.mark.parametrize("verb", RECIPES)
def test_the_keys_of_a_verb_are_those_of_its_recipes(verb: str) -> None:
    assert RECIPES.keys() == VERBS.keys() and VERBS[verb] == RECIPES[verb].model_fields.keys()


@pytest.mark.parametrize(
    ("reader", "recipe", "verb"),
    [
        (RunConfig, "post_training_demo", "post-train"),
        (RunConfig, "curate_demo", "data curate"),
        (WalkConfig, "grpo_demo", "train"),
        (CurateConfig, "sft_demo", "train"),
    ],
)
def test_the_recipe_of_another_verb_is_named(reader: Any, recipe: str, verb: str) -> None:
    path = DEMO.with_name(f"{recipe}.yaml")
    with pytest.raises(UserError) as error:
        load_config(path) if reader is RunConfig else load_as(reader, path)
    assert f"this is a recipe for `qwen-moe {verb}`" in str(error.value)
    assert f"Here the keys are {', '.join(reader.model_fields)}" in str(error.value)


def test_one_unknown_key_is_a_slip() -> None:
    assert "unknown key 'sft'; valid keys" in message(sft={})
