"""Predicts the seconds of a training step: each layer's GEMMs, attention and memory traffic, the communication that they
do not hide, the pipeline's idle time and the optimizer.

We measured none of this on a GPU. The constants (`hardware.Efficiency`, `software.Software`) are the same for every model
and layout, and `published.py` compares the predictions with published runs.
"""

import math
from dataclasses import dataclass

from parallel.mesh import Layout
from parallel.stages import V_SHAPED, stages_of_rank
from qwen_moe.config import ModelConfig
from qwen_moe.models.flops import flops_per_token
from qwen_moe.planning.context import ContextTime
from qwen_moe.planning.hardware import Cluster
from qwen_moe.planning.layouts import Choice
from qwen_moe.planning.rates import BF16, Rates
from qwen_moe.planning.schedules import idle_micro_batches
from qwen_moe.planning.shares import Shares, add
from qwen_moe.planning.software import Software
from qwen_moe.planning.times import Part, StepTime, total
from qwen_moe.sharding.layout import ContextPlan, RunLayout

NO_CONTEXT = ContextPlan()


# Of a pipeline rank: its MoE layers, its dense layers, whether it has the embedding, whether it has the head.
Rank = tuple[int, int, bool, bool]


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """Seconds of an average rank: ``gather`` of all its weights, ``reduce`` of all its gradients, both with their copies
    (``gather_copies``, ``reduce_copies``), which nothing hides, and ``update`` of the optimizer."""

    gather: float
    reduce: float
    gather_copies: float
    reduce_copies: float
    update: float


