"""Turns a recipe, a site file and the command line into a job that can be submitted, or into one message why not."""

import argparse
import contextlib
import getpass
import hashlib
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launchers.counted import counted
from launchers.errors import LaunchError
from launchers.folder.atomic import write_json, write_text
from launchers.folder.run_folder import CHECKPOINTS, RunFolder, read_object
from launchers.folder.secrets import redact_command
from launchers.folder.snapshot import take
from launchers.job.status import jobs_of
from launchers.local.lock import RunLock
from launchers.slurm import commands as slurm
from launchers.slurm import refuse
from launchers.slurm.request import gpus_in_gres, parse_gpus, split_names, take_known
from launchers.slurm.script import JobSpec, parse_environment
from launchers.slurm.site import Site
from qwen_moe.alone import alone
from qwen_moe.config import RunConfig, dump_config, stage_runs
from qwen_moe.errors import UserError, explain_os_error
from qwen_moe.launch.estimate import Estimate, estimate
from qwen_moe.launch.redact import redact
from qwen_moe.models.flops import flops_per_token
from qwen_moe.runs.sinks import check_recorders

# Defaults of the user's shell that sbatch reads. They are written into the script, so that they are checked and visible.
_SBATCH = {
    "account": "SBATCH_ACCOUNT",
    "partition": "SBATCH_PARTITION",
    "qos": "SBATCH_QOS",
    "constraint": "SBATCH_CONSTRAINT",
    "time": "SBATCH_TIMELIMIT",
    "gpus_per_node": "SBATCH_GPUS_PER_NODE",
}
CODE_ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("qwen_moe", "parallel", "launchers", "scaling_laws")  # a run keeps their code, and nodes compare it
AGENT = "qwen_moe.launch.agent"  # the module that the conductor starts on every node


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run, ready to be written and submitted."""

    config: RunConfig
    run: RunFolder
    spec: JobSpec
    estimate: Estimate


def job_name(run_dir: Path) -> str:
    """A name that is readable, safe for shells and for Slurm's patterns, and different for every run folder."""
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", run_dir.name).strip("-.")[:40] or "run"
    return f"{clean}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:6]}"


def absolute(config: RunConfig) -> RunConfig:
    """The same run with an absolute run folder; other paths of a recipe are relative to where `launch` is called."""
    return config.model_copy(update={"run_dir": Path.cwd() / config.run_dir})


def build_spec(config: RunConfig, site: Site, args: argparse.Namespace) -> JobSpec:
    """The job's options. The command line overrides the site file, and the site file's sbatch_args override its keys. An
    option and a `--sbatch` that contradict each other are refused."""
    free, others = take_known(args.sbatch)
    site_free, site_others = take_known(site.slurm.sbatch_args)
    for name, value in free.items():
        own = getattr(args, name, None)
        if own not in (None, "", 0) and str(own) != value:
            option = name.replace("_", "-")
            raise LaunchError(f"--{option} {own} and --sbatch {option}={value} contradict each other: leave one out")

    def given(name: str) -> Any:
        found = (getattr(args, name), free.get(name), site_free.get(name), getattr(site.slurm, name))
        default = os.environ.get(_SBATCH.get(name, ""), getattr(site.slurm, name))
        return next((value for value in found if value not in (None, "", 0)), default)

    request = str(given("gpus_per_node") or "")
    gpus = sum(parse_gpus(request).values()) if request else 0
    cpus = str(given("cpus_per_task"))
    if not cpus.isdecimal():
        raise LaunchError(f"--sbatch cpus-per-task={cpus[:60]}: expected a whole number, 1 or more")
    processes = args.nproc or site.slurm.processes_per_node or gpus or 1
    run_dir = config.run_dir
    image = args.container_image or site.container.image
    return JobSpec(
        name=job_name(run_dir),
        folder=run_dir / "launch",
        workdir=Path.cwd(),
        python=site.setup.python or sys.executable,
        code_root=CODE_ROOT,
        nodes=given("nodes"),
        processes_per_node=processes,
        gpus_per_node=gpus,
        gpu_request="" if request.isdecimal() else request,
        gres=_gres(request, free.get("gres", ""), site_free.get("gres", "")),
        cpus_per_task=int(cpus),
        exclusive=site.slurm.exclusive and not args.shared,
        signal_seconds=given("signal_seconds"),
        checkpoint_signal=site.survive.checkpoint_signal,
        **{n: given(n) for n in ("time", "account", "qos", "constraint", "exclude")},
        partition=",".join(split_names(given("partition"))),
        dependency=",".join(["singleton", *(f"afterok:{_job_of(text)}" for text in args.after_ok)]),
        sbatch_args=(*site_others, *others),
        srun_args=tuple(site.slurm.srun_args),
        setup=tuple(site.setup.commands),
        environment={**site.environment, **parse_environment(args.env)},
        container_image=image,
        container_mounts=(*site.container.mounts, *args.container_mounts) if image else (),
        container_python=site.container.python,
    )


def _gres(request: str, *given: str) -> str:
    """The `--gres` to write: the first one given. If other GPUs were requested elsewhere, they replace its GPUs."""
    text = next(filter(None, given), "")
    gpus, rest = gpus_in_gres(text)
    if not text or gpus == request:
        return text
    return ",".join([f"gpu:{part}" for part in request.split(",")] + [rest] * bool(rest))


