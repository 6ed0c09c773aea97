"""Directories that appear complete or not at all: written beside their final place, then renamed, or removed on failure."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from qwen_moe.alone import alone
from qwen_moe.checkpoint.directory import partial_path
from qwen_moe.errors import UserError


def require_free(target: Path, needed: int) -> None:
    """Raise UserError if the target is not empty, or its disk has less than ``needed`` bytes free."""
    _check_empty(target)
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"{target} needs {_size(needed)} but its disk has {_size(free)} free: free some, or give another directory"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _check_empty(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty: give a new directory, or remove it first")
    if target.is_symlink():  # a folder cannot be renamed to a link
        raise UserError(f"{target} is a link to {target.readlink()}: give that directory itself, or remove the link")


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Yield a new directory beside ``target``, removed if the body fails. Disk problems become UserErrors. A second process
    with the same target is refused: it would remove what the first one has written."""
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone(target, "wait for it, or give another directory"))
        except OSError as error:
            raise UserError(f"{target} was not written: {error}") from None
        _check_empty(target)  # another process may have finished it since `require_free`
        yield stack.enter_context(_new_directory(target))


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    partial = partial_path(target)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
    except BaseException as error:
        full = partial.exists() and shutil.disk_usage(partial).free < (1 << 20)
        shutil.rmtree(partial, ignore_errors=True)
        cause: BaseException | None = error
        if isinstance(error, CheckpointException):
            failure = next(iter(error.failures.values()))
            cause = failure[0] if isinstance(failure, tuple) else failure
        if isinstance(cause, UserError) and cause is not error:
            raise cause from None
        # torch's zip writer reports a short write as RuntimeError, with the errno lost.
        if (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)) or full:
            raise UserError(
                f"{target} was not written: no space left on its disk; free some and run it again"
            ) from None
        if isinstance(cause, OSError):
            raise UserError(f"{target} was not written: {cause}") from None
        raise
