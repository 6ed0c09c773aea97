"""What context parallelism costs attention, by kind (`qwen_moe/sharding/context.py`): bytes sent, exposed seconds, copies.

Of ``cp`` ranks, ``heads`` neighbors exchange tokens for heads (Ulysses). Keys and values then travel among the ``cp /
heads`` ranks with the same index, by a ring or an all-gather. Ranks are numbered dp, cp, tp, tp innermost. So ranks that
exchange heads are tp apart, and ranks that exchange keys are tp x heads apart. Shapes of one rank: s tokens, H query heads,
G key/value heads, C head dim.
"""

from dataclasses import dataclass, replace

from qwen_moe.config import ModelConfig
from qwen_moe.planning.layouts import Choice
from qwen_moe.planning.rates import BF16, Rates
from qwen_moe.sharding.layout import ContextPlan

FP32 = 4  # bytes
# Copies and sums in `sharding/context.py` and `models/ops/piece_attention.py`, in bytes for each element. A merge of two
# partial outputs, and the sum of their dq:
_MERGE = 26 + 10
# Keys and values, over forward and backward: zeroed, summed and stacked in each turn of a ring; stacked, put in order,
# summed and split again after an all-gather.
_RING_KEYS, _GATHERED_KEYS = 34, 42
_EXCHANGED = 24  # of an exchange of heads and its backward
_KERNELS_PER_PIECE, _KERNELS_PER_TURN = 16, 8


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a rank sends in one layer: tokens for heads (``exchange``), as many in forward as in backward, and keys and
    values (``keys_*``), of which backward also sends the gradients, in float32. With recomputation (``repeated``) backward
    repeats forward's."""

    exchange: float = 0.0
    keys_forward: float = 0.0
    keys_backward: float = 0.0
    repeated: bool = False

    @property
    def forward(self) -> float:
        return self.exchange + self.keys_forward

    @property
    def backward(self) -> float:
        return self.exchange + self.keys_backward + (self.forward if self.repeated else 0.0)


@dataclass(frozen=True, kw_only=True)
class ContextCost:
    """Seconds of one layer: ``exposed`` communication of its forward and backward, and ``copies``. ``kernels`` that it
    launches beyond those of plain attention."""

    exposed_forward: float = 0.0
    exposed_backward: float = 0.0
    copies: float = 0.0
    kernels: float = 0.0

    def total(self, recompute: bool) -> float:
        """With recomputation backward repeats forward's communication (and a third of the copies)."""
        again = self.exposed_forward + self.copies / 3 if recompute else 0.0
        return self.exposed_forward + self.exposed_backward + self.copies + again


@dataclass(frozen=True)
class _Sizes:
    """Elements on a rank of tp x (outer x heads): all that is exchanged, and afterwards queries and one rank's keys and
    values."""

    outer: int
    exchanged: float
    queries: float
    keys: float


