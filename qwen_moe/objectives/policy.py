"""Policy gradients on sampled responses: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476) and GSPO
(2507.18071).

A response is a document of a row. With l_t the log-probability of its token t, l'_t that of the policy which sampled it, and
A_t its advantage, the ratio is

    token      r_t = exp(l_t - l'_t)
    sequence   r_t = exp of the mean of l_u - l'_u over the response's tokens u, for all t   (GSPO, equation 7)

and the loss is the sum over learned tokens of

    w_t (-min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) + kl_coefficient k_t)

divided by their number T in the global batch. The weights w_t are fields of the batch (`policy_weights`), computed once from
the whole global batch, so that no cut of it changes the loss. For k_t see `kl_terms`.
Log-ratios are limited to +-20 before exp: an unlikely token would overflow to infinity, and infinity times an advantage of 0
is NaN. Beyond that limit a token has no gradient. Shapes: b rows of S tokens, s of them held by this rank.
"""

from typing import NamedTuple

import torch

from parallel.sequence import Batch, SequenceShard, document_numbers
from qwen_moe.config.objective import KL, Normalization, PolicyConfig
from qwen_moe.objectives.base import PACKED, Objective

LIMIT = 20.0  # of a log-ratio
LEAST_STD = 1e-4  # added to a group's standard deviation, as in TRL


def policy_weights(lengths: torch.Tensor, kind: Normalization, longest: int = 0) -> torch.Tensor:
    """The weight w ``[N]``, float64, of each learned token of N responses, which are those of a whole global batch.

    ``lengths [N]``: learned tokens of each; a response without any (a truncated one that is left out) is in no denominator.
    With B the number of the others and T the sum of their lengths, w / T is

        grpo      1 / (B length): every response weighs the same
        dr_grpo   1 / (B longest): every token weighs the same, whatever the lengths of this batch
        dapo      1 / T: every token weighs the same
    """
    lengths = lengths.double()
    responses, tokens = (lengths > 0).sum(), lengths.sum()
    if kind == "dapo":
        weights = torch.ones_like(lengths)
    elif kind == "dr_grpo":
        weights = (tokens / (responses * longest)).expand_as(lengths)
    else:
        weights = tokens / (responses * lengths)
    return weights.where(lengths > 0, 0.0)


class GroupAdvantages(NamedTuple):
    """``advantages [N]``, float64; the number of groups, and of those whose rewards are all equal."""

    advantages: torch.Tensor
    groups: int
    without_variance: int


def group_advantages(rewards: torch.Tensor, groups: torch.Tensor, divide_by_std: bool = True) -> GroupAdvantages:
    """The advantage of each response over its group: (reward - mean) / (std + 1e-4), with the standard deviation over n - 1
    (arXiv 2402.03300, section 4.1.2). Dr. GRPO does not divide (arXiv 2503.20783).

    ``rewards``, ``groups [N]``: the reward and the number (any integer) of each response's group. A group whose rewards are
    all equal says nothing: its advantages are exactly 0. Raises ValueError for a reward that is not finite.
    """
    rewards = rewards.double()
    if not bool(rewards.isfinite().all()):
        index = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(
            f"reward {index} is {float(rewards[index])}: leave the response out, or give it a finite reward"
        )
    names, group = groups.unique(return_inverse=True)
    sizes = torch.bincount(group, minlength=len(names)).double()
    zeros = torch.zeros(len(names), dtype=torch.float64)
    centered = rewards - (zeros.index_add(0, group, rewards) / sizes)[group]
    lowest, highest = (zeros.scatter_reduce(0, group, rewards, kind, include_self=False) for kind in ("amin", "amax"))
    flat = lowest == highest
    centered = centered.masked_fill(flat[group], 0.0)
    if divide_by_std:
        variance = zeros.index_add(0, group, centered.square()) / (sizes - 1).clamp_min(1)
        centered = centered / (variance.sqrt() + LEAST_STD)[group]
    return GroupAdvantages(centered, len(names), int(flat.sum()))


