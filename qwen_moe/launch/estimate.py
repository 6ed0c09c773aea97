"""Estimates a job's cost and time from the run's own metrics or, if there are none, from the site file."""

from dataclasses import dataclass
from pathlib import Path

from launchers.counted import counted
from launchers.folder.run_folder import RunFolder, last_metrics
from launchers.slurm.commands import parse_minutes
from launchers.slurm.script import JobSpec
from launchers.slurm.site import Hardware
from qwen_moe.checkpoint.preflight import checkpoint_bytes
from qwen_moe.config import RunConfig, stage_runs
from qwen_moe.models.flops import flops_per_token, training_flops
from qwen_moe.runs.outcome import with_known_length


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """``remaining_steps``, and ``seconds`` until the end of training (None if unknown) and their ``source``; GPU-hours and
    the price of one."""

    remaining_steps: int | None
    seconds: float | None
    source: str
    gpu_hours_limit: float | None
    gpu_hours_expected: float | None
    price: float
    currency: str
    checkpoint_seconds: float
    checkpoint_measured: bool
    stages: tuple[
        tuple[str, int, float], ...
    ] = ()  # name, steps to do, and share of the time, of each that is not done

    def lines(self) -> list[str]:
        """Human-readable summary."""
        found = [f"steps to do       {'unknown' if self.remaining_steps is None else f'{self.remaining_steps:,}'}"]
        if self.seconds is None:
            found.append(f"expected time     unknown: {self.source}")
        else:
            found.append(f"expected time     {self.seconds / 3600:,.2f} h ({self.source})")
        for name, steps, share in self.stages:
            hours = "" if self.seconds is None else f", {share * self.seconds / 3600:,.2f} h"
            found.append(f"  stage {name}: {counted(steps, 'step')}{hours} ({share:.0%} of the FLOPs)")
        if self.gpu_hours_expected is not None:
            found.append(f"expected          {self._cost(self.gpu_hours_expected)}")
        if self.gpu_hours_limit is not None:
            found.append(f"at most, per job  {self._cost(self.gpu_hours_limit)} (until the time limit)")
        how = "measured" if self.checkpoint_measured else "estimated"
        return [*found, f"checkpoint        {self.checkpoint_seconds:.1f} s ({how})"]

    def _cost(self, hours: float) -> str:
        price = f", {hours * self.price:,.2f} {self.currency}" if self.price else " (no price in the site file)"
        return f"{hours:,.1f} GPU-hours{price}"


def measured_checkpoint_seconds(run: RunFolder) -> float | None:
    """Seconds of the longest checkpoint that any rank of any attempt has measured."""
    found = [
        float(state["checkpoint_seconds"])
        for attempt in run.attempts()
        for report in attempt.read_all("nodes").values()
        for state in report["ranks"].values()
        if "checkpoint_seconds" in state
    ]
    return max(found, default=None)


def _flops_per_token_at(config: RunConfig, step: int) -> float:
    """FLOPs of a token in the stage that ``step`` (from 1) is in."""
    runs = stage_runs(config)
    found = next((run for run in runs if step <= run.end_step), runs[-1])
    return flops_per_token(found.model, found.data.sequence_length).training


def _stages_to_do(config: RunConfig, done: int, work: float) -> tuple[tuple[str, int, float], ...]:
    found = []
    for run in stage_runs(config) if config.stages else ():
        steps = run.end_step - max(done, run.place.first_step)
        if steps > 0:
            flops = flops_per_token(run.model, run.data.sequence_length).training * run.tokens_per_step * steps
            found.append((run.place.name, steps, flops / work))
    return tuple(found)


def estimate(config: RunConfig, spec: JobSpec, hardware: Hardware, run_dir: Path) -> Estimate:
    """Estimate a job before it starts."""
    run = RunFolder(run_dir)
    record, _ = last_metrics(run_dir)
    config = with_known_length(config, run_dir)
    remaining = max(0, config.train_steps - run.saved_step())
    gpus = spec.nodes * spec.gpus_per_node
    work = training_flops(config, run.saved_step())
    seconds: float | None = None
    if not config.train_steps:
        source = "the steps of training.epochs are known when the data have been read"
    elif record.get("tokens_per_second"):
        speed = float(record["tokens_per_second"]) * _flops_per_token_at(config, int(record.get("step", 1)))
        seconds = work / speed
        source = "measured by this run's last attempt"
    elif hardware.peak_tflops and gpus:
        seconds = work / (gpus * hardware.peak_tflops * 1e12 * hardware.expected_utilisation)
        source = f"{hardware.expected_utilisation:.0%} of {hardware.peak_tflops:g} TFLOP/s per GPU, from the site file"
    else:
        source = (
            "no step has been measured yet, and the site file has no hardware.peak_tflops; `qwen-moe plan` tells what to "
            "expect"
        )
    minutes = parse_minutes(spec.time) if spec.time else None
    measured = measured_checkpoint_seconds(run)
    written = checkpoint_bytes(config) / (hardware.checkpoint_gb_per_second * 1e9 or 1e9)
    return Estimate(
        remaining_steps=remaining if config.train_steps else None,
        seconds=seconds,
        source=source,
        gpu_hours_limit=gpus * minutes / 60 if minutes is not None and gpus else None,
        gpu_hours_expected=gpus * seconds / 3600 if seconds is not None and gpus else None,
        price=hardware.price_per_gpu_hour,
        currency=hardware.currency,
        checkpoint_seconds=written if measured is None else measured,
        checkpoint_measured=measured is not None,
        stages=_stages_to_do(config, run.saved_step(), work),
    )
