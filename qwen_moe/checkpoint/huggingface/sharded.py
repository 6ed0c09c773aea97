"""Writes a model of any layout as a Hugging Face directory while its run goes on."""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from qwen_moe.checkpoint.distributed import first_cause, model_state
from qwen_moe.checkpoint.huggingface.directory import CONFIG, copy_files, side_files
from qwen_moe.checkpoint.huggingface.export import ExportRequest, check_expert_bias, export, token_ids
from qwen_moe.checkpoint.huggingface.names import parameters
from qwen_moe.checkpoint.tensor_store import MODEL_KEY, CheckpointTensors
from qwen_moe.data.ranks import same_on_all_ranks
from qwen_moe.errors import UserError
from qwen_moe.sharding.model import ParallelModel

PIECES = ".pieces"  # follows the directory's name: what the ranks write first


def export_sharded(
    model: ParallelModel, hf_dir: Path, dtype: torch.dtype, side: Path, group: dist.ProcessGroup | None
) -> None:
    """Write the weights of ``model`` as the Hugging Face directory ``hf_dir``, in ``dtype`` and with the files of ``side``
    (a tokenizer's). It appears whole or not at all. ``group``: all ranks, on CPUs.

    Each rank writes its shards, and the first makes the directory of them, one tensor at a time, so no rank holds a whole
    model. All ranks must call it, and must see the same folder. Raises UserError on every rank if the disk is full, or for a
    model that Hugging Face's format cannot hold.
    """
    pieces = hf_dir.with_name(hf_dir.name + PIECES)
    same_on_all_ranks(lambda: _make_empty(pieces))
    writer = dcp.FileSystemWriter(pieces, thread_count=1, overwrite=True)
    try:
        dcp.save({MODEL_KEY: model_state(model)}, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise UserError(f"{hf_dir} could not be written: {first_cause(error, pieces)}") from None
    same_on_all_ranks(lambda: _join(pieces, model, hf_dir, dtype, side))


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _join(pieces: Path, model: ParallelModel, hf_dir: Path, dtype: torch.dtype, side: Path) -> None:
    source = CheckpointTensors(pieces)
    check_expert_bias(source, model.config, drop=False)
    kept = [name for name in side_files(side)[0] if name != Path(CONFIG)]
    export(
        ExportRequest(
            source=source,
            config=model.config,
            dtypes=dict.fromkeys(parameters(model.config), dtype),
            token_ids=token_ids(side),
            write_side_files=lambda partial: copy_files(side, kept, partial),
        ),
        hf_dir,
    )
    shutil.rmtree(pieces, ignore_errors=True)
