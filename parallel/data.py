"""Data parallelism through FSDP2: sharding on two grids, gradient sums, and the global gradient norm.

Gradients are summed over ranks, never averaged: the caller divides the loss by a global count.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor, Shard

from parallel.collectives import all_reduce_sum
from parallel.mesh import Axis


def cut_dim(shape: Sequence[int], ranks: int) -> int:
    """The dim along which ``ranks`` cut a parameter of ``shape``.

    FSDP2 pads dim 0 to a multiple of the ranks, and leaves the last ranks nothing if there are more ranks than rows. For a
    matrix that is little. A stack of few large matrices, such as a rank's experts, is instead cut along the first dim that
    ``ranks`` divides, or along dim 0 if there is none.
    """
    if len(shape) < 3:
        return 0
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


class _OneRank(ReduceScatter):
    """The reduce-scatter of a single rank, whose result is its input.

    FSDP2 asks for two buffers, first for the gradients in ``reduce_dtype`` and then for their sum, and copies the first to
    the second. Here both are one tensor, and copying a tensor to itself does nothing.
    """

    def __init__(self) -> None:
        # A weak reference: if the copy of the gradients fails, the buffer goes with the call that asked for it.
        self._gradients: Any = None

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        gradients = self._gradients and self._gradients()
        if gradients is None:
            gradients = torch.empty(*size, dtype=dtype, device=device)
            self._gradients = weakref.ref(gradients)
        else:
            self._gradients = None
        return gradients

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("FSDP2 calls no reduce-scatter for one rank")


def shard(
    model: nn.Module,
    units: Iterable[tuple[nn.Module, DeviceMesh]],
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
) -> None:
    """Shard each of ``units`` over its own mesh, inner units first, and the remaining parameters over ``mesh``, in place.

    forward: all-gather of each unit in ``compute_dtype``. backward: reduce-scatter (sum) of its gradients in
    ``reduce_dtype``. With ``reshard_after_forward`` parameters are gathered again in backward (ZeRO-3); otherwise they
    stay gathered. `cut_dim` says along which dim each parameter is cut.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    sizes = {}
    for unit, own, reshard in [*((unit, own, reshard_after_forward) for unit, own in units), (model, mesh, False)]:
        size = sizes[unit] = own.size()

        def along(parameter: nn.Parameter, ranks: int = size) -> Shard:
            return Shard(cut_dim(parameter.shape, ranks))

        fully_shard(unit, mesh=own, mp_policy=policy, reshard_after_forward=reshard, shard_placement_fn=along)
    for module, size in sizes.items():
        if not isinstance(module, FSDPModule):
            continue
        # A single rank needs no sum, and FSDP2 would still run a division over every gradient if given a factor.
        if size > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        elif mesh.device_type == "cpu":
            # On a GPU, gradients that are added to earlier ones on FSDP2's stream must not share the buffer, which the
            # main stream may use again before that.
            module.set_custom_reduce_scatter(_OneRank())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def zeros_like_shard(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``torch.zeros_like``; for a DTensor without its dispatch, which takes milliseconds for each new shape."""
    zeros = torch.zeros_like(local(tensor), dtype=dtype)
    if not isinstance(tensor, DTensor):
        return zeros
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(zeros, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


@torch.no_grad()
def sum_replicas(parameters: Iterable[tuple[nn.Parameter, Sequence[Axis]]]) -> None:
    """Sum the gradients of parameters that are replicated over an axis on which their inputs were split.

    One coalesced all-reduce per axis and dtype, once per step. A parameter that this rank did not use has no gradient and
    contributes zeros, so that every rank makes the same calls.
    """
    groups: dict[tuple[str, torch.dtype], tuple[Axis, list[torch.Tensor]]] = {}
    for parameter, axes in parameters:
        for axis in axes:
            if parameter.grad is None:
                parameter.grad = zeros_like_shard(parameter)
            gradient = local(parameter.grad)
            groups.setdefault((axis.name, gradient.dtype), (axis, []))[1].append(gradient)
    for axis, gradients in groups.values():
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat, group=axis.group)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def exchange_and_add(gradient: torch.Tensor, peer: int, axis: Axis) -> None:
    """Add rank ``peer``'s gradient to ``gradient`` in place. ``peer`` is an index on ``axis``; both ranks call this, for a
    parameter that two stages hold."""
    mine = gradient.contiguous()
    other = torch.empty_like(mine)
    assert axis.group is not None
    target = dist.get_global_rank(axis.group, peer)
    operations = [
        dist.P2POp(dist.isend, mine, target, group=axis.group),
        dist.P2POp(dist.irecv, other, target, group=axis.group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    gradient.add_(other)


def _held(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """This rank's shards of the gradients that have elements here. A small model leaves some ranks none at all."""
    gradients = (local(p.grad) for p in parameters if p.grad is not None)
    return [gradient for gradient in gradients if gradient.numel()]


@torch.no_grad()
def global_norm(parameters: Iterable[nn.Parameter], world: Axis, device: torch.device) -> torch.Tensor:
    """2-norm of all gradients, as a float64 scalar. ``parameters`` are the ones that this rank counts: each shard and each
    replicated parameter must be counted on exactly one rank."""
    gradients = _held(parameters)
    # One kernel computes each shard's norm in float32 (float64 for float64); the squares are added in float64.
    wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    square = torch.zeros((), dtype=torch.float64, device=device)
    if gradients:
        square = torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)).double().square().sum()
    return all_reduce_sum(square, world).sqrt()


@torch.no_grad()
def clip_by_norm(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scale all gradients by ``limit / norm`` when ``norm`` is above ``limit``."""
    if norm > limit and (gradients := _held(parameters)):
        torch._foreach_mul_(gradients, limit / norm)
