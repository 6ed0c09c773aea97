"""The files of prepared data appear together or not at all, are made by one process at a time, and are known again."""

import contextlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from qwen_moe.data.checked import carried_again
from qwen_moe.data.content import sha256, verify_content
from qwen_moe.data.manifest import (
    PreparedData,
    bin_path,
    column_path,
    idx_path,
    manifest_path,
    partial_path,
    read_manifest,
    trained_tokenizer_path,
    was_interrupted,
    write_manifest,
)
from qwen_moe.data.sources import Corpus, Source
from qwen_moe.data.tokenizer import load_tokenizer, tokenizer_hash
from qwen_moe.errors import UserError


class OtherDataThere(UserError):
    """The output was prepared from something else, and --overwrite was not given."""


class Asked(Protocol):
    """A request for prepared data. ``tokenizer``: None if one is trained with the data."""

    @property
    def tokenizer(self) -> Path | None: ...

    def settings(self) -> str:
        """A hash of everything except the inputs."""

    def by_status(self, sources: list[Source]) -> str:
        """A hash with the files' paths, sizes and modification times."""

    def by_content(self, sources: list[Source], digests: list[str]) -> str:
        """A hash with the files' kinds and contents."""


class Digested(ABC):
    """A request whose hashes are `_digest` of lines about its inputs."""

    @abstractmethod
    def _digest(self, lines: list[bytes]) -> str:
        """A hash of ``lines`` and of everything except the inputs."""

    def settings(self) -> str:
        """A hash of everything except the inputs."""
        return self._digest([])

    def by_status(self, sources: list[Source]) -> str:
        """A hash with the files' paths, sizes and modification times; manifests of all versions have it."""
        return self._digest(status_lines(sources))

    def by_content(self, sources: list[Source], digests: list[str]) -> str:
        """A hash with the files' kinds and contents."""
        return self._digest(content_lines(sources, digests))


def status_lines(sources: list[Source]) -> list[bytes]:
    """The files' paths, sizes and modification times, for a request's hash."""
    return [os.fsencode(f"{source.path}|{source.status()}\n") for source in sources]


def content_lines(sources: list[Source], digests: list[str]) -> list[bytes]:
    """The files' kinds and contents, for a request's hash."""
    return [f"{source.kind}|{digest}\n".encode() for source, digest in zip(sources, digests, strict=True)]


class Watch:
    """Sees whether files change while they are read; it begins when it is made. ``statuses``: what they were then."""

    def __init__(self, sources: list[Source]) -> None:
        self._sources, self.statuses = sources, [source.status() for source in sources]

    def check(self) -> None:
        """Raise UserError if a file has changed or is gone: what was read may be neither its old content nor its new one."""
        for source, status in zip(self._sources, self.statuses, strict=True):
            try:
                changed = source.status() != status
            except FileNotFoundError:
                changed = True
            if changed:
                raise UserError(
                    f"{source.path} was changed while it was read: wait until nothing writes it, then run the command again"
                )


def settled(request: Asked, corpus: Corpus, prefix: Path, overwrite: bool) -> PreparedData | None:
    """The manifest of an existing output that fits the request; None if it must be made. Raises OtherDataThere."""
    try:
        existing = read_manifest(prefix)
    except UserError:
        if not overwrite:
            raise
        return None
    if not bin_path(prefix).exists():
        return None
    if existing is None:
        if overwrite or was_interrupted(prefix):
            return None
        raise OtherDataThere(f"{bin_path(prefix)} exists and has no manifest: use --overwrite, or another output")
    by_status = request.by_status(corpus.sources)
    if existing.request != by_status and not _is_of_content(existing, request, corpus):
        if overwrite:
            return None
        raise OtherDataThere(
            f"{prefix}.bin was prepared from other inputs or with other settings: use --overwrite, or another output"
        )
    if damage(prefix, existing, request):
        return None
    decontaminated = carried_again(corpus.sources, existing.decontaminated)
    if existing.request == by_status and existing.decontaminated == decontaminated:
        return existing
    return _found_again(prefix, replace(existing, request=by_status, decontaminated=decontaminated))


def _is_of_content(existing: PreparedData, request: Asked, corpus: Corpus) -> bool:
    """True if the inputs' content is unchanged, whatever their names and modification times. Reads all of them."""
    if not existing.content or existing.settings != request.settings() or existing.files != len(corpus.sources):
        return False
    return existing.content == request.by_content(corpus.sources, [source.sha256() for source in corpus.sources])


def _found_again(prefix: Path, known: PreparedData) -> PreparedData:
    """Record the inputs' new paths and times, so that they are not hashed at every start, and what they were checked
    against."""
    with contextlib.suppress(OSError):  # the folder may be read-only
        write_manifest(manifest_path(prefix), known)
    return known


def damage(prefix: Path, manifest: PreparedData, request: Asked) -> str | None:
    """Why the files of a prefix are not what was written, or None if they are."""
    try:
        verify_content(prefix)
        trained = trained_tokenizer_path(prefix)
        if request.tokenizer is None:
            load_tokenizer(trained)
            if tokenizer_hash(trained) != manifest.tokenizer_sha256:
                raise UserError(f"tokenizer {trained} is not the one that was trained with the data")
    except UserError as error:
        return str(error)
    return None


def being_made(directory: Path) -> Path:
    return directory.with_name(directory.name + ".new")


@contextlib.contextmanager
def no_partial_left(prefix: Path, columns: Sequence[str] = ()) -> Iterator[None]:
    """Remove unfinished files if the block fails."""
    try:
        yield
    except BaseException:
        for path in (bin_path(prefix), idx_path(prefix), *(column_path(prefix, name) for name in columns)):
            partial_path(path).unlink(missing_ok=True)
        if manifest_path(prefix).exists():
            partial_path(manifest_path(prefix)).unlink(missing_ok=True)
        shutil.rmtree(being_made(trained_tokenizer_path(prefix)), ignore_errors=True)
        raise


def put_in_place(prefix: Path, prepared: PreparedData, tokenizer: Path | None) -> None:
    """Move all files into place. The manifest is removed first and replaced last. Until then, its partial file says that
    the data must not be read and that the next preparation may replace them."""
    manifest = manifest_path(prefix)
    with contextlib.suppress(UserError):  # of a damaged manifest
        before = read_manifest(prefix)
        obsolete = set(before.columns if before is not None else ()) - set(prepared.columns)
        for name in obsolete:
            column_path(prefix, name).unlink(missing_ok=True)
    write_manifest(partial_path(manifest), prepared)
    manifest.unlink(missing_ok=True)
    if tokenizer is not None:
        target = trained_tokenizer_path(prefix)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(tokenizer, target)
    columns = [column_path(prefix, name) for name in prepared.columns]
    for path in (*columns, idx_path(prefix), bin_path(prefix), manifest):
        os.replace(partial_path(path), path)


def synced(path: Path) -> str:
    """Flush a file to disk and return its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256(path)
