"""GRPO and its relatives against their formulas written for one response at a time, and whatever may not change the loss."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.sequence import SequenceShard
from qwen_moe.config.objective import KL, PolicyConfig
from qwen_moe.objectives.policy import LIMIT, Policy, group_advantages, kl_terms, policy_weights
from tests.objectives.packing import Cut, Document, batches, cuts, learned, mean_loss, plain, random_field

RESPONSES = 6
CONFIGS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo, clipped apart, k3": {"clip_low": 0.1, "clip_high": 0.4, "kl": "k3", "kl_coefficient": 0.3},
    "dr_grpo, rho_k3": {"normalization": "dr_grpo", "longest": 20, "kl": "rho_k3", "kl_coefficient": 0.2},
    "dapo": {"normalization": "dapo", "clip_high": 0.28},
    "dapo, k1 in reward": {"normalization": "dapo", "kl": "k1_in_reward", "kl_coefficient": 0.1},
    "gspo, k2": {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05, "kl": "k2", "kl_coefficient": 0.1},
}


def responses(config: PolicyConfig, seed: int = 0, left_out: bool = True) -> list[list[Document]]:
    """Responses of different lengths; the last is a truncated one without labels (``left_out``)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(RESPONSES):
        labels = learned(5 + (4 * index) % 7, 1 + index % 3, generator)
        if left_out and index == RESPONSES - 1:
            labels[:] = -100
        old = random_field(labels, generator, 0.5, -2.0)
        document = {
            "labels": labels,
            "log_probs": (old + random_field(labels, generator, 0.3)).requires_grad_(),
            "old_log_probs": old,
            "reference_log_probs": random_field(labels, generator, 0.5, -2.0),
            "advantages": torch.randn((), generator=generator, dtype=torch.float64).expand_as(old),
        }
        found.append([document])
    lengths = torch.tensor([int((item[0]["labels"] >= 0).sum()) for item in found])
    weights = policy_weights(lengths, config.normalization, config.longest)
    for item, weight in zip(found, weights, strict=True):
        item[0]["weights"] = weight.expand_as(item[0]["old_log_probs"])
    return found


def expected_loss(items: list[list[Document]], config: PolicyConfig) -> torch.Tensor:
    """The mean over responses with labels of the sum of their tokens' terms, over the length that the normalization says."""
    total, used, tokens = torch.zeros(()).double(), 0, 0
    for (document,) in items:
        at = (document["labels"] >= 0).nonzero().flatten().tolist()
        if not at:
            continue
        used, tokens = used + 1, tokens + len(at)
        new, old, reference = (document[name][at] for name in ("log_probs", "old_log_probs", "reference_log_probs"))
        advantage, of_tokens = float(document["advantages"][at[0]]), new.exp() / old.exp()
        ratio = of_tokens
        if config.ratio == "sequence":
            ratio = (new.exp().prod() / old.exp().prod()) ** (1 / len(at))
        terms = torch.zeros(len(at)).double()
        for t in range(len(at)):
            r = ratio if config.ratio == "sequence" else ratio[t]
            free, limited = r * advantage, r.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage
            loss = -free if free <= limited else -limited
            d = new[t] - reference[t]
            extra = {
                "none": 0.0,
                "k1": d,
                "k2": d**2 / 2,
                "k3": (-d).exp() - 1 + d,
                "rho_k3": of_tokens[t] * ((-d).exp() - 1 + d),
                "k1_in_reward": of_tokens[t] * d.item(),
            }[config.kl]
            terms[t] = loss + config.kl_coefficient * extra
        scale = {"grpo": len(at), "dr_grpo": config.longest, "dapo": 1}[config.normalization]
        total = total + terms.sum() / scale
    return total / (tokens if config.normalization == "dapo" else used)


