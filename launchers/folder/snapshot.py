"""Records the code that a run was launched with: the commit, diff and untracked files, or all code; secrets removed."""

import hashlib
import importlib.metadata
import io
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launchers.folder.atomic import replaced, write_json, write_text

PACKAGES = (
    "torch",
    "triton",
    "transformer-engine",
    "megatron-core",
    "transformers",
    "numpy",
    "pydantic",
    "safetensors",
    "tokenizers",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
_MAX_FILE_BYTES = 1_000_000  # larger files are data
_MAX_UNTRACKED_BYTES = 20_000_000


def code_hash(root: Path, packages: Sequence[str]) -> str:
    """SHA-256 of the names and contents of the Python files of ``packages``, which are folders of ``root``."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a run's numbers or its speed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", errors="replace") if done.returncode == 0 else None


def take(root: Path, packages: Sequence[str], target: Path, redact: Callable[[str], str]) -> dict[str, Any]:
    """Write the state of the code under ``root`` into ``target``, readable by this user only, and return its facts.

    ``packages`` are the folders of ``root`` that hold the code. ``redact`` removes secrets from a text. ``left_out`` names
    the files that were too large or unreadable.
    """
    facts: dict[str, Any] = {"root": str(root), "hash": code_hash(root, packages), "packages": versions()}
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD") if top and Path(top.strip()).resolve() == root.resolve() else None
    if commit is None:
        files = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
        facts["left_out"] = _archive(root, files, target / "code.tar.gz", redact)
        facts["archive"] = "code.tar.gz"
    else:
        facts["commit"] = commit.strip()
        diff = redact(_git(root, "diff", "HEAD") or "")
        write_text(target / "diff.patch", diff, private=True)
        listed = (_git(root, "ls-files", "--others", "--exclude-standard", "-z") or "").split("\0")
        files = [root / name for name in listed if name.endswith((".py", ".yaml", ".yml", ".toml", ".json"))]
        facts["left_out"] = _archive(root, files, target / "untracked.tar.gz", redact)
        facts |= {"modified": bool(diff), "untracked": len(files)}
    write_json(target / "code.json", facts, private=True)
    return facts


def _archive(root: Path, files: list[Path], target: Path, redact: Callable[[str], str]) -> list[str]:
    """Write ``files`` into an archive. Returns those that were too large or could not be read."""
    size, left_out = 0, []
    with replaced(target, private=True) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for path in files:
            if not path.is_file() or path.is_symlink():
                continue
            name = str(path.relative_to(root))
            try:
                length = path.stat().st_size
                if length > _MAX_FILE_BYTES or size + length > _MAX_UNTRACKED_BYTES:
                    left_out.append(name)
                    continue
                data = redact(path.read_text(encoding="utf-8", errors="replace")).encode()
            except OSError:
                left_out.append(name)
                continue
            size += length
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return left_out
