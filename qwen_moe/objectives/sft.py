"""Supervised fine-tuning: the likelihood of what is learned of conversations, which are packed into rows with padding."""

from qwen_moe.objectives.base import PACKED
from qwen_moe.objectives.likelihood import Likelihood


class FineTuning(Likelihood):
    """The sum of -log p over learned tokens, divided by their number in the global batch: neither the packing nor the
    micro-batches weight one conversation against another. Conversations do not see each other, and padding is in no
    statistic of the experts; the batch says where both are."""

    fields = PACKED
