"""The objectives of post-training as their papers write them, for one answer at a time: what `verify` compares with.

An answer is a document by itself: the log-probabilities ``[n]`` of its labels and the batch's fields, with entries at its n
valid labels only. For a reward model it is the scores ``[n, C]`` and the fields at the tokens that are judged: one, or none.
Nothing here is shared with `qwen_moe.objectives`, nor are the weights of the batch.
"""

from collections.abc import Callable, Sequence

import torch

from qwen_moe.config import ObjectiveConfig
from qwen_moe.config.objective import PolicyConfig, PreferenceConfig

Answer = dict[str, torch.Tensor]
Result = tuple[torch.Tensor, dict[str, float]]  # the loss of a global batch, and its metrics


def _sft(config: ObjectiveConfig, answers: Sequence[Answer]) -> Result:
    return -torch.cat([answer["log_probs"] for answer in answers]).mean(), {}


def _dpo(config: ObjectiveConfig, answers: Sequence[Answer]) -> Result:
    pairs = [_pair(config.preference, *pair) for pair in zip(answers[0::2], answers[1::2], strict=True)]
    rewards = torch.tensor([[chosen.item(), rejected.item()] for _, chosen, rejected in pairs], dtype=torch.float64)
    margins = rewards[:, 0] - rewards[:, 1]
    metrics = {
        "margin": margins.mean().item(),
        "accuracy": sum(margin > 0 for margin in margins.tolist()) / len(pairs),
        "reward_chosen": rewards[:, 0].mean().item(),
        "reward_rejected": rewards[:, 1].mean().item(),
    }
    return torch.stack([loss for loss, _, _ in pairs]).mean(), metrics


def _pair(
    config: PreferenceConfig, chosen: Answer, rejected: Answer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pair's loss and the rewards of its answers."""
    reduce: Callable[[torch.Tensor], torch.Tensor] = torch.mean if config.length_normalized else torch.sum
    rewards = [
        config.beta * (reduce(answer["log_probs"]) - reduce(answer["reference_log_probs"]))
        for answer in (chosen, rejected)
    ]
    margin = rewards[0] - rewards[1]
    if config.loss == "ipo":
        loss = (margin / config.beta - 1 / (2 * config.beta)) ** 2
    else:
        loss = -(1 - config.label_smoothing) * margin.sigmoid().log()
        loss = loss - config.label_smoothing * (-margin).sigmoid().log()
    return loss - config.sft_weight * chosen["log_probs"].mean(), rewards[0], rewards[1]


def _reward_model(config: ObjectiveConfig, answers: Sequence[Answer]) -> Result:
    losses: list[torch.Tensor] = []
    metrics = dict.fromkeys(("accuracy", "margin", "confidence", "brier"), 0.0)
    for first, second in zip(answers[0::2], answers[1::2], strict=True):
        if not len(first["preferences"]):
            continue
        terms, figures, weights = [], [], []
        for index, weight in enumerate(config.reward.weights):
            preferred = int(first["preferences"][0, index])
            if preferred == 0:
                continue
            better, worse = (first, second) if preferred == 1 else (second, first)
            up, down = better["scores"][0, index], worse["scores"][0, index]
            right = up.exp() / (up.exp() + down.exp())
            terms.append(weight * (-right.log() + config.reward.center * (up + down) ** 2))
            p = right.item()
            figures.append(
                [weight * value for value in (p > 0.5, abs((up - down).item()), max(p, 1 - p), (1 - p) ** 2)]
            )
            weights.append(weight)
        losses.append(torch.stack(terms).sum() / sum(weights))
        for name, values in zip(metrics, zip(*figures, strict=True), strict=True):
            metrics[name] += sum(values) / sum(weights)
    return torch.stack(losses).mean(), {name: total / len(losses) for name, total in metrics.items()}


def _grpo(config: ObjectiveConfig, answers: Sequence[Answer]) -> Result:
    answers = [answer for answer in answers if len(answer["log_probs"])]
    policy, tokens = config.policy, sum(len(answer["log_probs"]) for answer in answers)
    total, metrics = (
        torch.zeros((), dtype=torch.float64),
        dict.fromkeys(("clip_share", "kl", "kl_to_old", "entropy"), 0.0),
    )
    largest = 0.0
    for answer in answers:
        loss, ratio, clipped = _response(policy, answer)
        share = {"grpo": 1 / len(loss) / len(answers), "dr_grpo": 1 / max(policy.longest, 1) / len(answers)}
        total = total + loss.sum() * share.get(policy.normalization, 1 / tokens)
        new = answer["log_probs"].detach()
        metrics["clip_share"] += float(clipped.sum()) / tokens
        if policy.kl != "none":
            metrics["kl"] += float(_k3(new, answer["reference_log_probs"]).sum()) / tokens
        metrics["kl_to_old"] += float(_k3(new, answer["old_log_probs"]).sum()) / tokens
        metrics["entropy"] -= float(new.sum()) / tokens
        largest = max(largest, float(ratio.detach().max()))
    return total, metrics | {"ratio_max": largest}


def _k3(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    quotient = reference.exp() / log_probs.exp()
    return quotient - 1 - quotient.log()


def _response(policy: PolicyConfig, answer: Answer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each token's loss ``[n]`` and ratio, and whether clipping holds it."""
    new, old, advantage = answer["log_probs"], answer["old_log_probs"], answer["advantages"]
    ratio = of_tokens = new.exp() / old.exp()
    if policy.ratio == "sequence":
        ratio = (of_tokens.prod() ** (1 / len(new))).expand(len(new))
    above, below = 1 + policy.clip_high, 1 - policy.clip_low
    clipped = ((advantage > 0) & (ratio > above)) | ((advantage < 0) & (ratio < below))
    bound = torch.full_like(advantage, above).where(advantage > 0, below)
    loss = -(bound * advantage).where(clipped, ratio * advantage)
    if policy.kl == "none":
        return loss, ratio, clipped
    d = new - answer["reference_log_probs"]
    terms = {
        "k1": d,
        "k2": d**2 / 2,
        "k3": _k3(new, answer["reference_log_probs"]),
        "rho_k3": of_tokens * _k3(new, answer["reference_log_probs"]),
        "k1_in_reward": of_tokens * d.detach(),
    }
    return loss + policy.kl_coefficient * terms[policy.kl], ratio, clipped


LOSSES: dict[str, Callable[[ObjectiveConfig, Sequence[Answer]], Result]] = {
    "sft": _sft,
    "dpo": _dpo,
    "reward_model": _reward_model,
    "grpo": _grpo,
}


def plain_loss(config: ObjectiveConfig, answers: Sequence[Answer]) -> Result:
    """The loss of all answers of a global batch, differentiable, and its metrics. A pair's answers are neighbors."""
    return LOSSES[config.kind](config, answers)
