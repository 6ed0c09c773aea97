"""Any rank of a layout of 1,024 processes builds and runs a step, on shapes alone."""

from typing import Any

import pytest

from qwen_moe.config import PrecisionConfig, RunConfig, parse_config
from qwen_moe.errors import UserError
from qwen_moe.models.flops import count_parameters
from qwen_moe.verify.shapes import ShapeReport, run_shapes

WORLD = 1024


def plus_style(layers: int = 48, **parallel: Any) -> RunConfig:
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"preset": "plus_style", "num_hidden_layers": layers},
            "data": {"train": [{"prefix": "unused"}], "sequence_length": 4096},
            "training": {"train_tokens": 10**9, "micro_batch_size": 1, "global_batch_size": 1024},
            "optimizer": {"learning_rate": 1e-4},
            "parallel": parallel,
        },
        "test",
    )


@pytest.mark.parametrize(
    "parallel",
    [
        {"tp": 4, "pp": 8, "ep": 8},
        {"tp": 8, "pp": 4, "ep": 32, "etp": 2, "schedule": "dualpipev", "layers": 16},
        {"pp": 8, "ep": 64, "schedule": "interleaved_1f1b", "stages_per_rank": 2, "sharding": "zero3"},
        {"tp": 8, "ep": 64, "layers": 3},  # every rank has all layers
        {"tp": 2, "cp": 64, "pp": 4, "ep": 8, "layers": 4, "cp_kind": "all_gather", "cp_ulysses": 2},
        {"cp": 64, "pp": 4, "layers": 4},
        pytest.param({"cp": 64, "cp_kind": "ring", "cp_ulysses": 8, "ep": 64, "layers": 2}, marks=pytest.mark.slow),
        {"cp": 8, "cp_kind": "ulysses", "sharding": "zero3", "layers": 2},
    ],
    ids=str,
)
def test_ranks_of_a_thousand(parallel: dict[str, Any]) -> None:
    """The first, the last and some in between; every tensor of a rank gets a gradient of its shape, or it raises."""
    config = plus_style(**parallel)
    for rank in (0, 517, WORLD - 1):
        report = run_shapes(config, WORLD, rank)
        assert report.gradients == report.parameters and report.optimizer == 2 * report.parameters


def test_the_ranks_of_a_layout_hold_the_model_once() -> None:
    """Summed over all ranks, shards and copies are what the model has and the layout copies."""
    config = plus_style(layers=3, tp=4, pp=2, ep=8)
    total = sum(run_shapes(config, 16, rank).parameters for rank in range(16))
    counts = count_parameters(config.model)
    # What tp ranks hold a copy of: norms, routers and gates of shared experts.
    d, layers, moe = config.model.hidden_size, config.model.num_hidden_layers, len(config.model.moe_layers)
    copied = (2 * layers + 1) * d + moe * config.model.num_experts * d
    copied += moe * d if config.model.shared_expert_intermediate_size else 0
    copied += 2 * layers * config.model.head_dim if config.model.qk_norm else 0
    assert total == counts.total + 3 * copied


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_every_precision_has_shapes(dtype: str) -> None:
    config = plus_style(layers=2, ep=2).model_copy(
        update={"precision": PrecisionConfig(compute=dtype, master="fp64" if dtype == "fp64" else "fp32")}
    )
    report = run_shapes(config, 2, 0)
    assert report.gradients == report.parameters


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="1,000 processes are not a multiple of tp 4 x cp 1 x pp 8 = 32"):
        run_shapes(plus_style(tp=4, pp=8), 1000, 0)


def test_a_shape_that_does_not_fit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_moe.sharding import table

    monkeypatch.setitem(table.SPLITS, "*.self_attn.o_proj.weight", {0: "tp"})
    with pytest.raises((RuntimeError, AssertionError)):
        run_shapes(plus_style(tp=4), WORLD, 3)


def test_the_report_says_which_layers() -> None:
    report: ShapeReport = run_shapes(plus_style(tp=4, pp=8, ep=8), WORLD, 0)
    assert report.layers == [[0, 1, 2, 3, 4, 5]] and report.layout == "tp=4,dp=32,pp=8,ep=8"
