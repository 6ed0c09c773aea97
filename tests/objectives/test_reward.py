"""The reward model's loss against Bradley-Terry written for one pair at a time, and its calibration against known rates."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from qwen_moe.config.objective import RewardConfig
from qwen_moe.objectives.reward import RewardModel, calibration
from tests.objectives.packing import Cut, Document, cuts, learned, mean_loss, plain

PAIRS, CRITERIA = 5, 3
CONFIG = RewardConfig(criteria=("truthful", "helpful", "concise"), weights=(1.0, 2.0, 0.5), center=0.01)
# By pair and criterion: 1 if the first answer is better, -1 if the second, 0 where nobody judged.
JUDGED = [[1, 1, 0], [1, -1, 1], [0, 0, -1], [-1, 1, 1], [1, 0, 0]]


def pairs(seed: int = 0) -> list[list[Document]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(PAIRS):
        pair = []
        for answer in range(2):
            labels = learned(3 + (3 * index + 2 * answer) % 7, 1, generator)
            scores = torch.randn(len(labels), CRITERIA, generator=generator, dtype=torch.float64)
            preferences = torch.zeros(len(labels), CRITERIA)
            preferences[-1] = torch.tensor(JUDGED[index]) * (1.0 if answer == 0 else -1.0)
            pair.append({"labels": labels, "scores": scores.requires_grad_(), "preferences": preferences})
        found.append(pair)
    return found


def expected_loss(items: list[list[Document]]) -> tuple[torch.Tensor, float]:
    total, right = torch.zeros(()).double(), 0.0
    for pair, judged in zip(items, JUDGED, strict=True):
        first, second = (document["scores"][-1] for document in pair)
        of_pair, weight, correct = torch.zeros(()).double(), 0.0, 0.0
        for c, better in enumerate(judged):
            if better:
                probability = torch.sigmoid(first[c] - second[c] if better > 0 else second[c] - first[c])
                of_pair = of_pair + CONFIG.weights[c] * (0.01 * (first[c] + second[c]) ** 2 - probability.log())
                correct += CONFIG.weights[c] * (probability.item() > 0.5)
                weight += CONFIG.weights[c]
        total, right = total + of_pair / weight, right + correct / weight
    return total / PAIRS, right / PAIRS


def gradients(items: list[list[Document]]) -> list[torch.Tensor]:
    found = []
    for document in (document for item in items for document in item):
        assert document["scores"].grad is not None
        found.append(document["scores"].grad)
        document["scores"].grad = None
    return found


@given(cut=cuts(PAIRS))
@settings(max_examples=25, deadline=None)
def test_loss_and_gradient_are_those_of_the_formula_however_pairs_are_packed(cut: Cut) -> None:
    """The score is read at the answer's last token: transformers #35352, gpt-neox #1285, TRL #3750 read another one.
    It does not change with the batch: reward-bench #137."""
    items = pairs()
    loss, metrics = mean_loss(RewardModel(CONFIG), items, cut, "scores")
    loss.backward()
    got = gradients(items)
    expected, accuracy = expected_loss(items)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metrics["accuracy"] == pytest.approx(accuracy, rel=1e-12)
    for mine, theirs in zip(got, gradients(items), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)
        assert not mine[:-1].any()


def test_a_pair_that_nobody_judged_counts_nowhere() -> None:
    items = pairs()
    expected, metrics = mean_loss(RewardModel(CONFIG), items, plain(PAIRS), "scores")
    unjudged = [{name: field.detach().clone() for name, field in document.items()} for document in items[0]]
    for document in unjudged:
        document["preferences"].zero_()
    found, more = mean_loss(RewardModel(CONFIG), [*items, unjudged], plain(PAIRS + 1), "scores")
    assert found.item() == expected.item() and more == metrics


def test_equal_scores_cost_ln_2_and_are_half_right() -> None:
    items = pairs()
    for document in (document for item in items for document in item):
        document["scores"] = torch.zeros_like(document["scores"])
    loss, metrics = mean_loss(RewardModel(CONFIG), items, plain(PAIRS), "scores")
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert metrics == pytest.approx({"accuracy": 0.5, "margin": 0.0, "confidence": 0.5, "brier": 0.25})


def test_a_calibrated_model_has_no_calibration_error() -> None:
    """Of pairs that it is 60% and 90% sure of, 60% and 90% are in the right order."""
    z = torch.cat(
        [
            torch.tensor([math.log(0.6 / 0.4)]).double() * torch.tensor([1.0] * 6 + [-1.0] * 4),
            torch.tensor([math.log(0.9 / 0.1)]).double() * torch.tensor([1.0] * 9 + [-1.0]),
        ]
    )
    found = calibration(z, bins=4)
    assert found.judgments.tolist() == [10, 0, 0, 10]
    used = found.judgments > 0
    torch.testing.assert_close(found.confidence[used], found.accuracy[used], rtol=1e-7, atol=0)
    assert found.error < 1e-6
    assert calibration(-z).error == pytest.approx(0.5 * (0.6 - 0.4) + 0.5 * (0.9 - 0.1), rel=1e-6)
    assert calibration(torch.zeros(4)).accuracy[0] == 0.5 and calibration(torch.tensor([1e3])).judgments[-1] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"criteria": ("a", "a"), "weights": (1.0, 1.0)}, "a name twice"),
        ({"criteria": ("a", "b")}, "one weight for each criterion"),
        ({"weights": (0.0,)}, "greater than 0"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**values)
