"""Initial values of this rank's shards, cut from the value of the whole parameter."""

import torch
from torch.distributed.tensor import DTensor

from qwen_moe.models.init import initial_value
from qwen_moe.sharding.model import ParallelModel


@torch.no_grad()
def initialize(model: ParallelModel, seed: int, std: float) -> None:
    """Fill this rank's shard of every parameter with its part of the whole parameter's initial value, and zero buffers."""
    for name, parameter in model.named_parameters():
        place = model.placements[name]
        offsets, sizes = model.range_of(name, parameter)
        held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not held.numel():
            continue
        if place.is_expert:
            value = initial_value(name, place.shape, seed, std, experts=(offsets[0], sizes[0]))
            offsets[0] = 0
        else:
            value = initial_value(name, place.shape, seed, std)
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            value = value.narrow(dim, offset, size)
        held.copy_(value)
    for _, buffer in model.named_buffers():
        buffer.zero_()