def kl_terms(kind: KL, log_probs: torch.Tensor, reference: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Each token's term k for a divergence between the policy p and the reference q, at tokens sampled from the old policy.

    With d = log p - log q at the sampled token and r = p / old, the token's ratio. KL(p || q) is the divergence that
    policies are meant to be held by; what a term's gradient is, in expectation over the samples:

        k1            d                 gradient 0 where old = p: it averages the score function. Its value is KL(p || q)
        k2            d^2 / 2           gradient of KL(p || q) where old = p, although its value is not
        k3            exp(-d) - 1 + d   gradient of KL(q || p), the other divergence, where old = p; its value is KL(p || q)
        rho_k3        r k3              value and gradient of KL(p || q), for any old policy (DeepSeek-V3.2)
        k1_in_reward  r d, d constant   gradient of KL(p || q), for any old policy: as if kl_coefficient d were subtracted
                                        from the token's reward
    """
    d = log_probs - reference
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    ratio = (log_probs - old).clamp(-LIMIT, LIMIT).exp()
    if kind == "k1_in_reward":
        return ratio * d.detach()
    k3 = (-d).clamp(-LIMIT, LIMIT).exp() - 1 + d
    return ratio * k3 if kind == "rho_k3" else k3


class Policy(Objective):
    """The weighted sum over learned tokens, divided by their number.

    Fields ``[b, S]``: ``old_log_probs`` of the labels, ``advantages`` and ``weights`` of the tokens (an advantage of a
    response is repeated), and with a KL term ``reference_log_probs``. What they hold where a label is not valid is not read.

    Metrics are means over learned tokens: ``clip_share`` (whose gradient clipping removed), ``kl`` (k3, to the reference),
    ``kl_to_old`` (k3, to the policy that sampled), and ``entropy``, estimated by -log p of the sampled tokens.
    ``ratio_max`` is the largest ratio.
    """

    head = "log_probs"
    may_be_empty = True  # every group may have rewards that are all equal
    metrics = ("clip_share", "kl", "kl_to_old", "entropy")
    maxima = ("ratio_max",)

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        reference = ("reference_log_probs",) if config.kl != "none" else ()
        self.fields = (*PACKED, "old_log_probs", "advantages", "weights", *reference)

    def count(self, batch: Batch) -> torch.Tensor:
        return (batch["labels"] >= 0).sum()

    def loss(
        self, output: torch.Tensor, batch: Batch, sequence: SequenceShard
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, log_probs = self.config, output.double()
        valid = sequence.held(batch["labels"]) >= 0

        def field(name: str) -> torch.Tensor:
            return sequence.held(batch[name]).double().where(valid, 0.0)

        old, advantages, weights = field("old_log_probs"), field("advantages"), field("weights")
        log_ratio = log_probs - old
        if config.ratio == "sequence":
            log_ratio = _mean_of_document(log_ratio, valid, batch, sequence)
        ratio = log_ratio.clamp(-LIMIT, LIMIT).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        terms = -torch.minimum(ratio * advantages, clipped * advantages)
        kl = torch.zeros_like(terms)
        if config.kl != "none":
            reference = field("reference_log_probs")
            terms = terms + config.kl_coefficient * kl_terms(config.kl, log_probs, reference, old)
            kl = kl_terms("k3", log_probs, reference, old)
        of_tokens = {
            "clip_share": clipped * advantages < ratio * advantages,
            "kl": kl,
            "kl_to_old": kl_terms("k3", log_probs, old, old),
            "entropy": -log_probs,
        }
        named = {name: (values * valid).sum() for name, values in of_tokens.items()}
        return (weights * terms).sum(), named | {"ratio_max": ratio.detach().where(valid, 0.0).max()}


def _mean_of_document(x: torch.Tensor, valid: torch.Tensor, batch: Batch, sequence: SequenceShard) -> torch.Tensor:
    """The mean of ``x [b, s]`` over the valid tokens of each token's document, ``[b, s]``."""
    documents = document_numbers(batch["document_starts"])
    sums = sequence.document_sums(torch.stack([x.where(valid, 0.0), valid.double()], -1), documents)
    return sequence.of_documents(sums[..., 0] / sums[..., 1].clamp_min(1), documents)