def _job_of(text: str) -> str:
    """A job id, or the job of a launched run's folder."""
    if re.fullmatch(r"\d+(_\d+)?", text):
        return text
    job = RunFolder(Path(text)).facts().get("job")
    if not job:
        raise LaunchError(f"--after-ok {text}: that run has no job; launch it first, or give a job id")
    return str(job)


def check_world(config: RunConfig, world_size: int) -> None:
    """Raises UserError unless the recipe's layout, or that of each stage, fits ``world_size`` processes."""
    from qwen_moe.training.stages import check_layouts

    check_layouts(stage_runs(config), world_size)


def check(plan: Plan, partitions: list[slurm.Partition] | None, accounts: Any) -> None:
    """Check everything that can be refused before submitting; one error lists all problems."""
    spec, problems = plan.spec, []
    try:
        check_world(plan.config, spec.nodes * spec.processes_per_node)
    except UserError as error:
        problems.append(f"{counted(spec.nodes, 'node')} x {counted(spec.processes_per_node, 'process')}: {error}")
    if spec.python == sys.executable and not spec.container_image:  # another interpreter has other packages
        try:
            check_recorders(plan.config)
        except UserError as error:
            problems.append(str(error))
    if partitions is not None:
        found, notes = refuse.check_partitions(spec, partitions)
        problems += found + refuse.check_account(spec, accounts)
        print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    problems += refuse.check_time(spec, plan.estimate.checkpoint_seconds, plan.estimate.checkpoint_measured)
    refuse.refuse(problems)


def check_not_running(run: RunFolder, name: str, jobs: list[slurm.Job]) -> None:
    """Raises LaunchError if the run has a job in the queue, or a process on this machine works on it."""
    facts = read_object(run.facts_file) or {}
    found = refuse.already_active(str(facts.get("job") or ""), name, jobs) or next(iter(jobs_of(facts, jobs)), None)
    if found is not None:
        raise LaunchError(
            f"run {run.run_dir} is already in the queue as job {found.job_id} ({found.state}): wait for it, "
            f"`qwen-moe cancel {run.run_dir}`, or use another run_dir"
        )
    if run.run_dir.exists():
        RunLock(run.run_dir).close()


def one_launch(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Of launches that begin at once, one writes and submits what ``folder`` describes. The others are refused (UserError):
    each would overwrite the files of the first one and submit a second job."""
    return alone(folder, "wait for it, then see `qwen-moe status`")


def check_room(plan: Plan) -> None:
    """Raises LaunchError if the run folder cannot be written, and UserError if its disk has no space for checkpoints."""
    from qwen_moe.checkpoint.preflight import check_disk_space

    folder = plan.run.launch
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise LaunchError(
            f"run folder {plan.run.run_dir} cannot be written ({_why(error)}): give another run_dir, on a file system that "
            "the nodes share"
        ) from None
    check_disk_space(plan.config, plan.run.run_dir / CHECKPOINTS)


def _why(error: OSError) -> str:
    return explain_os_error(error) if isinstance(error, FileExistsError) else error.strerror or str(error)


def groups(config: RunConfig) -> dict[str, int]:
    """Sizes, in consecutive ranks, of the groups that communicate most; used for the placement."""
    parallel = config.parallel
    return {"tp": parallel.tp, "ep": parallel.ep * parallel.etp}


def write_run(plan: Plan, site: Site, *, local: bool, array: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write what the run's processes read and what a person may want to know later. ``array``: name of the array of which
    the run is a task, and the task's number. Returns launch.json's content."""
    run, spec = plan.run, plan.spec
    (run.launch / "cancelled.json").unlink(missing_ok=True)
    write_text(run.launch / "recipe.yaml", dump_config(plan.config))
    code = take(CODE_ROOT, PACKAGES, run.launch / "code", redact)
    write_json(run.launch / "command.json", redact_command(sys.argv), private=True)
    facts = {
        "name": spec.name,
        "job": "",
        "array": array,
        "launched": time.time(),
        "earlier_attempts": max((attempt.number for attempt in run.attempts()), default=0),
        "user": getpass.getuser(),
        "local": local,
        "workdir": str(spec.workdir),
        "nodes": spec.nodes,
        "processes_per_node": spec.processes_per_node,
        "train_steps": plan.config.train_steps,
        "tokens_per_step": plan.config.tokens_per_step,
        "stages": _stages(plan.config),
        "groups": groups(plan.config),
        "signal_seconds": spec.signal_seconds,
        "python": spec.python,
        "agent": AGENT,
        "packages": list(PACKAGES),
        "local_folder": site.setup.local_folder,
        "site": site.source,
        "survive": asdict(site.survive),
        "preflight": asdict(site.preflight),
        "code_hash": code["hash"],
        "commit": code.get("commit", ""),
    }
    write_json(run.facts_file, facts)
    return facts


def _stages(config: RunConfig) -> list[dict[str, Any]]:
    """What `status` reads of a run's stages: their names, where each ends, and the work of one of its steps."""
    return [
        {
            "name": run.place.name,
            "end_step": run.end_step,
            "flops_per_step": flops_per_token(run.model, run.data.sequence_length).training * run.tokens_per_step,
        }
        for run in stage_runs(config)
        if run.place.name
    ]


def plan_run(config: RunConfig, site: Site, args: argparse.Namespace) -> Plan:
    """Put a run's plan together, without checking it."""
    config = absolute(config)
    spec = build_spec(config, site, args)
    return Plan(
        config=config,
        run=RunFolder(config.run_dir),
        spec=spec,
        estimate=estimate(config, spec, site.hardware, config.run_dir),
    )
