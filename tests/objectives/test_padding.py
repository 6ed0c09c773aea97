"""Padding counts in no statistic of the experts: a padded batch equals the same documents without padding.

Public trainers counted it in the balance loss: Megatron-LM #1984 and #2121, transformers #28505, torchtitan #4594.
"""

from typing import Any

import pytest
import torch

from qwen_moe.data.samples import IGNORE, documents_of
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.init import build_model
from qwen_moe.models.moe.block import MoE
from qwen_moe.models.moe.router import RouterStatistics
from qwen_moe.verify.ranks import make_trainer
from tests.distributed import run_distributed
from tests.small import VOCAB, exact_run, model_values

LENGTH, PADDED = 12, 20


def documents(length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Two rows of two documents, without padding."""
    tokens = torch.randint(0, VOCAB, (2, length + 1), generator=torch.Generator().manual_seed(3))
    ends = torch.zeros(2, length, dtype=torch.bool)
    ends[:, 4] = True
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].masked_fill(ends, IGNORE)}
    return batch | documents_of(ends)


def padded(batch: dict[str, torch.Tensor], length: int = PADDED) -> dict[str, torch.Tensor]:
    """The same rows with a last document of padding, whose tokens differ so that they choose many experts."""
    rows, used = batch["labels"].shape
    more = length - used
    extra = {
        "input_ids": torch.randint(0, VOCAB, (rows, more), generator=torch.Generator().manual_seed(4)),
        "labels": torch.full((rows, more), IGNORE),
        "position_ids": torch.arange(more).expand(rows, more),
        "document_starts": torch.full((rows, more), used),
    }
    whole = {name: torch.cat([field, extra[name]], 1) for name, field in batch.items()}
    return whole | {"counted": torch.arange(length).expand(rows, length) < used}


def statistics(batch: dict[str, torch.Tensor], capacity: float) -> RouterStatistics:
    config = exact_run(model_values(initializer_range=0.3), LENGTH, training__train_tokens=10**6)
    model: DecoderLM = build_model(config.model, 0, torch.float64).train()
    for module in model.modules():
        if isinstance(module, MoE):
            module.capacity_factor = capacity
    counted = batch.get("counted")
    found = model.hidden_states(batch["input_ids"], batch["position_ids"], batch["document_starts"], counted)[1]
    assert found is not None
    return found


@pytest.mark.parametrize("capacity", [0.0, 0.6])
def test_routers_do_not_count_padding(capacity: float) -> None:
    without, with_padding = statistics(documents(), capacity), statistics(padded(documents()), capacity)
    torch.testing.assert_close(with_padding.prob_sum, without.prob_sum, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(with_padding.z_sum, without.z_sum, rtol=1e-12, atol=1e-14)
    assert torch.equal(with_padding.counts, without.counts)
    assert torch.equal(with_padding.dropped, without.dropped) and (int(without.dropped.sum()) > 0) == (capacity > 0)


def test_padding_was_counted_without_the_field() -> None:
    """The test above would see it."""
    batch = padded(documents())
    del batch["counted"]
    assert not torch.equal(statistics(batch, 0.6).dropped, statistics(documents(), 0.6).dropped)
    assert not torch.equal(statistics(batch, 0.0).counts, statistics(documents(), 0.0).counts)


def _step(length: int, changes: dict[str, Any], pad: bool) -> dict[str, Any]:
    config = exact_run(
        model_values(initializer_range=0.3),
        length,
        **{"training__global_batch_size": 2, "training__train_tokens": 4 * length} | changes,
    )
    trainer = make_trainer(config)
    gradients: dict[str, torch.Tensor] = {}
    trainer.on_gradients = lambda: gradients.update(
        {name: p.grad.to_local().clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    )
    result = trainer.step(0, [padded(documents(), length) if pad else documents(length)])
    biases = [router.expert_bias.clone() for _, router in trainer.routers()]
    assert result.expert_counts is not None
    facts = {"loss": result.loss, "count": result.count, "dropped": result.dropped_choices} | result.metrics
    return {"facts": facts, "counts": result.expert_counts.tolist(), "gradients": gradients, "biases": biases}


@pytest.mark.parametrize("scope", ["none", "micro_batch", "sequence", "global_batch", "huggingface"])
def test_a_padded_step_is_the_step_without_padding(scope: str) -> None:
    changes = {"balance__scope": scope, "balance__z_loss_coefficient": 0.1, "balance__bias_update_rate": 0.05}
    changes["balance__capacity_factor"] = 0.8
    (without,) = run_distributed(_step, 1, LENGTH, changes, False)
    (found,) = run_distributed(_step, 1, PADDED, changes, True)
    assert found["counts"] == without["counts"] and without["facts"]["dropped"] > 0
    for got, expected in zip(found["biases"], without["biases"], strict=True):
        assert torch.equal(got, expected)
    for name, expected in without["facts"].items():
        assert found["facts"][name] == pytest.approx(expected, rel=1e-12), name
    for name, expected in without["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], expected, rtol=1e-10, atol=1e-14, msg=name)


def _only_padding(scope: str) -> tuple[float, float]:
    """A step of two micro-batches, one of which is only padding."""
    config = exact_run(
        model_values(initializer_range=0.3),
        PADDED,
        training__train_tokens=8 * PADDED,
        training__global_batch_size=4,
        balance__scope=scope,
    )
    trainer, batch = make_trainer(config), padded(documents())
    nothing = {
        **batch,
        "labels": torch.full_like(batch["labels"], IGNORE),
        "counted": torch.zeros_like(batch["counted"]),
    }
    result = trainer.step(0, [batch, nothing])
    return result.metrics["balance_loss"], result.grad_norm


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "huggingface"])
def test_a_micro_batch_of_padding_alone_is_no_nan(scope: str) -> None:
    balance, norm = run_distributed(_only_padding, 1, scope)[0]
    (alone,) = run_distributed(_step, 1, PADDED, {"balance__scope": scope}, True)
    assert balance == pytest.approx(alone["facts"]["balance_loss"], rel=1e-12) and norm < float("inf")
