"""Every setting has a row in the table of what makes two runs the same, and all that compare settings ask it."""

import ast
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import create_model

from qwen_moe.config import RunConfig, parse_config
from qwen_moe.runs.identity import (
    OF_RESULTS,
    ON_BRANCH,
    ON_RESUME,
    TABLE,
    Rule,
    differences,
    flat,
    rule_of,
    saved_settings,
    settings_of,
)

ROOT = Path(__file__).parents[2]
ROWS = [name for names in TABLE.values() for name in names]
# As the version before the table wrote them: only what was compared, FP8's settings with `compute` fp8 alone.
EARLIER = json.loads(Path(__file__).with_name("settings_of_earlier_checkpoints.json").read_text())

BASE: dict[str, Any] = {
    "run_dir": "run",
    "seed": 7,
    "model": {
        "family": "qwen3_moe",
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "max_position_embeddings": 64,
    },
    "data": {"train": [{"prefix": "data/a"}], "sequence_length": 16, "seed": 5},
    "training": {"train_tokens": 1024, "micro_batch_size": 1, "global_batch_size": 2},
    "optimizer": {"learning_rate": 0.01, "weight_decay": 0.05},
    "schedule": {"kind": "wsd", "warmup_tokens": 64, "decay_tokens": 256, "min_learning_rate": 0.001},
    "balance": {"z_loss_coefficient": 1e-4},
}
FP8 = {"compute": "fp8", "fp8": {"recipe": "delayed", "amax_history_len": 16}}


def config(**changes: Any) -> RunConfig:
    """``section__key=value``, where a section may lie in another."""
    values = json.loads(json.dumps(BASE))
    for name, value in changes.items():
        *sections, key = name.split("__")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return parse_config(values, "test")


def unclassified(section: type[RunConfig]) -> list[str]:
    found = []
    for name, _ in settings_of(section):
        try:
            rule_of(name)
        except KeyError:
            found.append(name)
    return found


def test_every_setting_has_one_row() -> None:
    assert unclassified(RunConfig) == [], "say in qwen_moe/runs/identity.py what these settings decide"
    names = [name for name, _ in settings_of()]
    for name in names:
        assert sum(name == row or name.startswith(row + ".") for row in ROWS) == 1, name
    assert [row for row, times in Counter(ROWS).items() if times > 1] == []


def test_no_row_is_of_a_setting_that_is_gone() -> None:
    """A row of a whole section would hide what is added to it: only `model` is one, and it takes new settings as those of
    the trajectory."""
    names = {name for name, _ in settings_of()}
    assert [row for row in ROWS if row not in names] == ["model"]
    assert rule_of("model") == Rule.TRAJECTORY


def test_a_new_section_or_setting_is_noticed() -> None:
    reward = create_model("Reward", __base__=type(config().balance), kind=(str, "likelihood"))
    grown = create_model("Grown", __base__=RunConfig, reward=(reward, reward()), patience=(int, 3))
    assert set(unclassified(grown)) == {
        "patience",
        *(f"reward.{key}" for key in ("kind", *type(config().balance).model_fields)),
    }


@pytest.mark.parametrize("name", EARLIER)
def test_checkpoints_written_before_the_table_are_of_the_same_run(name: str) -> None:
    now = config(**({f"precision__{key}": value for key, value in FP8.items()} if name == "fp8" else {}))
    assert differences(EARLIER[name], now, ON_RESUME) == []
    assert differences(EARLIER[name], now, ON_BRANCH) == []
    assert differences(saved_settings(now), now, ON_RESUME) == []


# (setting, another value, compared on resume, compared between results)
OTHERS = [
    ("seed", 8, True, True),
    ("optimizer__learning_rate", 0.02, True, True),
    ("optimizer__clip_grad_norm", 2.0, True, True),
    ("optimizer__provider", "apex", False, False),
    ("schedule__decay_shape", "sqrt", True, True),
    ("balance__scope", "sequence", True, True),
    ("precision__master", "fp64", True, True),
    ("precision__compile", "never", False, False),
    ("precision__kernels", "torch", False, False),
    ("training__global_batch_size", 4, True, True),
    ("training__train_tokens", 2048, True, True),
    ("training__micro_batch_size", 2, False, True),
    ("training__recompute", "full", False, False),
    ("training__validation_sequences", 3, False, True),
    ("data__seed", 6, True, True),
    ("data__train", [{"prefix": "data/b"}], False, True),
    ("checkpoint__load_from", "elsewhere", False, True),
    ("checkpoint__interval", 3, False, False),
    ("parallel__tp", 2, False, False),
    ("run_dir", "moved", False, False),
]


@pytest.mark.parametrize(("name", "value", "resume", "result"), OTHERS)
def test_what_may_differ(name: str, value: Any, resume: bool, result: bool) -> None:
    before, now = config(), config(**{name: value})
    dotted = name.replace("__", ".")
    found = [str(d) for d in differences(saved_settings(before), now, ON_RESUME)]
    assert [text.partition(" was ")[0] for text in found] == ([dotted] if resume else [])
    found = [d.name for d in differences(before.model_dump(mode="json"), now, OF_RESULTS)]
    assert found == ([dotted] if result else [])


def test_a_difference_says_both_values() -> None:
    (found,) = differences(EARLIER["bf16"], config(balance__z_loss_coefficient=0.5), ON_RESUME)
    assert str(found) == "balance.z_loss_coefficient was 0.0001, is now 0.5"


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default() -> None:
    saved = saved_settings(config())
    del saved["balance"]
    assert [d.name for d in differences(saved, config(), ON_RESUME)] == ["balance.z_loss_coefficient"]
    assert differences(saved, config(balance__z_loss_coefficient=0.0), ON_RESUME) == []
    del saved["optimizer"]["learning_rate"]  # has no default
    assert "optimizer.learning_rate" in [d.name for d in differences(saved, config(), ON_RESUME)]


def test_settings_that_are_no_section_are_no_defaults() -> None:
    saved = saved_settings(config()) | {"precision": 3}
    assert "precision.compute was 3, is now 'bf16'" in map(str, differences(saved, config(), ON_RESUME))


def test_what_a_checkpoint_keeps_is_json_and_leaves_out_places() -> None:
    saved = saved_settings(config(**{f"precision__{key}": value for key, value in FP8.items()}))
    assert json.loads(json.dumps(saved)) == saved
    assert saved["precision"]["fp8"]["recipe"] == "delayed" and "prefix" not in json.dumps(saved)


def test_nothing_else_lists_settings_of_a_run() -> None:
    """No tuple or set of three sections' names outside the table: that was a second list each time. The recipe of a whole
    walk of post-training names the sections that it writes itself; all others come from RunConfig."""
    sections = {name for name, field in RunConfig.model_fields.items()} - {"data", "launch", "parallel"}
    found = []
    for path in sorted((ROOT / "qwen_moe").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                words = {item.value for item in node.elts if isinstance(item, ast.Constant)}
                if len(words & sections) >= 3:
                    found.append(path.relative_to(ROOT).as_posix())
    assert found == ["qwen_moe/posttraining/recipe.py"]


def test_the_flat_form_is_what_the_rules_choose() -> None:
    assert set(flat(config(), {Rule.HORIZON})) == {"training.train_tokens", "data.order_tokens"}
