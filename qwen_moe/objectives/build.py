"""Builds the objective that a recipe's objective section names."""

from collections.abc import Callable

from qwen_moe.config import ObjectiveConfig
from qwen_moe.objectives.base import Objective
from qwen_moe.objectives.likelihood import Likelihood
from qwen_moe.objectives.policy import Policy
from qwen_moe.objectives.preference import Preference
from qwen_moe.objectives.reward import RewardModel
from qwen_moe.objectives.sft import FineTuning

OBJECTIVES: dict[str, Callable[[ObjectiveConfig], Objective]] = {
    "likelihood": lambda config: Likelihood(),
    "sft": lambda config: FineTuning(),
    "dpo": lambda config: Preference(config.preference),
    "reward_model": lambda config: RewardModel(config.reward),
    "grpo": lambda config: Policy(config.policy),
}


def build_objective(config: ObjectiveConfig) -> Objective:
    return OBJECTIVES[config.kind](config)
