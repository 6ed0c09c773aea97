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


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


class _Forward:
    """The tensors that a call saves for backward: computed again when one is asked for, and then kept until the graph is
    freed. The call must draw no random numbers."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        self._call = partial(function, *arguments)
        self._saved: list[tuple[torch.Size, torch.dtype]] = []
        self._tensors: list[torch.Tensor] = []

    def pack(self, tensor: torch.Tensor) -> int:
        self._saved.append(_kind(tensor))
        return len(self._saved) - 1

    def unpack(self, place: int) -> torch.Tensor:
        if not self._tensors:
            self._tensors = self._computed_again()
        return self._tensors[place]

    def _computed_again(self) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> int:
            found.append(tensor.detach())
            if len(found) == len(self._saved):
                raise _Enough
            return len(found) - 1

        with torch.enable_grad(), saved_tensors_hooks(keep, found.__getitem__), contextlib.suppress(_Enough):
            self._call()
        same = 0
        for tensor, saved in zip(found, self._saved, strict=False):
            if _kind(tensor) != saved:
                break
            same += 1
        if same != len(self._saved):
            raise RuntimeError(
                f"computed again, a layer saved {same} of the {len(self._saved)} tensors of its forward, in its order, "
                "shapes and dtypes: it must do the same both times"
            )
        return found


def once(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, whose tensors for backward are dropped, computed again once, and then kept until all parts
    of backward are through."""
    forward = _Forward(function, arguments)
    with saved_tensors_hooks(forward.pack, forward.unpack):
        return function(*arguments)
