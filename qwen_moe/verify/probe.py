"""An objective that uses every feature of the objective contract, so that layouts are verified for future objectives.

For each sequence, a = sum_t w_t log p_t over its valid tokens t; the loss is the mean over sequences of softplus(-a).
Each token's gradient is different and depends on the whole sequence and on another field of the batch, as in direct
preference optimization (arXiv 2305.18290) and policy gradients. Shapes: b sequences of S tokens.
"""

import torch
import torch.nn.functional as F

from parallel.sequence import Batch, SequenceShard
from qwen_moe.objectives.base import Objective


class Probe(Objective):
    head = "log_probs"
    fields = ("weights",)
    metrics = ("log_likelihood",)

    def count(self, batch: Batch) -> torch.Tensor:
        return torch.tensor(batch["labels"].shape[0])

    def loss(
        self, output: torch.Tensor, batch: Batch, sequence: SequenceShard
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sums = sequence.row_sums(output * sequence.held(batch["weights"]).to(output.dtype))
        return sequence.share(F.softplus(-sums).sum()), {"log_likelihood": output.sum()}


def weights(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Random float64 weights around 0 in the shape ``[b, S]`` of ``labels``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(labels.shape, generator=generator, dtype=torch.float64) / labels.shape[1] ** 0.5


def probe_loss(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss and log-likelihood from whole ``logits [b, S, V]``, with torch's own functions."""
    labels = batch["labels"]
    valid = labels >= 0
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1) * valid
    return F.softplus(-(log_probs * batch["weights"]).sum(1)).sum(), log_probs.sum()