def gradients(items: list[list[Document]]) -> torch.Tensor:
    """At valid labels, in order; they are cleared."""
    found = []
    for (document,) in items:
        gradient = document["log_probs"].grad
        found.append(torch.zeros(0).double() if gradient is None else gradient[document["labels"] >= 0])
        document["log_probs"].grad = None
    return torch.cat(found)


@pytest.mark.parametrize("name", CONFIGS)
@given(cut=cuts(RESPONSES))
@settings(max_examples=15, deadline=None)
def test_loss_and_gradient_are_those_of_the_formula_however_responses_are_packed(name: str, cut: Cut) -> None:
    """TRL #3021 and #3231, verl #593 and #3741, open-instruct #1161, mlx-lm #1413: the loss changed with accumulation."""
    config = PolicyConfig(**CONFIGS[name])
    items = responses(config)
    loss, _ = mean_loss(Policy(config), items, cut)
    loss.backward()
    got = gradients(items)
    expected = expected_loss(items, config)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(got, gradients(items), rtol=1e-10, atol=1e-14)
    assert (got == 0).any() or name != "grpo"  # clipping has removed some token's gradient


def test_a_mean_over_each_micro_batch_is_another_loss() -> None:
    """The property above would see it."""
    config = PolicyConfig(normalization="dapo")
    items, objective = responses(config), Policy(config)
    parts = [mean_loss(objective, [item], plain(1))[0].item() for item in items[:-1]]
    assert abs(sum(parts) / len(parts) - mean_loss(objective, items, plain(RESPONSES))[0].item()) > 1e-3


@given(cut=cuts(RESPONSES))
@settings(max_examples=10, deadline=None)
def test_metrics_are_means_over_learned_tokens(cut: Cut) -> None:
    config = PolicyConfig(kl="k3", kl_coefficient=0.1)
    items = responses(config)
    valid = [document["labels"] >= 0 for (document,) in items]

    def tokens(name: str) -> torch.Tensor:
        return torch.cat([document[name].detach()[at] for (document,), at in zip(items, valid, strict=True)])

    ratio, advantages = (tokens("log_probs") - tokens("old_log_probs")).exp(), tokens("advantages")
    beyond = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    d, back = tokens("log_probs") - tokens("reference_log_probs"), tokens("log_probs") - tokens("old_log_probs")
    _, metrics = mean_loss(Policy(config), items, cut)
    expected = {
        "clip_share": beyond.double().mean().item(),
        "kl": ((-d).exp() - 1 + d).mean().item(),
        "kl_to_old": ((-back).exp() - 1 + back).mean().item(),
        "entropy": -tokens("log_probs").mean().item(),
    }
    assert metrics == pytest.approx(expected, rel=1e-12) and 0 < metrics["clip_share"] < 1
    largest = [Policy(config).loss(b["log_probs"], b, SequenceShard())[1]["ratio_max"] for b in batches(items, cut)]
    assert max(float(value) for value in largest) == pytest.approx(ratio.max().item(), rel=1e-12)


def test_without_advantages_and_kl_there_is_no_gradient() -> None:
    config = PolicyConfig()
    items = responses(config)
    for (document,) in items:
        document["advantages"] = torch.zeros_like(document["advantages"])
    mean_loss(Policy(config), items, plain(RESPONSES))[0].backward()
    assert not gradients(items).any()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_an_unlikely_token_makes_no_nan(ratio: Any, advantage: float) -> None:
    """prime-rl #2973: exp(800) is infinity, and infinity times 0 is NaN."""
    config = PolicyConfig(ratio=ratio, kl="rho_k3", kl_coefficient=0.1)
    items = responses(config)
    for (document,) in items:
        with torch.no_grad():
            document["log_probs"] += 800.0
        document["advantages"] = torch.full_like(document["advantages"], advantage)
    loss, metrics = mean_loss(Policy(config), items, plain(RESPONSES))
    loss.backward()
    assert loss.isfinite() and bool(gradients(items).isfinite().all())
    assert all(math.isfinite(value) for value in metrics.values())
    assert math.exp(LIMIT) < 1e9


