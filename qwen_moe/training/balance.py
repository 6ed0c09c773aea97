"""Load balancing of experts: the auxiliary loss at every scope, router z-loss, and the aux-loss-free bias.

For one MoE layer with E experts and top-k routing, let c_e be how many of T tokens chose expert e and P_e the sum of
its router probability over tokens (both sums, from RouterStatistics). With f_e = c_e / (T k), which sums to 1,

    balance loss = E * sum_e f_e * P_e / T            (arXiv 2101.03961, equations 4-6; 1 when perfectly balanced)

The scopes differ in the tokens that f is counted over:

* ``micro_batch``: the micro-batch of one rank. ``sequence``: each sequence by itself.
* ``global_batch`` (arXiv 2501.11873): all ranks and all micro-batches of the step up to and including this one. The
  counts and their number of tokens are buffered together and cleared after the optimizer step.
* ``huggingface``: what transformers' load_balancing_loss_func computes: all layers of a micro-batch pooled before the
  product, and f summing to k instead of 1.

Everything is a sum over ranks and micro-batches of terms divided by the tokens of the global batch, known beforehand:
f may come from all ranks, but P is this micro-batch's own, so nothing is divided by a group size. Layers are added up
(except for ``huggingface``, which pools them).
"""

from dataclasses import dataclass, field

import torch
from torch.distributed.device_mesh import DeviceMesh

from parallel.data import all_reduce_sum
from qwen_moe.config import BalanceConfig
from qwen_moe.models.router import RouterStatistics


@dataclass
class Balancer:
    """Forms the auxiliary losses of each micro-batch of a step; `end_step` returns the step's expert counts."""

    config: BalanceConfig
    num_experts: int
    top_k: int
    mesh: DeviceMesh
    _local: list[torch.Tensor] = field(default_factory=list)
    _buffer: torch.Tensor | None = None

    def loss(self, router: RouterStatistics, tokens: int, global_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(balance loss, z-loss) of one micro-batch of ``tokens`` tokens, before their coefficients, each this
        micro-batch's share of a sum over the ``global_tokens`` of the step. Shapes as in LossSums.router."""
        counts = router.counts.sum(1)
        self._local.append(counts)
        z_loss = router.z_sum.sum() / global_tokens
        return self._balance(router, counts, tokens) / global_tokens, z_loss

    def _balance(self, router: RouterStatistics, counts: torch.Tensor, tokens: int) -> torch.Tensor:
        """The balance loss times this micro-batch's tokens."""
        scope, experts, k = self.config.scope, self.num_experts, self.top_k
        dtype = router.prob_sum.dtype
        if scope == "sequence":
            per_sequence = tokens // router.counts.shape[1]
            fraction = router.counts.to(dtype) / (per_sequence * k)
            return experts * (fraction * router.prob_sum).sum()
        prob_sum = router.prob_sum.sum(1)
        if scope == "huggingface":
            layers = prob_sum.shape[0]
            fraction = counts.sum(0).to(dtype) / (layers * tokens)
            return experts * (fraction * prob_sum.sum(0) / layers).sum()
        if scope == "global_batch":
            seen = all_reduce_sum(counts, self.mesh)
            self._buffer = seen if self._buffer is None else self._buffer + seen
            counts = self._buffer
        # Every token makes exactly k choices, so the choices of a layer are k times its tokens.
        fraction = counts.to(dtype) / counts[0].sum().to(dtype)
        return experts * (fraction * prob_sum).sum()

    def end_step(self) -> torch.Tensor:
        """Expert counts of the whole step over all ranks, ``[L, E]`` int64; the buffers are cleared."""
        counts = (
            self._buffer if self._buffer is not None else all_reduce_sum(torch.stack(self._local).sum(0), self.mesh)
        )
        self._local, self._buffer = [], None
        return counts


@torch.no_grad()
def update_expert_bias(biases: list[torch.Tensor], counts: torch.Tensor, rate: float) -> None:
    """Move each MoE layer's selection bias ``[E]`` by ``rate`` against its load error (arXiv 2408.15664, algorithm 1):
    b_e += rate * sign(mean load - load of e). ``counts [L, E]`` are the whole step's."""
    load = counts.double()
    error = load.mean(1, keepdim=True) - load
    for bias, layer_error in zip(biases, error, strict=True):
        bias.add_(rate * layer_error.sign().to(bias.dtype))


def maximum_violation(counts: torch.Tensor) -> list[float]:
    """Per layer, how far the fullest expert is above the mean load, relative: max / mean - 1 (arXiv 2408.15664)."""
    load = counts.double()
    return (load.amax(1) / load.mean(1) - 1).tolist()
