"""`status` and `cancel`: joins the queue, the run folder's attempts and the metrics into one row for each run."""

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launchers.duration import clock
from launchers.errors import LaunchError
from launchers.folder.atomic import write_json
from launchers.folder.run_folder import RunFolder, last_metrics
from launchers.local.lock import locked, read_holder
from launchers.slurm import commands as slurm

NO_SLURM = "Slurm is not installed here"


def find_runs(roots: Sequence[Path]) -> list[Path]:
    """Launched runs in ``roots``: each root is a run, or holds runs up to two levels down."""
    found: list[Path] = []
    for root in roots:
        for pattern in ("launch/launch.json", "*/launch/launch.json", "*/*/launch/launch.json"):
            found += [path.parents[1] for path in sorted(root.glob(pattern))]
    return list(dict.fromkeys(path.resolve() for path in found))


def jobs_of(facts: Mapping[str, Any], jobs: Iterable[slurm.Job]) -> list[slurm.Job]:
    """The jobs of a run in the queue: that of launch.json, those with the run's name, and the run's task of an array with
    the array's name. A `launch` that was interrupted while it submitted may have left one that launch.json does not know."""
    job, name = str(facts.get("job") or ""), facts.get("name")
    array = facts.get("array")
    array = array if isinstance(array, dict) else {}
    ours, task = array.get("name"), f"_{array.get('task')}"

    def belongs(one: slurm.Job) -> bool:
        if one.job_id == job or (name and one.name == name):
            return True
        return bool(ours) and one.name == ours and one.job_id.endswith(task)

    return [one for one in jobs if one.state in slurm.ACTIVE and belongs(one)]


def row(run_dir: Path, jobs: Mapping[str, slurm.Job] | None, unasked: str = "") -> dict[str, Any]:
    """The row of one run. ``jobs`` is the queue by job id, or None if it could not be read; then ``unasked`` says why."""
    run = RunFolder(run_dir)
    facts = run.facts()
    attempts = run.attempts()
    last = next((a for a in reversed(attempts) if a.decision()), None)
    decision, current = (None, None) if last is None else (last.decision(), last.decision_since(facts))
    record, _ = last_metrics(run_dir)
    active = jobs_of(facts, (jobs or {}).values())
    job_id = str(facts.get("job") or "")
    job = next((one for one in active if one.state == "RUNNING"), active[0] if active else (jobs or {}).get(job_id))
    job_id = job_id if job is None else job.job_id
    step, total = int(record.get("step", 0)), int(facts["train_steps"])
    state, why = _state(run, facts, job, current, "" if jobs is not None else unasked or NO_SLURM)
    rate = record.get("tokens_per_second")
    eta = None
    if rate and state == "running" and step < total:
        seconds = float(record.get("step_seconds") or facts["tokens_per_step"] / rate)
        eta = seconds * steps_to_do(facts.get("stages"), step, total)
    return {
        "run": str(run_dir),
        "job": job_id,
        "state": state,
        "attempts": len(attempts),
        "restarts": max(0, len(attempts) - 1),
        "nodes": job.nodes if job is not None else "",
        "step": step,
        "stage": record.get("stage"),
        "train_steps": total,
        "saved_step": run.saved_step(),
        "loss": record.get("loss"),
        "tokens_per_second": rate if state == "running" else None,
        "eta_seconds": eta,
        "updated": record.get("time"),
        "last": why or (decision["reason"] if decision and decision["action"] != "done" else ""),
        "excluded_nodes": sorted(run.excluded_nodes()),
    }


def steps_to_do(stages: Any, step: int, total: int) -> float:
    """Steps that are left after ``step``, in steps of the stage that it is in: those of later stages count by their work."""
    try:
        ends = [(int(stage["end_step"]), float(stage["flops_per_step"])) for stage in stages or []]
        now = next(flops for end, flops in ends if step <= end)
        left, before = 0.0, step
        for end, flops in ends:
            left += max(0, end - before) * flops / now
            before = max(before, end)
        return left
    except (KeyError, TypeError, ValueError, ZeroDivisionError, StopIteration):
        return total - step  # a run without stages, or launched by an earlier version


def _state(
    run: RunFolder, facts: Mapping[str, Any], job: slurm.Job | None, current: Any, unasked: str
) -> tuple[str, str]:
    """The state in one word, and a reason if the last decision since the launch, ``current``, does not give it."""
    if current and current["action"] == "done":
        return "complete", ""
    if job is not None and job.state in slurm.ACTIVE:
        if job.state == "RUNNING":
            return "running", ""
        why = job.reason if job.reason not in ("None", "") else ""
        return job.state.lower(), (f"{why}; {current['reason']}" if current else why)
    if current and current["action"] == "stop":
        return ("cancelled" if current["kind"] == "cancelled" else "stopped"), ""
    if (run.launch / "cancelled.json").exists():
        return "cancelled", ""
    if facts.get("error"):
        return "not submitted", str(facts["error"])
    if facts.get("local"):
        return ("running" if locked(run.run_dir) else "interrupted"), ""
    if unasked:
        return "unknown", unasked
    return _forgotten(str(facts.get("job") or ""))


