"""The state of an AdamW optimizer by parameter name, as stored in checkpoints."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from parallel.data import zeros_like_shard


class Named(Protocol):
    """Anything with named parameters. A name may occur twice: two pipeline stages may hold copies of one parameter."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_state(model: Named, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """``{moment: {parameter name: tensor}}``; moments are zeros if the optimizer has not stepped yet. The tensors are the
    optimizer's own (DTensor shards under FSDP2), so loading into them restores it. If a name occurs twice, the first
    parameter is used."""
    state: dict[str, dict[str, torch.Tensor]] = {moment: {} for moment in MOMENTS}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = optimizer.state[parameter]
        for moment in MOMENTS:
            if moment not in own:
                own[moment] = zeros_like_shard(parameter)
            state[moment].setdefault(name, own[moment])
    return state


def set_optimizer_step(model: Named, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of updates done; AdamW uses it to correct the bias of its moments."""
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter]["step"] = torch.tensor(float(step), device=parameter.device)
