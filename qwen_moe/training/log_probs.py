"""The log-probabilities that present or earlier weights give to labels, for every rank, whatever the layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed import all_reduce

from parallel.pipeline import Pipeline, Sequential
from parallel.sequence import Batch
from qwen_moe.sharding.build import build_engine, build_model
from qwen_moe.sharding.model import ParallelModel
from qwen_moe.training.step import Trainer


@dataclass
class Frozen:
    """Another model of the trainer's layout, which is not trained, and the engine that runs it."""

    model: ParallelModel
    engine: Sequential | Pipeline


def frozen_model(trainer: Trainer) -> Frozen:
    """A second model with initial values, for `restore.load_start`. All ranks must call it."""
    config, layout = trainer.config, trainer.layout
    model = build_model(config, layout, trainer.grids, trainer.device)
    model.use_head(trainer.objective.head)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    engine = build_engine(config, layout, model, lambda output, batch: output.sum(), trainer.device)
    return Frozen(model, engine)


@torch.no_grad()
def label_log_probs(trainer: Trainer, micro_batches: Sequence[Batch], of: Frozen | None = None) -> list[torch.Tensor]:
    """For each of this data-parallel rank's micro-batches ``[b, S]``, the labels' log-probabilities of all dp ranks
    ``[dp, b, S]``, on the CPU; 0 where a label is not valid. float32, or float64 for models in float64. ``of``: the model,
    by default the trainer's.

    All ranks must call it, with the same number of micro-batches. In the layout that trains, the values are those of the
    next training step's forward pass, to the bit.
    """
    dp, sequence = trainer.grids.dp, trainer.sequence
    model, engine = (trainer.model, trainer.engine) if of is None else (of.model, of.engine)
    for part in model.parts:
        part.eval()
    found = []
    for batch in micro_batches:
        rows, length = batch["labels"].shape
        outputs = engine.forward([trainer.to_device(batch)])
        dtype = torch.float64 if trainer.config.precision.compute == "fp64" else torch.float32
        everywhere = torch.zeros(dp.size, rows, length, dtype=dtype, device=trainer.device)
        for output in outputs:  # only ranks of the last stage have one, and each token is held by one of them
            held = sequence.held_of(torch.arange(length)[None])[0].to(trainer.device)
            everywhere[dp.index, :, held] = output.to(dtype)
        all_reduce(everywhere)
        found.append(everywhere.cpu())
    model.reshard()
    return found
