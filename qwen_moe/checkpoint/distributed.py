"""Saves and resumes sharded training state through torch.distributed.checkpoint (DCP), in any layout.

A training checkpoint `checkpoints/step_XXXXXXXX/` holds DCP's files (weights and buffers under ``model.``, AdamW's
moments under ``optimizer.``, random states under ``rng.``, FP8 scales under ``kernels.``),
`train_state.json`, `model_config.json`, `hf/` (tokenizer and Hugging Face files for the export) and
`manifest.json` (see qwen_moe/checkpoint/directory.py).
"""

import errno
import shutil
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from parallel.data import local
from qwen_moe.checkpoint.directory import (
    commit,
    file_entry,
    files_in,
    partial_path,
    remove_directory,
    step_directory,
)
from qwen_moe.checkpoint.finite import count_not_finite, not_finite_message
from qwen_moe.checkpoint.manifest import MODEL_CONFIG, read_object
from qwen_moe.checkpoint.metadata import SafeReader, TensorsOnly
from qwen_moe.checkpoint.optimizer_state import MOMENTS, optimizer_state, set_updates_done
from qwen_moe.checkpoint.pieces import Piece, piece_of
from qwen_moe.checkpoint.resolve import HF_FOLDER, model_config
from qwen_moe.checkpoint.retention import Retention
from qwen_moe.checkpoint.train_state import TRAIN_STATE, TrainState, read_train_state
from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError
from qwen_moe.sharding.model import ParallelModel

KERNELS = "kernels"
SCORE = "score.weight"  # the head of a reward model
# Fields of a model's settings that no weight depends on and that a stage, or a run that starts from weights, may change.
WITHOUT_WEIGHTS = ("rope_theta", "rope_scaling", "max_position_embeddings", "dual_chunk")


def model_state(model: ParallelModel) -> dict[str, torch.Tensor]:
    """This rank's piece of every parameter, and every persistent buffer, by name; they share the model's memory."""
    state: dict[str, torch.Tensor] = dict(model.named_buffers())
    return state | _pieces(model, dict(_originals(model)))