def _sizes(model: ModelConfig, tokens: float, tp: int, cp: int, context: ContextPlan) -> _Sizes:
    heads = context.heads
    kv = max(1.0, model.num_key_value_heads / tp)
    queries = model.num_attention_heads / tp * model.head_dim * tokens
    keys = 2 * max(kv, heads) * model.head_dim * tokens  # a rank needs a whole head
    exchanged = 2 * queries + keys if heads > 1 else 0.0  # q, k, v, and the output back
    return _Sizes(cp // heads, exchanged, queries, keys if heads > 1 else 2 * kv * model.head_dim * tokens)


def traffic(model: ModelConfig, tokens: float, tp: int, cp: int, context: ContextPlan) -> Traffic:
    """``tokens``: on this rank, S / cp of each sequence of the micro-batch. An all-gather is counted as a ring, which NCCL
    makes of it."""
    size, heads = _sizes(model, tokens, tp, cp, context), context.heads
    others = size.outer - 1
    if context.kind == "ring" and size.outer > 1:
        gradients = size.outer * size.keys * FP32  # they end where they belong, one turn later
    else:
        gradients = others * size.keys * FP32
    keys = others * size.keys * BF16
    exchange = size.exchanged * BF16 * (heads - 1) / heads
    return Traffic(exchange=exchange, keys_forward=keys, keys_backward=keys + gradients)


class ContextTime:
    """Seconds that kinds of context parallelism add to a layer of ``model``."""

    def __init__(self, model: ModelConfig, sequence: int, rates: Rates) -> None:
        self.model, self.sequence, self.rates = model, sequence, rates

    def cost(self, choice: Choice, context: ContextPlan, scores: float) -> ContextCost:
        """``scores``: seconds of the attention scores of this micro-batch's forward, behind which a ring hides."""
        if choice.cp == 1:
            return ContextCost()
        tokens = choice.micro_batch * self.sequence / choice.cp
        size = _sizes(self.model, tokens, choice.tp, choice.cp, context)
        sent = self.traffic(choice, context)
        exchange = self._exchange(sent.exchange, context.heads, choice.tp)
        forward = backward = copies = kernels = 0.0
        stride = choice.tp * context.heads
        if size.outer > 1 and context.kind == "ring":
            forward, backward = self._ring(size, stride, scores)
            merges, pieces, each = size.outer + 0.5, 2 * size.outer + 1, _RING_KEYS
            kernels = pieces * _KERNELS_PER_PIECE + size.outer * _KERNELS_PER_TURN
        elif size.outer > 1:
            whole, latency = size.outer * size.keys, self.rates.latency(size.outer, stride)
            forward = self.rates.ring(whole * BF16, size.outer, stride) + latency
            backward = forward + self.rates.ring(whole * FP32, size.outer, stride) + latency
            merges, each = 2.0, _GATHERED_KEYS
            kernels = 4.0 * _KERNELS_PER_PIECE + 2 * _KERNELS_PER_TURN
        if size.outer > 1:
            copies = self.rates.moved(merges * size.queries, _MERGE, 1)
            copies += self.rates.moved(size.outer * size.keys, each, 1)
        if context.heads > 1:
            copies += self.rates.moved(size.exchanged, _EXCHANGED, 1)
            kernels += 4 * _KERNELS_PER_TURN
        return ContextCost(
            exposed_forward=forward + exchange, exposed_backward=backward + exchange, copies=copies, kernels=kernels
        )

    def traffic(self, choice: Choice, context: ContextPlan) -> Traffic:
        """What one layer sends for one micro-batch."""
        tokens = choice.micro_batch * self.sequence / choice.cp
        if choice.cp == 1:
            return Traffic()
        sent = traffic(self.model, tokens, choice.tp, choice.cp, context)
        return replace(sent, repeated=choice.recompute == "full")

    def _ring(self, size: _Sizes, stride: int, scores: float) -> tuple[float, float]:
        """Exposed seconds of forward and backward. In each turn messages travel while the rank attends; the last gradients
        have nothing to hide behind."""
        keys, gradients = (self.rates.message(size.keys * width, size.outer, stride) for width in (BF16, FP32))
        turns, hide = size.outer - 1, self.rates.software.cp_overlap
        each = scores / size.outer

        def exposed(messages: float, work: float) -> float:
            return max(messages * (1 - hide), messages - hide * work)

        # Backward has five GEMMs and forward two.
        return turns * exposed(keys, each), turns * exposed(keys + gradients, 2.5 * each) + gradients

    def _exchange(self, sent: float, ranks: int, stride: int) -> float:
        """Two even all-to-alls (to heads, and back) in which a rank sends ``sent`` bytes."""
        if ranks == 1:
            return 0.0
        gpu, network = self.rates.gpu, self.rates.network
        here = self.rates.fewest(ranks, stride)
        within = sent * (here - 1) / (ranks - 1) / (gpu.nvlink_gb_per_second * 1e9 * gpu.efficiency.nvlink)
        across = sent * (ranks - here) / (ranks - 1) / (network.gb_per_second * 1e9 * gpu.efficiency.network)
        return max(within, across) + 2 * self.rates.latency(ranks, stride)
