"""What a rank's stages are told when they are built."""

import pytest

from qwen_moe.planning.counting import fake_grids
from qwen_moe.sharding.build import shard_model
from qwen_moe.sharding.layout import run_layout
from tests.small import exact_run, model_values


@pytest.mark.parametrize(
    ("pp", "schedule", "halves"),
    [(1, "zbv", False), (2, "1f1b", False), (2, "interleaved_1f1b", False), (2, "zbv", True), (2, "dualpipev", True)],
)
def test_stages_know_whether_their_backward_comes_in_halves(pp: int, schedule: str, halves: bool) -> None:
    model = model_values(num_hidden_layers=4)
    config = exact_run(model, 8, parallel__pp=pp, parallel__schedule=schedule, training__train_tokens=800)
    layout = run_layout(config, pp)
    with fake_grids(layout.layout, config.model.num_key_value_heads) as grids:
        parts = shard_model(config, layout, grids).parts
    assert [part.backward_in_halves for part in parts] == [halves] * len(parts)
