"""Bytes and FLOPs of one operation of torch, from the shapes of its operands and results."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten

# Allocations and changes of metadata. Views are recognized by their schema.
NO_KERNEL = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::_unsafe_view", "aten::resize_", "aten::set_", "aten::detach_", "aten::requires_grad_",
}  # fmt: skip
# These read as many elements of their first tensor as they return.
_PICKS = {"aten::index_select", "aten::embedding", "aten::gather", "aten::index"}
# These overwrite their first tensor without reading it.
_OVERWRITES = {"aten::copy_", "aten::zero_", "aten::fill_", "aten::normal_", "aten::uniform_"}
# These write an argument only if they scale it, which they are not asked to.
_READS_ONLY = {("aten::_fused_adamw_", "grads")}


@dataclass
class Work:
    """Launches of one operation at one place, bytes of its operands and results, and FLOPs. ``chained``: launches inside
    elementwise chains that `precision.compile` makes one kernel each; ``chains``: how many chains begin with it."""

    launches: int = 0
    read: int = 0
    written: int = 0
    flops: int = 0
    chained: int = 0
    chains: int = 0


@functools.cache
def is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements in memory: those that an expanded dim repeats count once."""
    distinct = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(distinct) * tensor.element_size()


def _attention_flops(func: Any, args: Any) -> int | None:
    """Of torch's attention on a CPU: 2 matmuls forward, 5 backward, half of each where it is causal."""
    backward = func is _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    if func is not _aten._scaled_dot_product_flash_attention_for_cpu.default and not backward:
        return None
    q, k = args[1:3] if backward else args[:2]
    causal = args[7] if backward else (args[4] if len(args) > 4 else False)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    pairs = queries * (keys + 1) // 2 if causal else queries * keys
    return (10 if backward else 4) * batch * heads * pairs * width


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of matmuls and attention; a multiply-add counts as 2. Elementwise work counts as 0."""
    if func is _aten._grouped_mm.default:  # [N, A] x [E, A, O], or [O, N] x [N, A] in groups of columns
        left, right = args[:2]
        return 2 * left.shape[0] * left.shape[1] * right.shape[-1]
    attention = _attention_flops(func, args)
    if attention is not None:
        return attention
    packet = func._overloadpacket
    out_of_place = getattr(_aten, packet.__name__.removesuffix("_"), None)  # of addmm_ and the like
    formula = flop_registry.get(packet) or flop_registry.get(out_of_place)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def traffic(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
    """Bytes that an operation reads and writes if each operand and result moves once."""
    name, results = func._schema.name, tensors_in(out)
    read = written = 0
    for index, argument in enumerate(func._schema.arguments):
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        size = sum(bytes_of(t) for t in tensors_in(given))
        overwritten = argument.alias_info is not None and argument.alias_info.is_write
        overwritten = overwritten and (name, argument.name) not in _READS_ONLY
        if overwritten:
            written += size
            if argument.is_out or (index == 0 and name in _OVERWRITES):
                continue
        elif index == 0 and name in _PICKS:
            size = min(size, sum(bytes_of(t) for t in results))
        read += size
    if not any(r.alias_info is not None for r in func._schema.returns):
        written += sum(bytes_of(t) for t in results)
    return read, written
