"""A reward model trained on pairs of answers by the Bradley-Terry model, with one score for each of several criteria.

An answer's scores are those at its last token, which the batch names: a model that looks for padding instead finds another
token when the padding is an end-of-turn token, and other scores in another batch (transformers #35352, gpt-neox #1285,
reward-bench #137, TRL #3750). With s_c the scores of criterion c, z_c = p_c (s_c(first) - s_c(second)) where p_c is 1 if the
first answer was preferred and -1 if the second, a pair's loss is the weighted mean over its judged criteria of

    -log sigmoid(z_c) + center (s_c(first) + s_c(second))^2     (arXiv 2203.02155, equation 1; 2312.09244 for the second)

and the loss is the mean over the pairs of the global batch. Shapes: b rows of S tokens, s of them held by this rank, P pairs
in a row, C criteria.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from parallel.sequence import Batch, SequenceShard, document_numbers
from qwen_moe.config.objective import RewardConfig
from qwen_moe.objectives.base import PACKED, Objective
from qwen_moe.objectives.preference import by_pair


class RewardSums(NamedTuple):
    """Sums over pairs, ``[]`` each: the loss, and means over a pair's judged criteria of: right order (half for a tie), |z|,
    the probability that the model gives to its own order, and the square of what it lacked to certainty of the right one."""

    loss: torch.Tensor
    accuracy: torch.Tensor
    margin: torch.Tensor
    confidence: torch.Tensor
    brier: torch.Tensor


def answer_scores(scores: torch.Tensor, batch: Batch, sequence: SequenceShard) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores at the last tokens of the first and of the second answers, ``[b, P, C]`` each, float64.

    ``scores [b, s, C]``: the head's, at every token that this rank holds. ``preferences [b, S, C]`` of the batch are, at the
    last token of an answer, by criterion: 1 where this answer of its pair was preferred, -1 where the other was, 0 where the
    pair was not judged; and 0 at all other tokens.
    """
    ends = sequence.held(batch["preferences"]).ne(0).any(-1, keepdim=True)
    return by_pair(sequence.document_sums(scores.double().where(ends, 0.0), document_numbers(batch["document_starts"])))


def judgments(batch: Batch, sequence: SequenceShard) -> torch.Tensor:
    """``[b, P, C]``, float64: by criterion 1 where the first answer of a pair was preferred, -1 where the second was, 0
    where the pair was not judged."""
    held = sequence.held(batch["preferences"]).double()
    first, second = by_pair(sequence.document_sums(held, document_numbers(batch["document_starts"])))
    return (first - second) / 2


def bradley_terry(
    first: torch.Tensor, second: torch.Tensor, judged: torch.Tensor, weights: torch.Tensor, center: float = 0.0
) -> RewardSums:
    """Sums over pairs of the loss and of what is measured. ``first``, ``second [b, P, C]``: scores of the two answers;
    ``judged``: `judgments`; ``weights [C]`` of the criteria. A pair without a judgment counts nowhere."""
    z = judged * (first - second)
    share = weights * judged.abs()
    share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
    losses = F.softplus(-z) + center * (first + second).square()
    right = (z > 0).double() + 0.5 * (z == 0).double()
    sums = [
        (share * values).sum() for values in (losses, right, z.abs(), z.abs().sigmoid(), z.neg().sigmoid().square())
    ]
    return RewardSums(*sums)


class RewardModel(Objective):
    """The mean loss over judged pairs of what the head gives, the scores ``[b, s, C]`` of every token.

    Metrics: see `RewardSums`; ``accuracy`` and ``confidence`` are equal in a calibrated model.
    """

    head = "scores"
    may_be_empty = True  # no pair of a batch may have been judged
    fields = (*PACKED, "preferences")
    metrics = ("accuracy", "margin", "confidence", "brier")

    def __init__(self, config: RewardConfig) -> None:
        self.weights, self.center = torch.tensor(config.weights, dtype=torch.float64), config.center

    def count(self, batch: Batch) -> torch.Tensor:
        return judgments(batch, SequenceShard()).any(-1).sum()

    def loss(
        self, output: torch.Tensor, batch: Batch, sequence: SequenceShard
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        first, second = answer_scores(output, batch, sequence)
        sums = bradley_terry(first, second, judgments(batch, sequence), self.weights.to(output.device), self.center)
        named = {name: sequence.share(getattr(sums, name)) for name in self.metrics}
        return sequence.share(sums.loss), named


class Calibration(NamedTuple):
    """By bin of confidence ``[bins]``: the number of judgments, their mean confidence, and how often the order was right."""

    judgments: torch.Tensor
    confidence: torch.Tensor
    accuracy: torch.Tensor

    @property
    def error(self) -> float:
        """The expected calibration error (arXiv 1706.04599, equation 3)."""
        share = self.judgments / self.judgments.sum().clamp_min(1)
        return float((share * (self.confidence - self.accuracy).abs()).sum())


def calibration(z: torch.Tensor, bins: int = 10) -> Calibration:
    """How often pairs are in the right order, by how sure the model is: sigmoid(|z|), from 1/2 to 1 in ``bins`` equal parts.
    ``z [n]``: differences of scores, positive where the order is right. A tie is right half of the time."""
    z = z.double().flatten()
    sure = z.abs().sigmoid()
    bin_of = ((sure - 0.5) * 2 * bins).long().clamp_max(bins - 1)
    right = (z > 0).double() + 0.5 * (z == 0).double()
    zeros = torch.zeros(bins, dtype=torch.float64)
    count = zeros.index_add(0, bin_of, torch.ones_like(z))
    means = [zeros.index_add(0, bin_of, values) / count.clamp_min(1) for values in (sure, right)]
    return Calibration(count, *means)
