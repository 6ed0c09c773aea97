"""The history for rollbacks. When a loss is NaN, infinite or far above recent losses, the run goes back to its newest
checkpoint and skips the batches since then (arXiv 2204.02311, section 5.1). Rollbacks are counted and limited, and are the
same on every rank and after every resume."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

WINDOW, LEAST = 64, 16  # the most and the fewest recent losses that a spike is compared with


@dataclass
class History:
    """``skips``: pairs (step, batches); from that optimizer step on, data is read that many batches further on. ``losses``:
    of the last `WINDOW` steps. Both are saved in every checkpoint."""

    skips: list[tuple[int, int]] = field(default_factory=list)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @classmethod
    def restored(cls, skips: Sequence[Sequence[int]], losses: Sequence[float]) -> "History":
        return cls(skips=[(step, batches) for step, batches in skips], losses=deque(losses, maxlen=WINDOW))

    def data_step(self, step: int, ordered: int, first: int = 0) -> int:
        """The index of the batch that optimizer step ``step`` takes, out of ``ordered`` of its stage, which begins with step
        ``first``. Past the end it wraps around, so that the first batches replace the skipped ones."""
        return (step - first + sum(batches for at, batches in self.skips if first <= at <= step)) % ordered

    def highest_loss(self, spike_nats: float) -> float:
        """The loss above which a step is a spike; infinity if spikes are allowed or fewer than `LEAST` losses are known."""
        if not spike_nats or len(self.losses) < LEAST:
            return float("inf")
        return median(self.losses) + spike_nats

    def skip(self, checkpoint_step: int, bad_step: int) -> int:
        """Skip the batches of steps ``checkpoint_step`` to ``bad_step``. Returns their number."""
        batches = bad_step - checkpoint_step + 1
        self.skips.append((checkpoint_step, batches))
        return batches
