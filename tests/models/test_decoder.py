"""The whole decoder: recompute, document masks, the key/value cache, and what is kept in which dtype."""

import pytest
import torch

from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.init import build_model
from tests.models.test_layers import small_config
from tests.small import VOCAB


def tokens(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_recompute_changes_no_bit_and_counts_no_token_twice(dtype: torch.dtype) -> None:
    ids = tokens(2, 9)
    outcomes = []
    for recompute in ("none", "selective", "full"):
        model = build_model(small_config(num_hidden_layers=3), 1, dtype).train()
        model.recompute = recompute
        sums = model.loss_sums(ids[:, :-1], ids[:, 1:])
        objective = sums.cross_entropy + sums.router.prob_sum.square().sum() + 0.1 * sums.router.z_sum.sum()
        objective.backward()
        outcomes.append((sums, {name: p.grad for name, p in model.named_parameters()}))
    plain, plain_grads = outcomes[0]
    for again, again_grads in outcomes[1:]:
        assert torch.equal(plain.cross_entropy, again.cross_entropy)
        assert torch.equal(plain.router.counts, again.router.counts)
        assert again.router.counts.sum() == 3 * 2 * 8 * 2
        for name, grad in plain_grads.items():
            assert torch.equal(grad, again_grads[name]), name


def test_recompute_keeps_less() -> None:
    """Bytes that autograd holds between forward and backward: all, those of attention itself, or only the layers' inputs."""
    held = []
    for recompute in ("none", "selective", "full"):
        model = build_model(small_config(num_hidden_layers=3), 1, torch.float64).train()
        model.recompute = recompute
        seen: dict[int, int] = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(x: torch.Tensor, seen: dict[int, int] = seen, weights: set[int] = weights) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            sums = model.loss_sums(tokens(2, 33)[:, :-1], tokens(2, 33)[:, 1:])
        held.append(sum(seen.values()))
        del sums
    assert held[0] > 1.5 * held[1] > 1.5 * 1.2 * held[2], held


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3"])
def test_documents_in_one_row_equal_documents_apart(family: str) -> None:
    dense = {
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "moe_intermediate_size": 0,
        "shared_expert_intermediate_size": 0,
    }
    config = small_config(family=family, **({} if family == "qwen2_moe" else dense))
    model = build_model(config, 2, torch.float64)
    first, second = tokens(1, 6, 1), tokens(1, 4, 2)
    packed = model(
        torch.cat([first, second], 1),
        position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]),
        document_starts=torch.tensor([[0] * 6 + [6] * 4]),
    )
    torch.testing.assert_close(packed[:, :6], model(first), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(packed[:, 6:], model(second), rtol=1e-10, atol=1e-10)


def test_a_token_does_not_see_the_ones_after_it() -> None:
    model = build_model(small_config(), 2, torch.float64)
    ids = tokens(1, 8)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % VOCAB
    difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert difference[:5].max() < 1e-13 and difference[5:].min() > 1e-6


def test_statistics_keep_their_dtype_in_a_bfloat16_model() -> None:
    model = build_model(small_config(), 2, torch.bfloat16)
    ids = tokens(2, 5)
    sums = model.loss_sums(ids[:, :-1], ids[:, 1:])
    assert model(ids).dtype == torch.bfloat16
    assert sums.cross_entropy.dtype == sums.router.prob_sum.dtype == sums.router.z_sum.dtype == torch.float32
    assert sums.router.counts.dtype == torch.int64
    assert all(
        module.expert_bias.dtype == torch.float32 for module in model.modules() if hasattr(module, "expert_bias")
    )


def test_loss_sums_is_the_cross_entropy_of_the_logits() -> None:
    model = build_model(small_config(tie_word_embeddings=True), 2, torch.float64)
    ids = tokens(2, 7)
    labels = ids[:, 1:].clone()
    labels[0, :3] = -100
    sums = model.loss_sums(ids[:, :-1], labels, chunk_tokens=5)
    expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(sums.cross_entropy, expected)
    assert sums.tokens == 9
    assert isinstance(model, DecoderLM) and not hasattr(model, "lm_head")
