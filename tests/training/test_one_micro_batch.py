"""zbv splits backward in two: with FSDP in mixed precision and one micro-batch, gradients are still reduced in one dtype."""

from typing import Any

import pytest

from parallel.mesh import Layout
from qwen_moe.config import RunConfig
from qwen_moe.verify.ranks import Report, train_rank
from tests.distributed import run_distributed
from tests.schedules import needs
from tests.verify.cases import case


def _figures(config: RunConfig) -> list[dict[str, float]]:
    report: Report = train_rank(config)
    return report.figures


def figures(layout: Layout, **changes: Any) -> list[dict[str, float]]:
    settings = {"precision__compute": "bf16", "precision__master": "fp32", "balance__bias_update_rate": 0.0}
    settings |= {"training__global_batch_size": 2, "training__micro_batch_size": 1}
    return run_distributed(_figures, layout.world_size, case(layout, **settings | changes))[0]


def test_one_micro_batch_in_bf16_is_the_same_step_as_without_a_pipeline() -> None:
    needs("zbv")
    plain = figures(Layout(dp=2))
    found = figures(Layout(dp=2, pp=2), parallel__schedule="zbv")
    assert found[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-3)
    assert found[0]["gradient norm"] == pytest.approx(plain[0]["gradient norm"], rel=0.01)
    assert found[1]["loss"] == pytest.approx(plain[1]["loss"], rel=0.01)
