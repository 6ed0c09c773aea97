"""Estimates what a ladder's runs will cost on this machine: from complete runs or, without them, from a timed matmul."""

from pathlib import Path

from launchers.duration import span
from launchers.folder.run_folder import last_metrics
from qwen_moe.launch.folder import is_complete, open_folder
from qwen_moe.models.flops import training_flops

START_SECONDS = 10.0  # a process's time before its first step and after its last
UTILISATION = 0.1  # the share of the matmul speed that small models reach on a CPU


def ladder_cost(folder: Path, parallel: int, slurm: bool) -> list[str]:
    """Lines that say how many runs are left, their FLOPs, and how long they take on this machine."""
    work, left, speeds = 0.0, 0, []
    entries = open_folder(folder, [])
    for entry in entries:
        config = entry.config
        if is_complete(entry):
            record, _ = last_metrics(config.run_dir)
            speeds.append(float(record.get("model_flops_per_second", 0.0)))
            continue
        left += 1
        start = config.checkpoint.branch_from
        step = int(start.name.removeprefix("step_")) if start is not None else 0
        work += training_flops(config, step)
    lines = [f"{left} of {len(entries)} runs have to be trained, {work:.3g} FLOPs with embedding and head"]
    if slurm:
        return [*lines, "on Slurm, as a job array"]
    if not left:
        return lines
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
