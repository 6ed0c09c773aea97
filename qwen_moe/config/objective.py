"""The objective that a run minimizes and what its losses mean. No torch: `qwen_moe.objectives` computes it."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from launchers.counted import counted
from qwen_moe.config.fields import Criteria, NonNegativeFloat, NonNegativeInt, PositiveFloat, Section, ShareBelowOne

PreferenceLoss = Literal["sigmoid", "ipo"]
Ratio = Literal["token", "sequence"]
Normalization = Literal["grpo", "dr_grpo", "dapo"]
Reads = Literal["documents", "chat", "pairs", "samples"]
KL = Literal["none", "k1", "k2", "k3", "rho_k3", "k1_in_reward"]


class PreferenceConfig(Section):
    """Direct preference optimization (arXiv 2305.18290; qwen_moe/objectives/preference.py has the formulas).

    ``loss``: of a pair's margin: sigmoid, or IPO's square (arXiv 2310.12036). ``label_smoothing``: the share of pairs that
    are taken to be labeled the wrong way around (sigmoid only). ``length_normalized``: margins of log-probabilities per
    token. ``sft_weight``: of the chosen answer's negative log-likelihood per token, which is added (arXiv 2404.19733).
    """

    loss: PreferenceLoss = "sigmoid"
    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[ShareBelowOne, Field(lt=0.5)] = 0.0
    length_normalized: bool = False
    sft_weight: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(
                "preference.label_smoothing is only used by preference.loss sigmoid, not ipo: leave it out"
            )
        return self


class RewardConfig(Section):
    """A reward model (qwen_moe/objectives/reward.py has the formulas).

    ``criteria``: the names of its scores, and ``weights`` how much each counts in a pair's loss. ``center``: the weight of
    the squared sum of a pair's scores, which keeps scores near 0 on average (arXiv 2312.09244).
    """

    criteria: Criteria = ("preference",)
    weights: tuple[PositiveFloat, ...] = (1.0,)
    center: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.criteria:
            raise ValueError("reward.criteria is empty: give at least one name, or leave it out")
        if len(self.weights) != len(self.criteria):
            raise ValueError(
                f"reward.weights has {counted(len(self.weights), 'number')} and reward.criteria "
                f"{counted(len(self.criteria), 'name')}: give one "
                "weight for each criterion"
            )
        return self


class PolicyConfig(Section):
    """Group-relative policy optimization and its relatives (qwen_moe/objectives/policy.py has the formulas).

    ``ratio``: of the new to the old probability of each token, or of each sequence (GSPO, arXiv 2507.18071).
    ``clip_low``, ``clip_high``: the ratio is clipped to [1 - clip_low, 1 + clip_high]. ``normalization``: what weights the
    tokens (`policy_weights`); ``longest``: the length that dr_grpo divides by. ``divide_by_std``: advantages are divided by
    the standard deviation of their group's rewards (Dr. GRPO does not). ``kl``: the estimator of the divergence from
    the reference, and ``kl_coefficient`` its weight.
    """

    ratio: Ratio = "token"
    clip_low: ShareBelowOne = 0.2
    clip_high: NonNegativeFloat = 0.2
    normalization: Normalization = "grpo"
    longest: NonNegativeInt = 0
    divide_by_std: bool = True
    kl: KL = "none"
    kl_coefficient: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kl == "none") != (self.kl_coefficient == 0):
            raise ValueError(
                f"policy.kl is {self.kl} and policy.kl_coefficient {self.kl_coefficient:g}: give both, or leave both out"
            )
        if (self.normalization == "dr_grpo") != (self.longest > 0):
            raise ValueError(
                f"policy.normalization is {self.normalization} and policy.longest {self.longest}: dr_grpo divides by "
                "longest, the largest number of tokens of a response; the others do not use it"
            )
        return self


class ObjectiveConfig(Section):
    """``likelihood``: the mean negative log-likelihood of valid labels, for pre-training. ``sft``: the same for packed
    conversations with padding. ``dpo``, ``reward_model`` and ``grpo`` have the settings `preference`, `reward` and
    `policy`."""

    kind: Literal["likelihood", "sft", "dpo", "reward_model", "grpo"] = "likelihood"
    preference: PreferenceConfig = PreferenceConfig()
    reward: RewardConfig = RewardConfig()
    policy: PolicyConfig = PolicyConfig()

    @property
    def reads(self) -> Reads:
        """What it learns from: text, conversations, pairs of answers, or answers that the model samples itself."""
        found: dict[str, Reads] = {"sft": "chat", "dpo": "pairs", "reward_model": "pairs", "grpo": "samples"}
        return found.get(self.kind, "documents")

    @property
    def unit(self) -> str:
        """The unit of a loss."""
        if self.kind == "dpo" and self.preference.loss == "ipo":
            return "squared nats per pair"
        if self.kind in ("dpo", "reward_model"):
            return "nats per pair"
        return "per token" if self.kind == "grpo" else "nats per token"

    def loss_of_guessing(self, vocab_size: int) -> float:
        """The loss of a model that has learned nothing; a run that ends above it has failed. For dpo it is that of a model
        equal to its reference, for a reward model that of equal scores. A policy's loss has no such level: infinity."""
        uniform = math.log(vocab_size)
        if self.kind == "grpo":
            return math.inf
        if self.kind == "reward_model":
            return math.log(2)
        if self.kind != "dpo":
            return uniform
        equal = math.log(2) if self.preference.loss == "sigmoid" else (1 / (2 * self.preference.beta)) ** 2
        return equal + self.preference.sft_weight * uniform
