"""Where a run's records go beside metrics.jsonl: TensorBoard and Weights & Biases, as the recipe's ``logging`` says."""

import io
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from launchers.folder.atomic import write_json
from launchers.folder.run_folder import read_object
from qwen_moe.config import RunConfig, WandbConfig
from qwen_moe.errors import UserError
from qwen_moe.packages import check_installed, is_installed

TENSORBOARD = "tensorboard"
WANDB_RUN = "wandb.json"
# How long the end of a run waits for what has not been sent yet; it stays in the run folder, for `wandb sync`.
SECONDS_TO_FINISH = 60.0


class Sink(Protocol):
    """Takes the records of rank 0. Where a method raises, the run warns once and goes on without this sink."""

    name: str

    def write(self, record: dict[str, Any]) -> None:
        """One record: its ``step``, and figures by name."""

    def go_back(self, step: int) -> None:
        """The steps after ``step`` will be done again."""

    def close(self) -> None:
        """The run ends here, for now."""


def check_recorders(config: RunConfig) -> None:
    """Raises UserError where the recipe asks for a recorder whose package is not installed."""
    if config.logging.tensorboard is True:
        check_installed("logging.tensorboard", "tensorboard", otherwise="set it to auto or false")
    if config.logging.wandb is not None:
        check_installed("logging.wandb", "wandb", otherwise="leave it out")


def open_sinks(config: RunConfig, *, resumed_step: int) -> tuple[list[Sink], list[str]]:
    """The recorders of the recipe, on rank 0, and a warning for each that could not be opened. Raises UserError for a
    wrong setting or login of Weights & Biases at the start of a run; a resumed one goes on without it."""
    logging, sinks, warnings = config.logging, list[Sink](), list[str]()
    try:
        if logging.tensorboard is True or (logging.tensorboard == "auto" and is_installed("tensorboard")):
            sinks.append(TensorBoard(config.run_dir / TENSORBOARD, resumed_step))
    except Exception as error:
        warnings.append(not_recorded("TensorBoard", error))
    try:
        if logging.wandb is not None:
            sinks.append(WeightsAndBiases(config, logging.wandb))
    except UserError as error:
        if resumed_step == 0:
            raise
        warnings.append(not_recorded("Weights & Biases", error))
    except Exception as error:
        warnings.append(not_recorded("Weights & Biases", error))
    return sinks, warnings


def not_recorded(name: str, error: BaseException) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"warning: {name} gets no more records of this attempt ({reason[:300]}); training goes on, metrics.jsonl has all"


def _figures(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "time"):
            yield name, value


class TensorBoard:
    """Event files in ``folder``; of steps that are done again, the later record is shown."""

    name = "TensorBoard"

    def __init__(self, folder: Path, resumed_step: int) -> None:
        self._folder = folder
        self._open(resumed_step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in _figures(record):
            self._writer.add_scalar(name, value, record["step"])

    def go_back(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        self._writer.close()


@contextmanager
def _no_questions() -> Iterator[None]:
    """Without a login wandb asks for one where stdin is a terminal, and the run would wait for the answer."""
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = stdin


class WeightsAndBiases:
    """One run of Weights & Biases for a run folder: its id is kept there, and a resumed run goes on with it.

    Steps are the figure ``step``, for W&B's own count cannot go back. Steps that are done again are shown twice.
    """

    name = "Weights & Biases"

    def __init__(self, config: RunConfig, settings: WandbConfig) -> None:
        import wandb

        kept = config.run_dir / WANDB_RUN
        if not kept.exists():
            # Before W&B knows it: a kill in between must not make a second run.
            write_json(kept, {"id": secrets.token_hex(6)})
        identity = (read_object(kept) or {}).get("id")
        if not isinstance(identity, str) or not identity:
            raise UserError(f"{kept} is damaged: put it back, or delete it to begin another run of Weights & Biases")
        try:
            with _no_questions():
                self._run = wandb.init(
                    project=settings.project,
                    entity=settings.entity or None,
                    name=settings.name or config.run_dir.resolve().name,
                    group=settings.group or None,
                    tags=list(settings.tags),
                    mode=settings.mode,
                    id=identity,
                    resume="allow",
                    dir=str(config.run_dir),
                    config=config.model_dump(mode="json", exclude_none=True),
                    settings=wandb.Settings(
                        console="off", silent=True, disable_git=True, finish_timeout=SECONDS_TO_FINISH
                    ),
                )
        except wandb.errors.UsageError as error:
            raise UserError(
                f"logging.wandb: {' '.join(str(error).split())} (mode offline, or WANDB_MODE=offline, needs no login)"
            ) from None
        self._run.define_metric("*", step_metric="step")

    def write(self, record: dict[str, Any]) -> None:
        self._run.log({"step": record["step"], **dict(_figures(record))})

    def go_back(self, step: int) -> None:
        pass

    def close(self) -> None:
        self._run.finish()
