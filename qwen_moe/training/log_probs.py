"""The log-probabilities that the present weights give to labels, for every rank, whatever the layout."""

from collections.abc import Sequence

import torch
from torch.distributed import all_reduce

from parallel.sequence import Batch
from qwen_moe.training.step import Trainer


@torch.no_grad()
def label_log_probs(trainer: Trainer, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
    """For each of this data-parallel rank's micro-batches ``[b, S]``, the labels' log-probabilities of all dp ranks
    ``[dp, b, S]``, on the CPU; 0 where a label is not valid. float32, or float64 for models in float64.

    All ranks must call it, with the same number of micro-batches. In the layout that trains, the values are those of the
    next training step's forward pass, to the bit.
    """
    dp, sequence = trainer.grids.dp, trainer.sequence
    for part in trainer.model.parts:
        part.eval()
    found = []
    for batch in micro_batches:
        rows, length = batch["labels"].shape
        outputs = trainer.engine.forward([trainer.to_device(batch)])
        dtype = torch.float64 if trainer.config.precision.compute == "fp64" else torch.float32
        everywhere = torch.zeros(dp.size, rows, length, dtype=dtype, device=trainer.device)
        for output in outputs:  # only ranks of the last stage have one, and each token is held by one of them
            held = sequence.held_of(torch.arange(length)[None])[0].to(trainer.device)
            everywhere[dp.index, :, held] = output.to(dtype)
        all_reduce(everywhere)
        found.append(everywhere.cpu())
    trainer.model.reshard()
    return found
