"""Load balancing of experts: the auxiliary loss at every scope, router z-loss, and the aux-loss-free bias.

For one MoE layer with E experts and top-k routing, let c_e be how many of T tokens chose expert e and P_e the sum of
its router probability over tokens (both sums, from RouterStatistics). With f_e = c_e / (T k), which sums to 1,

    balance loss = E * sum_e f_e * P_e / T            (arXiv 2101.03961, equations 4-6; 1 when perfectly balanced)

The scopes differ in the tokens that f is counted over:

* ``micro_batch``: the micro-batch of one rank. ``sequence``: each sequence by itself.
* ``global_batch`` (arXiv 2501.11873): all ranks and all micro-batches of the step up to and including this one. The
  counts are buffered and cleared after the optimizer step.
* ``huggingface``: as transformers' load_balancing_loss_func: all layers of a micro-batch are pooled before the product
  f_e * P_e, and f sums to k instead of 1.

Every loss is a sum over ranks and micro-batches of terms that are divided by the tokens of the global batch, a number known
beforehand. f may come from all ranks, but P is this micro-batch's own, so nothing is divided by a group size. Layers are
summed (``huggingface`` pools them).
"""

from dataclasses import dataclass, field

import torch

from parallel.collectives import all_reduce_sum
from parallel.mesh import Axis
from parallel.sequence import SequenceShard
from qwen_moe.config import BalanceConfig
from qwen_moe.models.moe.router import RouterStatistics


@dataclass
class Balancer:
    """Computes the auxiliary losses of one stage module. `end_step` returns this rank's own counts of the step.

    ``sequence``: the split of a sequence over ranks. ``stage``: all ranks with these layers, over which a global batch is
    split.
    """

    config: BalanceConfig
    num_experts: int
    top_k: int
    sequence: SequenceShard
    stage: Axis
    _local: list[torch.Tensor] = field(default_factory=list)
    _dropped: list[torch.Tensor] = field(default_factory=list)
    _buffer: torch.Tensor | None = None

    def loss(
        self, router: RouterStatistics, tokens: int | torch.Tensor, global_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(balance loss, z-loss) of one micro-batch, before their coefficients: this rank's share of the step's loss.
        ``tokens``: of the micro-batch over all ranks of ``sequence``, or of each of its sequences ``[B]`` where padding is
        left out; ``global_tokens``: of the step. ``router`` has the shapes of LossSums.router."""
        self._local.append(router.counts.sum(1))
        self._dropped.append(router.dropped.sum(1))
        z_loss = router.z_sum.sum() / global_tokens
        return self._balance(router, tokens) / global_tokens, z_loss

    def _balance(self, router: RouterStatistics, tokens: int | torch.Tensor) -> torch.Tensor:
        """This rank's share of the balance loss times the micro-batch's tokens. f counts all ranks of its scope. The
        probabilities are this rank's own, so that the sum over ranks is the loss and needs no division."""
        scope, experts, k = self.config.scope, self.num_experts, self.top_k
        dtype = router.prob_sum.dtype
        if scope == "sequence":
            counts = self.sequence.sum(router.counts)
            per_sequence = tokens // counts.shape[1] if isinstance(tokens, int) else _not_zero(tokens.unsqueeze(1))
            fraction = counts.to(dtype) / (per_sequence * k)
            return experts * (fraction * router.prob_sum).sum()
        prob_sum = router.prob_sum.sum(1)
        if scope == "global_batch":
            chosen = all_reduce_sum(router.counts.sum(1), self.stage)
            self._buffer = chosen if self._buffer is None else self._buffer + chosen
            counts = self._buffer
        else:
            counts = self.sequence.sum(router.counts.sum(1))
        if scope == "huggingface":
            layers = prob_sum.shape[0]
            pooled = tokens if isinstance(tokens, int) else _not_zero(tokens.sum())
            fraction = counts.sum(0).to(dtype) / (layers * pooled)
            return experts * (fraction * prob_sum.sum(0) / layers).sum()
        # Every token makes exactly k choices, so a layer's choices are k times its tokens.
        fraction = counts.to(dtype) / _not_zero(counts[0].sum()).to(dtype)
        return experts * (fraction * prob_sum).sum()

    @property
    def has_counts(self) -> bool:
        """Whether this step has counts; False for a stage module without MoE layers."""
        return bool(self._local)

    def end_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's expert counts ``[L, E]`` and dropped choices ``[L]`` of the step, int64; clear the buffers."""
        counts, dropped = torch.stack(self._local).sum(0), torch.stack(self._dropped).sum(0)
        self._local, self._dropped, self._buffer = [], [], None
        return counts, dropped


def _not_zero(tokens: torch.Tensor) -> torch.Tensor:
    """Numbers of tokens to divide by: 1 where there is only padding, which chose no expert."""
    return tokens.clamp_min(1)


@torch.no_grad()
def update_expert_bias(biases: list[torch.Tensor], counts: torch.Tensor, rate: float) -> None:
    """Move each MoE layer's selection bias ``[E]`` by ``rate`` against its load error (arXiv 2408.15664, algorithm 1):
    b_e += rate * sign(mean load - load of e). ``counts [L, E]`` cover the whole step."""
    load = counts.double()
    error = load.mean(1, keepdim=True) - load
    for bias, layer_error in zip(biases, error, strict=True):
        bias.add_(rate * layer_error.sign().to(bias.dtype))


def maximum_violation(counts: torch.Tensor) -> list[float]:
    """Per layer, the relative excess of the fullest expert over the mean load: max / mean - 1 (arXiv 2408.15664)."""
    load = counts.double()
    return (load.amax(1) / load.mean(1) - 1).tolist()
