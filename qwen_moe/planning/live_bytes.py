"""Counts the bytes of tensors that are alive while code runs, on real or on fake tensors."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Of the plain tensors in ``tree``; a wrapper such as DTensor has no bytes of its own, its local tensor comes too."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return [tensor.untyped_storage() for tensor in tensors if not is_traceable_wrapper_subclass(tensor)]


class LiveBytes(TorchDispatchMode):
    """Within it, every storage that an operation makes is followed until it is freed or emptied. Storages made before are
    not counted. ``live`` is what is held now and ``peak`` the most that was held since the last `reset_peak`, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}  # views and in-place results share one of these
        out = func(*args, **(kwargs or {}))
        made = [storage for storage in _storages(out) if storage._cdata not in given]
        self._made |= {storage._cdata: StorageWeakRef(storage) for storage in made}
        if made:
            self.peak = max(self.peak, self.live)
        return out

    @property
    def live(self) -> int:
        total = 0
        for address, reference in list(self._made.items()):
            # The size is asked for again: FSDP empties and fills storages in place.
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._made[address]
            else:
                total += storage.nbytes()
        return total

    def reset_peak(self) -> None:
        self.peak = self.live
