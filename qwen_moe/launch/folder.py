"""`qwen-moe launch FOLDER --local`: trains every recipe of a folder on this machine, some at a time.

The same command again continues with the runs that are not complete.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launchers.counted import counted
from launchers.errors import LaunchError
from launchers.folder.run_folder import RunFolder, last_metrics
from launchers.local.fleet import Fleet, Result, Task
from launchers.local.lock import RunLock, locked
from launchers.local.supervisor import INTERRUPTED
from parallel.threads import choose_threads
from qwen_moe.config import RunConfig, load_config
from qwen_moe.launch.prepare import CODE_ROOT
from qwen_moe.models.flops import training_flops

LOGS = "logs"
TRAIN = (sys.executable, "-m", "qwen_moe", "train")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A recipe of the folder, its config, and the name of the run that it branches from (``after``)."""

    path: Path
    config: RunConfig
    after: str

    @property
    def name(self) -> str:
        return self.path.stem


def recipes(folder: Path) -> list[Path]:
    """The recipes of a folder, sorted by name. Raises LaunchError if there are none."""
    if not folder.is_dir():
        raise LaunchError(f"{folder} is not a folder: give a folder of recipes (*.yaml), or one recipe")
    found = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    if not found:
        raise LaunchError(f"{folder} has no recipes (*.yaml): `qwen-moe scaling ladder` writes some")
    return found


def trunk_of(config: RunConfig) -> Path | None:
    """The run folder whose checkpoint ``config`` branches from."""
    start = config.checkpoint.branch_from
    return (Path.cwd() / start).resolve().parents[1] if start is not None else None


def open_folder(folder: Path, overrides: Iterable[str]) -> list[Entry]:
    """Every recipe of a folder; each must have its own run folder. Raises LaunchError, UserError."""
    loaded = [(path, load_config(path, list(overrides))) for path in recipes(folder)]
    owners: dict[Path, str] = {}
    for path, config in loaded:
        where = (Path.cwd() / config.run_dir).resolve()
        if where in owners:
            raise LaunchError(f"several recipes of {folder} have the run_dir {config.run_dir}: give each its own")
        owners[where] = path.stem
    return [
        Entry(path=path, config=config, after=owners.get(trunk, "") if (trunk := trunk_of(config)) else "")
        for path, config in loaded
    ]


def is_complete(entry: Entry) -> bool:
    """True if every step is done and saved, with the recipe's settings. False if only the length differs and no step beyond
    the recipe's is done: the run itself decides whether its length may change. Also false if only the run's data can tell
    how long `training.epochs` are. Raises LaunchError if a finished run had other settings."""
    from qwen_moe.runs.identity import Rule, rule_of
    from qwen_moe.runs.outcome import changed_settings, with_known_length

    config = with_known_length(entry.config, entry.config.run_dir)
    saved = RunFolder(config.run_dir).saved_step()
    if not config.train_steps or saved < config.train_steps:
        return False
    changed = changed_settings(config, config.run_dir)
    if changed and saved == config.train_steps and all(rule_of(d.name) == Rule.HORIZON for d in changed):
        return False
    if changed:
        raise LaunchError(
            f"{config.run_dir} holds a finished run with other settings than {entry.path}: {'; '.join(map(str, changed))}. "
            "Give the recipe another run_dir, or move that run elsewhere"
        )
    return True


def has_diverged(entry: Entry) -> str:
    """Why the run diverged; "" if it did not. It is not retried, because another attempt would meet the same step."""
    from qwen_moe.runs.outcome import difference, read_outcome

    found = read_outcome(entry.config, entry.config.run_dir)
    return found.why if found.state == "diverged" and not difference(entry.config, entry.config.run_dir) else ""


def first_step(config: RunConfig) -> int:
    """The number of steps that a run does not take itself: those of the trunk that it branches from. 0 if the name of the
    trunk's checkpoint does not tell."""
    start = config.checkpoint.branch_from
    number = start.name.removeprefix("step_") if start is not None else ""
    return int(number) if number.isascii() and number.isdecimal() else 0


def _progress(config: RunConfig) -> tuple[float, str]:
    record, _ = last_metrics(config.run_dir)
    if not record:
        return 0.0, ""
    from qwen_moe.runs.outcome import with_known_length

    first, steps = first_step(config), with_known_length(config, config.run_dir).train_steps
    share = (record["step"] - first) / max(1, steps - first)
    return min(1.0, max(0.0, share)), f"loss {record['loss']:.3f}"


