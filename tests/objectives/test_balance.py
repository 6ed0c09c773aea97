"""Balancing losses against transformers, a plain loop and known values; every scope adds up over ranks and micro-batches."""

from typing import Any

import pytest
import torch
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from parallel.sequence import SequenceShard
from qwen_moe.config import BalanceConfig
from qwen_moe.models.moe.router import RouterStatistics
from qwen_moe.objectives.balance import Balancer, maximum_violation, update_expert_bias
from tests.distributed import run_distributed
from tests.models.hf_reference import true_float64

LAYERS, BATCH, SEQ, EXPERTS, TOP_K = 3, 4, 10, 6, 2
TOKENS = BATCH * SEQ


def logits() -> torch.Tensor:
    """[L, B, S, E] float64"""
    return 2 * torch.randn(LAYERS, BATCH, SEQ, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def statistics(values: torch.Tensor) -> RouterStatistics:
    probs = values.softmax(-1)
    chosen = torch.nn.functional.one_hot(probs.topk(TOP_K).indices, EXPERTS).sum((-2, -3))
    dropped = torch.zeros(chosen.shape[:2], dtype=torch.int64)
    return RouterStatistics(probs.sum(2), chosen, values.logsumexp(-1).square().sum(2), dropped)


def evaluate(scope: str, rank_count: int, micro_batches: int) -> dict[str, Any]:
    """This rank's share of the losses and of their gradient by the logits."""
    import torch.distributed as dist

    from parallel.mesh import Grids, Layout

    grids = Grids(Layout(dp=rank_count), "cpu")
    balancer = Balancer(BalanceConfig(scope=scope), EXPERTS, TOP_K, SequenceShard.of(grids), grids.stage)
    values = logits().requires_grad_()
    size = BATCH // (rank_count * micro_batches)
    total = z_total = 0.0
    for m in range(micro_batches):
        first = (m * rank_count + dist.get_rank()) * size
        loss, z_loss = balancer.loss(statistics(values[:, first : first + size]), size * SEQ, TOKENS)
        loss.backward()
        total, z_total = total + loss.item(), z_total + z_loss.item()
    return {"loss": total, "z": z_total, "grad": values.grad, "counts": balancer.end_step()[0]}


def combined(scope: str, rank_count: int = 1, micro_batches: int = 1) -> dict[str, Any]:
    parts = run_distributed(evaluate, rank_count, scope, rank_count, micro_batches)
    return {key: sum(part[key] for part in parts) for key in ("loss", "z", "grad", "counts")}


def test_huggingface_scope_is_transformers_loss_and_gradient() -> None:
    values = logits().requires_grad_()
    with true_float64():
        expected = load_balancing_loss_func(tuple(layer.flatten(0, 1) for layer in values), EXPERTS, TOP_K)
    expected.backward()
    got = combined("huggingface")
    assert got["loss"] == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(got["grad"], values.grad, rtol=1e-10, atol=1e-15)


def plain_loss(values: torch.Tensor) -> float:
    """E * sum_e f_e P_e of one layer's [T, E] logits, token by token."""
    tokens = values.shape[0]
    share, probability = [0.0] * EXPERTS, [0.0] * EXPERTS
    for token in values.softmax(-1):
        for e in token.topk(TOP_K).indices.tolist():
            share[e] += 1 / (tokens * TOP_K)
        for e in range(EXPERTS):
            probability[e] += token[e].item() / tokens
    return EXPERTS * sum(f * p for f, p in zip(share, probability))


def test_global_batch_scope_sees_all_ranks() -> None:
    expected = sum(plain_loss(layer.flatten(0, 1)) for layer in logits())
    whole, split = combined("global_batch"), combined("global_batch", rank_count=4)
    assert whole["loss"] == pytest.approx(expected, rel=1e-12)
    assert split["loss"] == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(split["grad"], whole["grad"], rtol=1e-12, atol=1e-15)


def test_sequence_scope_is_the_mean_over_sequences_however_they_are_cut() -> None:
    expected = sum(plain_loss(sequence) for layer in logits() for sequence in layer) / BATCH
    for ranks, micro_batches in ((1, 1), (2, 2), (1, 4)):
        got = combined("sequence", ranks, micro_batches)
        assert got["loss"] == pytest.approx(expected, rel=1e-12)


def test_micro_batch_scope_is_the_mean_over_micro_batches() -> None:
    values = logits()
    expected = (
        sum(plain_loss(values[layer, half : half + 2].flatten(0, 1)) for layer in range(LAYERS) for half in (0, 2)) / 2
    )
    assert combined("micro_batch", rank_count=2)["loss"] == pytest.approx(expected, rel=1e-12)
    assert combined("micro_batch", micro_batches=2)["loss"] == pytest.approx(expected, rel=1e-12)


def test_z_loss_and_counts_do_not_depend_on_the_cut() -> None:
    values = logits()
    expected = values.logsumexp(-1).square().sum().item() / TOKENS
    for scope, ranks, micro_batches in (("none", 2, 1), ("global_batch", 2, 2), ("sequence", 1, 4)):
        got = combined(scope, ranks, micro_batches)
        assert got["z"] == pytest.approx(expected, rel=1e-12)
        assert torch.equal(got["counts"], statistics(values).counts.sum(1))


def test_perfect_balance_costs_one_per_layer() -> None:
    from parallel.mesh import Axis

    router = RouterStatistics(
        prob_sum=torch.full((LAYERS, 1, EXPERTS), 12 / EXPERTS, dtype=torch.float64),
        counts=torch.full((LAYERS, 1, EXPERTS), 12 * TOP_K // EXPERTS),
        z_sum=torch.zeros(LAYERS, 1),
        dropped=torch.zeros(LAYERS, 1, dtype=torch.int64),
    )
    alone = Axis("tp", 1, 0, None)
    loss, _ = Balancer(BalanceConfig(scope="sequence"), EXPERTS, TOP_K, SequenceShard(), alone).loss(router, 12, 12)
    assert loss.item() == pytest.approx(LAYERS)


def test_bias_update_and_violation() -> None:
    counts = torch.tensor([[8, 0, 4], [4, 4, 4]])
    biases = [torch.zeros(3), torch.ones(3)]
    update_expert_bias(biases, counts, 0.5)
    assert biases[0].tolist() == [-0.5, 0.5, 0.0] and biases[1].tolist() == [1.0, 1.0, 1.0]
    assert maximum_violation(counts) == [1.0, 0.0]


def test_the_bias_sees_differences_that_half_precision_does_not() -> None:
    """Counts kept in bfloat16 are the same from 256 on; a trainer that did so never moved these biases."""
    counts = torch.tensor([[100_001, 100_000, 99_999]])
    bias = [torch.zeros(3)]
    update_expert_bias(bias, counts, 0.5)
    assert counts.bfloat16().unique().numel() == 1
    assert bias[0].tolist() == [-0.5, 0.0, 0.5]
