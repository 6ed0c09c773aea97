"""Generation with a model that is split over ranks: tensor, expert and pipeline parallel.

Every rank of a pipeline and of a tensor-parallel group follows the same batches and draws the same tokens; dp and cp ranks
have prompts of their own. Shapes: N new tokens, n tp ranks, D hidden, V vocabulary; of routing, see `routing`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

from parallel.collectives import all_gather_single, all_reduce_sum, gather_sequence
from parallel.gemm import linear
from parallel.kernels.interface import Kernels
from parallel.mesh import Grids
from parallel.stages import split_layers
from parallel.tensor import split_range
from qwen_moe.checkpoint.finite import check_cast, check_finite
from qwen_moe.checkpoint.tensor_store import TensorSource
from qwen_moe.config import ModelConfig
from qwen_moe.generation.cache import SequenceCache
from qwen_moe.generation.likelihood import of_labels
from qwen_moe.generation.routing import experts_of_pass
from qwen_moe.models.attention.cache import Cache
from qwen_moe.models.flops import layer_costs
from qwen_moe.models.init import keep_statistics_dtypes
from qwen_moe.sharding.model import ParallelModel, build_parts

Item = TypeVar("Item")


def load_sharded(
    config: ModelConfig, source: TensorSource, grids: Grids, dtype: torch.dtype, device: torch.device, where: str
) -> ParallelModel:
    """This rank's part of the model, filled from ``source`` one tensor at a time. No rank holds a whole model, and weights
    are not cut over data-parallel ranks."""
    costs = layer_costs(config, 1)
    layers = split_layers(costs.layers, grids.pp.size, first=costs.embedding, last=costs.head)
    model = build_parts(
        config, grids, layers, [grids.pp.index], recompute="none", dtype=dtype, kernels=Kernels(grids.tp)
    )
    available = source.shapes()
    (part,) = model.parts
    part.to_empty(device=device)
    keep_statistics_dtypes(part)
    with torch.no_grad():
        for name, tensor in part.state_dict().items():
            if name not in available:
                tensor.zero_()  # only expert biases may be absent: every parameter was checked
                continue
            stored = check_finite(name, source.read(name), where)
            if name in model.placements:
                place = model.placements[name]
                for dim, (offset, size) in enumerate(zip(place.offsets, place.sizes, strict=True)):
                    stored = stored.narrow(dim, offset, size)
            check_cast(name, stored, tensor.copy_(stored))
    part.eval()
    return model


class ShardedRunner:
    """A `Runner` of ``model``, whose ranks are those of ``grids``. ``holders``: the pipeline rank of each stage; by default
    one on each rank, in order."""

    def __init__(
        self, model: ParallelModel, grids: Grids, device: torch.device, holders: Sequence[int] | None = None
    ) -> None:
        self._parts, self._config = dict(sorted(zip(model.stages, model.parts, strict=True))), model.config
        self._holders = list(range(grids.pp.size)) if holders is None else list(holders)
        assert [stage for stage, rank in enumerate(self._holders) if rank == grids.pp.index] == list(self._parts)
        self._grids, self.device, self._vocabulary = grids, device, model.config.vocab_size
        self.first_head = grids.tp.index * model.config.num_attention_heads // grids.tp.size
        # Experts of one exchange wait for each other: all its ranks run the same number of passes.
        self._in_step = grids.data.size > 1 and grids.exchange.size > 1
        self._hidden, self.dtype = model.config.hidden_size, next(model.parameters()).dtype

    def share_of(self, items: Sequence[Item]) -> list[Item]:
        """The prompts of this dp and cp rank."""
        return list(items[self._grids.data.index :: self._grids.data.size])

    @torch.no_grad()
    def logits(
        self, ids: torch.Tensor, cache: SequenceCache, wanted: torch.Tensor, experts: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """See `Runner`. Ranks without the last stage return ``[len(wanted), 0]``."""
        if self._in_step:
            self._anyone(True)
        states = self._pass(ids, cache, wanted, experts)
        return states if states.shape[1] == 0 else self._head(states)

    @torch.no_grad()
    def log_probs(
        self, ids: torch.Tensor, cache: Cache, wanted: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Runner`."""
        if self._in_step:
            self._anyone(True)
        states = self._pass(ids, cache, wanted)
        if states.shape[1] == 0:  # the rank of the last stage knows
            log_probs, best = labels.new_zeros(len(labels), dtype=torch.float64), torch.zeros_like(labels)
        else:
            log_probs, best = of_labels(states, labels, self._head)
        best, log_probs = self.share(best, log_probs)
        return log_probs, best

    def of_all_layers(self, experts: torch.Tensor) -> torch.Tensor:
        pp, config = self._grids.pp, self._config
        if pp.size == 1:
            return experts
        layers = (layer for part in self._parts.values() for layer in part.model.layers)
        here = [layer.self_attn.layer for layer in layers if layer.is_moe]
        places = [config.moe_layers.index(layer) for layer in here]
        # int32, because neither gloo nor NCCL sums int16. Each layer is another stage's, so a sum with zeros joins them.
        whole = torch.zeros(len(experts), len(config.moe_layers), experts.shape[2], dtype=torch.int32)
        whole[:, places] = experts.to(torch.int32)
        return all_reduce_sum(whole.to(self.device), pp).to("cpu", torch.int16)

    def share(self, tokens: torch.Tensor, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the last stage has drawn, on every stage."""
        pp = self._grids.pp
        if pp.size == 1:
            return tokens, log_probs
        drawn = torch.stack([tokens.double(), log_probs.double()])
        assert pp.group is not None
        dist.broadcast(drawn, self._global_rank(self._holders[-1]), group=pp.group)
        return drawn[0].to(tokens.dtype), drawn[1]

    def finish(self) -> None:
        """Called when this group has no prompts left: helps others, whose tokens visit this rank's experts."""
        if not self._in_step:
            return
        idle = torch.zeros(1, dtype=torch.int64, device=self.device)
        while self._anyone(False):
            self._pass(idle, _NoCache(), idle[:0])

    def _anyone(self, busy: bool) -> bool:
        flag = torch.tensor([int(busy)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    @torch.no_grad()
    def _pass(
        self,
        ids: torch.Tensor,
        cache: Cache,
        wanted: torch.Tensor,
        experts: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The last hidden states ``[len(wanted), D]``, and ``[len(wanted), 0]`` on ranks without the last stage."""
        tp, last = self._grids.tp, len(self._holders) - 1
        padded = F.pad(ids, (0, -len(ids) % tp.size))
        x, found = padded.unsqueeze(0), []
        for stage, part in self._parts.items():
            if stage > 0:
                x = self._from_stage_before(stage, x, len(padded) // tp.size)
            chosen: list[torch.Tensor] | None = None if experts is None else []
            x = part.read(x, cache, chosen=chosen)
            if chosen is not None:
                of_layers = [self._of_all_tokens(held)[: len(ids)] for held in chosen]
                found.append(experts_of_pass(part, of_layers, wanted, len(ids)))
            if stage < last and self._holders[stage + 1] != self._grids.pp.index:
                dist.send(x.contiguous(), self._global_rank(self._holders[stage + 1]), group=self._grids.pp.group)
        if experts is not None:
            experts.append(torch.cat(found, 1))
        if last not in self._parts:
            return x.new_empty(len(wanted), 0)
        states = x if tp.size == 1 else gather_sequence(x, tp)
        return states[0, wanted]

    def _from_stage_before(self, stage: int, x: torch.Tensor, tokens: int) -> torch.Tensor:
        """What the stage before ``stage`` has computed: ``x``, if it is this rank's too."""
        pp, holder = self._grids.pp, self._holders[stage - 1]
        if holder == pp.index:
            return x
        received = torch.empty(1, tokens, self._hidden, dtype=self.dtype, device=self.device)
        dist.recv(received, self._global_rank(holder), group=pp.group)
        return received

    def _of_all_tokens(self, held: torch.Tensor) -> torch.Tensor:
        """``[N / n, K] -> [N, K]``: each tp rank has routed its part of the tokens."""
        tp = self._grids.tp
        return held if tp.size == 1 else gather_sequence(held.unsqueeze(0), tp)[0]

    def _global_rank(self, pipeline_rank: int) -> int:
        assert self._grids.pp.group is not None
        return dist.get_global_rank(self._grids.pp.group, pipeline_rank)

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        """``[N, D] -> [N, V]``: each tp rank computes the logits of its part of the vocabulary."""
        tp, weight = self._grids.tp, self._parts[len(self._holders) - 1].head_weight
        logits = linear(states, weight)
        if tp.size == 1:
            return logits
        most = -(-self._vocabulary // tp.size)
        mine = F.pad(logits, (0, most - logits.shape[1])).contiguous()
        gathered = mine.new_empty(tp.size * mine.shape[0], most)
        all_gather_single(gathered, mine, group=tp.group)
        sizes = [split_range(self._vocabulary, replace(tp, index=index))[1] for index in range(tp.size)]
        return torch.cat([part[:, :size] for part, size in zip(gathered.chunk(tp.size), sizes, strict=True)], 1)


class _NoCache:
    """The cache of an idle pass: its token belongs to no sequence."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wanted_only: bool) -> torch.Tensor:
        return torch.zeros_like(q)


def gather_shares(mine: list[Item], grids: Grids, count: int) -> list[Item]:
    """The results of all dp and cp ranks, in the order of the ``count`` prompts that `share_of` dealt out."""
    shares: list[list[Item]] = [[] for _ in range(grids.data.size)]
    dist.all_gather_object(shares, mine, group=grids.data.group)
    return [shares[i % grids.data.size][i // grids.data.size] for i in range(count)]
