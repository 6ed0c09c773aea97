"""The files of a launched run: `RUN/launch/`, with one numbered folder per attempt. All writes are atomic.

launch/
  launch.json           the request and the job id; command.json: the command; job.sbatch: the script as submitted
  recipe.yaml           the resolved recipe; code/: the commit, diff and untracked files it was launched with
  excluded_nodes.json   nodes that this run does not use again, and why
  attempts/003/
    plan.json           nodes in rank order, address, ports; decision.json: how it ended and what was decided
    nodes/HOST.json     what the agent of that node last saw; facts/ and bandwidth/ hold the preflight's results
    errors/, failures/  what ranks reported when they failed, and what their agents saw
    ranks/rank-0003.log every line with its time; stacks/: what ranks were doing when they were stopped
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.errors import LaunchError
from launchers.folder.atomic import write_json

# Names in a run folder.
CHECKPOINTS = "checkpoints"  # step_XXXXXXXX directories
METRICS = "metrics.jsonl"
_STEP = re.compile(r"step_(\d+)")


def read_json(path: Path) -> Any:
    """The content, or None if there is no such file or it is not valid JSON (for example truncated)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> dict[str, Any] | None:
    """Like `read_json`, but also None if the content is not a JSON object."""
    found = read_json(path)
    return found if isinstance(found, dict) else None


def is_number(value: Any) -> bool:
    """Whether a value from a JSON file is a finite number that fits into a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def is_step_record(record: Any) -> bool:
    """Whether a line of metrics.jsonl is a valid record. A loss may be NaN, because a run may have diverged."""
    if not isinstance(record, dict):
        return False
    names = ("step", "tokens_per_second", "step_seconds", "time")
    loss = record.get("loss", 0.0)
    numbers = all(is_number(record[name]) for name in names if record.get(name) is not None)
    return numbers and isinstance(loss, int | float) and not isinstance(loss, bool)


def last_metrics(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last step's record and the last record of any kind; empty ones when there are none."""
    path = run_dir / METRICS
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 262_144))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return {}, {}
    step: dict[str, Any] = {}
    last: dict[str, Any] = {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # truncated at either end
        if not is_step_record(record):
            continue  # damaged: use the record before it
        last = last or record
        if "loss" in record:
            return record, last
    return step, last


def rank_name(rank: int) -> str:
    """The name of a rank's files, which sorts in rank order."""
    return f"rank-{rank:05d}"


@dataclass(frozen=True)
class Attempt:
    """One start of the run's processes."""

    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name)

    def read(self, name: str) -> Any:
        return read_json(self.folder / name)

    def write(self, name: str, value: Any, *, private: bool = False) -> None:
        write_json(self.folder / name, value, private=private)

    def decision(self) -> dict[str, Any] | None:
        """How the attempt ended and what was decided; None if the file is not written yet or is damaged."""
        found = self.read("decision.json")
        if not isinstance(found, dict) or not is_number(found.get("started")):
            return None
        return found if all(isinstance(found.get(key), str) for key in ("action", "kind", "reason")) else None

    def decision_since(self, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """`decision`, if the attempt was made for the launch that ``facts``, launch.json, describe. Numbers tell, because
        the clocks of the machines that launch and run a job may differ. Facts of an earlier version have only the time."""
        found, earlier = self.decision(), facts.get("earlier_attempts")
        if found is None or (isinstance(earlier, int) and self.number <= earlier):
            return None
        return found if isinstance(earlier, int) or found["started"] >= float(facts.get("launched", 0)) else None

    def plan(self) -> dict[str, Any] | None:
        """What the conductor wrote before it started anything; None if the file is not written yet or is damaged."""
        found = read_object(self.folder / "plan.json")
        if found is None or not isinstance(found.get("nodes"), list):
            return None
        return found if is_number(found.get("saved_step")) and is_number(found.get("time")) else None

    def read_all(self, subfolder: str) -> dict[str, Any]:
        """Every JSON file of a subfolder that holds an object or a list, by its name without the suffix."""
        found = {}
        for path in sorted((self.folder / subfolder).glob("[!.]*.json")):
            value = read_json(path)
            if isinstance(value, dict | list):
                found[path.stem] = value
        return found


@dataclass(frozen=True)
class RunFolder:
    """A run directory and its `launch` folder."""

    run_dir: Path

    @property
    def launch(self) -> Path:
        return self.run_dir / "launch"

    @property
    def facts_file(self) -> Path:
        return self.launch / "launch.json"

    def facts(self) -> dict[str, Any]:
        """What `launch` recorded. Raises LaunchError if the folder holds no launched run."""
        found = read_object(self.facts_file)
        if found is None:
            raise LaunchError(
                f"{self.run_dir} is not a launched run (no {self.facts_file.name} in {self.launch}): give the run_dir "
                "of a recipe that `qwen-moe launch` has started"
            )
        wrong = [key for key in ("launched", "train_steps", "tokens_per_step") if not is_number(found.get(key))]
        if wrong:
            raise LaunchError(
                f"{self.facts_file} is damaged: its {wrong[0]} is {found.get(wrong[0])!r:.60}, expected a number; run the "
                "same `qwen-moe launch` again: it rewrites the file and resumes the run"
            )
        return found

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        root = self.launch / "attempts"
        if not root.is_dir():
            return []
        numbers = sorted(int(path.name) for path in root.iterdir() if path.name.isdigit())
        return [Attempt(root / f"{number:03d}") for number in numbers]

    def new_attempt(self) -> Attempt:
        existing = self.attempts()
        number = existing[-1].number + 1 if existing else 1
        attempt = Attempt(self.launch / "attempts" / f"{number:03d}")
        for name in ("nodes", "facts", "bandwidth", "errors", "failures", "ranks", "stacks"):
            (attempt.folder / name).mkdir(parents=True, exist_ok=True)
        return attempt

    def saved_step(self) -> int:
        """Step of the newest complete checkpoint; 0 if there is none."""
        steps = [0]
        root = self.run_dir / CHECKPOINTS
        if root.is_dir():
            for path in root.iterdir():
                match = _STEP.fullmatch(path.name)
                if match and (path / "manifest.json").is_file():
                    steps.append(int(match[1]))
        return max(steps)

    def excluded_nodes(self) -> dict[str, str]:
        """Nodes that this run does not use again, with the reason."""
        return read_object(self.launch / "excluded_nodes.json") or {}

    def exclude_nodes(self, nodes: dict[str, str]) -> None:
        write_json(self.launch / "excluded_nodes.json", self.excluded_nodes() | nodes)
