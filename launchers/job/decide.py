"""Turns the evidence of one attempt into one decision with its reason: done, go on, requeue, exclude a node, or stop."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from launchers.counted import counted

Action = Literal["done", "go on", "requeue", "exclude", "stop"]

# Kinds of failure. When a rank fails, its peers fail too and often report first. Such echoes are named last.
USER, DISK, BAD_STEP, MEMORY, HARDWARE, CONNECTION, KILLED, CRASH, AGENT = (
    "user error",
    "disk",
    "bad step",
    "out of memory",
    "hardware",
    "connection",
    "killed",
    "crash",
    "agent",
)
CERTAIN = (USER, DISK, BAD_STEP)  # not retryable
_PATTERNS: tuple[tuple[str, str], ...] = (
    (MEMORY, r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|Cannot allocate memory"),
    (
        HARDWARE,
        r"uncorrectable|\bECC\b|fallen off the bus|\bXid\b|NVLink error|hardware stack error|unspecified launch failure|"
        r"CUDA error: (?:unknown error|an illegal instruction)|device is lost|no CUDA-capable device",
    ),
    (
        CONNECTION,
        r"Connection (?:closed|reset|refused)|Broken pipe|remote process exited|Socket Timeout|"
        r"NCCL communicator was aborted|ncclRemoteError|ncclSystemError|Timed out waiting|wait timeout|"
        r"Watchdog caught collective operation timeout|"
        r"timed out after|Application timeout caused pair closure|Gloo connectFullMesh failed|TCPStore|recvValue failed|"
        r"recvVector failed|sendBytes failed|Connection was likely closed",
    ),
    (DISK, r"No space left on device|Disk quota exceeded"),
)


def classify(text: str) -> str:
    """The kind of failure that an exception's text describes."""
    for kind, pattern in _PATTERNS:
        if re.search(pattern, text):
            return kind
    return CRASH


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A rank that failed, or an agent (rank -1). ``time``: seconds since the epoch on its node's clock."""

    rank: int
    host: str
    kind: str
    message: str
    time: float

    def text(self) -> str:
        who = f"rank {self.rank} on {self.host}" if self.rank >= 0 else f"the agent on {self.host}"
        return f"{who}: {self.message}"


def in_order_of_blame(failures: Sequence[Failure]) -> list[Failure]:
    """Root causes first: user errors, then failures that are not echoes, then echoes; each by time."""
    return sorted(
        failures, key=lambda f: (f.kind not in (USER, DISK, BAD_STEP), f.kind in (CONNECTION, AGENT), f.time, f.rank)
    )


@dataclass(frozen=True, kw_only=True)
class Hang:
    """No rank made a step for ``seconds``. ``silent`` ranks gave no stack when asked: (rank, host, process state)."""

    seconds: float
    silent: tuple[tuple[int, str, str], ...] = ()

    def text(self) -> str:
        if not self.silent:
            return f"no rank made a step for {self.seconds:.0f} s; all answered (their stacks are kept)"
        states = {"T": "stopped (SIGSTOP or a debugger)", "D": "in uninterruptible sleep: disk or driver"}
        who = ", ".join(f"rank {r} on {h} ({states.get(s, f'state {s}')})" for r, h, s in self.silent[:4])
        more = f" and {len(self.silent) - 4} more" if len(self.silent) > 4 else ""
        return f"no rank made a step for {self.seconds:.0f} s; silent when asked for a stack: {who}{more}"


