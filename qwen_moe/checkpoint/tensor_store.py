"""Reads and writes weights one tensor at a time: from a Hugging Face directory, a module or a DCP checkpoint, and into a
DCP checkpoint.

Peak memory is what the caller keeps plus about two copies of the tensor being read, because DCP's reader holds a stored
chunk while it copies it.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from qwen_moe.checkpoint.huggingface.names import Piece, Shape
from qwen_moe.checkpoint.huggingface.safetensors_file import Header, read_into
from qwen_moe.checkpoint.metadata import SafeReader, TensorsOnly
from qwen_moe.errors import UserError

# The key of weights and buffers in the state dict of our checkpoints.
MODEL_KEY = "model"


class TensorSource(Protocol):
    """Our parameters and buffers by name."""

    def shapes(self) -> dict[str, Shape]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU, contiguous, in its stored dtype."""
        ...


class HuggingFaceTensors:
    """The parameters in the safetensors files of a directory (``headers``: file -> header), with experts stacked."""

    def __init__(
        self, headers: Mapping[Path, Header], pieces: Mapping[str, tuple[Piece, ...]], shapes: Mapping[str, Shape]
    ) -> None:
        self._pieces, self._shapes = pieces, dict(shapes)
        self._found = {name: (path, header) for path, header in headers.items() for name in header.entries}
        for name, parts in pieces.items():
            dtypes = {piece.hf_name: self._entry_dtype(piece.hf_name) for piece in parts}
            if len(set(dtypes.values())) > 1:
                first, dtype = next(iter(dtypes.items()))
                other = next(key for key, value in dtypes.items() if value != dtype)
                raise UserError(
                    f"{first} is {dtype} but {other} is {dtypes[other]}: the experts of a layer are stacked into "
                    f"{name} and must have one dtype"
                )

    def _entry_dtype(self, hf_name: str) -> torch.dtype:
        return self._found[hf_name][1].entries[hf_name].dtype

    def _read_piece(self, file: BinaryIO, header: Header, hf_name: str, out: torch.Tensor) -> None:
        read_into(file, header, hf_name, out)

    def shapes(self) -> dict[str, Shape]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        return self._entry_dtype(self._pieces[name][0].hf_name)

    def read(self, name: str) -> torch.Tensor:
        out = torch.empty(self._shapes[name], dtype=self.dtype(name))
        pieces = sorted(self._pieces[name], key=lambda piece: str(self._found[piece.hf_name][0]))
        position = 0
        while position < len(pieces):
            path, header = self._found[pieces[position].hf_name]
            with path.open("rb", buffering=0) as file:
                while position < len(pieces) and self._found[pieces[position].hf_name][0] == path:
                    piece = pieces[position]
                    self._read_piece(file, header, piece.hf_name, out[piece.index])
                    position += 1
        return out


class ModuleTensors:
    """The parameters and buffers of a module that is not sharded."""

    def __init__(self, module: nn.Module) -> None:
        self._state = module.state_dict()

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self._state[name].detach().cpu().contiguous()


class CheckpointTensors:
    """The weights of a DCP checkpoint that was saved in any layout. Ignores optimizer state and everything else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = SafeReader(path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, True)
        prefix = MODEL_KEY + "."
        self._known: dict[str, TensorStorageMetadata] = {
            key.removeprefix(prefix): value
            for key, value in self._metadata.state_dict_metadata.items()
            if key.startswith(prefix) and isinstance(value, TensorStorageMetadata)
        }

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(known.size) for name, known in self._known.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._known[name].properties.dtype

    def read(self, name: str) -> torch.Tensor:
        out = torch.empty(self._known[name].size, dtype=self.dtype(name))
        # This does what dcp.load does for one process, but does not read the metadata again for every tensor.
        planner = TensorsOnly(flatten_state_dict=False)
        planner.set_up_planner({f"{MODEL_KEY}.{name}": out}, self._metadata, True)
        try:
            plan = self._reader.prepare_local_plan(planner.create_local_plan())
            self._reader.read_data(planner.finish_plan(plan), planner).wait()
        except UserError:
            raise
        except Exception as error:  # torch's reader may raise almost anything if the data contradict the metadata
            raise UserError(f"{name} of checkpoint {self._path} cannot be read: {error}") from None
        return out


class _StreamingPlanner(DefaultSavePlanner):
    """Plans with meta tensors and produces each real tensor only when it is written."""

    def __init__(self, produce: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self._produce = produce

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._produce(write_item.index.fqn.removeprefix(MODEL_KEY + "."))


class _Writer(dcp.FileSystemWriter):
    """Leaves the path and a random id out of DCP's metadata, so that the same tensors give the same bytes in every file."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def write_tensors(
    directory: Path, specs: Mapping[str, tuple[Shape, torch.dtype]], produce: Callable[[str], torch.Tensor]
) -> None:
    """Write a DCP checkpoint of ``specs`` (name -> shape and dtype). ``produce(name)`` is called once for each, in turn.

    Each tensor gets its own file, because DCP's writer keeps all tensors of a file until it closes the file. The same
    tensors give the same bytes anywhere.
    """
    state = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in specs.items()}
    # per_thread_copy_ahead=0, because otherwise the writer asks for tensors ahead of time if there is a GPU.
    writer = _Writer(directory, single_file_per_rank=False, thread_count=1, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({MODEL_KEY: state}, storage_writer=writer, planner=_StreamingPlanner(produce), no_dist=True)
