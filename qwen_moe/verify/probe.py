"""An objective that needs everything an objective may ask for, so that layouts are proven for objectives to come.

For each sequence, a = sum_t w_t log p_t over its valid tokens t; the loss is the mean over sequences of softplus(-a).
So the gradient of each token differs, comes from the whole sequence, and depends on another field of the batch, as in
direct preference optimization (arXiv 2305.18290) and policy gradients. Shapes: b sequences of S tokens.
"""

import torch
import torch.nn.functional as F

from parallel.sequence import Batch, SequenceShard
from qwen_moe.objectives.base import Objective


class Probe(Objective):
    head = "log_probs"
    fields = ("weights",)
    metrics = ("log_likelihood",)

    def count(self, batch: Batch, sequence: SequenceShard) -> torch.Tensor:
        rows = torch.tensor(batch["labels"].shape[0])
        return rows if sequence.cp.index == 0 else torch.zeros_like(rows)

    def loss(
        self, output: torch.Tensor, batch: Batch, sequence: SequenceShard
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sums = sequence.row_sums(output * sequence.held(batch["weights"]).to(output.dtype))
        return sequence.share(F.softplus(-sums).sum()), {"log_likelihood": output.sum()}


def weights(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """``[b, S]`` float64 numbers around 0 for labels of that shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(labels.shape, generator=generator, dtype=torch.float64) / labels.shape[1] ** 0.5


def probe_loss(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss and log-likelihood by torch's own functions, from whole ``logits [b, S, V]``."""
    labels = batch["labels"]
    valid = labels >= 0
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1) * valid
    return F.softplus(-(log_probs * batch["weights"]).sum(1)).sum(), log_probs.sum()
