"""Cuts the experts of one layer from its dense feed-forward.

The feed-forward is a sum over its intermediate indices j: ``y = sum_j down[:, j] * silu(gate[j] . x) * (up[j] . x)``. An
expert holds some of the indices, the same ones of gate, up and down. Every random number comes from a generator seeded by
the name of what it is for, so that no order of work, layout or number of files changes a bit.

Shape legend: D hidden, I dense feed-forward width, E experts, F expert width, S shared expert width.
"""

import numpy as np
import torch

from qwen_moe.checkpoint.finite import check_cast
from qwen_moe.checkpoint.upcycle.settings import Plan
from qwen_moe.models.init import initial_value, named_generator


class Layer:
    """The experts of layer ``index``: which intermediate indices they hold, and the factors of their down projections.

    ``experts [E, F]``: indices of the dense feed-forward. Copies of it, each in an order of its own, are laid one behind
    the other and cut into E pieces of F; what is left of the last copy is discarded.
    ``shared [S]``: whole copies in order, then a random part. ``routed_factor [I]`` and ``shared_factor [S]``: float64.
    """

    def __init__(self, plan: Plan, index: int) -> None:
        self._plan = plan
        self._prefix = f"model.layers.{index}.mlp."
        width = plan.dense.intermediate_size
        orders = [self._order(copy) for copy in range(plan.copies)]
        self.experts = torch.cat(orders)[: plan.moe.num_experts * plan.expert_size].view(-1, plan.expert_size)
        size = plan.moe.shared_expert_intermediate_size
        part = torch.randperm(width, generator=self._generator("shared_expert/part"))[: size % width].sort().values
        self.shared = torch.cat([torch.arange(width)] * (size // width) + [part])
        times = self.shared.bincount(minlength=width).double()
        if plan.settings.scale == "none":
            self.routed_factor = torch.ones(width, dtype=torch.float64)
            self.shared_factor = torch.ones(size, dtype=torch.float64)
            return
        # What the shared expert does not hold is the routed experts' alone.
        share = (times > 0).double() * plan.settings.shared_share
        self.routed_factor = (1 - share) * plan.routed_scale
        # Its gate is 0 at first, so that it gives sigmoid(0) = 1/2 of its output.
        self.shared_factor = (2 * share / times.clamp(min=1))[self.shared]

    def _generator(self, what: str) -> torch.Generator:
        return named_generator(self._plan.settings.seed, f"upcycle/{self._prefix}{what}")

    def _order(self, copy: int) -> torch.Tensor:
        width = self._plan.dense.intermediate_size
        if not self._plan.shuffles:
            return torch.arange(width)
        return torch.randperm(width, generator=self._generator(f"copy/{copy}"))

    def router(self) -> torch.Tensor:
        """``[E, D]`` float32."""
        count, parts = self._plan.moe.num_experts, 1
        name, std = f"{self._prefix}gate.weight", self._plan.dense.initializer_range
        if self._plan.router == "even":
            return torch.zeros(count, self._plan.dense.hidden_size)
        if self._plan.router == "groups":
            parts = self._plan.dense.intermediate_size // self._plan.expert_size
        rows = initial_value(name, (count // parts, self._plan.dense.hidden_size), self._plan.settings.seed, std)
        return rows.repeat_interleave(parts, dim=0)

    def gate_up(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """``[E, 2, F, D]`` from ``[I, D]`` each: gate first."""
        found = gate.new_empty(len(self.experts), 2, self._plan.expert_size, gate.shape[1])
        for expert, indices in enumerate(self.experts):
            for place, (name, matrix) in enumerate((("gate", gate), ("up", up))):
                torch.index_select(matrix, 0, indices, out=found[expert, place])
                self._reinitialize(found[expert, place], f"experts/{expert}", name)
        return found

    def down(self, down: torch.Tensor) -> torch.Tensor:
        """``[E, D, F]`` from ``[D, I]``."""
        scaled = self._scaled(down, self.routed_factor)
        found = down.new_empty(len(self.experts), down.shape[0], self._plan.expert_size)
        for expert, indices in enumerate(self.experts):
            torch.index_select(scaled, 1, indices, out=found[expert])
            self._reinitialize(found[expert].T, f"experts/{expert}", "down")
        return found

    def shared_up(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """``[S, D]`` from ``[I, D]``; ``name``: gate or up."""
        found = matrix.index_select(0, self.shared)
        if self._plan.settings.reinitialize_shared:
            self._reinitialize(found, "shared_expert", name)
        return found

    def shared_down(self, down: torch.Tensor) -> torch.Tensor:
        """``[D, S]`` from ``[D, I]``."""
        found = self._scaled(down.index_select(1, self.shared), self.shared_factor)
        if self._plan.settings.reinitialize_shared:
            self._reinitialize(found.T, "shared_expert", "down")
        return found

    def _scaled(self, matrix: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Columns multiplied by ``factor`` in float64 and rounded once; the same bits where all factors are 1."""
        if bool((factor == 1).all()):
            return matrix
        found = torch.empty_like(matrix)
        for row, line in zip(found, matrix, strict=True):
            row.copy_(line.double() * factor)
        return check_cast(f"{self._prefix}down_proj, scaled by up to {factor.max():g},", factor, found)

    def _reinitialize(self, matrix: torch.Tensor, owner: str, name: str) -> None:
        """Draw a share of ``matrix [F, D]`` anew, in place: whole rows, which are the same for gate, up and down of one
        owner, or single elements."""
        plan = self._plan
        if plan.settings.reinitialize_what == "indices":
            rows = torch.randperm(len(matrix), generator=self._generator(f"{owner}/indices"))
            rows = rows[: plan.reinitialized(len(matrix))]
            replaced = matrix[rows]
        else:
            flat = torch.randperm(matrix.numel(), generator=self._generator(f"{owner}/{name}/elements"))
            flat = flat[: plan.reinitialized(matrix.numel())]
            rows, columns = flat // matrix.shape[1], flat % matrix.shape[1]
            replaced = matrix[rows, columns]
        if not replaced.numel():
            return
        mean, std = 0.0, plan.dense.initializer_range
        if plan.settings.reinitialize_std == "replaced":
            mean, std = _moments(replaced)
        drawn = torch.empty(replaced.shape).normal_(generator=self._generator(f"{owner}/{name}/values"))
        drawn.mul_(std).add_(mean)
        if plan.settings.reinitialize_what == "indices":
            matrix[rows] = drawn.to(matrix.dtype)
        else:
            matrix[rows, columns] = drawn.to(matrix.dtype)


def _moments(values: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation, by numpy, whose sums do not depend on the number of threads."""
    array = values.to(torch.float64, copy=True).numpy()
    mean = np.mean(array)
    array -= mean
    return float(mean), float(np.sqrt(np.square(array, out=array).sum() / max(1, array.size - 1)))
