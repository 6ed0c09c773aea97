"""`qwen-moe train RECIPE.yaml [section.key=value ...]`: prepare data, start processes, export the trained model."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from launchers.counted import counted
from launchers.folder.atomic import write_json, write_text
from launchers.folder.run_folder import CHECKPOINTS
from qwen_moe.config import RunConfig, dump_config, load_config, stage_runs
from qwen_moe.errors import UserError
from qwen_moe.runs.outcome import FAILURE
from qwen_moe.runs.records import RESOLVED


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("train", help="train a model from a recipe; run it again to resume after a stop")
    parser.add_argument("recipe", type=Path, help="a YAML file with every setting of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe to override")
    parser.add_argument("--json", action="store_true", help="print the outcome as one JSON object on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from parallel.process import started_by_launcher

    config = load_config(args.recipe, args.overrides)
    if started_by_launcher():
        return _join(config)
    outcome = _train_here(config)
    if isinstance(outcome, int):
        return outcome
    if args.json:
        print(json.dumps(outcome))
    return 0


def _join(config: RunConfig) -> int:
    """Run one rank of a run whose processes torchrun or Slurm started. Rank 0 finishes the run."""
    from launchers.local.lock import RunLock
    from parallel.process import process_info
    from qwen_moe.training.worker import run_worker

    held: list[RunLock] = []  # rank 0 holds the lock until it ends; another run of the folder is refused on every rank

    def admit() -> None:
        held.append(RunLock(config.run_dir, "rank 0 of qwen-moe train, started by torchrun or srun"))

    code = run_worker(config, admit=admit)
    if code == 0 and process_info().rank == 0:
        from qwen_moe.data.inputs import with_length
        from qwen_moe.runs.finish import finish_run

        finish_run(with_length(config))
    for lock in held:
        lock.close()
    return code


def _train_here(config: RunConfig) -> dict[str, Any] | int:
    from launchers.local.lock import RunLock
    from launchers.local.supervisor import Supervisor
    from parallel.gpus import visible_gpus
    from qwen_moe.checkpoint.preflight import check_disk_space
    from qwen_moe.data.inputs import prepare_inputs, tell_of_data, with_length
    from qwen_moe.runs.sinks import check_recorders
    from qwen_moe.sharding.layout import run_layout
    from qwen_moe.training.stages import check_layouts, processes_for

    check_recorders(config)
    gpus = visible_gpus()
    stages = stage_runs(config)
    nproc = processes_for(stages, gpus)
    check_layouts(stages, nproc)
    layout = run_layout(stages[0], nproc).layout
    if nproc != config.launch.nproc:
        why = (
            f"there are {counted(gpus, 'GPU')}, one for each"
            if gpus and nproc < config.launch.nproc
            else f"layout {layout}"
        )
        print(f"processes: {nproc} instead of launch.nproc {config.launch.nproc}: {why}", file=sys.stderr)
    lock = RunLock(config.run_dir)
    try:
        check_disk_space(config, config.run_dir / CHECKPOINTS)
        prepare_inputs(config)
        tell_of_data(config)
        config = with_length(config)
        (config.run_dir / FAILURE).unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="qwen-moe-") as folder:
            # Not in the run folder: the failure may be that its disk is full.
            failure = Path(folder) / "failure.json"
            # The run folder keeps its own settings until its checkpoint is known to match this recipe.
            resolved = Path(folder) / RESOLVED
            write_text(resolved, dump_config(config))
            command = [sys.executable, "-m", "qwen_moe.training.elastic"]
            command += [str(nproc), str(resolved), str(failure)]
            limit = config.launch.max_restarts_without_progress
            outcome = Supervisor(command, config.run_dir, failure, _environment(config, nproc), limit, lock).run()
        if outcome.message:
            print(file=sys.stderr)  # a failed run's progress bar does not end its line
            if not lock.lost():
                _note_failure(config.run_dir / FAILURE, outcome.kind, outcome.message)
            raise UserError(outcome.message)
        if outcome.code != 0:
            return outcome.code
        from qwen_moe.runs.finish import finish_run

        return finish_run(config) | {"restarts": outcome.restarts}
    finally:
        lock.close()


def _note_failure(path: Path, kind: str, message: str) -> None:
    """Record how the run ended. Errors are ignored: a full disk must not hide the message itself."""
    with contextlib.suppress(OSError):
        write_json(path, {"kind": kind, "message": message})


def _environment(config: RunConfig, nproc: int) -> dict[str, str]:
    from parallel.heap import heap_environment
    from parallel.threads import choose_threads
    from qwen_moe.runs.records import earlier_threads

    before = earlier_threads(config.run_dir, nproc)
    threads = choose_threads(nproc, config.launch.threads, before=before)
    return os.environ | threads.environment() | heap_environment()
