"""`qwen-moe launch FOLDER --array`: every recipe of a folder as one job array; run again, it launches unfinished runs."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from launchers.counted import counted
from launchers.errors import LaunchError
from launchers.folder.atomic import write_json, write_text
from launchers.folder.run_folder import RunFolder, read_object
from launchers.job.status import jobs_of, row
from launchers.slurm import commands as slurm
from launchers.slurm.request import split_names
from launchers.slurm.script import JobSpec, render
from launchers.slurm.site import Site
from qwen_moe.config import load_config
from qwen_moe.launch import prepare
from qwen_moe.launch.folder import recipes, trunk_of
from qwen_moe.launch.prepare import Plan


def launch_array(args: argparse.Namespace, site: Site) -> int:
    """Submit the recipes that are neither complete nor in the queue."""
    if args.local or args.then:
        raise LaunchError("--array submits to Slurm and cannot be combined with --local or --then: leave these out")
    plans = [prepare.plan_run(load_config(path, args.overrides), site, args) for path in recipes(args.recipe)]
    folders = [plan.run.run_dir for plan in plans]
    for folder in folders:
        if folders.count(folder) > 1:
            raise LaunchError(f"several recipes of {args.recipe} have the run_dir {folder}: give each its own")
    if args.dry_run:
        return _launch(plans, args, site)
    with prepare.one_launch(args.recipe.resolve() / "launch"):
        return _launch(plans, args, site)


def _launch(plans: list[Plan], args: argparse.Namespace, site: Site) -> int:
    partitions = slurm.partitions(split_names(plans[0].spec.partition))
    accounts, jobs = slurm.accounts(), slurm.queue()
    by_id = {job.job_id: job for job in jobs}
    chosen, skipped = _choose(plans, by_id)
    if not chosen:
        count = len(plans)
        which = f"the run of {args.recipe} is" if count == 1 else f"all {count:,} runs of {args.recipe} are"
        raise LaunchError(f"{which} complete or in the queue: nothing to launch")
    for plan in chosen:
        prepare.check(plan, partitions, accounts)
        prepare.check_not_running(plan.run, "", jobs)
    first, second, queued = _waves(chosen, plans, by_id)
    waves = [wave for wave in (first, second) if wave]
    _say(*(f"{plan.run.run_dir}: {why}, not launched" for plan, why in skipped))
    job, after = "", queued
    for place, wave in enumerate(waves):
        spec = _spec_of(wave, args, after=after if wave is second else [])
        script = render(spec)
        if args.dry_run:
            print(script, end="")
            continue
        job = _submit(wave, site, spec, script)
        after = [*queued, job]
        print(f"job array   {job} ({counted(len(wave), 'task')})" + (", after the previous array" if place else ""))
        print(f"script      {spec.folder / 'job.sbatch'}")
        print(f"            scancel {job}")
    if args.dry_run:
        _say(f"{counted(len(chosen), 'task')}; nothing was written or submitted")
        return 0
    shown = shlex.quote(str(chosen[0].run.run_dir))
    print(f"            qwen-moe status {shlex.quote(str(Path(chosen[0].run.run_dir).parent))}")
    print(f"            qwen-moe logs {shown} --follow")
    return 0


def queued_runs(runs: Iterable[RunFolder], jobs: Mapping[str, slurm.Job]) -> dict[Path, str]:
    """Job id by resolved run folder, of those ``runs`` whose job is in the queue or running."""
    found: dict[Path, str] = {}
    for run in runs:
        of_run = jobs_of(read_object(run.facts_file) or {}, jobs.values())
        if of_run:
            found[run.run_dir.resolve()] = of_run[0].job_id
    return found


def _waves(
    chosen: list[Plan], plans: list[Plan], jobs: dict[str, slurm.Job]
) -> tuple[list[Plan], list[Plan], list[str]]:
    """(runs that need no other run of the folder; runs that branch off an incomplete trunk; jobs of such trunks that are
    already in the queue)."""
    waiting = {plan.run.run_dir.resolve() for plan in chosen}
    queued = queued_runs([plan.run for plan in plans], jobs)
    first = [plan for plan in chosen if trunk_of(plan.config) not in waiting | queued.keys()]
    second = [plan for plan in chosen if trunk_of(plan.config) in waiting | queued.keys()]
    needed = {queued[trunk] for plan in second if (trunk := trunk_of(plan.config)) in queued}
    return first, second, sorted(needed)


def _spec_of(plans: list[Plan], args: argparse.Namespace, after: list[str]) -> JobSpec:
    """The array of ``plans``. It starts when the jobs ``after`` have ended, even if they failed: a task whose trunk failed
    says so, and the others run."""
    base = (Path.cwd() / args.recipe / "launch").resolve()
    number = 1 + max((int(p.name) for p in base.glob("[0-9]*") if p.name.isdigit()), default=0)
    limit = f"%{args.max_parallel}" if args.max_parallel else ""
    # Tasks share the array's name, so singleton would run them one after the other. The run folder's lock ensures that
    # each run exists only once.
    given = [part for part in plans[0].spec.dependency.split(",") if part not in ("singleton", "")]
    dependency = ",".join([*given, *(f"afterany:{job}" for job in after)])
    return dataclasses.replace(
        plans[0].spec,
        # Each array has another name: by it and the task's number, `status` finds a run whose job id was never written.
        name=f"{prepare.job_name(base.parent)}-{number:03d}",
        folder=base / f"{number:03d}",
        array=f"0-{len(plans) - 1}{limit}",
        dependency=dependency,
    )


def _choose(plans: list[Plan], jobs: dict[str, slurm.Job]) -> tuple[list[Plan], list[tuple[Plan, str]]]:
    chosen: list[Plan] = []
    skipped: list[tuple[Plan, str]] = []
    for plan in plans:
        try:
            known = row(plan.run.run_dir, jobs)
        except LaunchError:  # never launched, or its launch.json is damaged: launching rewrites it
            known = {"state": "", "job": ""}
        job = jobs.get(known["job"])
        if known["state"] == "complete" or (job is not None and job.state in slurm.ACTIVE):
            skipped.append((plan, known["state"]))
        else:
            chosen.append(plan)
    return chosen, skipped


def _submit(plans: list[Plan], site: Site, spec: JobSpec, script: str) -> str:
    """Write and submit one array. Returns its job id."""
    folder = spec.folder
    for plan in plans:
        prepare.check_room(plan)
    facts = [
        prepare.write_run(plan, site, local=False, array={"name": spec.name, "task": task})
        for task, plan in enumerate(plans)
    ]
    write_json(folder / "tasks.json", [str(plan.run.run_dir) for plan in plans])
    write_text(folder / "job.sbatch", script, private=True)
    try:
        job = slurm.submit(folder / "job.sbatch")
    except slurm.SlurmError as error:
        for plan, values in zip(plans, facts, strict=True):
            write_json(plan.run.facts_file, values | {"error": str(error)})
        raise
    except KeyboardInterrupt:
        shown = shlex.quote(str(plans[0].run.run_dir.parent))
        _say(f"Slurm may have got the array before the interrupt: see `qwen-moe status {shown}`")
        raise
    for index, (plan, values) in enumerate(zip(plans, facts, strict=True)):
        write_json(plan.run.facts_file, values | {"job": f"{job}_{index}"})
    return job


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)
