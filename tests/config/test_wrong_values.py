"""Messages about wrong values are in plain words: none of Python's, for any field of any recipe."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from qwen_moe.config import RunConfig, load_config
from qwen_moe.curation.recipe import CurateConfig
from qwen_moe.errors import UserError, wrong
from qwen_moe.posttraining.recipe import WalkConfig

GRPO = Path(__file__).parents[2] / "recipes" / "grpo_demo.yaml"
PYTHON = re.compile(r"tuple|dictionar|instance|pathlib|bool|\bclass\b|\bstr\b|string|\bint\b|integer|float|unable|None")
VALUES: list[Any] = [7, 1.5, True, None, "many", [5], {"a": 1}, [[{}]], {"a": [None]}]


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rollout.rewards=exact", "rollout.rewards = 'exact': Input should be a list, as in [exact]"),
        ("rollout.queries=tasks:reverse:8", "Input should be a list, as in [tasks:reverse:8]"),
        ("rollout={samples: many}", "rollout.samples = 'many': Input should be a whole number"),
        ("rollout.samples=8.5", "rollout.samples = 8.5: Input should be a whole number"),
        ("rollout.samples=null", "rollout.samples = null: Input should be a whole number"),
        ("rollout=5", "rollout = 5: Input should be a section, as in {key: value}"),
        ("data.train=[5]", "data.train.0 = 5: Input should be a section"),
        ("data.respect_document_boundaries=maybe", "= 'maybe': Input should be true or false"),
        ("optimizer.learning_rate=abc", "= 'abc': Input should be a number"),
        ("run_dir=5", "run_dir = 5: Input should be a path (a number in quotation marks)"),
    ],
)
def test_a_recipe_says_what_it_expects(override: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(GRPO, [override])
    assert part in str(error.value)


@pytest.mark.parametrize("recipe", [RunConfig, CurateConfig, WalkConfig])
def test_no_field_of_a_recipe_answers_in_python(recipe: type[BaseModel]) -> None:
    """By the schema, for fields that nobody has thought of yet too."""
    seen = 0

    def sections(kind: Any) -> list[type[BaseModel]]:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return [kind]
        return [found for inner in get_args(kind) for found in sections(inner)]

    def check(section: type[BaseModel]) -> None:
        nonlocal seen
        for name, field in section.model_fields.items():
            for inner in sections(field.annotation):
                check(inner)
            for value in VALUES:
                try:
                    section.__pydantic_validator__.validate_assignment(section.model_construct(), name, value)
                except ValidationError as error:
                    for item in error.errors():
                        seen += 1
                        if item["type"] != "value_error":  # our own sentences
                            assert not PYTHON.search(wrong(item)), (
                                f"{section.__name__}.{name} = {value!r}: {wrong(item)}"
                            )
                except (TypeError, AttributeError):  # a check of the whole section, which has no other fields here
                    pass

    check(recipe)
    assert seen > 20
