"""Estimates what a ladder's runs will cost on this machine: from complete runs or, without them, from a timed matmul."""

from collections.abc import Sequence
from pathlib import Path

from launchers.counted import counted
from launchers.duration import span
from launchers.folder.run_folder import RunFolder, last_metrics
from qwen_moe.launch.folder import Entry, first_step, has_diverged, is_complete, open_folder
from qwen_moe.models.flops import training_flops

START_SECONDS = 10.0  # a process's time before its first step and after its last
UTILISATION = 0.1  # the share of the matmul speed that small models reach on a CPU


def in_queue(entries: Sequence[Entry]) -> set[str]:
    """Names of the runs whose Slurm job is in the queue or running. Raises SlurmError if Slurm does not answer."""
    from launchers.slurm import commands
    from qwen_moe.launch.array import queued_runs

    jobs = {job.job_id: job for job in commands.queue()}
    queued = queued_runs([RunFolder(entry.config.run_dir) for entry in entries], jobs)
    return {entry.name for entry in entries if entry.config.run_dir.resolve() in queued}


def ladder_cost(folder: Path, parallel: int, slurm: bool) -> list[str]:
    """Lines that say how many runs are left to start, their FLOPs, and how long they take on this machine. Empty if none is
    left."""
    work, left, speeds = 0.0, 0, []
    entries = open_folder(folder, [])
    queued = in_queue(entries) if slurm else set()
    for entry in entries:
        config = entry.config
        if is_complete(entry):
            record, _ = last_metrics(config.run_dir)
            speeds.append(float(record.get("model_flops_per_second", 0.0)))
            continue
        if entry.name in queued or has_diverged(entry):  # it is paid for, or is not run again
            continue
        left += 1
        work += training_flops(config, max(first_step(config), RunFolder(config.run_dir).saved_step()))
    if not left:
        return []
    lines = [
        f"{left} of {counted(len(entries), 'run has', 'runs have')} to be trained, {work:.3g} FLOPs with embedding and head"
    ]
    if slurm:
        return [*lines, "on Slurm, as a job array"]
    speeds = sorted(speed for speed in speeds if speed)
    if speeds:
        speed, source = speeds[len(speeds) // 2], "measured in the complete runs"
    else:
        from torch import device, float32

        from qwen_moe.runs.recorder import measure_matmul_peak

        speed = UTILISATION * measure_matmul_peak(float32, device("cpu"))
        source = f"assuming {UTILISATION:.0%} of the matmul speed of this machine's CPU"
    seconds = (work / speed + START_SECONDS * left) / parallel
    return [*lines, f"expected time here about {span(seconds)}, {parallel} at a time ({source})"]
