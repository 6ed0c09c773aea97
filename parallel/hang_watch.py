"""Ends a job whose collectives wait too long, and prints every rank's last collective and stack.

Each rank has a thread that looks at its recorded collectives. The first to find a collective that has waited past the
limit writes a report into a shared folder; the threads of all other ranks see it and report too. The lowest reporting
rank prints a summary, and all ranks exit.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from parallel.atomic import write_bytes
from parallel.trace import Collective, behind, first_mismatch, recorded

HUNG = 75
_LAST = 200  # collectives in a report


class HangWatch:
    """Watches this rank from `start` to `stop`. ``folder`` is shared by all ranks; ``limit`` is in seconds."""

    def __init__(self, folder: Path, rank: int, world_size: int, limit: float, poll: float = 1.0) -> None:
        self.folder, self.rank, self.world_size, self.limit, self.poll = folder, rank, world_size, limit, poll
        self._end = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to watch. Rank 0 removes the reports of an earlier attempt. Ranks need not start together."""
        if self.rank == 0 and self.folder.exists():
            for old in self.folder.glob("rank_*.json"):
                old.unlink()
        self._thread.start()

    def stop(self) -> None:
        """End the watch. This does not return if a hang was found: the process then ends with the report, not with errors
        from connections that other ranks' exits have broken."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        begun = time.time()
        while not self._end.wait(min(self.poll, self.limit / 4)):
            calls = recorded()
            stuck = next((call for call in calls if not call.done and call.age > self.limit), None)
            if stuck is not None or self._others_report(begun):
                self._report(calls, stuck)
                self._wait_for_others()
                if self._first_to_report():
                    print(self.summary(), file=sys.stderr, flush=True)
                os._exit(HUNG)

    def _others_report(self, begun: float) -> bool:
        return any(file.stat().st_mtime > begun for file in self.folder.glob("rank_*.json"))

    def _report(self, calls: list[Collective], stuck: Collective | None) -> None:
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.format_stack(frame) if frame is not None else []
        report = {
            "rank": self.rank,
            "waiting": str(stuck) if stuck is not None else None,
            "stack": "".join(stack),
            "collectives": [asdict(call) for call in calls[-_LAST:]],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.folder / f"rank_{self.rank}.json", json.dumps(report).encode())

    def _wait_for_others(self) -> None:
        end = time.monotonic() + 10 * self.poll
        while time.monotonic() < end and len(list(self.folder.glob("rank_*.json"))) < self.world_size:
            time.sleep(0.05)

    def _first_to_report(self) -> bool:
        ranks = [int(file.stem.removeprefix("rank_")) for file in self.folder.glob("rank_*.json")]
        return self.rank == min(ranks)

    def summary(self) -> str:
        """The likely culprits first, then every rank's last collective and innermost frames."""
        reports, traces = {}, {}
        for file in self.folder.glob("rank_*.json"):
            report = json.loads(file.read_text(encoding="utf-8"))
            reports[report["rank"]] = report
            traces[report["rank"]] = [_collective(call) for call in report["collectives"]]
        silent = sorted(set(range(self.world_size)) - reports.keys())
        lines = [f"a collective has waited for more than {self.limit:.0f} s: the job is hung and is ended"]
        if silent:
            lines.append(f"  no report from ranks {silent}: frozen, or dead")
        explanations: list[Callable[..., str | None]] = [first_mismatch, behind]
        lines += [f"  {explanation}" for explain in explanations if (explanation := explain(traces))]
        for rank in sorted(reports):
            calls = traces[rank]
            lines.append(f"rank {rank}: last collective {calls[-1] if calls else 'none'}")
            lines += ["  " + line for line in reports[rank]["stack"].splitlines()[-8:]]
        lines.append(f"full stacks and the last collectives of every rank: {self.folder}")
        return "\n".join(lines)


def _collective(values: dict[str, object]) -> Collective:
    values = dict(values)
    values["ranks"] = tuple(values["ranks"])  # type: ignore[arg-type]
    values["shapes"] = tuple(tuple(shape) for shape in values["shapes"])  # type: ignore[attr-defined]
    values["dtypes"] = tuple(values["dtypes"])  # type: ignore[arg-type]
    return Collective(**values)  # type: ignore[arg-type]


class MismatchError(RuntimeError):
    """The ranks of a group made different collectives; the message names the first difference."""


def compare_collectives() -> None:
    """Check that all ranks of every group have made the same recorded collectives (kind, shapes, dtypes, in order). All
    ranks must call it together. Raises MismatchError on every rank."""
    import torch.distributed as dist

    mine = recorded()
    everyone: list[list[Collective] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    problem = first_mismatch({rank: calls for rank, calls in enumerate(everyone) if calls is not None})
    if problem:
        raise MismatchError(problem)