def _task(entry: Entry, folder: Path, threads: int, overrides: list[str]) -> Task:
    config = entry.config
    extra = [f"launch.threads={threads}"] if threads else []
    overrides = [given for given in overrides if not (extra and given.startswith("launch.threads="))]
    return Task(
        name=entry.name,
        command=(*TRAIN, str(entry.path), *overrides, *extra),
        log=folder / LOGS / f"{entry.name}.log",
        complete=lambda: is_complete(entry),
        busy=lambda: locked(config.run_dir),
        progress=lambda: _progress(config),
        after=entry.after,
        work=training_flops(config, first_step(config)),
    )


def _prepare_data(entries: list[Entry]) -> None:
    """Prepare shared data once, before concurrent runs race to do it. Raises UserError."""
    wanted: dict[str, RunConfig] = {}
    for entry in entries:
        if entry.config.data.prepare is not None:
            wanted.setdefault(entry.config.data.prepare.model_dump_json(), entry.config)
    if wanted:
        from qwen_moe.data.inputs import prepare_inputs

        for config in wanted.values():
            prepare_inputs(config)


def launch_folder(
    folder: Path, *, overrides: list[str], parallel: int, threads: int, retries: int, dry_run: bool = False
) -> dict[str, Result]:
    """Run what is not complete, and return a result for every recipe. With ``threads`` 0, the runs share the cores."""
    entries = open_folder(folder, overrides)
    if not threads and parallel > 1:
        # Ignore the current load: the folder runs for a long time, and all its runs should have the same thread count.
        most = parallel * max(entry.config.launch.nproc for entry in entries)
        threads = choose_threads(most, load=False).count
    complete = [entry for entry in entries if is_complete(entry)]
    if dry_run:
        _show(entries, complete)
        return {}
    lock = RunLock(folder)
    try:
        results: dict[str, Result] = {}
        for entry in entries:
            if entry not in complete and (why := has_diverged(entry)):
                results[entry.name] = Result(state="failed", why=why)
        left = [entry for entry in entries if entry not in complete and entry.name not in results]
        if left:
            print(
                f"{folder}: {counted(len(entries), 'run')}, {len(complete)} complete, {len(left)} to do, {parallel} "
                "at a time; "
                f"logs in {folder / LOGS}",
                file=sys.stderr,
            )
            _prepare_data(left)
        for name in results:
            print(f"{name} diverged before and is not run again: {results[name].why}", file=sys.stderr)
        path = os.pathsep.join(filter(None, [str(CODE_ROOT), os.environ.get("PYTHONPATH", "")]))
        tasks = [_task(entry, folder, threads, overrides) for entry in entries if entry.name not in results]
        fleet = Fleet(tasks, parallel=parallel, retries=retries, environment=os.environ | {"PYTHONPATH": path})
        fleet.results |= results
        found = fleet.run() if tasks else {}
        return {entry.name: found.get(entry.name) or results[entry.name] for entry in entries}
    finally:
        lock.close()


def _show(entries: list[Entry], complete: list[Entry]) -> None:
    left = [entry for entry in entries if entry not in complete]
    for entry in left:
        after = f", after {entry.after}" if entry.after else ""
        steps, epochs = entry.config.train_steps, entry.config.training.epochs
        length = counted(steps, "step") if steps else counted(epochs, "epoch")
        print(f"{entry.name}: {length} in {entry.config.run_dir}{after}")
    print(f"{counted(len(left), 'run')} to do, {len(complete)} complete; nothing was started", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    results = launch_folder(
        args.recipe,
        overrides=list(args.overrides),
        parallel=args.parallel or 1,
        threads=args.threads or 0,
        retries=2 if args.retries is None else args.retries,
        dry_run=args.dry_run,
    )
    if args.dry_run:
        return 0
    states = [result.state for result in results.values()]
    print(json.dumps({state: states.count(state) for state in dict.fromkeys(states)}))
    for name, result in results.items():
        if result.state in ("failed", "blocked"):
            print(f"{name} {result.state}: {result.why}", file=sys.stderr)
    if "stopped" in states:
        print("stopped; the same command continues from there", file=sys.stderr)
        return INTERRUPTED
    return 1 if set(states) - {"complete"} else 0