@pytest.mark.parametrize("length", [2, 40, 400])
def test_the_sequence_ratio_is_a_mean_and_does_not_grow_with_length(length: int) -> None:
    """NeMo-RL #2269: the ratio of summed log-probabilities clipped long answers away (arXiv 2507.18071, equation 7)."""
    config = PolicyConfig(ratio="sequence", normalization="dapo")
    old = torch.full((length,), -1.0, dtype=torch.float64)
    document = {
        "labels": torch.zeros(length, dtype=torch.int64),
        "log_probs": (old + 0.01).requires_grad_(),
        "old_log_probs": old,
        "advantages": torch.ones_like(old),
        "weights": torch.ones_like(old),
    }
    loss, metrics = mean_loss(Policy(config), [[document]], plain(1))
    loss.backward()
    assert loss.item() == pytest.approx(-math.exp(0.01), rel=1e-12) and metrics["clip_share"] == 0
    assert document["log_probs"].grad is not None
    assert document["log_probs"].grad.sum().item() == pytest.approx(-math.exp(0.01), rel=1e-12)


# Weights


def test_what_each_normalization_weighs_alike() -> None:
    """prime-rl #102 and #2034: per sample or per token was not what the name said."""
    lengths = torch.tensor([2, 10, 3])
    tokens = 15
    by_response = policy_weights(lengths, "grpo") * lengths / tokens
    torch.testing.assert_close(by_response, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=1e-14, atol=0)
    assert policy_weights(lengths, "dapo").tolist() == [1.0, 1.0, 1.0]
    longest = policy_weights(lengths, "dr_grpo", 50) / tokens
    torch.testing.assert_close(longest, torch.full((3,), 1 / 150, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_responses_that_are_left_out_are_in_no_denominator(kind: Any) -> None:
    """TRL #6439: masked truncated answers stayed in the denominator and made the loss of the others smaller."""
    kept, all_of_them = torch.tensor([4, 7, 1]), torch.tensor([4, 0, 7, 1, 0])
    expected, found = policy_weights(kept, kind, 9), policy_weights(all_of_them, kind, 9)
    assert torch.equal(found[[0, 2, 3]], expected) and not found[[1, 4]].any()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.randoms())
def test_weights_follow_their_responses(lengths: list[int], random: Any) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    for kind in ("grpo", "dr_grpo", "dapo"):
        whole = policy_weights(torch.tensor(lengths), kind, 40)
        assert torch.equal(policy_weights(torch.tensor(lengths)[order], kind, 40), whole[order])
        assert bool(whole.isfinite().all())


# Advantages


def test_advantages_of_a_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 3.0, 0.1, 0.0, 0.1, 0.1])
    groups = torch.tensor([7, 7, 2, 5, 7, 5, 5])
    found = group_advantages(rewards, groups)
    mean, std = 1 / 3, math.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2)
    expected = [(1 - mean) / (std + 1e-4), -mean / (std + 1e-4), 0.0, 0.0, -mean / (std + 1e-4), 0.0, 0.0]
    assert found.advantages.tolist() == pytest.approx(expected, rel=1e-12)
    assert (found.groups, found.without_variance) == (3, 2)
    centered = group_advantages(rewards, groups, divide_by_std=False).advantages
    assert centered[[0, 1, 4]].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3], rel=1e-12)


def test_equal_rewards_give_exactly_zero() -> None:
    """The mean of six times 0.1 is not 0.1 in float64: the rest would be an advantage, over a standard deviation of 0."""
    rewards = torch.full((6,), 0.1, dtype=torch.float64)
    assert sum(rewards.tolist()) / 6 != 0.1
    found = group_advantages(rewards, torch.zeros(6, dtype=torch.int64))
    assert found.advantages.tolist() == [0.0] * 6 and found.without_variance == 1


