"""After a step that must not be taken (a loss that is NaN, infinite or far above the recent ones): back to the newest
checkpoint, and past the batches since then, as in arXiv 2204.02311, section 5.1. Counted, limited, and the same on every
rank and after every resume."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

WINDOW, LEAST = 64, 16  # losses that a spike is compared with, and how many there must be


@dataclass
class History:
    """``skips``: (step, batches): from that optimizer step on, data is read so many batches further on; ``losses`` of the
    last `WINDOW` steps. Both are in every checkpoint."""

    skips: list[tuple[int, int]] = field(default_factory=list)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @classmethod
    def restored(cls, skips: Sequence[Sequence[int]], losses: Sequence[float]) -> "History":
        return cls(skips=[(step, batches) for step, batches in skips], losses=deque(losses, maxlen=WINDOW))

    def data_step(self, step: int, ordered: int) -> int:
        """Which of the ``ordered`` batches optimizer step ``step`` takes; past their end those of the beginning make up for
        the skipped ones."""
        return (step + sum(batches for at, batches in self.skips if at <= step)) % ordered

    def highest_loss(self, spike_nats: float) -> float:
        """A loss above this is a spike; infinity while that is not looked for, or too little is known."""
        if not spike_nats or len(self.losses) < LEAST:
            return float("inf")
        return median(self.losses) + spike_nats

    def skip(self, checkpoint_step: int, bad_step: int) -> int:
        """Leave out the batches of steps ``checkpoint_step`` to ``bad_step``; how many those are."""
        batches = bad_step - checkpoint_step + 1
        self.skips.append((checkpoint_step, batches))
        return batches
