"""The logs of a run's ranks, merged by time, each line with its rank. The logs of all attempts are kept."""

import heapq
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launchers.errors import LaunchError
from launchers.folder.run_folder import Attempt, RunFolder


def choose_attempt(run: RunFolder, number: int | None) -> Attempt:
    """The attempt ``number``, or the last one. Raises LaunchError, which names the existing attempts."""
    attempts = run.attempts()
    if not attempts:
        run.facts()  # raises if this is not a launched run
        raise LaunchError(f"{run.run_dir} has not started yet: there are no logs")
    if number is None:
        return attempts[-1]
    for attempt in attempts:
        if attempt.number == number:
            return attempt
    raise LaunchError(f"{run.run_dir} has no attempt {number}: there are 1 to {attempts[-1].number}")


def read_tail(path: Path, lines: int = 20) -> str:
    """The last lines of a text file; empty if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64_000))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def rank_files(attempt: Attempt, rank: int | None) -> dict[int, Path]:
    """Log files by rank; only the file of ``rank`` if it is given."""
    found = {}
    for path in sorted((attempt.folder / "ranks").glob("rank-*.log")):
        number = int(path.stem.removeprefix("rank-"))
        if rank is None or number == rank:
            found[number] = path
    return found


def _lines(rank: int, path: Path) -> Iterator[tuple[str, int, str]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            stamp, _, text = line.rstrip("\n").partition(" ")
            yield stamp, rank, text


def merged(attempt: Attempt, rank: int | None = None) -> Iterator[str]:
    """Every line as `TIME [rank N] text`, oldest first."""
    sources = [_lines(number, path) for number, path in rank_files(attempt, rank).items()]
    for stamp, number, text in heapq.merge(*sources, key=lambda line: (line[0], line[1])):
        yield f"{stamp} [rank {number}] {text}"


def follow(
    run: RunFolder,
    attempt: Attempt,
    rank: int | None = None,
    poll_seconds: float = 0.5,
    ended: Callable[[], str] = str,
) -> Iterator[str]:
    """Like `merged`, then new lines as they are written, also of later attempts, until the run has ended. ``ended`` says why
    no more will come although no decision says so: the conductor was killed, or the job cancelled in the queue."""
    while True:
        offsets: dict[int, int] = {}
        over = False
        while not over:
            why = ended()  # before the look, so that what was written last is not missed
            over = (attempt.folder / "decision.json").exists()
            new: list[tuple[str, int, str]] = []
            for number, path in rank_files(attempt, rank).items():
                with path.open("rb") as file:
                    file.seek(offsets.get(number, 0))
                    data = file.read()
                whole = data[: data.rfind(b"\n") + 1]
                offsets[number] = offsets.get(number, 0) + len(whole)
                for line in whole.decode("utf-8", errors="replace").splitlines():
                    stamp, _, text = line.partition(" ")
                    new.append((stamp, number, text))
            for stamp, number, text in sorted(new, key=lambda line: (line[0], line[1])):
                yield f"{stamp} [rank {number}] {text}"
            if not over and why:
                yield f"-- {why}"
                return
            if not over:
                time.sleep(poll_seconds)
        decision = attempt.decision()
        if decision is None:
            raise LaunchError(f"{attempt.folder / 'decision.json'} is damaged: it does not say how this attempt ended")
        yield f"-- attempt {attempt.number}: {decision['action']} ({decision['kind']}): {decision['reason']}"
        if decision["action"] in ("done", "stop"):
            return
        while not (later := [a for a in run.attempts() if a.number > attempt.number]):
            if why := ended():
                yield f"-- {why}"
                return
            time.sleep(poll_seconds)
        attempt = later[0]
