"""Which keys a query may see, as a value. A mask tensor is made only for a backend that needs one.

Shapes: B batch, S queries, P earlier keys (in a cache).
"""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Visibility:
    """A query sees every key at or before its own position; with ``documents [B, S]`` (equal numbers within a document) it
    sees only keys of its own document. The first query comes after ``past`` cached keys."""

    past: int = 0
    documents: torch.Tensor | None = None

    def __post_init__(self) -> None:
        assert self.documents is None or not self.past, "document masks are for training, without a cache"

    def is_causal(self, queries: int) -> bool:
        """Whether the mask is exactly the lower triangle of a square."""
        return self.documents is None and self.past == 0

    def sees_all(self, queries: int) -> bool:
        """Whether every query sees every key, as a single new token does."""
        return self.documents is None and queries == 1

    @cached_property
    def _dense(self) -> dict[tuple[int, torch.device], torch.Tensor]:
        return {}

    def dense(self, queries: int, device: torch.device) -> torch.Tensor:
        """The boolean mask ``[B or 1, 1, S, P + S]``, True where attention is allowed. All layers share it."""
        mask = self._dense.get((queries, device))
        if mask is None:
            mask = torch.ones(queries, self.past + queries, dtype=torch.bool, device=device).tril(self.past)[None, None]
            if self.documents is not None:
                mask = mask & (self.documents[:, :, None] == self.documents[:, None, :]).unsqueeze(1)
            self._dense[queries, device] = mask
        return mask