@dataclass(frozen=True, kw_only=True)
class PastAttempt:
    """The facts about an earlier attempt that decisions use."""

    kind: str  # failure, hang, node failure, time limit, preemption, preflight, ...
    progressed: bool
    host: str = ""  # the node where its failure began


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything known when an attempt has ended. Steps are those of the newest checkpoint."""

    outcome: str = ""  # reported by rank 0: complete, stopped, or nothing
    exit_code: int | None = None
    warned: str = ""  # time limit, terminated, interrupted
    cancelled: bool = False  # by `qwen-moe cancel` or scancel
    preempted: bool = False
    node_failed: str = ""
    failures: tuple[Failure, ...] = ()
    hang: Hang | None = None
    bad_nodes: dict[str, str] = field(default_factory=dict)  # preflight: node -> why
    preflight_problem: str = ""  # a problem that no single node causes
    saved_before: int = 0
    saved_after: int = 0
    history: tuple[PastAttempt, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """See `launchers.slurm.site.SurviveLimits`."""

    max_restarts: int = 50
    max_failures_without_progress: int = 2
    exclude_after: int = 2


@dataclass(frozen=True, kw_only=True)
class Decision:
    """``kind`` says what happened, ``reason`` explains it, ``host`` is where it began. ``nodes`` to exclude -> why.
    ``suspected``: nothing but failures that began there speaks against these nodes."""

    action: Action
    kind: str
    reason: str
    host: str = ""
    nodes: dict[str, str] = field(default_factory=dict)
    suspected: bool = False


# Failures that the run itself may cause: they are limited if no new checkpoint comes between them.
_COUNTED = {"failure", "hang", "time limit"}


def decide(evidence: Evidence, limits: Limits) -> Decision:
    """One decision. Non-retryable endings come first, then requests to stop, then failures by their root cause."""
    if evidence.outcome == "complete":
        return Decision(action="done", kind="complete", reason="the run is complete")
    if evidence.cancelled:
        return Decision(action="stop", kind="cancelled", reason="the run was cancelled")
    found = _what_happened(evidence)
    if found.action in ("done", "stop"):
        return found
    return _limited(evidence, limits, _node_to_exclude(evidence, limits, found))


def _what_happened(e: Evidence) -> Decision:
    if e.bad_nodes:
        names = "; ".join(f"{node}: {why}" for node, why in sorted(e.bad_nodes.items()))
        return Decision(action="exclude", kind="preflight", reason=f"preflight: {names}", nodes=e.bad_nodes)
    if e.preflight_problem:
        return Decision(action="stop", kind="preflight", reason=f"preflight: {e.preflight_problem}")
    first = in_order_of_blame(e.failures)[0] if e.failures else None
    if first is not None and first.kind in CERTAIN:
        return Decision(action="stop", kind=first.kind, reason=first.text(), host=first.host)
    saved = f"checkpoint of step {e.saved_after}"
    if (e.preempted or e.warned) and e.outcome != "stopped":
        saved = f"its processes ended before they saved a checkpoint, so it resumes from the {saved}"
    if e.preempted:
        return Decision(action="requeue", kind="preemption", reason=f"preempted; {saved}")
    if e.warned == "time limit":
        return Decision(action="requeue", kind="time limit", reason=f"warned before the time limit; {saved}")
    if e.warned:
        return Decision(action="requeue", kind=e.warned, reason=f"{e.warned} from outside; {saved}")
    if e.node_failed:
        return Decision(
            action="requeue", kind="node failure", reason=f"node failure: {e.node_failed}", host=e.node_failed
        )
    if e.hang is not None:
        host = e.hang.silent[0][1] if len({h for _, h, _ in e.hang.silent}) == 1 else ""
        return Decision(action="go on", kind="hang", reason=e.hang.text(), host=host)
    if first is not None:
        others = len(e.failures) - 1
        tail = f" ({counted(others, 'other')} failed after it)" if others else ""
        if first.kind == HARDWARE:
            return Decision(
                action="exclude",
                kind="failure",
                reason=first.text() + tail,
                host=first.host,
                nodes={first.host: first.message},
            )
        return Decision(action="go on", kind="failure", reason=first.text() + tail, host=first.host)
    if e.outcome == "stopped":
        return Decision(action="requeue", kind="terminated", reason=f"stopped from outside; {saved}")
    return Decision(
        action="go on", kind="failure", reason=f"the processes exited with code {e.exit_code} and no error report"
    )


def _node_to_exclude(e: Evidence, limits: Limits, found: Decision) -> Decision:
    """Exclude a node on which failures keep beginning, whatever their kind."""
    if found.action != "go on" or not found.host:
        return found
    in_a_row = 1
    for past in reversed(e.history):
        if past.kind not in ("failure", "hang") or past.host != found.host:
            break
        in_a_row += 1
    if in_a_row < limits.exclude_after:
        return found
    why = f"{counted(in_a_row, 'failure')} in a row began on it; the last: {found.reason}"
    return replace(found, action="exclude", nodes={found.host: why}, suspected=True)


def _limited(e: Evidence, limits: Limits, found: Decision) -> Decision:
    progressed = e.saved_after > e.saved_before
    if found.kind in _COUNTED and not progressed:
        without = 1
        for past in reversed(e.history):
            if past.progressed:
                break
            without += past.kind in _COUNTED
        if without > limits.max_failures_without_progress:
            return Decision(
                action="stop",
                kind="no progress",
                host=found.host,
                reason=f"{counted(without, 'attempt')} ended without a new checkpoint (still at step {e.saved_after}); "
                f"the last: {found.reason}",
            )
    if len(e.history) >= limits.max_restarts:
        return Decision(
            action="stop",
            kind="too many restarts",
            host=found.host,
            reason=f"{counted(len(e.history) + 1, 'attempt')}, the limit is {counted(limits.max_restarts, 'restart')}; "
            f"the last: {found.reason}",
        )
    return found
