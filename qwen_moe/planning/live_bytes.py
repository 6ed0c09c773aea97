"""Counts the bytes of the tensors that are alive while code runs. The tensors may be real or fake."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

ASKED = (torch.ops.prim.device.default,)  # what fake tensors are asked most often, which allocates nothing


def storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Storages of the plain tensors in ``tree``. Wrappers such as DTensor have none; their local tensors are seen too."""
    if isinstance(tree, torch.Tensor):
        if not is_traceable_wrapper_subclass(tree):
            yield tree.untyped_storage()
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from storages(part)
    elif isinstance(tree, dict):
        yield from storages(tuple(tree.values()))


class LiveBytes(TorchDispatchMode):
    """A context that tracks every storage that an operation allocates until it is freed or emptied.

    Storages allocated before are not counted. ``live`` is the number of bytes alive now. ``peak`` is the largest number
    since the last `reset_peak`; it is measured after every operation, and only with ``peaks``.
    """

    def __init__(self, peaks: bool = True) -> None:
        super().__init__()
        self._peaks = peaks
        self._made: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKED:
            return func(*args, **(kwargs or {}))
        given = {
            storage._cdata for storage in storages((args, kwargs))
        }  # views and in-place results share one of these
        out = func(*args, **(kwargs or {}))
        made = [storage for storage in storages(out) if storage._cdata not in given]
        self._made |= {storage._cdata: StorageWeakRef(storage) for storage in made}
        if made and self._peaks:
            self.peak = max(self.peak, self.live)
        return out

    @property
    def live(self) -> int:
        total = 0
        for address, reference in list(self._made.items()):
            # Read the size each time, because FSDP empties and fills storages in place.
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._made[address]
            else:
                total += storage.nbytes()
        return total

    def reset_peak(self) -> None:
        self.peak = self.live
