"""What a rank's stages are told when they are built."""

from typing import Any

import pytest
import torch

from parallel.kernels import transformer_engine
from parallel.kernels.torch_fp8 import TorchFp8
from qwen_moe.errors import UserError
from qwen_moe.planning.counting import fake_grids
from qwen_moe.planning.layouts import Choice, legal
from qwen_moe.sharding.build import shard_model
from qwen_moe.sharding.kernels import choose_kernels
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


def _stages(schedule: str, kernels: str, **precision: Any) -> Any:
    model, precision = model_values(num_hidden_layers=4), {"master": "fp32", "kernels": kernels} | precision
    parallel = {"pp": 2, "schedule": schedule}
    return exact_run(model, 8, parallel=parallel, precision=precision, training__train_tokens=800)


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
@pytest.mark.parametrize("compute", ["bf16", "fp8"])
def test_transformer_engine_is_refused_where_backward_comes_in_halves(schedule: str, compute: str) -> None:
    """Its layers run backward once: they free what they have saved. A plan proposes no such layout."""
    with pytest.raises(UserError, match=f"kernels te cannot be combined with parallel.schedule {schedule}"):
        _stages(schedule, "te", compute=compute)
    choice = Choice(pp=2, schedule=schedule, per_rank=2, precision=compute)
    refused = legal(_stages("1f1b", "te", compute=compute), choice, 2)
    assert isinstance(refused, str) and "kernels te" in refused


def test_where_the_kernels_are_left_open_torch_runs_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transformer_engine, "load_transformer_engine", lambda: pytest.fail("it was tried"))
    config = _stages("zbv", "auto", compute="fp8")
    with fake_grids(run_layout(config, 2).layout, config.model.num_key_value_heads) as grids:
        kernels = choose_kernels(config, grids)
    assert isinstance(kernels, TorchFp8) and "schedule zbv runs backward in two halves" in kernels.name
