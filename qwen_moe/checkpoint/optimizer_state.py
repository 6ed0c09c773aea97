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
    """``{moment: {parameter name: tensor}}``; moments are zeros if the optimizer has not stepped yet, and it can step after
    this. The tensors are the optimizer's own (DTensor shards under FSDP2), so loading into them restores it. If a name
    occurs twice, the first parameter is used."""
    state: dict[str, dict[str, torch.Tensor]] = {moment: {} for moment in MOMENTS}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = optimizer.state[parameter]
        own.setdefault("step", _number(0, parameter))
        for moment in MOMENTS:
            if moment not in own:
                own[moment] = zeros_like_shard(parameter)
            state[moment].setdefault(name, own[moment])
    return state


def updates_done(optimizer: torch.optim.Optimizer) -> int:
    """The number of updates done. Steps that had nothing to learn from are not among them."""
    # Providers do not count the updates of an empty shard.
    return max((int(own["step"]) for own in optimizer.state.values()), default=0)


def set_updates_done(model: Named, optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set the number of updates done; AdamW uses it to correct the bias of its moments."""
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter]["step"] = _number(updates, parameter)


def _number(updates: int, parameter: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(updates), device=parameter.device)