class StepTimeModel:
    """Predicts step times of ``model`` on a cluster.

    ``imbalance`` is the number of rows on the busiest expert rank over the average. Two settings describe published runs:
    ``score_factor`` scales the FLOPs of attention scores, and ``recomputed`` is the share of a forward that backward
    repeats.
    """

    def __init__(
        self,
        model: ModelConfig,
        sequence: int,
        cluster: Cluster,
        software: Software,
        imbalance: float = 1.0,
        score_factor: float = 1.0,
        recomputed: float = 0.0,
    ) -> None:
        self.model, self.sequence, self.software, self.imbalance = model, sequence, software, imbalance
        self.gpu, self.network, self.gpus_per_node = cluster.gpu, cluster.network, cluster.gpus_per_node
        self.score_factor, self.recomputed = score_factor, recomputed
        self.shares = Shares(model)
        self._moe_layers = frozenset(model.moe_layers)
        self.rates = Rates(cluster, software)
        self.context = ContextTime(model, sequence, self.rates)
        self._layers: dict[tuple[object, ...], Part] = {}
        self._ends_of: dict[tuple[object, ...], Part] = {}
        self._ranks: dict[tuple[object, ...], list[Rank]] = {}
        self._means: dict[tuple[object, ...], tuple[Part, float]] = {}
        self._collectives: dict[tuple[Layout, str], Collectives] = {}

    # Communication of layers

    def tp_seconds(self, tp: int, tokens: float, times: float) -> float:
        """``times`` all-gathers or reduce-scatters of hidden states over tp."""
        if tp == 1:
            return 0.0
        time = self.rates.ring(tokens * self.model.hidden_size * BF16, tp, 1) * (1 - self.software.tp_overlap)
        return times * (time + self.rates.latency(tp, 1))

    def all_to_all(self, rows: float, ep: int, etp: int) -> float:
        """Dispatch or combine of ``rows`` hidden states, counted after they are copied for etp."""
        ranks = ep * etp
        if ranks == 1:
            return 0.0
        e, top_k = self.gpu.efficiency, self.model.num_experts_per_tok
        here = self.rates.fewest(ranks, 1)
        nodes = ranks / here
        bytes_ = rows * self.model.hidden_size * BF16
        within = bytes_ * (here - 1) / here / nodes
        across = bytes_ * (nodes - 1) / nodes
        if self.software.once_per_node and nodes > 1:
            across *= min(1.0, nodes * (1 - (1 - 1 / nodes) ** top_k) / top_k)
            within = bytes_ * (here - 1) / here  # the node that receives a token passes it on to its own ranks
        slowest = max(
            within / (self.gpu.nvlink_gb_per_second * 1e9 * e.nvlink),
            across / (self.network.gb_per_second * 1e9 * e.network),
        )
        share = 1.0 if self.software.once_per_node else e.all_to_all
        return slowest / share + self.rates.latency(ranks, 1) * (1 + math.log2(ranks) / 2)

    # Layers, embedding and head

    def layer(self, choice: Choice, moe: bool, context: ContextPlan = NO_CONTEXT) -> Part:
        """Forward and backward of one micro-batch through a layer, with the second forward if it is recomputed."""
        key = (*_layer_key(choice, context), moe)
        if key not in self._layers:
            # Halves that take turns are two micro-batches of half the size.
            count = 2 if choice.overlaps else 1
            one = choice.changed(micro_batch=choice.micro_batch / count)
            part = self._attention(one) + (self._moe(one) if moe else self._feed_forward(one))
            if choice.recompute == "full":
                part = part * (4 / 3)
            part += Part(compute=part.compute * self.recomputed / 3)
            cost = self.context.cost(one, context, self._scores(one))
            part = (part + Part(cp=cost.total(choice.recompute == "full"))) * count
            if choice.overlaps:
                part = self._behind_the_other_half(part, choice.recompute == "full")
            kernels = 1.0 * self.software.dense_kernels
            if moe:
                local = self.model.num_experts / choice.ep
                kernels = self.software.moe_kernels + self.software.expert_kernels * local
            if choice.precision == "fp8":
                kernels *= 1.5
            kernels = count * (kernels + cost.kernels)
            if choice.recompute == "full":
                kernels *= 4 / 3
            launch = kernels * max(self.gpu.kernel_launch_us, self.software.host_us) * 1e-6
            # The host cannot run ahead of an MoE layer, which waits for the sizes of what it will receive.
            waits = max(0.0, launch - part.total)
            self._layers[key] = part + Part(compute=waits)
        return self._layers[key]

    def _behind_the_other_half(self, part: Part, recompute: bool) -> Part:
        """``part`` of two halves without the all-to-alls that the other half's work hides. A layer that is recomputed ends
        with all rows back: the last of its four messages has nothing to hide behind, in either direction."""
        share = self.software.halves_overlap * (0.75 if recompute else 1.0)
        hidden = min(share * part.ep, part.compute)
        return part + Part(ep=-hidden, experts=-hidden)

    def context_seconds(self, choice: Choice, context: ContextPlan) -> float:
        """What ``context`` adds to a layer of ``choice``, without recomputation."""
        return self.context.cost(choice, context, self._scores(choice)).total(recompute=False)

    def _scores(self, choice: Choice) -> float:
        """Forward of the attention scores. Ranks of a sequence have the same number of query-key pairs."""
        tokens = choice.micro_batch * self.sequence / choice.cp
        heads, keys = self.model.num_attention_heads / choice.tp, self.model.keys_per_query(self.sequence)
        flops = 4 * heads * self.model.head_dim * keys * tokens * self.score_factor
        return flops / (self.gpu.peak_tflops["bf16"] * 1e12 * self.gpu.efficiency.attention)

    def _attention(self, choice: Choice) -> Part:
        m, tp, precision = self.model, choice.tp, choice.precision
        tokens = choice.micro_batch * self.sequence / choice.cp
        d, c = m.hidden_size, m.head_dim
        heads, kv = m.num_attention_heads / tp, max(1.0, m.num_key_value_heads / tp)
        gemms = self.rates.gemm(tokens, (heads + 2 * kv) * c, d, precision) + self.rates.gemm(
            tokens, d, heads * c, precision
        )
        scores = 3.5 * self._scores(choice)  # backward has five GEMMs and forward two
        # Two norms and two residual sums on this rank's tokens, then RoPE and copies to the kernel's layout.
        moved = self.rates.moved(tokens / tp * d, 24) + self.rates.moved(tokens * (heads + 2 * kv) * c, 14)
        moved += self.rates.moved(tokens * (heads + kv) * c, 8) if m.qk_norm else 0.0
        return Part(compute=gemms + scores + moved, tp=self.tp_seconds(tp, tokens, 5))

    def _feed_forward(self, choice: Choice, hidden: int = 0) -> Part:
        d, f = self.model.hidden_size, (hidden or self.model.intermediate_size) / choice.tp
        tokens = choice.micro_batch * self.sequence / choice.cp
        gemms = self.rates.gemm(tokens, 2 * f, d, choice.precision) + self.rates.gemm(tokens, d, f, choice.precision)
        moved = self.rates.moved(tokens * f, 8) + self.rates.moved(tokens / choice.tp * d, 4)
        return Part(compute=gemms + moved, tp=self.tp_seconds(choice.tp, tokens, 5))

    def _moe(self, choice: Choice) -> Part:
        m, tp, ep, etp = self.model, choice.tp, choice.ep, choice.etp
        d, f, local = m.hidden_size, m.moe_intermediate_size / etp, m.num_experts / ep
        tokens = choice.micro_batch * self.sequence / choice.cp / tp
        rows = tokens * m.num_experts_per_tok * etp
        each = rows / local
        experts = self.rates.gemm(each, 2 * f, d, choice.precision, local, grouped=True)
        experts += self.rates.gemm(each, d, f, choice.precision, local, grouped=True)
        experts += self.rates.moved(rows * f, 8)
        # Sort the rows and sum them with weights; an all-to-all reorders them twice more.
        moved = self.rates.moved(rows * d, 10 if ep * etp == 1 else 18) + self.rates.moved(
            tokens * m.num_experts, 10, 4
        )
        shared = Part()
        if m.shared_expert_intermediate_size:
            shared = self._feed_forward(choice, m.shared_expert_intermediate_size)
        exchange = 4 * self.all_to_all(rows, ep, etp)
        hidden = min(exchange * self.software.ep_overlap, experts + moved)
        if self.software.shared_expert_overlap:
            hidden += min(exchange / 2, shared.compute)
        exposed = exchange - hidden
        return Part(experts + moved, 0.0, exposed, experts + exposed) + shared

    def _ends(self, choice: Choice, first: bool, last: bool) -> Part:
        """The embedding (``first``) and the head (``last``)."""
        key = (choice.tp, choice.cp, choice.micro_batch, first, last)
        if key not in self._ends_of:
            self._ends_of[key] = self._make_ends(choice, first, last)
        return self._ends_of[key]

    def _make_ends(self, choice: Choice, first: bool, last: bool) -> Part:
        tokens = choice.micro_batch * self.sequence / choice.cp
        d, part = self.model.hidden_size, Part()
        if first:
            part += Part(compute=self.rates.moved(tokens / choice.tp * d, 6), tp=self.tp_seconds(choice.tp, tokens, 2))
        if last:
            v = (len(self.model.criteria) or self.model.vocab_size) / choice.tp
            head = self.rates.gemm(tokens, v, d, "bf16") + self.rates.moved(tokens * v, 9, 4)
            part += Part(compute=head, tp=self.tp_seconds(choice.tp, tokens, 2))
        return part

    # The step

    def _stages(self, choice: Choice, layout: RunLayout) -> list[Rank]:
        """What each pipeline rank computes."""
        key = (choice.schedule in V_SHAPED, choice.pp, layout.per_rank, layout.layers)
        if key not in self._ranks:
            found = []
            for rank in range(choice.pp):
                stages = stages_of_rank(choice.schedule, choice.pp, layout.per_rank, rank) if choice.pp > 1 else [0]
                layers = [layer for stage in stages for layer in layout.layers[stage]]
                moe = len(self._moe_layers.intersection(layers))
                found.append((moe, len(layers) - moe, 0 in stages, len(layout.layers) - 1 in stages))
            self._ranks[key] = found
        return self._ranks[key]

    def step(self, choice: Choice, layout: RunLayout) -> StepTime:
        """One step of ``layout.micro_batches`` micro-batches on every data-parallel rank."""
        mean, worst = self._ranks_of(choice, layout)
        busiest = (self.imbalance - 1) * mean.experts
        count = layout.micro_batches
        idle = idle_micro_batches(choice.schedule, choice.pp, count, layout.per_rank)
        forward = mean.compute / 3
        dp, optimizer = self._data_parallel(choice, layout, forward)
        return StepTime(
            compute=count * mean.compute,
            tp=count * mean.tp,
            cp=count * mean.cp,
            ep=count * mean.ep,
            pp=self._pipeline_messages(choice, layout),
            dp=dp,
            bubble=idle * (mean.total + busiest),
            imbalance=count * (worst - mean.total + busiest),
            optimizer=optimizer,
        )

    def _ranks_of(self, choice: Choice, layout: RunLayout) -> tuple[Part, float]:
        """(time of the average pipeline rank, seconds of the slowest one) for one micro-batch."""
        key = (
            _layer_key(choice, layout.context),
            choice.pp,
            layout.per_rank,
            choice.schedule in V_SHAPED,
            layout.layers,
        )
        if key not in self._means:
            ranks, zero = self._stages(choice, layout), Part()
            moe = self.layer(choice, True, layout.context) if any(r[0] for r in ranks) else zero
            dense = self.layer(choice, False, layout.context) if any(r[1] for r in ranks) else zero
            part_of = {r: moe * r[0] + dense * r[1] + self._ends(choice, r[2], r[3]) for r in dict.fromkeys(ranks)}
            mean = total(part_of[rank] for rank in ranks) * (1 / len(ranks))
            self._means[key] = mean, max(part.total for part in part_of.values())
        return self._means[key]

    def _pipeline_messages(self, choice: Choice, layout: RunLayout) -> float:
        if choice.pp == 1:
            return 0.0
        bytes_ = choice.micro_batch * self.sequence / choice.cp / choice.tp * self.model.hidden_size * BF16
        one = self.rates.message(bytes_, choice.pp, layout.layout.stage_size)
        return 2 * one * layout.per_rank * layout.micro_batches * (1 - self.software.pp_overlap)

    def _data_parallel(self, choice: Choice, layout: RunLayout, forward: float) -> tuple[float, float]:
        """(exposed communication, optimizer) of the average rank. A micro-batch's ``forward`` can hide an all-gather."""
        of, hide = self._collectives_of(choice, layout.layout), self.software.dp_overlap
        software, count = self.software, layout.micro_batches
        in_forward = max(0.0, of.gather - hide * forward) + of.gather_copies
        if choice.sharding == "zero3":
            gathers = count * (in_forward + max(0.0, of.gather - hide * 2 * forward) + of.gather_copies)
        elif choice.pp == 1 and software.gathers_each_micro_batch:
            gathers = count * in_forward
        else:
            gathers = in_forward
        in_backward = max(of.reduce * (1 - hide), of.reduce - hide * 2 * forward)
        if choice.gradient_reduction == "every":
            # Where a schedule splits backward, a stage reduces after it and waits.
            each = of.reduce if choice.pp > 1 and choice.schedule in V_SHAPED else in_backward
            return gathers + count * (each + of.reduce_copies), of.update
        at_end = choice.pp > 1 and software.pipeline_reduces_at_end
        return gathers + (of.reduce if at_end else in_backward) + of.reduce_copies, of.update

    def _collectives_of(self, choice: Choice, grid: Layout) -> Collectives:
        key = (grid, choice.precision)
        if key not in self._collectives:
            dense, experts, sharded, copied = self._elements_of(grid)

            def over(bytes_per_element: int) -> float:
                return self.rates.ring(dense * bytes_per_element, grid.dp * grid.cp, grid.tp) + self.rates.ring(
                    experts * bytes_per_element, grid.edp, grid.ep * grid.etp
                )

            # AdamW reads four and writes three numbers of four bytes. The norm reads the gradient; clipping reads and
            # writes it.
            update = sharded * 40 / self.rates.memory
            weight = 1 if choice.precision == "fp8" else BF16
            self._collectives[key] = Collectives(
                gather=over(weight),
                reduce=over(4),
                gather_copies=2 * copied * weight / self.rates.memory,
                reduce_copies=2 * copied * 4 / self.rates.memory,
                update=update,
            )
        return self._collectives[key]

    def _elements_of(self, grid: Layout) -> tuple[float, float, float, float]:
        """(dense elements, expert elements) that an average rank gathers, the elements that its optimizer updates, and those
        gathered that are copied besides, because they are not cut along dim 0."""
        moe, layers = len(self._moe_layers), self.model.num_hidden_layers
        dense = [self.shares.root(grid, True, True)]
        experts = []
        for kind, times in ((True, moe), (False, layers - moe)):
            if times:
                units = self.shares.layer(grid, kind)
                dense += [units[0]] * times
                experts += [*units[1:]] * times
        sums = add(dense), add(experts)
        moved = [unit.padded if self.software.pads_shards else unit.whole for unit in sums]
        sharded = sums[0].sharded + sums[1].sharded
        copied = sums[1].copied if self.software.pads_shards else 0
        return moved[0] / grid.pp, moved[1] / grid.pp, sharded / grid.pp, copied / grid.pp

    def flops(self) -> float:
        """Training FLOPs per token, counted as in `models/flops.py`, with attention scores scaled by ``score_factor``."""
        found = flops_per_token(self.model, self.sequence)
        return found.training + 3 * (self.score_factor - 1) * found.attention_scores


def _layer_key(choice: Choice, context: ContextPlan) -> tuple[object, ...]:
    """What a layer's time depends on."""
    degrees = (choice.tp, choice.cp, choice.ep, choice.etp)
    numerics = (choice.recompute, choice.precision)
    return (*degrees, context.kind, context.heads, choice.micro_batch, *numerics, choice.overlaps)
