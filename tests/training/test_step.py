"""A training step on several data-parallel ranks and micro-batches against plain autograd in one process, float64."""

import functools
from typing import Any

import pytest
import torch

from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.verify.case import global_batch
from qwen_moe.verify.compare import compare
from qwen_moe.verify.ranks import make_trainer, train_rank
from qwen_moe.verify.reference import Trajectory, reference_model, train_reference
from tests.distributed import run_distributed
from tests.small import exact_run, model_values
from tests.verify.cases import STEPS

ROWS, SEQ = 8, 12
MOST_STEPS = 4  # that tests with `make_config` take


def make_config(**changes: Any) -> RunConfig:
    model = model_values(
        num_hidden_layers=3, norm_topk_prob=True, mlp_only_layers=[1], tie_word_embeddings=True, initializer_range=0.2
    )
    return exact_run(model, SEQ, **{"training__train_tokens": MOST_STEPS * ROWS * SEQ} | changes)


@functools.cache
def whole_batches(scope: str) -> Trajectory:
    """The reference on one rank that takes each global batch as one micro-batch.

    Global-batch balance over one buffer needs the counts of all micro-batches that came before, in the order in which
    the ranks do them; with one micro-batch per rank that is all of them, and so the reference sees the batch whole.
    """
    return train_reference(make_config(balance__scope=scope, training__micro_batch_size=ROWS), 1, STEPS)


@pytest.mark.parametrize("scope", ["global_batch", "sequence"])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (2, 4), (4, 2)])
def test_ranks_equal_plain_autograd(scope: str, world_size: int, micro_batch_size: int) -> None:
    config = make_config(balance__scope=scope, training__micro_batch_size=micro_batch_size)
    found = compare(run_distributed(train_rank, world_size, config, STEPS), whole_batches(scope))
    assert found.equal, found


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_micro_batches_and_sharding_do_not_change_the_step(sharding: str, recompute: str) -> None:
    """`sequence` scope does not depend on how the batch is cut, so accumulation must not show at all."""
    config = make_config(
        balance__scope="sequence",
        training__micro_batch_size=1,
        training__recompute=recompute,
        parallel__sharding=sharding,
    )
    found = compare(run_distributed(train_rank, 2, config, STEPS), whole_batches("sequence"))
    assert found.equal, found


def test_global_batch_scope_counts_up_to_the_current_micro_batch() -> None:
    """Two micro-batches on one rank: the second's f comes from both, the first's from itself (arXiv 2501.11873)."""
    config = make_config(training__micro_batch_size=4, optimizer__clip_grad_norm=0.0)
    (report,) = run_distributed(train_rank, 1, config, 1)
    model = reference_model(config)
    batch = global_batch(config, 0)
    experts, top_k, tokens = 6, 2, ROWS * SEQ
    expected, counts = 0.0, torch.zeros(2, experts, dtype=torch.float64)
    for half in range(2):
        _, router = model.hidden_states(batch["input_ids"][4 * half : 4 * half + 4])
        counts += router.counts.sum(1)
        share = counts / ((half + 1) * 4 * SEQ * top_k)
        expected += experts * (share * router.prob_sum.sum(1)).sum().item() / tokens
    assert report.figures[0]["balance loss"] == pytest.approx(expected / 2, rel=1e-12)


def test_expert_bias_moves_against_the_load_and_alike_on_all_ranks() -> None:
    config = make_config(balance__scope="none", balance__bias_update_rate=0.25)
    reports = run_distributed(train_rank, 2, config, 1)
    counts = torch.tensor(reports[0].counts[0][0]).double()
    first = [b for name, b in reference_model(config).named_buffers() if name.endswith("expert_bias")]
    expected = torch.stack(first) + 0.25 * (counts.mean(1, keepdim=True) - counts).sign().float()
    for report in reports:
        assert torch.equal(torch.stack(list(report.biases.values())), expected)


def test_gradients_of_bf16_are_summed_over_ranks_in_float32() -> None:
    """Each rank's gradients are bf16 numbers. A sum of two mostly is not, unless it was rounded to one."""
    changes = {"precision__compute": "bf16", "precision__master": "fp32", "training__micro_batch_size": 1}
    config = make_config(balance__scope="none", training__global_batch_size=2, **changes)
    for report in run_distributed(train_rank, 2, config, 1):
        values = torch.cat([held.flatten() for _, _, held in report.gradients[0]])
        assert values.dtype == torch.float32
        assert float((values.bfloat16().float() != values).float().mean()) > 0.3


def _nan_step(config: RunConfig) -> tuple[str, bool]:
    from qwen_moe.training.step import BadStep

    trainer = make_trainer(config)
    model = trainer.model
    with torch.no_grad():
        model.parts[0].model.norm.weight.to_local().fill_(float("nan"))
    before = {name: p.to_local().clone() for name, p in model.named_parameters()}
    try:
        trainer.step(3, [global_batch(config, 0)])
    except BadStep as error:
        same = all(
            torch.equal(before[n], p.to_local()) for n, p in model.named_parameters() if n != "model.norm.weight"
        )
        return str(error), same
    return "", False


def test_a_nan_loss_stops_before_the_update() -> None:
    for message, unchanged in run_distributed(_nan_step, 2, make_config()):
        assert "step 3" in message and "nan" in message and "learning_rate" in message
        assert unchanged


def _after_an_abandoned_step(config: RunConfig) -> tuple[Any, Any]:
    """(what a step reports and the weights after it, the same after a step before it was abandoned)"""
    found = []
    for abandoned in (False, True):
        trainer = make_trainer(config)
        if abandoned:
            batch = global_batch(config, 1)
            trainer.forward_backward([batch], batch["labels"].numel())
            trainer.abandon_step()
        result = trainer.step(0, [global_batch(config, 0)])
        counts = None if result.expert_counts is None else result.expert_counts.tolist()
        weights = {name: p.to_local().clone() for name, p in trainer.model.named_parameters()}
        found.append(((result.loss, result.grad_norm, counts), weights))
    return found[0], found[1]


def test_an_abandoned_step_leaves_nothing_behind() -> None:
    for (figures, weights), (others, other_weights) in run_distributed(_after_an_abandoned_step, 2, make_config()):
        assert figures[2] is not None and others == figures
        assert all(torch.equal(other_weights[name], weight) for name, weight in weights.items())


def unjudged(config: RunConfig) -> tuple[bool, str]:
    """Whether a step whose pairs nobody has judged leaves the weights as they were, and what an evaluation says."""
    trainer = make_trainer(config)
    batch = global_batch(config, 0)
    batch["preferences"] = torch.zeros_like(batch["preferences"])
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    result = trainer.step(0, [batch])
    same = all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True)) and result.count == 0
    try:
        trainer.evaluate([batch])
    except UserError as error:
        return same, str(error)
    return same, ""


def test_pairs_that_nobody_has_judged_change_nothing_and_cannot_be_evaluated() -> None:
    model = model_values("qwen2", criteria=["preference"])
    config = exact_run(model, 24, objective={"kind": "reward_model"}, training__train_tokens=MOST_STEPS * ROWS * 24)
    ((same, said),) = run_distributed(unjudged, 1, config)
    assert same and "nothing that objective.kind reward_model learns from" in said
