"""Runs the stages of a step on the library's executors: in processes of this machine, or as Slurm arrays."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import multiprocess
import multiprocess.connection

from launchers.counted import counted
from launchers.folder.atomic import write_json, write_text
from launchers.folder.run_folder import read_json
from launchers.local.signals import interrupts_kept_from_children
from parallel.threads import available_cpus
from qwen_moe.curation.library import LocalPipelineExecutor, SlurmPipelineExecutor, logger
from qwen_moe.curation.recipe import SlurmSection
from qwen_moe.errors import UserError
from qwen_moe.progress import bar

LOG = "log"
SCRIPT, JOB = "launch_script.slurm", "job.json"


@dataclass(frozen=True)
class Stage:
    """A pipeline of the library and how many tasks it has, in the folder of its step. ``workers``: the most tasks at the
    same time, 0 for as many as the recipe allows."""

    name: str
    pipeline: Sequence[Any]
    tasks: int
    folder: Path
    workers: int = 0

    @property
    def log(self) -> Path:
        return self.folder / LOG / self.name


class Here(LocalPipelineExecutor):
    """The library's executor for one machine. Its own `run` starts a manager process that outlives a killed parent and keeps
    its files open; this one starts workers that end with it, so that a second command never meets them."""

    what = "tasks"  # of which stage, for the progress bar

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        self.save_executor_as_json()
        workers = min(self.workers, len(ranks))
        if workers == 1:
            pipeline = self.pipeline  # type: ignore[has-type]
            for rank in bar(ranks, self.what, "task"):
                self.pipeline = deepcopy(pipeline)
                self._quiet(rank)
            self.pipeline = pipeline
            return
        context = multiprocess.get_context("forkserver")
        with interrupts_kept_from_children():
            started = context.Pool(workers, initializer=_start_worker)
        with started as pool:
            for _ in bar(pool.imap_unordered(self._quiet, ranks), self.what, "task", total=len(ranks)):
                pass

    def _quiet(self, rank: int) -> None:
        """Do a task. What it says goes to its log; an error also to the caller."""
        try:
            with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stderr(nothing):
                self._run_for_rank(rank, local_rank=1)
        finally:
            logger.remove()


def _start_worker() -> None:
    """A worker ignores Ctrl-C, which the command handles, and ends when the command ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_command, daemon=True).start()


def _end_with_command() -> None:
    # Its parent in the sense of the kernel is the fork server, which lives as long as its workers.
    parent = multiprocess.parent_process()
    if parent is not None:
        multiprocess.connection.wait([parent.sentinel])
        os._exit(1)


class Executor:
    """Runs stages. ``workers``: tasks at the same time on this machine, 0 for one per core."""

    def __init__(self, workers: int, slurm: SlurmSection | None = None) -> None:
        self.workers, self.slurm = workers or available_cpus()[0], slurm
        logger.remove()

    def run(self, stage: Stage) -> None:
        """Do the tasks of ``stage`` that are not done."""
        if self.slurm is not None:
            _Array(stage, self.slurm).run()
            return
        executor = Here(
            pipeline=list(stage.pipeline),
            tasks=stage.tasks,
            workers=min(stage.workers or self.workers, stage.tasks),
            logging_dir=str(stage.log),
        )
        executor.what = stage.name
        executor.run()

    def script(self, stage: Stage) -> Path:
        """Write the sbatch script of ``stage`` without submitting it, and return its path."""
        assert self.slurm is not None
        return _Array(stage, self.slurm).write_script()


class _Array:
    """A stage as an array of Slurm jobs. The number of the job is kept, so that a command that was stopped waits for the job
    that it had submitted."""

    def __init__(self, stage: Stage, section: SlurmSection) -> None:
        self.stage, self.section = stage, section
        workers = min(stage.workers or stage.tasks, section.workers or stage.tasks)
        self.executor = SlurmPipelineExecutor(
            pipeline=list(stage.pipeline),
            tasks=stage.tasks,
            time=section.time,
            partition=section.partition,
            cpus_per_task=section.cpus_per_task,
            mem_per_cpu_gb=section.mem_per_cpu_gb,
            workers=workers if workers < stage.tasks else -1,
            job_name=f"curate-{stage.folder.name}-{stage.name}",
            qos=section.qos,
            env_command=section.env_command or _environment(),
            sbatch_args=dict(section.sbatch_args),
            tasks_per_job=section.tasks_per_job,
            logging_dir=str(stage.log.resolve()),
            slurm_logs_folder=str(stage.log.resolve() / "slurm"),
        )

    def write_script(self) -> Path:
        """As the library's `launch_job` writes it, which submits it, too."""
        executor, path = self.executor, self.stage.log / SCRIPT
        jobs = -(-len(executor.get_incomplete_ranks()) // executor.tasks_per_job)
        pickled = shlex.quote(str(self.stage.log.resolve() / "executor.pik"))
        command = f"srun  -l -n 1 launch_pickled_pipeline {pickled}"
        arguments = executor.get_sbatch_args(min(jobs, executor.max_array_size))
        write_text(path, executor.get_launch_file_contents(arguments, command))
        return path

    def run(self) -> None:
        """Submit what is left, unless a job of this stage is in the queue, and wait for it. Raises UserError if it ends with
        tasks undone."""
        kept = self.stage.log / JOB
        job = str((read_json(kept) or {}).get("job", ""))
        if not self.executor.get_incomplete_ranks():
            return
        if not job or not _queued(job):
            try:
                self.executor.launch_job()
            except (OSError, subprocess.CalledProcessError) as error:
                raise UserError(f"slurm: sbatch failed ({error}): see {self.stage.log / SCRIPT}") from None
            job = str(self.executor.job_id)
            write_json(kept, {"job": job})
            print(f"submitted job {job} for {counted(self.stage.tasks, 'task')} of {self.stage.name}", file=sys.stderr)
        while self.executor.get_incomplete_ranks() and _queued(job):
            time.sleep(self.section.poll_seconds)
        if left := self.executor.get_incomplete_ranks():
            raise UserError(
                f"slurm: job {job} ended with {len(left)} of {counted(self.stage.tasks, 'task')} undone: read "
                f"{self.stage.log}/slurm, "
                "then run the same command again, which submits those that are left"
            )


def _queued(job: str) -> bool:
    """Whether a job waits or runs."""
    asked = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return True  # not known: ask again
    if done.returncode:
        return "Invalid job id" not in done.stderr
    return bool(done.stdout.strip())


def _environment() -> str:
    """Shell lines that give a job this Python's commands and packages."""
    places = [entry for entry in (os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)) if entry]
    path = os.pathsep.join(dict.fromkeys(os.path.abspath(entry) for entry in places))
    binaries = shlex.quote(str(Path(sys.executable).parent))
    return f"export PATH={binaries}:$PATH PYTHONPATH={shlex.quote(path)}\ncd {shlex.quote(os.getcwd())}"
