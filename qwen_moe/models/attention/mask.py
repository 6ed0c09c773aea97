"""Which keys a query may see, as a value: a tensor is made of it only by a backend that wants one.

Shapes: B batch, S queries, P earlier keys (of a cache).
"""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Visibility:
    """Every key at or before the query's own position, and, where ``documents [B, S]`` is given (equal numbers within a
    document), of its own document only. The first query comes after ``past`` keys of a cache."""

    past: int = 0
    documents: torch.Tensor | None = None

    def __post_init__(self) -> None:
        assert self.documents is None or not self.past, "documents are told apart in training only, without a cache"

    def is_causal(self, queries: int) -> bool:
        """Whether the lower triangle of a square says it all."""
        return self.documents is None and self.past == 0

    def sees_all(self, queries: int) -> bool:
        """Whether every query sees every key: a single new token."""
        return self.documents is None and queries == 1

    @cached_property
    def _dense(self) -> dict[tuple[int, torch.device], torch.Tensor]:
        return {}

    def dense(self, queries: int, device: torch.device) -> torch.Tensor:
        """Boolean ``[B or 1, 1, S, P + S]``, True where a query may look. Made once for all layers that ask."""
        found = self._dense.get((queries, device))
        if found is None:
            found = torch.ones(queries, self.past + queries, dtype=torch.bool, device=device).tril(self.past)[
                None, None
            ]
            if self.documents is not None:
                found = found & (self.documents[:, :, None] == self.documents[:, None, :]).unsqueeze(1)
            self._dense[queries, device] = found
        return found
