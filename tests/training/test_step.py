"""A training step on several data-parallel ranks and micro-batches against plain autograd in one process, float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qwen_moe.config import RunConfig, parse_config
from qwen_moe.models.init import build_model
from tests.distributed import run_distributed

VOCAB, SEQ = 61, 12


def make_config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "run_dir": "unused",
        "model": {
            "family": "qwen2_moe",
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 12,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
        },
        "data": {"train": [{"prefix": "unused"}], "sequence_length": SEQ},
        "training": {"train_tokens": 3 * 8 * SEQ, "micro_batch_size": 2, "global_batch_size": 8},
        # Where a gradient is near 0, AdamW's first update multiplies its rounding by learning_rate / eps: 1e6 at the
        # default eps, which would turn 1e-16 into 1e-10 and say nothing of the layout.
        "optimizer": {"learning_rate": 1e-2, "clip_grad_norm": 0.5, "eps": 1e-5},
        "balance": {"scope": "global_batch", "coefficient": 0.1, "z_loss_coefficient": 0.01},
        "precision": {"compute": "fp64", "master": "fp64"},
        "checkpoint": {"export_hf": False},
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        values.setdefault(section, {})[key] = value
    return parse_config(values, "test")


def global_batch(step: int) -> dict[str, torch.Tensor]:
    """Tokens with an uneven number of uncounted labels per sequence, so that means and sums differ."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCAB, (8, SEQ + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(8):
        labels[row, : row % 5] = -100
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": labels}


def run_steps(config: RunConfig, steps: int = 3) -> dict[str, Any]:
    """Train on this rank's share of each global batch; parameters after the steps and every step's figures."""
    import torch.distributed as dist

    from qwen_moe.verify.ranks import make_trainer

    trainer = make_trainer(config)
    rank, world, size = dist.get_rank(), dist.get_world_size(), config.training.micro_batch_size
    results = []
    for step in range(steps):
        batch = global_batch(step)
        share = 8 // world
        mine = {name: tensor[rank * share : (rank + 1) * share] for name, tensor in batch.items()}
        micro_batches = [
            {name: tensor[start : start + size] for name, tensor in mine.items()} for start in range(0, share, size)
        ]
        result = trainer.step(step, micro_batches)
        results.append((result.loss, *result.metrics.values(), result.grad_norm, result.expert_counts.tolist()))
    parameters = {name: p.full_tensor().detach().clone() for name, p in trainer.model.named_parameters()}
    biases = [router.expert_bias.clone() for _, router in trainer.routers()]
    return {"results": results, "parameters": parameters, "biases": biases}


def reference_steps(config: RunConfig, steps: int = 3) -> dict[str, Any]:
    """The same in one process with torch's own cross-entropy, AdamW and clipping, the losses written out as means.

    Global-batch balance over one buffer needs the counts of all micro-batches that came before, in the order in which
    the ranks do them; with one micro-batch per rank that is all of them, and so the reference sees the batch whole.
    """
    model = build_model(config.model, config.seed, torch.float64)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if p.ndim > 1], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for n, p in named.items() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-5)
    results = []
    experts, top_k = config.model.num_experts, config.model.num_experts_per_tok
    for step in range(steps):
        batch = global_batch(step)
        hidden, router = model.hidden_states(batch["input_ids"])
        loss = F.cross_entropy((hidden @ model.head_weight.T).flatten(0, 1), batch["labels"].flatten())
        tokens = batch["labels"].numel()
        balance = z = torch.zeros((), dtype=torch.float64)
        for layer in range(len(config.model.moe_layers)):
            if config.balance.scope == "sequence":
                share = router.counts[layer].double() / (SEQ * top_k)
                probability = router.prob_sum[layer] / SEQ
                balance = balance + experts * (share * probability).sum(-1).mean()
            else:
                share = router.counts[layer].sum(0).double() / (tokens * top_k)
                balance = balance + experts * (share * router.prob_sum[layer].sum(0) / tokens).sum()
            z = z + router.z_sum[layer].sum() / tokens
        total = loss + config.balance.coefficient * balance + config.balance.z_loss_coefficient * z
        optimizer.zero_grad()
        total.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        # Not torch's clip_grad_norm_, which divides by norm + 1e-6.
        for p in model.parameters():
            p.grad *= min(1.0, config.optimizer.clip_grad_norm / norm.item())
        # The schedule of the default config: cosine over 3 steps without warm-up.
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / 3))
        optimizer.step()
        layers = len(config.model.moe_layers)
        results.append(
            (loss.item(), balance.item() / layers, z.item() / layers, norm.item(), router.counts.sum(1).tolist())
        )
    return {"results": results, "parameters": {n: p.detach() for n, p in named.items()}}


