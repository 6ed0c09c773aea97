"""`python -m launchers.job.conductor --run RUN -- COMMAND...`: the batch script's last line. It runs the attempts.

``COMMAND`` starts Python on every node (`srun ... python -u`), or is a Python (`--local`). Attempts follow each other until
the run is done, stops, or is requeued. Each attempt leaves a folder with everything known about it.
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from launchers.counted import counted
from launchers.errors import LaunchError
from launchers.folder.atomic import write_json
from launchers.folder.run_folder import Attempt, RunFolder, is_number, read_json, read_object
from launchers.job import preflight
from launchers.job.cluster import LocalMachine, SlurmAllocation, scancelled
from launchers.job.decide import Decision, Evidence, Hang, Limits, PastAttempt, decide
from launchers.job.evidence import collect_failures, no_room, silent_ranks
from launchers.job.hang_clock import HangClock
from launchers.job.step import Step
from launchers.local.lock import RunLock
from launchers.local.signals import signal_number
from launchers.local.supervisor import INTERRUPTED
from launchers.local.terminal import outlive_terminal
from launchers.slurm.placement import describe, order_nodes

LOOK_SECONDS = 0.5
REPEAT_SIGNAL_SECONDS = 10.0
OWNER_SECONDS = 15.0
FACTS = "launchers.job.node_facts"
CANCELLED = "cancelled.json"
# Exit codes of a step that somebody signalled (`scancel --signal=INT`): srun's, and those of a process of this machine.
_SIGNALLED = {code for number in (signal.SIGINT, signal.SIGTERM) for code in (128 + number, -number)}


def say(message: str) -> None:
    with contextlib.suppress(OSError):  # the disk of the job's log is full: the run matters more
        print(f"conductor: {message}", flush=True)


class NotOurs(Exception):
    """Slurm has started this job again elsewhere: this conductor must end without touching the run."""


class Conductor:
    """One process per job, on its first node."""

    def __init__(
        self,
        run: RunFolder,
        command: list[str],
        cluster: LocalMachine | SlurmAllocation,
        before: dict[str, Any] | None = None,
    ) -> None:
        """``before``: facts that launch.json of an older version lacks. Raises LaunchError if launch.json is damaged."""
        self.run, self.cluster = run, cluster
        facts = (before or {}) | run.facts()
        self.facts = facts
        self.agent = _agent(run, facts)
        self.survive = facts["survive"]
        alone = {} if cluster.can_requeue else {"exclude_after": sys.maxsize}  # this machine has no other node
        self.limits = Limits(**{f.name: self.survive[f.name] for f in dataclasses.fields(Limits)} | alone)
        self.checkpoint_signal = signal_number(self.survive["checkpoint_signal"])
        self.stack_signal = signal_number(self.survive["stack_signal"])
        self.warned, self.warned_at = "", 0.0
        self.step = Step(command, cluster, float(self.survive["stop_seconds"]))

    # ------------------------------------------------------------------ signals

    def listen(self) -> None:
        meanings = {self.checkpoint_signal: "time limit", signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            # The terminal of `launch --local` was closed, or its connection lost.
            meanings[signal.SIGHUP] = "terminated"

        def note(number: int, frame: FrameType | None) -> None:
            if self.warned and number == signal.SIGINT:
                self.step.kill()  # second Ctrl-C: do not wait for the checkpoint
            if not self.warned:
                self.warned, self.warned_at = meanings[number], time.monotonic()

        for number in meanings:
            signal.signal(number, note)

    # ------------------------------------------------------------------ the run

    def conduct(self) -> int:
        """Exit code of the job: 0 if the run is complete, 1 if it stopped for good, 130 after a local interrupt."""
        self._finish_what_was_cut_off()
        first = True
        while True:
            attempt = self.run.new_attempt()
            started = time.time()
            saved = self.run.saved_step()
            try:
                nodes, evidence = self._attempt(attempt, saved, preflight_level=self._level(first))
            except NotOurs:
                say("Slurm has started this job again elsewhere: this conductor ends")
                return 1
            evidence = dataclasses.replace(evidence, saved_after=self.run.saved_step(), history=self._history(attempt))
            decision = self._possible(decide(evidence, self.limits), nodes)
            self._write(attempt, decision, evidence, nodes, started)
            first = False
            if decision.action == "done":
                return 0
            if decision.action == "stop":
                say(f"STOPPED: {decision.reason}")
                return 1
            if decision.nodes:
                self.run.exclude_nodes(decision.nodes)
            if decision.action == "go on" and not self.warned:
                continue
            if not self.cluster.can_requeue:
                say("stopped; the same command resumes it")
                return INTERRUPTED
            self.cluster.requeue(sorted(self.run.excluded_nodes()))
            time.sleep(120)  # until Slurm ends this process
            return 1

    def _level(self, first: bool) -> str:
        level = self.facts["preflight"]["level"]
        return level if first or level == "off" else "quick"

    def _write(
        self, attempt: Attempt, decision: Decision, evidence: Evidence, nodes: list[str], started: float
    ) -> None:
        record = {
            **dataclasses.asdict(decision),
            "job": self.cluster.job,
            "restarts": self.cluster.restarts,
            "placed": nodes,
            "started": started,
            "ended": time.time(),
            "evidence": dataclasses.asdict(evidence),
        }
        try:
            attempt.write("decision.json", record)
        except OSError as error:  # a full disk must not hide the decision itself
            say(f"{attempt.folder / 'decision.json'} could not be written: {error.strerror}")
        excluded = f"; excluded: {', '.join(sorted(decision.nodes))}" if decision.nodes else ""
        say(f"attempt {attempt.number}: {decision.action} ({decision.kind}): {decision.reason}{excluded}")

    def _history(self, current: Attempt) -> tuple[PastAttempt, ...]:
        """Earlier attempts since the user last launched the run."""
        found = []
        for attempt in self.run.attempts():
            record = attempt.decision_since(self.facts)
            if attempt.number < current.number and record:
                evidence = record.get("evidence")
                evidence = evidence if isinstance(evidence, dict) else {}
                after, before = evidence.get("saved_after", 0), evidence.get("saved_before", 0)
                progressed = is_number(after) and is_number(before) and after > before
                found.append(PastAttempt(kind=record["kind"], progressed=progressed, host=record.get("host", "")))
        return tuple(found)

    def _finish_what_was_cut_off(self) -> None:
        """Write missing decisions: an attempt without one ended with its conductor (node failure, or a killed job)."""
        for attempt in self.run.attempts():
            plan = attempt.plan()
            if plan is None or (attempt.folder / "decision.json").exists():
                continue
            failures = collect_failures(attempt)
            why = failures[0].text() if failures else "its nodes reported nothing: node failure, or killed from outside"
            evidence = Evidence(saved_before=plan["saved_step"], saved_after=self.run.saved_step())
            reason = f"the job ended together with its conductor; {why}"
            decision = Decision(action="requeue", kind="node failure", reason=reason)
            self._write(attempt, decision, evidence, plan["nodes"], plan["time"])

    def _possible(self, decision: Decision, nodes: list[str]) -> Decision:
        """``decision``. If none can replace the nodes to exclude: go on with suspected ones, stop for others."""
        if not decision.nodes:
            return decision
        if not self.cluster.can_requeue:
            return dataclasses.replace(decision, action="stop")
        excluded = sorted(self.run.excluded_nodes() | decision.nodes)
        if (spare := self.cluster.spare_nodes(excluded)) is None or spare >= len(nodes):
            return decision
        left = f"without {', '.join(excluded)} the partition has {spare} usable of the {counted(len(nodes), 'node')}"
        text = f"{decision.reason}; {left} that are needed"
        if decision.suspected:
            return dataclasses.replace(decision, action="go on", reason=f"{text}, so none is excluded", nodes={})
        return dataclasses.replace(decision, action="stop", reason=text)

    # ------------------------------------------------------------------ one attempt

    def _attempt(self, attempt: Attempt, saved: int, preflight_level: str) -> tuple[list[str], Evidence]:
        switches = self.cluster.switches()
        nodes = order_nodes(self.cluster.nodes(), switches)
        known = self.run.excluded_nodes()
        plan = {
            "attempt": attempt.number,
            "time": time.time(),
            "job": self.cluster.job,
            "restarts": self.cluster.restarts,
            "nodes": nodes,
            "switches": {node: switches[node] for node in nodes if node in switches},
            "address": self.cluster.address(nodes[0]),
            "port": self.cluster.port(attempt.number * 2),
            "processes_per_node": self.facts["processes_per_node"],
            "saved_step": saved,
            "local": not self.cluster.can_requeue,
            "local_folder": self.facts["local_folder"],
            "recipe": str(self.run.launch / "recipe.yaml"),
            "survive": self.survive,
            "preflight": self.facts["preflight"],
            "python": self.facts["python"],
            "packages": self.facts.get("packages", []),
        }
        attempt.write("plan.json", plan)
        say(f"attempt {attempt.number} on {', '.join(nodes)} from step {saved}")
        print(describe(nodes, plan["processes_per_node"], switches, self.facts.get("groups", {})), flush=True)
        unwanted = {node: known[node] for node in nodes if node in known}
        if unwanted:
            return nodes, Evidence(bad_nodes=unwanted, saved_before=saved)
        if preflight_level != "off":
            evidence = self._preflight(attempt, nodes, preflight_level)
            if evidence is not None:
                return nodes, dataclasses.replace(evidence, saved_before=saved)
        return nodes, dataclasses.replace(self._train(attempt), saved_before=saved)

    def _preflight(self, attempt: Attempt, nodes: list[str], level: str) -> Evidence | None:
        """None if the nodes are good; otherwise the evidence against them."""
        limits = self.facts["preflight"]
        stages = [("facts", FACTS, [str(attempt.folder)])]
        stages += [("bandwidth", self.agent, [str(attempt.folder), "bandwidth"])] if level == "full" else []
        for stage, module, arguments in stages:
            end = time.monotonic() + float(limits["timeout_seconds"])
            self.step.start(module, arguments, attempt.folder / f"{stage}.log")
            while (code := self.step.poll()) is None and time.monotonic() < end and not self.warned:
                self._check_owner()
                time.sleep(LOOK_SECONDS / 5)
            if code is None:
                self.step.stop()
            if self.warned or code in _SIGNALLED:
                return self._evidence(attempt, code, None, outcome="stopped")
            verdict = preflight.judge(stage, attempt, nodes, limits, self.facts.get("code_hash", ""))
            for line in verdict.lines:
                print(line, flush=True)
            if verdict.bad_nodes or verdict.problem:
                node = self.cluster.failed_node()
                if node:
                    return self._evidence(attempt, code, None, node_failed=node)
                return Evidence(bad_nodes=verdict.bad_nodes, preflight_problem=verdict.problem)
        return None

    def _train(self, attempt: Attempt) -> Evidence:
        self.step.start(self.agent, [str(attempt.folder), "train"], attempt.folder / "srun.log")
        watch = HangClock(self.survive)
        signalled = 0.0
        looked = time.monotonic()
        while (code := self.step.poll()) is None:
            time.sleep(LOOK_SECONDS)
            now = time.monotonic()
            if now - looked > OWNER_SECONDS:
                looked = now
                self._check_owner()
            if self.warned:
                if now - signalled > REPEAT_SIGNAL_SECONDS:  # ranks that are still importing torch have no handler yet
                    signalled = now
                    self.step.signal(self.checkpoint_signal)
                # Slurm's own end leaves no time to requeue.
                least = 0.0 if self.warned == "time limit" and self.cluster.can_requeue else 20.0
                if now - self.warned_at > max(least, 0.8 * float(self.facts["signal_seconds"])):
                    say("no checkpoint within the remaining time: stopping without one")
                    self.step.stop()
            elif any((attempt.folder / "failures").glob("*.json")) or any(
                node.get("death") for node in attempt.read_all("nodes").values()
            ):
                self._end_of_a_failure(attempt)
            elif watch.hung(attempt):
                say(f"no sign of life for {watch.quiet():.0f} s: asking every rank for its stack")
                hang = Hang(seconds=watch.quiet(), silent=self._stacks_of_a_hang(attempt))
                self.step.stop()
                return self._evidence(attempt, None, hang)
        self._check_owner()
        return self._evidence(attempt, code, None)

    def _end_of_a_failure(self, attempt: Attempt) -> None:
        """After a rank has failed: give its agent and the other ranks a moment to report, take stacks, stop all."""
        self.step.signal(self.stack_signal)
        end = time.monotonic() + min(8.0, float(self.survive["stop_seconds"]) / 2)
        while time.monotonic() < end and self.step.poll() is None:
            time.sleep(0.1)
        self.step.stop()

    def _stacks_of_a_hang(self, attempt: Attempt) -> tuple[tuple[int, str, str], ...]:
        self.step.signal(self.stack_signal)
        end = time.monotonic() + 15
        while time.monotonic() < end and self.step.poll() is None:
            reports = attempt.read_all("nodes").values()
            if reports and all(report["stacks"] for report in reports):
                break
            time.sleep(0.2)
        return silent_ranks(attempt)

    def _evidence(
        self, attempt: Attempt, code: int | None, hang: Hang | None, *, outcome: str = "", node_failed: str = ""
    ) -> Evidence:
        facts = self.cluster.facts()
        said = read_object(attempt.folder / "outcome.json") or {}
        failures = collect_failures(attempt) or (no_room(self.run.run_dir) if code else [])
        if not node_failed and (failures or hang is not None or code):
            node_failed = self.cluster.failed_node()
        preempted = facts.get("JobState") == "PREEMPTED" or facts.get("PreemptTime", "None") not in ("None", "")
        return Evidence(
            outcome=outcome or str(said.get("outcome", "")),
            exit_code=code,
            warned=self.warned,
            cancelled=(self.run.launch / CANCELLED).exists() or (not preempted and scancelled(facts)),
            preempted=preempted,
            node_failed=node_failed,
            failures=tuple(failures),
            hang=hang,
        )

    def _check_owner(self) -> None:
        if not self.cluster.still_mine():
            self.step.stop()
            raise NotOurs


def _agent(run: RunFolder, facts: dict[str, Any]) -> str:
    """The module that runs on every node, from launch.json."""
    found = facts.get("agent")
    if not isinstance(found, str) or not found:
        raise LaunchError(
            f"{run.facts_file} is damaged: its agent is {found!r:.60}, expected the module to run on every node; run the "
            "same `qwen-moe launch` again: it rewrites the file and resumes the run"
        )
    return found


def _locked(run: RunFolder, what: str, patience: float = 180) -> RunLock:
    """The lock of the run folder. Waits for it, because a conductor on a failed node may hold it for a while."""
    end = time.monotonic() + patience
    while True:
        try:
            return RunLock(run.run_dir, what)
        except LaunchError:
            if time.monotonic() > end:
                raise
        time.sleep(2)


def _run_of_task(path: Path, task: str) -> Path:
    """The run folder of an array's task. Raises LaunchError if the list or the number is invalid."""
    found = read_json(path)
    try:
        return Path(found[int(task)])
    except (TypeError, ValueError, LookupError):
        raise LaunchError(
            f"{path} does not say which run task {task or 'nothing'} of the array is: launch the folder of recipes again"
        ) from None


