"""The state of a run, read from its folder; no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launchers.folder.run_folder import METRICS, RunFolder, read_json
from launchers.job.decide import BAD_STEP
from qwen_moe.config import RunConfig, load_config
from qwen_moe.runs.identity import OF_RESULTS, Difference, differences
from qwen_moe.runs.records import RESOLVED, read_lines

FAILURE = "failure.json"  # why the last attempt failed: {"kind", "message"}; removed when the next one starts


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """``state`` is complete if every step is recorded; otherwise ``why`` says more. ``records``: from metrics.jsonl."""

    state: Literal["missing", "unfinished", "diverged", "complete"]
    why: str
    step: int
    records: list[dict[str, Any]]


def read_outcome(config: RunConfig, run_dir: Path) -> RunOutcome:
    """The outcome of the run of ``config`` in ``run_dir``. A non-finite step, or a final loss not below the loss of guessing
    (see the objective), counts as diverged. Raises UserError for a damaged metrics.jsonl."""
    path = run_dir / METRICS
    records = read_lines(path)
    steps = [record for record in records if "loss" in record]
    config = with_known_length(config, run_dir)
    done, total = (int(steps[-1]["step"]) if steps else 0), config.train_steps
    kind, message = _failure(run_dir)

    def outcome(state: Any, why: str) -> RunOutcome:
        return RunOutcome(state=state, why=why, step=done, records=records)

    if kind == BAD_STEP:
        return outcome("diverged", message)
    if not steps:
        return outcome("missing", message or "no step was taken")
    if done < total or not total:
        text = f"step {done:,} of {total:,}" if total else f"step {done:,} of other epochs"
        return outcome("unfinished", text + (f"; {message}" if message else ""))
    guess = config.objective.loss_of_guessing(config.model.vocab_size)
    last = float(steps[-1]["loss"])
    if not last < guess:
        return outcome("diverged", f"it ended with loss {last:.3g}, and guessing gives {guess:.3g}")
    return outcome("complete", "")


def _failure(run_dir: Path) -> tuple[str, str]:
    """(kind, message) of the last attempt's failure: as `train` recorded it, else the last decision of a launched run."""
    failure = read_json(run_dir / FAILURE)
    if not isinstance(failure, dict) or not isinstance(failure.get("message"), str):
        attempts = RunFolder(run_dir).attempts()
        last = attempts[-1].decision() if attempts else None
        stopped = last is not None and last["action"] == "stop"
        failure = {"kind": last["kind"], "message": last["reason"]} if last is not None and stopped else None
    return (str(failure.get("kind", "")), str(failure["message"])) if failure else ("", "")


def difference(config: RunConfig, run_dir: Path) -> str:
    """The settings that affect the result and differ between the run in ``run_dir`` and ``config``, as text. Empty if there
    is no difference or no run."""
    return "; ".join(map(str, changed_settings(config, run_dir)))


def changed_settings(config: RunConfig, run_dir: Path) -> list[Difference]:
    """Like `difference`, as a list."""
    path = run_dir / RESOLVED
    if not path.is_file():
        return []
    saved, epochs = load_config(path), config.training.epochs
    found = differences(saved.model_dump(mode="json"), with_known_length(config, run_dir), OF_RESULTS)
    if epochs and saved.training.epochs != epochs and not config.training.train_tokens:
        others = [one for one in found if one.name != "training.train_tokens"]
        return [*others, Difference("training.epochs", saved.training.epochs, epochs)]
    return found


def with_known_length(config: RunConfig, run_dir: Path) -> RunConfig:
    """``config`` with the `training.train_tokens` that its epochs took when the run in ``run_dir`` read its data. Without
    epochs, and where no run has read data for as many, it is ``config``; then its steps are 0 if it has epochs."""
    path, training = run_dir / RESOLVED, config.training
    if not training.epochs or training.train_tokens or not path.is_file():
        return config
    saved = load_config(path).training
    if saved.epochs != training.epochs:
        return config
    return config.model_copy(update={"training": training.model_copy(update={"train_tokens": saved.train_tokens})})