def _forgotten(job_id: str) -> tuple[str, str]:
    """The state of a job that is not in the queue, from scontrol or else from sacct."""
    if not job_id:
        return "not submitted", ""
    try:
        try:
            known = slurm.show_job(job_id)
        except slurm.NoAnswer as error:
            return "unknown", error.short
        if known:
            return known.get("JobState", "gone").lower(), known.get("Reason", "").replace("None", "")
        asked = ("sacct", "-n", "-P", "-X", "-j", job_id, "-o", "State,ExitCode")
        lines = slurm.run(*asked, timeout=slurm.ASK_SECONDS).splitlines()
        if lines:
            state, _, code = lines[0].partition("|")
            return state.split()[0].lower(), f"exit code {code}"
    except slurm.SlurmError:
        pass  # no slurmdbd, or slurmctld does not answer: only the run folder is known
    return "gone", f"Slurm no longer knows job {job_id}"


def table(rows: Sequence[Mapping[str, Any]], home: Path) -> str:
    """A human-readable table; paths under ``home`` are relative to it."""
    header = ("run", "job", "state", "attempts", "step", "loss", "tokens/s", "ETA", "last")
    cells = [header]
    for r in rows:
        path = Path(r["run"])
        cells.append(
            (
                str(path.relative_to(home) if path.is_relative_to(home) else path),
                r["job"] or "-",
                r["state"],
                str(r["attempts"]),
                f"{r['step']}"
                + (f"/{r['train_steps']}" if r["train_steps"] else "")
                + (f" {r['stage']}" if r.get("stage") else ""),
                f"{r['loss']:.4f}" if r["loss"] is not None else "-",
                f"{r['tokens_per_second']:,.0f}" if r["tokens_per_second"] else "-",
                clock(r["eta_seconds"]) if r["eta_seconds"] is not None else "-",
                _one_line(r["last"]),
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells)


def _one_line(text: str, limit: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def ask_queue() -> tuple[dict[str, slurm.Job] | None, str]:
    """The queue by job id; or None and the reason, if Slurm is not installed or does not answer."""
    try:
        return {job.job_id: job for job in slurm.queue(slurm.ASK_SECONDS)}, ""
    except slurm.NoAnswer as error:
        return None, error.short
    except slurm.SlurmError as error:
        return None, str(error) if shutil.which("squeue") else NO_SLURM


class Ended:
    """Says, for `logs --follow`, why a run will write no more; "" while it may. It asks Slurm every ``seconds`` at most."""

    def __init__(self, run: RunFolder, seconds: float = 10) -> None:
        self._run, self._seconds, self._asked = run, seconds, time.monotonic()

    def __call__(self) -> str:
        """Raises LaunchError if the run folder is gone."""
        if time.monotonic() - self._asked < self._seconds:
            return ""
        self._asked = time.monotonic()
        facts = self._run.facts()
        if facts.get("local"):
            return "" if locked(self._run.run_dir) else "the run has ended: no process works on it"
        jobs, _ = ask_queue()
        if jobs is None or jobs_of(facts, jobs.values()):
            return ""
        return f"the run has ended: its job ({facts.get('job') or 'none'}) is not in the queue"


def cancel(run_dir: Path) -> str:
    """Mark the run as cancelled, so that it is not requeued, and cancel its job. Returns a message."""
    run = RunFolder(run_dir)
    facts = run.facts()
    job = str(facts.get("job") or "")
    if facts.get("local"):
        if not locked(run_dir):
            raise LaunchError(f"{run_dir} is not running")
        holder = read_holder(run_dir)
        how = f" (kill -INT {holder.pid})" if holder.pid else ""
        raise LaunchError(f"{run_dir} is run by {holder.text()}: interrupt it{how}")
    found = [one.job_id for one in jobs_of(facts, slurm.queue(slurm.ASK_SECONDS))]
    if not found:
        raise LaunchError(f"{run_dir} has no job in the queue (last: {job or 'none'}): there is nothing to cancel")
    job = " and ".join(found)
    write_json(run.launch / "cancelled.json", {"time": time.time(), "job": job})
    try:
        for one in found:
            slurm.cancel(one)
    except slurm.SlurmError:
        (run.launch / "cancelled.json").unlink(missing_ok=True)  # the job still runs
        raise
    return f"job {job} cancelled; `qwen-moe launch` of the same recipe resumes from step {run.saved_step()}"
