"""Layouts equal one process; deliberate breaks of each part do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from parallel.mesh import Layout
from qwen_moe.cli import main
from qwen_moe.config import RunConfig
from qwen_moe.verify.case import draw
from qwen_moe.verify.compare import Differences, compare
from qwen_moe.verify.ranks import Report, train_rank
from qwen_moe.verify.reference import train_reference
from tests.distributed import run_distributed
from tests.schedules import needs
from tests.verify.cases import CASES, QWEN3, STEPS, case


def differences(
    config: RunConfig, layout: Layout, rank: Callable[..., Report] = train_rank, *args: Any, probe: bool = False
) -> Differences:
    arguments = args or (STEPS, probe)
    return compare(
        run_distributed(rank, layout.world_size, config, *arguments),
        train_reference(config, layout.dp, STEPS, probe),
    )


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_process(name: str) -> None:
    layout, changes = CASES[name]
    config = case(layout, **changes)
    needs(config.parallel.schedule)
    found = differences(config, layout)
    assert found.equal, found


def test_drops_do_happen_and_are_counted() -> None:
    layout, changes = CASES["capacity with drops"]
    for counts, dropped in train_reference(case(layout, **changes), layout.dp, STEPS).counts:
        assert 0 < dropped < torch.tensor(counts).sum()


@pytest.mark.parametrize("index", [*range(6), *(pytest.param(i, marks=pytest.mark.slow) for i in range(6, 14))])
def test_random_layouts(index: int) -> None:
    config, layout, probe = draw(2026, index, 8)
    found = differences(config, layout, probe=probe)
    assert found.equal, (str(layout), found)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes on a quiet machine
def test_two_hundred_random_layouts() -> None:
    assert main(["verify", "demo", "--fuzz", "200"]) == 0


# Each mistake was shipped by a public trainer or is one step from it: what is broken, and a layout that must show it.
def _averaged(patch: Any) -> None:
    import parallel.data

    patch(parallel.data.FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)
    patch(parallel.data.FSDPModule, "set_force_sum_reduction_for_comms", lambda self, on: None)


def _norm_without_experts(patch: Any) -> None:
    from qwen_moe.sharding.model import ParallelModel
    from qwen_moe.sharding.table import is_expert

    original = ParallelModel.counts_in_norm
    patch(ParallelModel, "counts_in_norm", lambda m, name, stage: not is_expert(name) and original(m, name, stage))


def _norm_counts_copies(patch: Any) -> None:
    from qwen_moe.sharding.model import ParallelModel

    patch(ParallelModel, "counts_in_norm", lambda m, name, stage: True)


def _norm_of_one_rank(patch: Any) -> None:
    from parallel.mesh import Axis
    from qwen_moe.training import step

    original = step.global_norm
    patch(step, "global_norm", lambda p, world, device: original(p, Axis("alone", 1, 0, None), device))


def _experts_times_ep(patch: Any) -> None:
    from qwen_moe.training.step import Trainer

    original = Trainer.finalize_gradients

    def finalize(trainer: Trainer) -> None:
        original(trainer)
        for name, parameter in trainer.model.named_parameters():
            if trainer.model.placements[name].is_expert:
                assert parameter.grad is not None
                parameter.grad *= trainer.grids.layout.ep

    patch(Trainer, "finalize_gradients", finalize)


def _replicas_not_summed(names: str) -> Callable[[Any], None]:
    def mutate(patch: Any) -> None:
        from dataclasses import replace

        from qwen_moe.sharding import parallelize

        original = parallelize.placement

        def placement(name: str, shape: Any, grids: Any) -> Any:
            found = original(name, shape, grids)
            return replace(found, replicas=()) if names in name else found

        patch(parallelize, "placement", placement)

    return mutate


def _auxiliary_times_tp(patch: Any) -> None:
    from qwen_moe.training import step

    original = step.attach_loss
    patch(step, "attach_loss", lambda out, loss: original(out, 2 * loss))


def _auxiliary_detached(patch: Any) -> None:
    from qwen_moe.training import step

    patch(step, "attach_loss", lambda out, loss: out + 0 * loss.detach())


def _auxiliary_over_group(patch: Any) -> None:
    from qwen_moe.objectives.balance import Balancer

    original = Balancer.loss

    def loss(b: Balancer, router: Any, tokens: int, global_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        balance, z_loss = original(b, router, tokens, global_tokens)
        return balance / b.stage.size, z_loss

    patch(Balancer, "loss", loss)


def _counts_of_one_rank(patch: Any) -> None:
    from qwen_moe.objectives import balance

    patch(balance, "all_reduce_sum", lambda tensor, axis: tensor.clone())


def _buffer_over_one_micro_batch(patch: Any) -> None:
    from qwen_moe.objectives.balance import Balancer

    original, end_step = Balancer.loss, Balancer.end_step
    done: dict[int, int] = {}  # micro-batches of this step, by balancer

    def loss(b: Balancer, router: Any, tokens: int, global_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        done[id(b)] = done.get(id(b), 0) + 1
        balance, z_loss = original(b, router, tokens, global_tokens)
        return balance * done[id(b)], z_loss  # counts of all of them over the choices of one

    def end(b: Balancer) -> tuple[torch.Tensor, torch.Tensor]:
        done.pop(id(b), None)
        return end_step(b)

    patch(Balancer, "loss", loss)
    patch(Balancer, "end_step", end)


def _own_tokens(patch: Any) -> None:
    from qwen_moe.training import step

    original = step.all_reduce_sum

    def own(tensor: torch.Tensor, axis: Any) -> torch.Tensor:
        return tensor * axis.size if tensor.ndim == 0 and tensor.dtype == torch.int64 else original(tensor, axis)

    patch(step, "all_reduce_sum", own)


def _tied_not_summed(patch: Any) -> None:
    from qwen_moe.sharding.model import ParallelModel

    patch(ParallelModel, "tied_apart", property(lambda m: False))


def _stages_alike(patch: Any) -> None:
    """Layers named by their place on the rank instead of in the model."""
    import re

    from qwen_moe.sharding import init

    original = init.initial_value

    def value(name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) % 2}", name), *args, **kwargs)

    patch(init, "initial_value", value)


def _experts_alike(patch: Any) -> None:
    """Every ep rank draws its experts as if they were the first."""
    from qwen_moe.sharding import init

    original = init.initial_value

    def value(name: str, shape: Any, seed: int, std: float, experts: Any = None) -> torch.Tensor:
        return original(name, shape, seed, std, experts=None if experts is None else (0, experts[1]))

    patch(init, "initial_value", value)


def _row_parallel_not_summed(patch: Any) -> None:
    from parallel import tensor

    def own_part(x: torch.Tensor, axis: Any) -> torch.Tensor:
        return x.unflatten(1, (axis.size, -1))[:, axis.index]

    patch(tensor, "reduce_scatter_sequence", own_part)


def _bias_on_every_rank(patch: Any) -> None:
    """The bias of a row-parallel layer added before the sum, so once per rank."""
    import torch.nn.functional as F

    from parallel.collectives import reduce_scatter_sequence
    from parallel.tensor import RowParallelLinear

    patch(
        RowParallelLinear,
        "forward",
        lambda m, x: reduce_scatter_sequence(F.linear(x, m.weight, m.bias), m.axis),
    )


def _sequence_gradient_not_summed(patch: Any) -> None:
    from parallel import tensor
    from parallel.collectives import Pending

    def own_part(x: torch.Tensor, axis: Any) -> Pending:
        return Pending(None, x.unflatten(1, (axis.size, -1))[:, axis.index].contiguous())

    patch(tensor, "start_reduce_scatter_sequence", own_part)


def _softmax_of_one_shard(patch: Any) -> None:
    """The vocabulary-parallel softmax normalized by this rank's columns only."""
    import torch.distributed as dist

    from parallel import vocab_head

    class Blind:
        def __getattr__(self, name: str) -> Any:
            return getattr(dist, name)

        @staticmethod
        def all_reduce(x: torch.Tensor, **kwargs: Any) -> None:
            if x.ndim == 2:
                dist.all_reduce(x[1], **kwargs)

    patch(vocab_head, "dist", Blind())