def _originals(model: ParallelModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by name. If a name occurs twice (tied embeddings of two stages), only the first one."""
    seen = set()
    for name, parameter in model.named_parameters():
        if name not in seen:
            seen.add(name)
            yield name, parameter


def _pieces(model: ParallelModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: piece_of(tensor, model.placements[name].shape, model.range_of(name, tensor)[0])
        for name, tensor in tensors.items()
    }


def _optimizer_pieces(model: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    return {moment: _pieces(model, held) for moment, held in optimizer_state(model, optimizer).items()}


@torch.no_grad()
def _copy_to_twins(model: ParallelModel, optimizer: torch.optim.Optimizer | None) -> None:
    """If two stages of this rank hold copies of one parameter, copy the loaded one to the other."""
    originals = dict(_originals(model))
    for name, parameter in model.named_parameters():
        original = originals[name]
        if parameter is original:
            continue
        local(parameter).copy_(local(original))
        if optimizer is not None:
            for moment in MOMENTS:
                local(optimizer.state[parameter][moment]).copy_(local(optimizer.state[original][moment]))


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _kernels_state(model: ParallelModel) -> dict[str, Any]:
    """State that the kernels keep in addition to weights (FP8 scales), under ``kernels.``; empty if there is none. It is
    not among the model's buffers, because weights are loaded and exported without it."""
    state = model.kernels.state()
    return {KERNELS: state} if state else {}


def _full_state(model: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": model_state(model),
        "optimizer": _optimizer_pieces(model, optimizer),
        "rng": {f"rank_{dist.get_rank()}": _rng_state()},
    } | _kernels_state(model)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return value.copy() if isinstance(value, Piece) else value.detach().cpu().clone()


class CheckpointWriter:
    """Writes the checkpoints of one run, at most one at a time. All ranks must call every method together.

    If ``asynchronous``, `save` copies the state and returns, and a thread with its own process group writes the files.
    The next `save` or `finish` raises an error of that thread.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        keep_steps: tuple[int, ...] = (),
        asynchronous: bool,
        config: ModelConfig,
        compute_dtype: str,
        hf_files: Path | None = None,
    ) -> None:
        self.root, self.asynchronous = root, asynchronous
        self.retention = Retention(root, keep, keep_steps)
        self.config, self.compute_dtype, self.hf_files = config, compute_dtype, hf_files
        self.group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, model: ParallelModel, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Write the checkpoint of ``state.step``. Raises UserError if the disk is full; existing checkpoints are kept."""
        self.finish()
        tensors = _full_state(model, optimizer)
        if not self.asynchronous:
            self._write(tensors, state)
            return
        tensors = _copy(tensors)
        self._thread = threading.Thread(target=self._write_and_keep_error, args=(tensors, state), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and raise its error if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_and_keep_error(self, tensors: dict[str, Any], state: TrainState) -> None:
        try:
            self._write(tensors, state)
        except BaseException as error:
            self._error = error

    def _write(self, tensors: dict[str, Any], state: TrainState) -> None:
        path = step_directory(self.root, state.step)
        partial = partial_path(path)
        rank = dist.get_rank()
        if rank == 0:
            # An existing checkpoint of this step must have failed its check on resume, or it would not be rewritten.
            for stale in (partial, path):
                remove_directory(stale)
            partial.mkdir(parents=True)
        dist.barrier(self.group)
        entries: dict[str, Any] = {}
        problem: str | None = None
        try:
            dcp.save(
                tensors,
                storage_writer=dcp.FileSystemWriter(partial, thread_count=1, overwrite=True),
                process_group=self.group,
            )
            entries = {p.name: file_entry(p) for p in sorted(partial.glob(f"__{rank}_*.distcp"))}
        except CheckpointException as error:
            problem = first_cause(error, partial)
        except OSError as error:
            problem = _disk_problem(error, partial)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (entries, problem), group=self.group)
        problems = [found for _, found in gathered if found]
        if not problems and rank == 0:
            try:
                self._commit(path, [found for found, _ in gathered], state)
            except OSError as error:
                problems = [_disk_problem(error, partial)]
        agreed = [problems]
        dist.broadcast_object_list(agreed, src=0, group=self.group)
        if agreed[0]:
            raise UserError(f"checkpoint of step {state.step} could not be written: {agreed[0][0]}")
        if rank == 0:
            try:
                self.retention.written(state.step)
            except OSError as error:
                print(f"warning: old checkpoints in {self.root} could not be deleted: {error}", file=sys.stderr)
        dist.barrier(self.group)

    def _commit(self, path: Path, gathered: list[dict[str, Any]], state: TrainState) -> None:
        partial = partial_path(path)
        entries = {name: entry for part in gathered for name, entry in part.items()}
        (partial / TRAIN_STATE).write_text(state.dumps(), encoding="utf-8")
        (partial / MODEL_CONFIG).write_text(self.config.model_dump_json(indent=1), encoding="utf-8")
        if self.hf_files is not None:
            shutil.copytree(self.hf_files, partial / HF_FOLDER)
        for file in files_in(partial):
            if file.as_posix() not in entries:
                entries[file.as_posix()] = file_entry(partial / file)
        facts = {"step": state.step, "compute_dtype": self.compute_dtype, "world_size": dist.get_world_size()}
        commit(path, entries, facts)


def _disk_problem(error: OSError, where: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left on the disk of {where.parent}; free some, or lower checkpoint.keep, then run the same "
            "command again: it resumes from the previous checkpoint"
        )
    return f"{error}"


def first_cause(error: CheckpointException, where: Path) -> str:
    for rank, failure in error.failures.items():
        cause: BaseException | None = failure[0] if isinstance(failure, tuple) else failure
        if isinstance(cause, OSError):
            return _disk_problem(cause, where)
        # torch's zip writer reports a short write as RuntimeError, with the errno lost.
        if shutil.disk_usage(where.parent).free < (1 << 20):
            return _disk_problem(OSError(errno.ENOSPC, "no space"), where)
        return f"rank {rank}: {cause}"
    return str(error)


def _load(reader: SafeReader, tensors: dict[str, Any]) -> None:
    """Read ``tensors`` in place. Raises UserError on every rank if any rank cannot read its tensors."""
    try:
        dcp.load(tensors, storage_reader=reader, planner=TensorsOnly())
    except CheckpointException as error:
        causes = [found[0] if isinstance(found, tuple) else found for found in error.failures.values()]
        raise UserError(f"checkpoint {reader.path} cannot be loaded: {causes[0] if causes else error}") from None


def _check_finite(path: Path, tensors: dict[str, Any]) -> None:
    """Raise UserError on every rank if a loaded tensor holds NaN or infinite values on any rank."""
    found: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
    for name, value in tensors.items():
        held = value.held if isinstance(value, Piece) else value
        if count := count_not_finite(held):
            # Keyed by offsets, because several ranks may hold the same part.
            found[name, tuple(value.offsets) if isinstance(value, Piece) else ()] = (count, value.numel())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    everywhere = {key: value for part in gathered for key, value in part.items()}
    if everywhere:
        name = next(iter(everywhere))[0]
        parts = [value for (other, _), value in everywhere.items() if other == name]
        raise UserError(not_finite_message(name, sum(count for count, _ in parts), parts[0][1], f"checkpoint {path}"))


def load_weights(path: Path, model: ParallelModel, config: ModelConfig) -> None:
    """Load weights and buffers of a checkpoint into a model of any layout and dtype. Raises UserError if the checkpoint
    belongs to another model; RoPE and the longest text may differ. A reward model may start from a language model: its head
    then keeps its initial values."""
    own_head = has_own_head(model_config(path), config)
    check_same_model(path, config, WITHOUT_WEIGHTS if own_head else (*WITHOUT_WEIGHTS, "criteria"))
    state = model_state(model)
    if not own_head:
        state.pop(SCORE, None)  # only the last stage has it
    _load(SafeReader(path), {"model": state})
    _check_finite(path, state)
    _copy_to_twins(model, None)


def has_own_head(start: ModelConfig, config: ModelConfig) -> bool:
    """Whether the weights of ``start`` have the head of ``config``. A reward model that starts from a language model has
    none yet."""
    return not config.criteria or bool(start.criteria)


def check_same_model(path: Path, config: ModelConfig, may_differ: Collection[str] = (), label: str = "") -> None:
    """Raise UserError if the checkpoint's model differs from ``config`` in other fields than ``may_differ``; the message
    begins with ``label`` and names the fields."""
    check_fields(read_object(path / MODEL_CONFIG), config, f"{label}checkpoint {path}", may_differ)


def check_fields(
    saved: dict[str, Any], config: ModelConfig, where: str, may_differ: Collection[str] = WITHOUT_WEIGHTS
) -> None:
    """`check_same_model` for the model's fields ``saved``, which are those of ``where``."""
    # Fields that are absent are newer than what was saved, and had their defaults.
    saved = {"criteria": []} | saved
    wanted = config.model_dump(mode="json")
    differing = [
        f"{key} is {saved.get(key)!r} there, {wanted[key]!r} here"
        for key in wanted
        if saved.get(key) != wanted[key] and key not in may_differ
    ]
    if differing:
        raise UserError(
            f"{where} is of another model: {'; '.join(differing)}. Use the same model section, or another run_dir"
        )


def _check_kernels_state(
    path: Path, wanted: dict[str, torch.Tensor], known: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Raise UserError unless the checkpoint holds all the state that this run's kernels need, in the same shapes."""
    for name, tensor in wanted.items():
        found = known.get(f"{KERNELS}.{name}")
        shape = tuple(found.size) if isinstance(found, TensorStorageMetadata) else None
        if shape != tuple(tensor.shape):
            there = "it is not there" if shape is None else f"it has shape {shape}"
            raise UserError(
                f"checkpoint {path} has no FP8 state {name} {tuple(tensor.shape)} ({there}): it was trained with "
                f"precision {settings.get('precision')}. Restore that setting and its provider (precision.kernels), or "
                "give another run_dir (checkpoint.load_from starts a new run from its weights)"
            )


def resume(
    path: Path,
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    config: ModelConfig,
    may_differ: Collection[str] = (),
) -> TrainState:
    """Load everything that a training checkpoint holds. Ranks without a saved random state keep their own. ``may_differ``:
    fields of the model's settings that may be others than the checkpoint's."""
    check_same_model(path, config, may_differ)
    state = read_train_state(path)
    tensors: dict[str, Any] = {"model": model_state(model), "optimizer": _optimizer_pieces(model, optimizer)}
    rank = dist.get_rank()
    reader = SafeReader(path)
    known = reader.read_metadata().state_dict_metadata
    if all(f"rng.rank_{rank}.{device}" in known for device in _rng_state()):
        tensors["rng"] = {f"rank_{rank}": _rng_state()}
    tensors |= _kernels_state(model)
    _check_kernels_state(path, tensors.get(KERNELS, {}), known, state.settings)
    _load(reader, tensors)
    moments = {f"{name} ({key})": held for key, part in tensors["optimizer"].items() for name, held in part.items()}
    _check_finite(path, tensors["model"] | moments)
    set_updates_done(model, optimizer, state.step if state.updates is None else state.updates)
    _copy_to_twins(model, optimizer)
    if "rng" in tensors:
        restored = tensors["rng"][f"rank_{rank}"]
        torch.set_rng_state(restored["cpu"])
        if "cuda" in restored:
            torch.cuda.set_rng_state(restored["cuda"])
    return state
