"""Data parallelism through FSDP2: sharding, sums of gradients, the global norm.

Gradients are summed over ranks, never averaged: the caller divides the loss by a count that is global already.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def data_parallel_mesh(device: torch.device) -> DeviceMesh:
    """The one-axis mesh ``(dp,)`` over all ranks."""
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
) -> None:
    """Shard ``blocks`` (each a unit of all-gather) and what remains of ``model`` over ``mesh``, in place.

    forward: all-gather of each unit in ``compute_dtype``. backward: reduce-scatter (sum) of its gradients in
    ``reduce_dtype``. With ``reshard_after_forward`` parameters are gathered again in backward (ZeRO-3), else kept.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if mesh.size() == 1:
        return  # one rank's sum is its own gradient; asked for a factor, FSDP2 would still divide every gradient by it
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def all_reduce_sum(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """A new tensor: the sum over ``mesh``. The argument is not changed (in-place reduction of a count that is used
    again is a classic way to count twice)."""
    total = tensor.clone()
    dist.all_reduce(total, group=mesh.get_group())
    return total


@torch.no_grad()
def global_norm(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> torch.Tensor:
    """2-norm of all gradients, each shard counted once, as a float64 scalar."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    # Each shard's norm in float32 (float64 for float64) from one kernel; their squares are added in float64.
    wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    norms = torch._foreach_norm([g for g in gradients if g.numel()], 2, dtype=wide)
    device = gradients[0].device
    square = (
        torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
    )
    return all_reduce_sum(square, mesh).sqrt()


@torch.no_grad()
def clip_by_norm(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scale all gradients by ``limit / norm`` when ``norm`` is above ``limit``."""
    if norm > limit:
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        torch._foreach_mul_([g for g in gradients if g.numel()], limit / norm)
