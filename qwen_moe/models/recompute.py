"""What backward computes again instead of keeping it: by torch's checkpoint, or once for all of a backward's parts.

torch's checkpoint computes again in every call of the engine. A zero-bubble schedule calls it once for the gradients of
activations and once more for each group of weights, so a layer would be computed again a dozen times.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Recomputed = Callable[..., Any]  # (function, *arguments) -> what the function returns

in_every_call: Recomputed = partial(checkpoint, use_reentrant=False)


class _Enough(Exception):
    """All tensors are there: what follows in forward is needed by no backward."""


class _Forward:
    """The tensors that a call saves for backward: computed again when one is asked for, and then kept until the graph is
    freed. The call must draw no random numbers."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        self._call = partial(function, *arguments)
        self._count = 0
        self._tensors: list[torch.Tensor] = []

    def pack(self, tensor: torch.Tensor) -> int:
        self._count += 1
        return self._count - 1

    def unpack(self, place: int) -> torch.Tensor:
        if not self._tensors:
            with torch.enable_grad(), saved_tensors_hooks(self._keep, self.unpack), contextlib.suppress(_Enough):
                self._call()
            if len(self._tensors) != self._count:
                raise RuntimeError(
                    f"computed again, a layer saved {len(self._tensors)} of the {self._count} tensors of its forward: it "
                    "must do the same both times"
                )
        return self._tensors[place]

    def _keep(self, tensor: torch.Tensor) -> int:
        self._tensors.append(tensor.detach())
        if len(self._tensors) == self._count:
            raise _Enough
        return len(self._tensors) - 1


def once(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, whose tensors for backward are dropped, computed again once, and then kept until all parts
    of backward are through."""
    forward = _Forward(function, arguments)
    with saved_tensors_hooks(forward.pack, forward.unpack):
        return function(*arguments)
