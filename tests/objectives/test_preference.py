"""DPO against its formulas written for one pair at a time, and whatever may not change its loss."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_moe.config.objective import PreferenceConfig
from qwen_moe.objectives.preference import Preference
from tests.objectives.packing import Cut, Document, cuts, learned, mean_loss, plain, random_field

PAIRS = 5
CONFIGS: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.3},
    "label smoothing": {"beta": 0.5, "label_smoothing": 0.2},
    "per token": {"beta": 2.0, "length_normalized": True},
    "ipo": {"loss": "ipo", "beta": 0.2},
    "ipo per token": {"loss": "ipo", "beta": 0.2, "length_normalized": True},
    "with an SFT term": {"beta": 0.1, "sft_weight": 0.7},
}


def pairs(seed: int = 0, equal: bool = False) -> list[list[Document]]:
    """Pairs of answers of different lengths; ``equal``: the reference is the policy itself."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(PAIRS):
        pair = []
        for answer in range(2):
            labels = learned(4 + (3 * index + 2 * answer) % 7, 1 + index % 2, generator)
            log_probs = random_field(labels, generator, 0.8, -2.0)
            reference = log_probs.clone() if equal else random_field(labels, generator, 0.8, -2.0)
            pair.append({"labels": labels, "log_probs": log_probs.requires_grad_(), "reference_log_probs": reference})
        found.append(pair)
    return found


def expected_loss(items: list[list[Document]], config: PreferenceConfig) -> tuple[torch.Tensor, dict[str, float]]:
    losses, rewards = [], []
    for pair in items:
        values = []
        for answer in pair:
            at = [t for t, label in enumerate(answer["labels"].tolist()) if label >= 0]
            value = sum(
                (answer["log_probs"][t] - answer["reference_log_probs"][t] for t in at), torch.zeros(()).double()
            )
            values.append(value / len(at) if config.length_normalized else value)
        margin = values[0] - values[1]
        if config.loss == "ipo":
            loss = (margin - 0.5 / config.beta) ** 2
        else:
            sure = torch.sigmoid(config.beta * margin)
            loss = -(1 - config.label_smoothing) * sure.log() - config.label_smoothing * (1 - sure).log()
        chosen = pair[0]["log_probs"][pair[0]["labels"] >= 0]
        losses.append(loss - config.sft_weight * chosen.mean())
        rewards.append([config.beta * value.item() for value in values])
    means = {
        "margin": sum(a - b for a, b in rewards) / PAIRS,
        "accuracy": sum(a > b for a, b in rewards) / PAIRS,
        "reward_chosen": sum(a for a, _ in rewards) / PAIRS,
        "reward_rejected": sum(b for _, b in rewards) / PAIRS,
    }
    return sum(losses, torch.zeros(()).double()) / PAIRS, means


def gradients(items: list[list[Document]]) -> list[torch.Tensor]:
    """By document, at its valid labels; they are cleared."""
    found = []
    for document in (document for item in items for document in item):
        gradient = document["log_probs"].grad
        assert gradient is not None
        found.append(gradient[document["labels"] >= 0])
        document["log_probs"].grad = None
    return found


@pytest.mark.parametrize("name", CONFIGS)
@given(cut=cuts(PAIRS))
@settings(max_examples=15, deadline=None)
def test_loss_gradient_and_metrics_are_those_of_the_formula_however_pairs_are_packed(name: str, cut: Cut) -> None:
    config, items = PreferenceConfig(**CONFIGS[name]), pairs()
    loss, metrics = mean_loss(Preference(config), items, cut)
    loss.backward()
    got = gradients(items)
    expected, expected_metrics = expected_loss(items, config)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metrics == pytest.approx(expected_metrics, rel=1e-12)
    for mine, theirs in zip(got, gradients(items), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


@given(seed=st.integers(0, 1000), cut=cuts(PAIRS))
@settings(max_examples=25, deadline=None)
def test_before_the_first_update_margins_are_zero_and_the_loss_is_ln_2(seed: int, cut: Cut) -> None:
    """NeMo-Aligner #227: a policy equal to its reference had another loss under tensor parallelism."""
    loss, metrics = mean_loss(Preference(PreferenceConfig(beta=0.1)), pairs(seed, equal=True), cut)
    assert metrics == {"margin": 0.0, "accuracy": 0.0, "reward_chosen": 0.0, "reward_rejected": 0.0}
    assert abs(loss.item() - math.log(2)) <= math.ulp(math.log(2))


def test_each_pair_starts_at_ln_2_exactly() -> None:
    for pair in pairs(equal=True):
        loss, _ = mean_loss(Preference(PreferenceConfig(beta=0.1)), [pair], plain(1))
        assert loss.item() == math.log(2)


@given(cut=cuts(PAIRS))
@settings(max_examples=25, deadline=None)
def test_a_reference_by_answer_is_the_reference_by_token(cut: Cut) -> None:
    """All of an answer's sum at its first valid label."""
    items, objective = pairs(), Preference(PreferenceConfig(beta=0.3))
    expected, _ = mean_loss(objective, items, plain(PAIRS))
    for document in (document for item in items for document in item):
        valid = document["labels"] >= 0
        sums = torch.zeros(valid.shape, dtype=torch.float64).where(valid, float("nan"))
        sums[int(valid.nonzero()[0])] = document["reference_log_probs"][valid].sum()
        document["reference_log_probs"] = sums
    assert mean_loss(objective, items, cut)[0].item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_first_token_of_a_response_is_learned() -> None:
    """fw-ai/cookbook #388: an off-by-one lost it. Here labels say what counts, and nothing is shifted again."""
    items = pairs()
    mean_loss(Preference(PreferenceConfig(beta=0.3)), items, plain(PAIRS))[0].backward()
    for gradient in gradients(items):
        assert gradient.abs().min() > 0


def test_a_row_of_padding_alone_is_no_pair() -> None:
    items = pairs()
    nothing = [{name: field.detach() for name, field in document.items()} for document in items[0]]
    for document in nothing:
        document["labels"] = torch.full_like(document["labels"], -100)
    objective = Preference(PreferenceConfig(beta=0.3))
    expected, _ = mean_loss(objective, items, plain(PAIRS))
    found, _ = mean_loss(objective, [*items, nothing], plain(PAIRS + 1))
    assert found.item() == expected.item()


def test_large_margins_are_finite() -> None:
    """A margin of 10,000 nats: log(sigmoid(-1000)) computed in two steps is minus infinity."""
    items = pairs()
    with torch.no_grad():
        items[0][0]["log_probs"] -= 2000.0
    loss, _ = mean_loss(Preference(PreferenceConfig(beta=0.1)), items, plain(PAIRS))
    loss.backward()
    assert loss.item() > 50 and all(bool(gradient.isfinite().all()) for gradient in gradients(items))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "only used by preference.loss sigmoid"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"beta": 0.0}, "greater than 0"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**values)
