"""The one setting of a model that the objective of a reward model decides: the names of its scores."""

from typing import Any

from qwen_moe.config.model import ModelConfig
from qwen_moe.config.objective import ObjectiveConfig, RewardConfig


def with_criteria(values: Any) -> Any:
    """The values of a recipe, where a reward model's `model.criteria` are those of its objective if they are left out."""
    if not isinstance(values, dict):
        return values
    objective, model = values.get("objective"), values.get("model")
    if isinstance(objective, str):
        objective = {"kind": objective}
    elif isinstance(objective, ObjectiveConfig):
        objective = objective.model_dump()
    if not isinstance(objective, dict) or objective.get("kind") != "reward_model":
        return values
    reward = objective.get("reward", {})
    criteria = reward.get("criteria", RewardConfig().criteria) if isinstance(reward, dict) else ()
    if isinstance(model, ModelConfig) and not model.criteria:
        return values | {"model": model.model_copy(update={"criteria": tuple(criteria)})}
    if isinstance(model, dict) and not model.get("criteria"):
        return values | {"model": model | {"criteria": criteria}}
    return values


def check_criteria(scored: tuple[str, ...], objective: ObjectiveConfig, sample_prompt: str) -> None:
    """Raise ValueError unless a model with the criteria ``scored`` can be trained by ``objective``."""
    judged = objective.reward.criteria
    if objective.kind != "reward_model":
        if scored:
            raise ValueError(
                f"model.criteria {list(scored)} make a reward model, which objective.kind {objective.kind} cannot train: "
                "set objective.kind to reward_model, or leave model.criteria out"
            )
        return
    if scored != judged:
        raise ValueError(
            f"model.criteria {list(scored)} are not objective.reward.criteria {list(judged)}: leave model.criteria out"
        )
    if sample_prompt:
        raise ValueError("sample_prompt is set, but a reward model writes no text: leave it out")
