"""Settings for all tests."""

import hashlib
import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

# Ranks, tokenizers and BLAS share two cores: threads beyond one only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A background job of a shell ignores SIGINT, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """What a command installs for its process ends with the test, so that no test depends on the one before."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


# What takes long is begun first where two processes share the tests. A file is not split: its tests share trained runs
# and prepared corpora. (Not `--dist loadgroup`: pytest-xdist 3.8 loses the groups under pytest 9.2, without a word.)
_LONG = (
    "launchers/job/test_on_slurm.py",
    "training/test_run.py",
    "workflow/test_workflow.py",
    "training/test_fp8_run.py",
    "test_first_run.py",
    "launchers/local/test_folder_of_recipes.py",
    "training/test_rollback.py",
    "verify/test_layouts.py",
    "verify/test_objectives.py",
    "verify/test_ep_overlap.py",
)


def _place(item: pytest.Item) -> int:
    path = item.path.relative_to(item.config.rootpath / "tests").as_posix()
    return _LONG.index(path) if path in _LONG else len(_LONG)


def _mark_slow(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what slow_tests.txt names. A name without a test is an error where its whole file was collected."""
    root = config.rootpath / "tests"
    named = (root / "slow_tests.txt").read_text("utf-8").split("\n")
    ids = {name for name in named if name and not name.startswith("#")}
    found = {item.nodeid.removeprefix("tests/"): item for item in items}
    for name in ids & found.keys():
        found[name].add_marker(pytest.mark.slow)
    chosen = any("::" in argument for argument in config.args)
    files = {name.split("::")[0] for name in found}
    if lost := sorted(name for name in ids - found.keys() if not chosen and name.split("::")[0] in files):
        raise pytest.UsageError(f"tests/slow_tests.txt names tests that do not exist: {lost}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark slow tests; for pytest-xdist's ``--dist loadfile``, the longest files first.

    With TEST_ORDER, files come in an order that it decides: CI has no time for all slow tests, so each commit begins
    with others."""
    _mark_slow(config, items)
    if order := os.environ.get("TEST_ORDER"):
        items.sort(key=lambda item: hashlib.sha256(f"{order} {item.nodeid.split('::')[0]}".encode()).digest())
    elif hasattr(config, "workerinput"):
        items.sort(key=_place)
