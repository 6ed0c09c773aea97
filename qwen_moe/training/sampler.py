"""Samples answers from the model that is being trained, with the weights that this rank's layout already holds."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from parallel.sequence import Batch
from parallel.stages import ranks_of_stages
from qwen_moe.config import RunConfig
from qwen_moe.data.ranks import same_on_all_ranks
from qwen_moe.data.samples import IGNORE
from qwen_moe.generation.engine import Completion, Engine, Limits
from qwen_moe.generation.ranks import ShardedRunner, gather_shares
from qwen_moe.generation.sampling import Sampling
from qwen_moe.rollout.queries import Query
from qwen_moe.sharding.model import ParallelModel
from qwen_moe.training.episode_files import EpisodeFiles
from qwen_moe.training.log_probs import label_log_probs
from qwen_moe.training.step import Trainer


class PolicySampler:
    """``end_tokens`` end an answer; ``text`` decodes tokens; ``batch``: answers at a time.

    Every dp and cp rank samples the answers to its own prompts (`share`), which it reads whole. While it samples, FSDP's
    parameters are gathered: a rank holds its tp, ep and pp part in the compute dtype.
    """

    def __init__(
        self, trainer: Trainer, end_tokens: Sequence[int], text: Callable[[list[int]], str], batch: int
    ) -> None:
        self.trainer, self._ends, self._text, self._limits = trainer, list(end_tokens), text, Limits(sequences=batch)
        # FSDP gathers the parts of a model only after a forward pass through all of it.
        label_log_probs(trainer, [_padding(trainer.config)])

    def share(self, count: int) -> range:
        """The numbers of those of ``count`` prompts that this dp and cp rank samples for."""
        data = self.trainer.grids.data
        return range(data.index, count, data.size)

    def _holders(self) -> list[int] | None:
        pp = self.trainer.grids.pp.size
        schedule, per_rank = self.trainer.config.parallel.schedule, self.trainer.layout.per_rank
        return None if pp == 1 else ranks_of_stages(schedule, pp, per_rank)

    def sample_episode(
        self, files: EpisodeFiles, queries: Sequence[tuple[int, Query]], sampling: Sampling, weights: str
    ) -> None:
        """Sample the answers to ``queries``, each with its place in the run, into ``files``. ``weights``: a hash of those
        that sample. All ranks must call it together."""
        grids, config = self.trainer.grids, self.trainer.config
        assert config.rollout is not None
        same_on_all_ranks(files.begin)
        own = self.share(len(queries))
        prompts = [queries[place][1].tokens for place in own]
        routing = config.rollout.replay and bool(config.model.moe_layers)
        found = self.sample(prompts, sampling, [queries[place][0] for place in own], routing=routing)
        if grids.tp.index == grids.pp.index == 0:
            files.write_part(grids.data.index, own, prompts, found)
        dist.barrier()
        same_on_all_ranks(lambda: files.end_sampling(grids.data.size, weights, {"queries": [q.id for _, q in queries]}))

    def answers(self, queries: Sequence[Query], sampling: Sampling) -> list[list[Completion]]:
        """Answers to ``queries``, on every rank. All ranks must call it together."""
        own = self.share(len(queries))
        found = self.sample([queries[number].tokens for number in own], sampling, list(own))
        return gather_shares(found, self.trainer.grids, len(queries))

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        numbers: Sequence[int],
        *,
        routing: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """Answers to this rank's ``prompts``, which ``numbers`` identify. All ranks must call it together."""
        trainer = self.trainer
        for part in trainer.model.parts:
            part.eval()
        _gather(trainer.model)
        try:
            runner = ShardedRunner(trainer.model, trainer.grids, trainer.device, self._holders())
            engine = Engine(runner, trainer.config.model, end_tokens=self._ends, text=self._text, limits=self._limits)
            return engine.generate(prompts, sampling, numbers=numbers, routing=routing, progress=progress)
        finally:
            trainer.model.reshard()


def _padding(config: RunConfig) -> Batch:
    """A micro-batch of nothing but padding."""
    shape = config.training.micro_batch_size, config.data.sequence_length
    zeros = torch.zeros(shape, dtype=torch.int64)
    return {
        "input_ids": zeros,
        "labels": torch.full(shape, IGNORE),
        "document_starts": zeros,
        "position_ids": torch.arange(shape[1]).expand(shape).contiguous(),
        "counted": torch.zeros(shape, dtype=torch.bool),
    }


def _gather(model: ParallelModel) -> None:
    """Gather FSDP's parameters, in the compute dtype, until `ParallelModel.reshard`."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
