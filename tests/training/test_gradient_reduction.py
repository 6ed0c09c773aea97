"""Gradients reduced after every micro-batch: how often, what a rank then holds, and that bfloat16 runs learn the same."""

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.mesh import Layout
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.planning.layouts import Choice
from qwen_moe.planning.live_bytes import LiveBytes
from qwen_moe.planning.memory import MemoryModel
from qwen_moe.sharding.layout import run_layout
from qwen_moe.verify.ranks import Report, make_trainer, micro_batches, record_step, train_rank
from tests.distributed import run_distributed
from tests.schedules import needs
from tests.verify.cases import case

BF16 = {"precision__compute": "bf16", "precision__master": "fp32", "balance__bias_update_rate": 0.0}
SCHEDULES = ["1f1b", "interleaved_1f1b", "zbv", "dualpipev"]


class Reductions(TorchDispatchMode):
    """Counts reduce-scatters of one tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name == "c10d::_reduce_scatter_base_"
        return func(*args, **(kwargs or {}))


def _reductions(config: RunConfig) -> tuple[int, int]:
    """(reduce-scatters of a step's backward, micro-batches)."""
    trainer = make_trainer(config)
    batches = micro_batches(trainer, 0)
    trainer.begin_step(1, 1)
    with Reductions() as mode:
        trainer.engine.forward_backward(batches)
    return mode.count, len(batches)


@pytest.mark.parametrize("schedule", ["", *SCHEDULES])
def test_every_micro_batch_is_reduced(schedule: str) -> None:
    layout, changes = Layout(dp=2, pp=2 if schedule else 1), {"parallel__schedule": schedule} if schedule else {}
    needs(schedule or "1f1b")
    counts = {
        reduction: run_distributed(
            _reductions, layout.world_size, case(layout, parallel__gradient_reduction=reduction, **changes)
        )
        for reduction in ("last", "every")
    }
    for (once, _), (often, number) in zip(counts["last"], counts["every"], strict=True):
        assert number >= 4 if schedule else 2
        assert once > 0 and often == number * once


def _peak(config: RunConfig) -> int:
    """Most bytes that a second step's forward and backward allocate."""
    trainer = make_trainer(config)
    record_step(trainer, Report(), 0)
    batches = micro_batches(trainer, 1)
    trainer.begin_step(1, 1)
    with LiveBytes() as live:
        trainer.engine.forward_backward(batches)
    return live.peak


LARGE = {
    "model__hidden_size": 64,
    "model__moe_intermediate_size": 64,
    "model__vocab_size": 64,
    "model__num_experts": 16,
    "model__num_hidden_layers": 8,
    "training__micro_batch_size": 1,
}


@pytest.mark.parametrize("schedule", ["", *(pytest.param(one, marks=pytest.mark.slow) for one in ("1f1b", "zbv"))])
def test_a_rank_holds_less_by_what_is_planned(schedule: str) -> None:
    """Real tensors on real ranks; the weights of the model are large beside its activations. A pipeline that reduces at the
    end has the buffers of the reduction when it has no activations any more; this is a part of what it holds less then."""
    needs(schedule or "1f1b")
    pp = 2 if schedule else 1
    layout = Layout(dp=4, pp=pp)
    batch = {"training__global_batch_size": 16} | ({"parallel__schedule": schedule} if schedule else {})
    peaks, planned = {}, {}
    choice = Choice(pp=pp, schedule=schedule or "1f1b", per_rank=2 if schedule == "zbv" else 1)
    for reduction in ("last", "every"):
        config = case(layout, parallel__gradient_reduction=reduction, **BF16, **LARGE, **batch)
        peaks[reduction] = max(run_distributed(_peak, layout.world_size, config))
        choice = choice.changed(gradient_reduction=reduction)
        planned[reduction] = MemoryModel(config).fullest(choice, run_layout(config, layout.world_size))
    saved = planned["last"].gradients - planned["every"].gradients
    found = peaks["last"] - peaks["every"]
    print(f"{schedule or 'no pipeline'}: peaks {peaks}, planned to differ by {saved:.0f}")
    assert found > 0.2 * peaks["last"]
    if schedule:
        assert saved - planned["every"].buffers <= found <= 1.02 * saved
    else:
        assert found == pytest.approx(saved, rel=0.02)


def _figures(config: RunConfig) -> list[dict[str, float]]:
    return train_rank(config).figures


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_runs_in_bf16_learn_the_same(schedule: str) -> None:
    """FSDP keeps and converts gradients in two dtypes; where backward is split, their hooks come at other times."""
    needs(schedule)
    layout = Layout(dp=2, pp=2)
    found = [
        run_distributed(
            _figures,
            layout.world_size,
            case(layout, parallel__schedule=schedule, parallel__gradient_reduction=reduction, **BF16),
        )[0]
        for reduction in ("last", "every")
    ]
    for last, every in zip(*found, strict=True):
        assert every["loss"] == pytest.approx(last["loss"], rel=1e-3)
        assert every["gradient norm"] == pytest.approx(last["gradient norm"], rel=0.01)


def test_gradients_are_not_added_up_in_bf16() -> None:
    with pytest.raises(UserError, match=r"precision.master.*gradient_reduction last"):
        case(
            Layout(dp=2),
            parallel__gradient_reduction="every",
            precision__compute="bf16",
            precision__master="bf16",
        )
