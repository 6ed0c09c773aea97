"""Finds the checkpoint that a path means: the checkpoint itself, or the newest valid one of a run. Needs no torch."""

import sys
from pathlib import Path

from pydantic import ValidationError

from launchers.counted import counted
from launchers.folder.run_folder import CHECKPOINTS
from qwen_moe.checkpoint.directory import step_directories, verify
from qwen_moe.checkpoint.manifest import MANIFEST, METADATA, MODEL_CONFIG, CheckpointDamaged
from qwen_moe.config import ModelConfig
from qwen_moe.config.writers import writer
from qwen_moe.errors import UserError, wrong

HF_FOLDER = "hf"


def _steps(path: Path) -> list[Path]:
    """Step directories of a run or of its `checkpoints/`, oldest first. Those without a manifest are damaged."""
    return list((step_directories(path) or step_directories(path / CHECKPOINTS)).values())


def check_exists(directory: Path) -> None:
    """Raises UserError if there is no such directory of a model."""
    if not directory.is_dir():
        raise UserError(
            f"{directory} does not exist: give a checkpoint, a run directory or a Hugging Face directory{writer(directory)}"
        )


def _is_huggingface(path: Path) -> bool:
    """Whether ``path`` holds what no checkpoint and no run does. Publishers may add a manifest.json of their own."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def side_folder(directory: Path) -> Path:
    """The folder of the tokenizer and other small files of ``directory``, a Hugging Face directory or a checkpoint."""
    inside = directory / HF_FOLDER
    return inside if inside.is_dir() and not _is_huggingface(directory) else directory


def is_ours(path: Path) -> bool:
    """Whether ``path`` is a checkpoint, a run directory or its `checkpoints/`, rather than a Hugging Face directory."""
    if _is_huggingface(path):
        return False
    found = [path, *_steps(path)]
    # A checkpoint that has lost its manifest must be reported as damaged, so .metadata counts too.
    return any((place / name).is_file() for place in found for name in (MANIFEST, METADATA))


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` (a checkpoint, a run directory or its `checkpoints/`) means, fully verified.

    If there are several, the newest intact one is used, and damaged newer ones are reported on stderr. Raises UserError.
    """
    if not path.is_dir():
        raise UserError(
            f"checkpoint {path} does not exist: give a checkpoint directory or a run directory{writer(path)}"
        )
    if (path / MANIFEST).is_file() and not _is_huggingface(path):
        try:
            verify(path)
        except CheckpointDamaged as error:
            raise UserError(f"checkpoint {path} is damaged: {error}. Use another one, or convert it again") from None
        return path
    candidates = [] if _is_huggingface(path) else _steps(path)
    for candidate in reversed(candidates):
        try:
            verify(candidate)
        except CheckpointDamaged as error:
            print(f"checkpoint {candidate.name} is damaged and not used: {error}", file=sys.stderr)
            continue
        return candidate
    if candidates:
        which = "the only checkpoint" if len(candidates) == 1 else f"all {counted(len(candidates), 'checkpoint')}"
        raise UserError(f"{which} in {path} {'is' if len(candidates) == 1 else 'are'} damaged: see the messages above")
    if (path / "config.json").is_file():
        raise UserError(f"{path} is a Hugging Face directory, not a checkpoint: convert it with from-hf")
    raise UserError(
        f"{path} is not a checkpoint (it has no {MANIFEST}) and holds none: give a checkpoint directory, a run "
        "directory or its checkpoints folder"
    )


def model_config(checkpoint: Path) -> ModelConfig:
    """The model config of a checkpoint. Raises UserError if the file is missing or of another version."""
    file = checkpoint / MODEL_CONFIG
    try:
        return ModelConfig.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: {checkpoint} is not a checkpoint of a model") from None
    except ValidationError as error:
        raise UserError(f"{file} does not describe a model: {wrong(error.errors()[0])}") from None
