"""Work that one rank does for all: checking data, and managing the files that ranks share."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from qwen_moe.data.content import Content, check_prefix, signature, verify_content
from qwen_moe.errors import UserError, explain_os_error

T = TypeVar("T")


def _attempt(fn: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return fn(), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, explain_os_error(error)


def same_on_all_ranks(fn: Callable[[], T]) -> T:
    """Run ``fn`` on rank 0 only and return its result on all ranks. Its UserError or OSError is a UserError on all ranks."""
    if not dist.is_initialized():
        return fn()
    found: list[tuple[T | None, str | None]] = [_attempt(fn) if dist.get_rank() == 0 else (None, None)]
    dist.broadcast_object_list(found, src=0)
    return _result(found[0])


def long_on_first_rank(fn: Callable[[], T], poll: float = 2.0) -> T:
    """`same_on_all_ranks` for work that may take longer than a collective may wait: every ``poll`` seconds they ask
    whether it is done. ``fn`` runs in a thread of rank 0."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return same_on_all_ranks(fn)
    with ThreadPoolExecutor(1) as thread:
        work = thread.submit(_attempt, fn) if dist.get_rank() == 0 else None
        done = [False]
        while not done[0]:
            done = [bool(work and wait([work], poll).done)]
            dist.broadcast_object_list(done, src=0)
    return same_on_all_ranks(lambda: _result(work.result() if work else (None, None)))


def _result(attempt: tuple[T | None, str | None]) -> T:
    result, problem = attempt
    if problem is not None:
        raise UserError(problem)
    return result  # type: ignore[return-value]


def verified_on_all_ranks(prefixes: Sequence[Path], vocab_size: int, record: Path) -> dict[Path, Content]:
    """Check every prefix on rank 0, and on the first rank of each machine that sees other files than rank 0.

    Raises UserError on all ranks if data are damaged, do not fit the model, or differ between machines.
    """

    def verify() -> dict[Path, Content]:
        found = {}
        for prefix in prefixes:
            check_prefix(prefix, vocab_size)
            found[prefix] = verify_content(prefix, record=record)
        return found

    contents = same_on_all_ranks(verify)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return contents
    problem = None
    if dist.get_rank() != 0 and os.environ.get("LOCAL_RANK", "0") == "0":
        problem = _attempt(lambda: _check_copy(contents))[1]
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise UserError(f"on the machine of rank {rank}: {found}")
    return contents


def _check_copy(contents: dict[Path, Content]) -> None:
    """Raises UserError if this machine's files differ from rank 0's."""
    for prefix, wanted in contents.items():
        check_prefix_exists(prefix)
        if signature(prefix) != wanted.signature:
            found = verify_content(prefix)
            if found.sha256 != wanted.sha256:
                raise UserError(f"{prefix}.bin and .idx differ from those on rank 0's machine: copy them again")


def check_prefix_exists(prefix: Path) -> None:
    """Raises UserError if a file is missing."""
    if not prefix.with_name(prefix.name + ".bin").is_file() or not prefix.with_name(prefix.name + ".idx").is_file():
        raise UserError(f"{prefix}.bin or .idx does not exist: all machines need the data under the same path")
