"""One rank's shard of a tensor, in a form that torch.distributed.checkpoint saves and loads by its offsets.

A parameter may be split by tensor, expert and data parallelism at once. A checkpoint needs only its name, its whole shape
and this rank's offsets, whatever split it. So every layout writes and reads the same tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor


class Piece(torch.Tensor):
    """A tensor of the whole shape without its own storage. ``held`` is this rank's shard, which begins at ``offsets``.

    Like DTensor, it implements DCP's protocol for tensors that are stored in chunks (`_Checkpointable` in
    torch.distributed.checkpoint).
    """

    held: torch.Tensor
    offsets: torch.Size

    @staticmethod
    def __new__(cls, held: torch.Tensor, shape: Sequence[int], offsets: Sequence[int]) -> "Piece":
        piece = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=held.dtype, device=held.device)
        piece.held, piece.offsets = held, torch.Size(offsets)
        return piece

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} on a Piece: it is only for checkpoints, use its `held`")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Piece({tuple(self.held.shape)} at {tuple(self.offsets)} of {tuple(self.shape)})"

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        if not self.held.numel():
            return []
        return [
            WriteItem(
                index=MetadataIndex(fqn, self.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=self.offsets, sizes=self.held.size()),
                    properties=TensorProperties.create_from_tensor(self.held),
                    size=self.size(),
                ),
            )
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if not self.held.numel():
            return []
        return [ChunkStorageMetadata(offsets=self.offsets, sizes=self.held.size())]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.held

    def copy(self) -> "Piece":
        """The same piece with a CPU copy of its shard."""
        return Piece(self.held.detach().cpu().clone(), self.shape, self.offsets)


def piece_of(tensor: torch.Tensor, shape: Sequence[int], offsets: Sequence[int]) -> Piece:
    """``tensor`` (a DTensor's shard, or the tensor itself) as the piece at ``offsets`` of a tensor of ``shape``."""
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return Piece(held.detach(), shape, offsets)