def assert_equal_runs(run: dict[str, Any], reference: dict[str, Any], tolerance: float = 1e-10) -> None:
    for got, expected in zip(run["results"], reference["results"], strict=True):
        assert got[:4] == pytest.approx(expected[:4], rel=tolerance)
        assert got[4] == expected[4]
    for name, expected in reference["parameters"].items():
        torch.testing.assert_close(run["parameters"][name], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scope", ["global_batch", "sequence"])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (2, 4), (4, 2)])
def test_ranks_equal_plain_autograd(scope: str, world_size: int, micro_batch_size: int) -> None:
    config = make_config(balance__scope=scope, training__micro_batch_size=micro_batch_size)
    for run in run_distributed(run_steps, world_size, config):
        assert_equal_runs(run, reference_steps(config))


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
    runs = run_distributed(run_steps, 2, config)
    assert_equal_runs(runs[0], reference_steps(config))


def test_global_batch_scope_counts_up_to_the_current_micro_batch() -> None:
    """Two micro-batches on one rank: the second's f comes from both, the first's from itself (arXiv 2501.11873)."""
    config = make_config(training__micro_batch_size=4, optimizer__clip_grad_norm=0.0)
    run = run_distributed(run_steps, 1, config, 1)[0]
    model = build_model(config.model, config.seed, torch.float64)
    batch = global_batch(0)
    experts, top_k, tokens = 6, 2, 8 * SEQ
    expected, counts = 0.0, torch.zeros(2, experts, dtype=torch.float64)
    for half in range(2):
        _, router = model.hidden_states(batch["input_ids"][4 * half : 4 * half + 4])
        counts += router.counts.sum(1)
        share = counts / ((half + 1) * 4 * SEQ * top_k)
        expected += experts * (share * router.prob_sum.sum(1)).sum().item() / tokens
    assert run["results"][0][1] == pytest.approx(expected / 2, rel=1e-12)


def test_expert_bias_moves_against_the_load_and_alike_on_all_ranks() -> None:
    config = make_config(balance__scope="none", balance__bias_update_rate=0.25)
    runs = run_distributed(run_steps, 2, config, 1)
    counts = torch.tensor(runs[0]["results"][0][4]).double()
    expected = 0.25 * (counts.mean(1, keepdim=True) - counts).sign()
    for run in runs:
        assert torch.equal(torch.stack(run["biases"]).double(), expected)


def _nan_step(config: RunConfig) -> tuple[str, bool]:
    from qwen_moe.training.step import BadStep
    from qwen_moe.verify.ranks import make_trainer

    trainer = make_trainer(config)
    model = trainer.model
    with torch.no_grad():
        model.parts[0].model.norm.weight.to_local().fill_(float("nan"))
    before = {name: p.to_local().clone() for name, p in model.named_parameters()}
    try:
        trainer.step(7, [global_batch(0)])
    except BadStep as error:
        same = all(
            torch.equal(before[n], p.to_local()) for n, p in model.named_parameters() if n != "model.norm.weight"
        )
        return str(error), same
    return "", False


def test_a_nan_loss_stops_before_the_update() -> None:
    for message, unchanged in run_distributed(_nan_step, 2, make_config()):
        assert "step 7" in message and "nan" in message and "learning_rate" in message
        assert unchanged
