"""AdamW (arXiv 1711.05101) over two parameter groups: with and without weight decay."""

from typing import Any

import torch

from parallel.data import local, zeros_like_shard
from qwen_moe.checkpoint.optimizer_state import Named
from qwen_moe.config import OptimizerConfig


def is_decayed(name: str) -> bool:
    """Whether weight decay applies: to matrices, but not to norms and biases."""
    return not name.endswith(("norm.weight", ".bias"))


class ShardAdamW(torch.optim.AdamW):
    """torch's AdamW on this rank's shards. An update is elementwise, so no shard needs another one, and none of it goes
    through DTensor, whose first dispatch of an operation takes milliseconds. ``state`` holds DTensors, as torch's does."""

    def _init_group(self, group: dict[str, Any], *lists: list[torch.Tensor]) -> bool:
        for parameter in group["params"]:
            if parameter.grad is not None and not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": zeros_like_shard(parameter),
                    "exp_avg_sq": zeros_like_shard(parameter),
                }
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local, tensors)
        return has_complex


def build_optimizer(model: Named, config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW, or another library's if ``config.provider`` names one. On CPU torch's default (foreach) path
    measured 6.6 times slower than the fused one."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if is_decayed(name)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not is_decayed(name)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.provider != "torch":
        from qwen_moe.training.optimizer_providers import provided_optimizer

        return provided_optimizer(groups, config)
    return ShardAdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
