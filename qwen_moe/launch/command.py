"""`qwen-moe launch RECIPE.yaml`: check, write, submit. `--dry-run` prints the script; `--local` runs without Slurm."""

import argparse
import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.errors import LaunchError
from launchers.folder.atomic import write_json, write_text
from launchers.slurm import commands as slurm
from launchers.slurm.request import split_names
from launchers.slurm.script import render
from launchers.slurm.set_up import checked, without_variables
from launchers.slurm.site import Site, load_site
from qwen_moe.config import load_config
from qwen_moe.options import whole

if TYPE_CHECKING:
    from qwen_moe.launch.prepare import Plan

NOTHING_DONE = "nothing was written or submitted"
NO_CLUSTER = "note: no Slurm answers here; nothing was checked against a cluster"


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("launch", help="run or resume a recipe on a Slurm cluster (docs/slurm.md)")
    parser.add_argument("recipe", type=Path, help="a recipe; with --array or --local, also a folder of recipes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe to override")
    parser.add_argument("--site", type=Path, help="site file (default: ~/.config/qwen-moe/slurm.toml, if it exists)")
    parser.add_argument("--dry-run", action="store_true", help="only print the sbatch script and the estimates")
    parser.add_argument("--nodes", type=whole(1), help="number of nodes (default: site file)")
    parser.add_argument("--gpus-per-node", default="", metavar="[TYPE:]NUMBER", help="default: site file")
    parser.add_argument("--nproc", type=whole(1), help="processes per node (default: one per GPU, or one)")
    parser.add_argument("--cpus-per-task", type=whole(1), help="CPUs for all processes of a node (default: all)")
    parser.add_argument("--partition", default="", metavar="NAME[,NAME...]", help="as in sbatch")
    for name in ("time", "account", "qos", "constraint", "exclude"):
        parser.add_argument(f"--{name}", default="", help="as in sbatch")
    parser.add_argument("--signal-seconds", type=whole(1), help="seconds before the time limit to save a checkpoint")
    parser.add_argument("--shared", action="store_true", help="do not request whole nodes")
    parser.add_argument("--container-image", default="", help="run in this container (pyxis)")
    parser.add_argument("--container-mounts", type=lambda text: text.split(","), default=[], metavar="FROM:TO,...")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable for every process")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="any sbatch option")
    parser.add_argument(
        "--after-ok", action="append", default=[], metavar="RUN|JOB", help="start after that run or job has succeeded"
    )
    parser.add_argument(
        "--then", metavar="COMMAND", help="a shell command to run as a separate one-node job after success"
    )
    parser.add_argument(
        "--preflight", choices=("full", "quick", "off"), help="test the nodes first (default: site file, or full)"
    )
    parser.add_argument("--array", action="store_true", help="run every recipe of a folder as one job array")
    parser.add_argument("--max-parallel", type=whole(1), help="number of array tasks that run at a time")
    parser.add_argument("--local", action="store_true", help="run on this machine, without Slurm")
    parser.add_argument("--parallel", type=whole(1), help="with --local and a folder: runs at a time (default: 1)")
    parser.add_argument("--threads", type=whole(1), help="with --local and a folder: threads of each process")
    parser.add_argument(
        "--retries", type=whole(), help="with --local and a folder: retries of a failed run (default: 2)"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    site = load_site(args.site)
    if args.preflight:
        site = dataclasses.replace(site, preflight=dataclasses.replace(site.preflight, level=args.preflight))
    if args.array:
        from qwen_moe.launch.array import launch_array

        return launch_array(args, site)
    if args.max_parallel:
        raise LaunchError("--max-parallel is for --array: leave it out or add --array")
    if args.local and args.recipe.is_dir():
        from qwen_moe.launch import folder

        _refuse_with_folder(args)
        return folder.run(args)
    for name in ("parallel", "threads", "retries"):
        if getattr(args, name) is not None:
            raise LaunchError(f"--{name} is for a folder of recipes with --local: leave it out")
    if args.recipe.is_dir():
        raise LaunchError(
            f"{args.recipe} is a folder: add --local to run its recipes on this machine, or --array for a Slurm job array"
        )
    if args.local:
        return _launch_here(args, site)
    return _launch_slurm(args, site)


def _refuse_with_folder(args: argparse.Namespace) -> None:
    """Refuse options that a folder's runs ignore: they start with `qwen-moe train` and the recipe's own launch.nproc."""
    given = [name for name in ("nodes", "gpus_per_node", "nproc", "then") if getattr(args, name)]
    if given:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise LaunchError(
            f"{shown}: not with --local and a folder; set the number of processes by launch.nproc of each recipe"
        )


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def _launch_here(args: argparse.Namespace, site: Site) -> int:
    from qwen_moe.launch import prepare

    if args.nodes not in (None, 1):
        raise LaunchError(f"--nodes {args.nodes} with --local: this machine is one node")
    config = load_config(args.recipe, args.overrides)
    args.nodes, args.nproc = 1, args.nproc or config.launch.nproc
    plan = prepare.plan_run(config, site, args)
    prepare.check_world(plan.config, args.nproc)
    prepare.check_not_running(plan.run, "", [])
    if args.dry_run:
        _say(*plan.estimate.lines())
        return 0
    prepare.check_room(plan)
    with prepare.one_launch(plan.run.launch):
        return _conduct_here(plan, site)


def _conduct_here(plan: "Plan", site: Site) -> int:
    from launchers.job import conductor
    from qwen_moe.launch import prepare

    prepare.check_not_running(plan.run, "", [])
    prepare.write_run(plan, site, local=True)
    shown = shlex.quote(str(plan.run.run_dir))
    _say(f"run folder  {plan.run.run_dir}", f"logs        qwen-moe logs {shown} --follow")
    # As in the batch script, use this code whatever the current folder is.
    paths = [str(plan.spec.code_root), os.environ.get("PYTHONPATH", "")]
    os.environ |= {**plan.spec.environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return conductor.main(["--run", str(plan.run.run_dir), "--local", "--", plan.spec.python, "-u"])


def _launch_slurm(args: argparse.Namespace, site: Site) -> int:
    from qwen_moe.launch import prepare

    plan = prepare.plan_run(load_config(args.recipe, args.overrides), site, args)
    script = render(plan.spec)
    partitions, accounts, jobs = _ask_cluster(plan.spec.partition, args.dry_run)
    prepare.check(plan, partitions, accounts)
    prepare.check_not_running(plan.run, plan.spec.name, jobs)
    if args.dry_run:
        print(script, end="")
        _say(f"run folder        {plan.run.run_dir}", *plan.estimate.lines(), NOTHING_DONE)
        return 0
    prepare.check_room(plan)
    with prepare.one_launch(plan.run.launch):
        prepare.check_not_running(plan.run, plan.spec.name, slurm.queue())  # another launch may have ended just now
        job = _submit(plan, site, script)
    _say(*plan.estimate.lines())
    then = ""
    try:
        then = _submit_then(args.then, plan.spec, job) if args.then else ""
    except (LaunchError, KeyboardInterrupt):
        _say(f"job {job} of the run was submitted, but that of --then most likely not: `squeue --me` shows both")
        raise
    finally:
        _print_next(job, plan.run.run_dir, then)
    return 0


def _submit(plan: "Plan", site: Site, script: str) -> str:
    """Write what the job reads, and submit it. Returns the job id."""
    from qwen_moe.launch import prepare

    facts = prepare.write_run(plan, site, local=False)
    path = plan.run.launch / "job.sbatch"
    write_text(path, script, private=True)
    try:
        job = slurm.submit(path)
    except slurm.SlurmError as error:
        write_json(plan.run.facts_file, facts | {"error": str(error)})
        raise
    except KeyboardInterrupt:
        _say(
            f"Slurm may have got the job before the interrupt: see `qwen-moe status {shlex.quote(str(plan.run.run_dir))}`"
        )
        raise
    write_json(plan.run.facts_file, facts | {"job": job})
    return job


def _print_next(job: str, run_dir: Path, then: str) -> None:
    shown = shlex.quote(str(run_dir))
    print(f"job         {job}" + (f" (then {then})" if then else ""))
    print(f"run folder  {run_dir}")
    print(f"            qwen-moe status {shown}")
    print(f"            qwen-moe logs {shown} --follow")
    print(f"            qwen-moe cancel {shown}")


def _ask_cluster(partition: str, dry_run: bool) -> tuple[Any, Any, list[slurm.Job]]:
    """The partitions, the accounts and the queue. A dry run also works without a cluster, and says so."""
    import shutil

    if dry_run and shutil.which("sbatch") is None:
        _say(NO_CLUSTER)
        return None, None, []
    try:
        return slurm.partitions(split_names(partition)), slurm.accounts(), slurm.queue()
    except slurm.SlurmError as error:
        if not dry_run:
            raise
        # Slurm's commands are installed, but no cluster is configured or running.
        _say(NO_CLUSTER, f"note: {error}")
        return None, None, []


def _submit_then(command: str, spec: Any, job: str) -> str:
    """Submit a one-node job that runs ``command`` in a shell after ``job`` has succeeded. Returns its id."""
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={spec.name}-then",
        "#SBATCH --nodes=1",
        "#SBATCH --output=then-%j.out",
        f"#SBATCH --dependency=afterok:{job}",
        "# Cancel this job, instead of letting it wait, if the run fails.",
        "#SBATCH --kill-on-invalid-dep=yes",
        *(
            f"#SBATCH --{n}={shlex.quote(getattr(spec, n))}"
            for n in ("account", "partition", "qos")
            if getattr(spec, n)
        ),
        "set -u",
        f"cd -- {shlex.quote(str(spec.workdir))} || exit 1",
        *without_variables(),
        *(["set +u", *checked(spec.setup)] if spec.setup else []),
        f"exec bash -c {shlex.quote(command)}",
        "",
    ]
    path = spec.folder / "then.sbatch"
    write_text(path, "\n".join(lines), private=True)
    return slurm.submit(path)