def main(arguments: list[str], before: dict[str, Any] | None = None) -> int:
    """Entry point of the batch script. Returns `Conductor.conduct`'s exit code, or 2 if it cannot begin. ``before``: see
    `Conductor`."""
    parser = argparse.ArgumentParser(prog="launchers.job.conductor")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--run", type=Path)
    where.add_argument("--array", type=Path, help="JSON list of run folders, one per array task")
    parser.add_argument("--local", action="store_true")
    split = arguments.index("--")
    options = parser.parse_args(arguments[:split])
    try:
        run_dir = options.run or _run_of_task(options.array, os.environ.get("SLURM_ARRAY_TASK_ID", ""))
        run = RunFolder(run_dir)
        cluster = LocalMachine() if options.local else SlurmAllocation(os.environ)
        conductor = Conductor(run, arguments[split + 1 :], cluster, before)
        conductor.listen()
        outlive_terminal()
        if cluster.job:
            write_json(run.launch / "job.json", {"job": cluster.job, "restarts": cluster.restarts})
        lock = _locked(run, f"job {cluster.job}" if cluster.job else "qwen-moe launch --local")
        cluster.lock_fds = lock.pass_fds
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return conductor.conduct()
    except LaunchError as error:  # a command of Slurm failed: it does if scancel ends it together with this job
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: run folder {run_dir}: {error}: correct it, then launch again to resume", file=sys.stderr)
        return 1
    finally:
        lock.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