def _rows_in_order_of_arrival(patch: Any) -> None:
    """Experts run on received rows that are not sorted by expert."""
    from qwen_moe.sharding import dispatcher

    patch(dispatcher, "reorder", lambda rows, index, inverse: rows)


def _capacity_of_own_part(patch: Any) -> None:
    """Every tp rank counts capacity from the beginning of its own part of the sequence."""
    from parallel.sequence import SequenceShard

    patch(SequenceShard, "earlier", lambda shard, counts: torch.zeros_like(counts))


def _capacity(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Every expert serves ``change(capacity)`` choices of a sequence."""

    def mutate(patch: Any) -> None:
        from qwen_moe.models.moe import block

        original = block.within_capacity
        patch(
            block, "within_capacity", lambda i, experts, capacity, *rest: original(i, experts, change(capacity), *rest)
        )

    return mutate


def _dropping_in_evaluation(patch: Any) -> None:
    """Modules stay in training mode while they evaluate."""
    from qwen_moe.sharding.model import TrainingPart

    patch(TrainingPart, "eval", lambda part: part)


def _evaluation_over_dp(patch: Any) -> None:
    """The evaluated loss is summed over dp, of which most stages and tp ranks have other parts."""
    from qwen_moe.training import step

    evaluate, total = step.Trainer.evaluate, step.all_reduce_sum

    def broken(trainer: Any, *arguments: Any) -> float:
        patch(step, "all_reduce_sum", lambda x, axis: total(x, trainer.grids.dp))
        return evaluate(trainer, *arguments)

    patch(step.Trainer, "evaluate", broken)


def _norms_of_ones(patch: Any) -> None:
    """A rank's norms are not those that were drawn, loaded or trained, but ones."""
    from qwen_moe.models.norm import RMSNorm

    original = RMSNorm.forward

    def forward(norm: Any, x: torch.Tensor) -> torch.Tensor:
        return original(norm, x) / norm.weight

    patch(RMSNorm, "forward", forward)


TP, EP, PP = Layout(tp=2, dp=2), Layout(dp=4, ep=2), Layout(pp=2, dp=2)
MISTAKES: dict[str, tuple[Callable[[Any], None], Layout, dict[str, Any]]] = {
    "gradients averaged over ranks": (_averaged, EP, {}),
    "norm without experts": (_norm_without_experts, EP, {}),
    "norm counts tp copies and both tied embeddings": (_norm_counts_copies, Layout(tp=2, pp=2), {}),
    "norm of one rank": (_norm_of_one_rank, EP, {}),
    "expert gradients times ep": (_experts_times_ep, EP, {}),
    "router gradients not summed over tp": (_replicas_not_summed("mlp.gate.weight"), TP, {}),
    "norm weights' gradients not summed over tp": (_replicas_not_summed("input_layernorm"), TP, {}),
    "QK-norm's gradients not summed over tp": (_replicas_not_summed("k_norm"), TP, QWEN3),
    "KV heads' gradients not summed over their copies": (_replicas_not_summed("k_proj"), Layout(tp=4), {}),
    "shared expert's gate not summed over tp": (_replicas_not_summed("shared_expert_gate"), TP, {}),
    "auxiliary gradient scaled by tp": (_auxiliary_times_tp, TP, {}),
    "auxiliary loss detached": (_auxiliary_detached, TP, {}),
    "auxiliary loss divided by the group's size again": (_auxiliary_over_group, TP, {}),
    "balance counts of one rank": (_counts_of_one_rank, TP, {}),
    "accumulated counts over one micro-batch's tokens": (_buffer_over_one_micro_batch, EP, {}),
    "every rank divides by its own tokens": (_own_tokens, EP, {}),
    "tied embeddings not summed over stages": (_tied_not_summed, PP, {}),
    "layers of stages initialized alike": (_stages_alike, PP, {}),
    "experts of ep ranks initialized alike": (_experts_alike, EP, {}),
    "row-parallel sum dropped": (_row_parallel_not_summed, TP, {}),
    "row-parallel bias on every rank": (_bias_on_every_rank, TP, QWEN3 | {"model__qkv_bias": True}),
    "column-parallel input gradient not summed": (_sequence_gradient_not_summed, TP, {}),
    "softmax over one shard of the vocabulary": (_softmax_of_one_shard, TP, {}),
    "received rows not sorted by expert": (_rows_in_order_of_arrival, EP, {}),
    "capacity counted per tp rank": (_capacity_of_own_part, TP, {"balance__capacity_factor": 0.75}),
    "a choice too many is served": (_capacity(lambda capacity: capacity + 1), EP, {"balance__capacity_factor": 0.75}),
    "capacity rounded down": (_capacity(lambda capacity: capacity - 1), EP, {"balance__capacity_factor": 0.7}),
    "choices dropped in evaluation": (_dropping_in_evaluation, EP, {"balance__capacity_factor": 0.75}),
    "evaluated loss summed over dp alone": (_evaluation_over_dp, Layout(tp=2, pp=2), {}),
    "norms of ones": (_norms_of_ones, TP, {}),
}  # fmt: skip


def _broken(config: RunConfig, mistake: str) -> Report:
    MISTAKES[mistake][0](setattr)
    return train_rank(config, STEPS)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str) -> None:
    _, layout, changes = MISTAKES[mistake]
    config = case(layout, **changes)
    found = differences(config, layout, _broken, mistake)
    assert not found.equal and (found.wrong or found.largest > 1e-6), found
