"""`train_state.json`: the state of a training checkpoint that is not a tensor."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from qwen_moe.checkpoint.manifest import CheckpointDamaged
from qwen_moe.errors import wrong

TRAIN_STATE = "train_state.json"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """``step`` is the number of optimizer steps done. It determines the schedule and, with ``skips``, the next sample.
    ``updates``: how many of them changed the weights (a step may have nothing to learn from), which AdamW counts; None in
    checkpoints of earlier versions, for which it is ``step``.
    ``skips`` and ``recent_losses`` belong to `qwen_moe.training.rollback.History`. ``settings``: of the stage that wrote the
    checkpoint. ``stages``: of a run of stages, those that have begun (`qwen_moe.training.walk`)."""

    step: NonNegativeInt
    consumed_samples: NonNegativeInt
    consumed_tokens: NonNegativeInt
    data_fingerprint: str
    settings: dict[str, Any]
    updates: NonNegativeInt | None = None
    skips: list[tuple[NonNegativeInt, NonNegativeInt]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)

    def dumps(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read_train_state(checkpoint: Path) -> TrainState:
    """The state of the checkpoint ``checkpoint``. Raises CheckpointDamaged if it is missing or invalid."""
    file = checkpoint / TRAIN_STATE
    try:
        return TypeAdapter(TrainState).validate_json(file.read_bytes(), strict=True)
    except FileNotFoundError:
        raise CheckpointDamaged(f"{file} is missing: {checkpoint} is not a checkpoint of a training run") from None
    except OSError as error:
        raise CheckpointDamaged(f"{file} cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointDamaged(f"{file} is not the state of a run: {where} {wrong(first)}") from None
