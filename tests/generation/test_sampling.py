"""What is drawn where some of the logits are no numbers; `test_text` compares with transformers."""

from typing import Any

import pytest
import torch

from qwen_moe.errors import UserError
from qwen_moe.generation.engine import Engine
from qwen_moe.generation.runner import LocalRunner
from qwen_moe.generation.sampling import Sampling, draw
from tests.generation.conftest import small_config
from tests.models.hf_reference import draw_weights


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "values",
    [{"temperature": 0.0}, {}, {"temperature": 1.0, "top_p": 1.0}, {"top_p": 1.0, "min_p": 0.1}, {"top_k": 3}],
    ids=str,
)
def test_outputs_that_are_no_numbers_are_named(values: dict[str, Any], wrong: float) -> None:
    model = draw_weights(small_config(), 4, torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(wrong)
    with pytest.raises(UserError, match="outputs are NaN or infinite"):
        Engine(LocalRunner(model), model.config).generate([[0, 0, 0]], Sampling(max_new_tokens=2, **values))


def test_one_row_without_numbers_leaves_the_others_alone() -> None:
    """Such as that of an answer that has ended."""
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(1))
    damaged = logits.clone()
    damaged[1, 7] = float("nan")
    chance = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for values in ({"temperature": 0.0}, {"top_p": 1.0}, {"top_p": 0.3}, {"top_k": 4}):
        sampling = Sampling(**values)
        (tokens, log_probs), (found, of_found) = (draw(x, sampling, chance) for x in (logits, damaged))
        assert found[[0, 2]].equal(tokens[[0, 2]]) and of_found[[0, 2]].equal(log_probs[[0, 2]])
        assert bool(of_found[1].isnan()) and 0 <= int(found[1]) < 2000
