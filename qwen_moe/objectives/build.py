"""Builds the objective that a recipe's objective section names."""

from qwen_moe.config import ObjectiveConfig
from qwen_moe.objectives.base import Objective
from qwen_moe.objectives.likelihood import Likelihood

OBJECTIVES: dict[str, type[Objective]] = {"likelihood": Likelihood}


def build_objective(config: ObjectiveConfig) -> Objective:
    return OBJECTIVES[config.kind]()
