"""Plants every mistake of the table in a copy of the project, runs the tests that should see it, and prints which did.

`make mutations` runs it. Exit code 0 if the tests see every mistake, 1 if one survives, 2 if it cannot be told: the tests
fail without a mistake, or the table does not fit the code.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from tests.mutations.table import Mutation, load

ROOT = Path(__file__).parents[2]
SEEN, SURVIVED, NO_ANSWER = "seen", "SURVIVED", "NO ANSWER"
PLUGIN = "tests.mutations.unshrunk"
_PASSED, _FAILED = 0, 1  # exit codes of pytest; others mean that it could not run the tests


def copy_project(root: Path, target: Path) -> Path:
    """Copy every file that git tracks or would track, so that nothing is planted in the checkout itself."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, listed):
        source, copy = root / name, target / name
        if not source.exists():  # deleted, but not yet for git
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy, follow_symlinks=False)
    return target


def run_tests(tree: Path, tests: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """pytest's exit code, or None if it took longer than ``seconds``, and what it printed."""
    # Python takes a compiled file for current if source and compiled file agree in size and second: one that was written
    # before the mistake was planted would hide it.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-rfE", "-p", "no:cacheprovider", "-p", PLUGIN, *tests]
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        with suppress(ProcessLookupError):  # what the tests started ends with them
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def try_out(mutation: Mutation, tree: Path, seconds: float) -> tuple[str, str]:
    """(seen, survived or no answer; by which test, or why) of one mistake, which is taken out of ``tree`` again."""
    file = tree / mutation.file
    before = file.read_bytes()
    try:
        file.write_text(mutation.planted(tree), encoding="utf-8")
        code, output = run_tests(tree, mutation.tests, seconds)
    finally:
        file.write_bytes(before)
    if code == _PASSED:
        return SURVIVED, f"by {', '.join(mutation.tests)}"
    if code == _FAILED:
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        return SEEN, f"by {failed[1] if failed else 'a test'}"
    why = f"longer than {seconds:.0f} s" if code is None else f"pytest ended with {code}: {output.strip()[-2000:]}"
    return NO_ANSWER, why


def run(mutations: Sequence[Mutation], root: Path, seconds: float, jobs: int) -> int:
    """Try out all ``mutations`` and print a line for each. Returns the exit code."""
    for mutation in mutations:
        mutation.planted(root)
    begin, survivors = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        if (root.parent / "shared").is_dir():  # public sweeps of runs, which some tests skip without
            (Path(folder) / "shared").symlink_to(root.parent / "shared")
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(min(jobs, len(mutations))):
            trees.put(copy_project(root, Path(folder) / str(number)))
        tree = trees.get()
        tests = sorted({test for mutation in mutations for test in mutation.tests})
        print(f"{len(tests)} tests without a mistake ...", flush=True)
        code, output = run_tests(tree, tests, seconds * len(mutations))
        trees.put(tree)
        if code != _PASSED:
            print(f"{output.strip()[-4000:]}\nthe tests fail without a mistake: repair them first", file=sys.stderr)
            return 2

        def try_one(mutation: Mutation) -> tuple[str, str, float]:
            tree, started = trees.get(), time.monotonic()
            result = try_out(mutation, tree, seconds)
            trees.put(tree)
            return *result, time.monotonic() - started

        with ThreadPoolExecutor(jobs) as pool:
            for mutation, (result, how, took) in zip(mutations, pool.map(try_one, mutations), strict=True):
                print(f"{result:<9} {took:5.1f} s  {mutation.name}  ({how})", flush=True)
                if result != SEEN:
                    survivors.append(mutation)
    print(f"{len(mutations) - len(survivors)} of {len(mutations)} mistakes seen in {time.monotonic() - begin:.0f} s")
    for mutation in survivors:
        print(f"not seen: {mutation.name} ({mutation.file}): {mutation.why}")
    return 1 if survivors else 0


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, table: Path | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations.run", description=__doc__)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="mistakes whose name contains it; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--seconds", type=float, default=240, help="time limit of one mistake's tests")
    parser.add_argument("--jobs", type=int, default=1, help="mistakes that are tried out at a time")
    options = parser.parse_args(arguments)
    try:
        mutations = load(table) if table is not None else load()
        if options.only:
            unknown = [part for part in options.only if not any(part in one.name for one in mutations)]
            if unknown:
                parser.error(f"no mistake has {unknown[0]!r} in its name: --list prints them")
            mutations = [one for one in mutations if any(part in one.name for part in options.only)]
        if options.list:
            print("\n".join(f"{one.name}  ({one.file})" for one in mutations))
            return 0
        return run(mutations, root, options.seconds, max(1, options.jobs))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