@given(st.lists(st.tuples(st.integers(-2, 2), st.floats(-100, 100)), min_size=1, max_size=30), st.randoms())
def test_advantages_follow_their_responses(values: list[tuple[int, float]], random: Any) -> None:
    groups, rewards = torch.tensor([g for g, _ in values]), torch.tensor([r for _, r in values]).double()
    order = list(range(len(values)))
    random.shuffle(order)
    whole = group_advantages(rewards, groups)
    found = group_advantages(rewards[order], groups[order])
    torch.testing.assert_close(found.advantages, whole.advantages[order], rtol=1e-9, atol=1e-9)
    assert found[1:] == whole[1:]
    for group in groups.unique():
        assert abs(whole.advantages[groups == group].sum().item()) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match="reward 1 is"):
        group_advantages(torch.tensor([0.0, bad]), torch.tensor([0, 0]))


# KL: expectations over all tokens of a small vocabulary


VOCABULARY = 7


def distributions(on_policy: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the policy, and log-probabilities of the reference and of the old policy."""
    generator = torch.Generator().manual_seed(1)
    logits, reference, old = torch.randn(3, VOCABULARY, generator=generator, dtype=torch.float64).unbind()
    return logits, reference.log_softmax(0), (logits if on_policy else logits + 0.5 * old).log_softmax(0)


def expected_gradient(kind: KL, on_policy: bool) -> torch.Tensor:
    """The mean over tokens, drawn from the old policy, of the gradient of the term."""
    logits, reference, old = distributions(on_policy)
    logits.requires_grad_()
    (old.exp() * kl_terms(kind, logits.log_softmax(0), reference, old)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def gradient_of_kl(reverse: bool) -> torch.Tensor:
    """Of KL(p || q) by its definition (``reverse``), or of KL(q || p)."""
    logits, reference, _ = distributions(True)
    log_p = logits.requires_grad_().log_softmax(0)
    kl = log_p.exp() @ (log_p - reference) if reverse else reference.exp() @ (reference - log_p)
    kl.backward()
    assert logits.grad is not None
    return logits.grad


# TRL #3104, #534, #4638 and #6503, OpenRLHF #1309: terms whose gradient was not that of the named divergence.
@pytest.mark.parametrize(
    ("kind", "on_policy", "reverse"),
    [
        ("k2", True, True),
        ("k3", True, False),
        ("rho_k3", True, True),
        ("k1_in_reward", True, True),
        ("rho_k3", False, True),
        ("k1_in_reward", False, True),
    ],
)
def test_the_expected_gradient_is_that_of_the_divergence(kind: KL, on_policy: bool, reverse: bool) -> None:
    torch.testing.assert_close(expected_gradient(kind, on_policy), gradient_of_kl(reverse), rtol=1e-12, atol=1e-14)


def test_k1_as_a_loss_has_no_gradient() -> None:
    assert expected_gradient("k1", True).abs().max() < 1e-15


@pytest.mark.parametrize(("kind", "on_policy"), [("k3", True), ("k2", False), ("k3", False), ("k1", False)])
def test_the_others_have_another_gradient(kind: KL, on_policy: bool) -> None:
    expected = gradient_of_kl(True)
    assert (expected_gradient(kind, on_policy) - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("kind", "on_policy"), [("k1", True), ("k3", True), ("rho_k3", False), ("k1_in_reward", False)]
)
def test_values_are_the_divergence(kind: KL, on_policy: bool) -> None:
    logits, reference, old = distributions(on_policy)
    log_p = logits.log_softmax(0)
    expected = (log_p.exp() @ (log_p - reference)).item()
    assert (old.exp() @ kl_terms(kind, log_p, reference, old)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl": "k3"}, "give both, or leave both out"),
        ({"kl_coefficient": 0.1}, "give both, or leave both out"),
        ({"normalization": "dr_grpo"}, "dr_grpo divides by longest"),
        ({"longest": 100}, "the others do not use it"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**values)
