"""Recorders besides metrics.jsonl: TensorBoard and Weights & Biases, as the recipe's ``logging`` section configures them."""

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
# How long the end of a run waits for unsent records. They stay in the run folder for `wandb sync`.
SECONDS_TO_FINISH = 60.0


class Sink(Protocol):
    """Takes the records of rank 0. If a method raises, the run warns once and continues without this sink."""

    name: str

    def write(self, record: dict[str, Any]) -> None:
        """Write one record: its ``step``, and figures by name."""

    def go_back(self, step: int) -> None:
        """Prepare for the steps after ``step`` to be repeated."""

    def close(self) -> None:
        """End this attempt's records."""


def check_recorders(config: RunConfig) -> None:
    """Raise UserError if the recipe requires a recorder whose package is not installed."""
    if config.logging.tensorboard is True:
        check_installed("logging.tensorboard", "tensorboard", otherwise="set it to auto or false")
    if config.logging.wandb is not None:
        check_installed("logging.wandb", "wandb", otherwise="leave it out")


def open_sinks(config: RunConfig, *, resumed_step: int) -> tuple[list[Sink], list[str]]:
    """Open the recipe's recorders on rank 0. Returns them, and a warning for each that could not be opened. At the start of
    a run, a wrong setting or login of Weights & Biases raises UserError; a resumed run continues without it."""
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
    return (
        f"warning: {name} gets no more records of this attempt ({reason[:300]}); training continues, and metrics.jsonl has "
        "all records"
    )


def _figures(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "time"):
            yield name, value


class TensorBoard:
    """Event files in ``folder``. For repeated steps TensorBoard shows the later record."""

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
    """Hide stdin from wandb, which would otherwise ask for a login on a terminal and block the run."""
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = stdin


class WeightsAndBiases:
    """One W&B run per run folder. Its id is kept in the folder, and a resumed run continues it.

    The x-axis is the figure ``step``, because W&B's own step cannot go back. Repeated steps are shown twice.
    """

    name = "Weights & Biases"

    def __init__(self, config: RunConfig, settings: WandbConfig) -> None:
        import wandb

        kept = config.run_dir / WANDB_RUN
        if not kept.exists():
            # Written before W&B knows the id, so that a kill in between does not lead to a second run.
            write_json(kept, {"id": secrets.token_hex(6)})
        identity = (read_object(kept) or {}).get("id")
        if not isinstance(identity, str) or not identity:
            raise UserError(f"{kept} is damaged: restore it, or delete it to begin a new Weights & Biases run")
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
