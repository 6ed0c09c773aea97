"""Direct preference optimization on pairs of answers (arXiv 2305.18290).

A pair is two neighboring documents of a row, the chosen answer first: documents 2p and 2p + 1. With l_t the log-probability
of a valid label and l'_t the reference's, an answer's log-ratio is a = sum_t (l_t - l'_t), divided by its number of valid
labels where `length_normalized`, and the pair's margin is m = a_chosen - a_rejected. The loss is the mean over the pairs of
the global batch of

    sigmoid   -(1 - s) log sigmoid(beta m) - s log sigmoid(-beta m)   (with label smoothing s: ericmitchell.ai/cdpo.pdf)
    ipo       (m - 1 / (2 beta))^2   (arXiv 2310.12036, equation 17)

plus `sft_weight` times -sum_t l_t / n of the chosen answer's n valid labels (arXiv 2404.19733). Shapes: b rows of S tokens,
s of them held by this rank, N documents and P pairs in a row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from parallel.sequence import Batch, SequenceShard, document_numbers
from qwen_moe.config.objective import PreferenceConfig
from qwen_moe.objectives.base import PACKED, Objective


class Answers(NamedTuple):
    """Sums over an answer's valid labels ``[b, P]``, float64: log-ratios, log-probabilities, and the number of labels."""

    ratios: torch.Tensor
    log_probs: torch.Tensor
    lengths: torch.Tensor


def by_pair(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[b, N, ...]`` by document -> the first and the second documents of pairs, each ``[b, P, ...]``. After a row's last
    pair there may be one document more, its padding."""
    if sums.shape[1] % 2:
        sums = torch.cat([sums, torch.zeros_like(sums[:, :1])], 1)
    return sums[:, 0::2], sums[:, 1::2]


def preference_losses(
    config: PreferenceConfig, chosen: Answers, rejected: Answers
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each pair's loss, and the rewards beta a of its two answers ``[2, b, P]``."""
    answers = torch.stack([chosen.ratios, rejected.ratios])
    if config.length_normalized:
        answers = answers / torch.stack([chosen.lengths, rejected.lengths]).clamp_min(1)
    margin = answers[0] - answers[1]
    if config.loss == "ipo":
        losses = (margin - 1 / (2 * config.beta)).square()
    else:
        z, smoothing = config.beta * margin, config.label_smoothing
        losses = (1 - smoothing) * F.softplus(-z) + smoothing * F.softplus(z)
    if config.sft_weight:
        losses = losses - config.sft_weight * chosen.log_probs / chosen.lengths.clamp_min(1)
    return losses, config.beta * answers


class Preference(Objective):
    """The mean loss over pairs. A pair counts if a label of it is valid.

    ``reference_log_probs [b, S]``: the reference's log-probability of each label. Only sums over answers matter, so that the
    sum of an answer may be at any of its valid labels instead, with 0 at the others. Differences are taken token by token:
    where the reference is the model itself, in the same layout, margins are exactly 0 and the sigmoid loss is ln 2.
    """

    head = "log_probs"
    fields = (*PACKED, "reference_log_probs")
    metrics = ("margin", "accuracy", "reward_chosen", "reward_rejected")

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config

    def count(self, batch: Batch) -> torch.Tensor:
        valid, documents = batch["labels"] >= 0, document_numbers(batch["document_starts"])
        chosen, rejected = by_pair(SequenceShard().document_sums(valid, documents))
        return (chosen + rejected > 0).sum()

    def loss(
        self, output: torch.Tensor, batch: Batch, sequence: SequenceShard
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        valid, log_probs = sequence.held(batch["labels"]) >= 0, output.double()
        reference = sequence.held(batch["reference_log_probs"]).double()
        ratios = (log_probs - reference).where(valid, 0.0)
        of_tokens = torch.stack([ratios, log_probs, valid.double()], -1)
        sums = sequence.document_sums(of_tokens, document_numbers(batch["document_starts"]))
        chosen, rejected = (Answers(*answer.unbind(-1)) for answer in by_pair(sums))
        losses, rewards = preference_losses(self.config, chosen, rejected)
        present = chosen.lengths + rejected.lengths > 0
        of_pairs = {
            "margin": rewards[0] - rewards[1],
            "accuracy": (rewards[0] > rewards[1]).to(rewards.dtype),
            "reward_chosen": rewards[0],
            "reward_rejected": rewards[1],
        }
        named = {name: sequence.share((values * present).sum()) for name, values in of_pairs.items()}
        return sequence.share((losses * present).sum()), named
