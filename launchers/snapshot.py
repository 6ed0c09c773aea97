"""What a run was launched with: the commit, the diff, the files git does not know, or the whole code; secrets taken out."""

import io
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from launchers.node_facts import CODE, code_hash, versions
from launchers.run_folder import write_json, write_text

# Well-known shapes of keys, and assignments to names that say secret; what is taken out is marked.
_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|"
    r"xox[abpr]-[A-Za-z0-9-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----|"
    r"(?i:(?<=token=)|(?<=secret=)|(?<=password=)|(?<=api_key=))['\"]?[^\s'\"]{8,}",
    re.DOTALL,
)
_MAX_UNTRACKED_BYTES = 20_000_000


def redact(text: str) -> str:
    """``text`` without what looks like keys and tokens."""
    return _SECRETS.sub("[removed: looks like a secret]", text)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", errors="replace") if done.returncode == 0 else None


def take(root: Path, target: Path) -> dict[str, Any]:
    """Write the state of the code under ``root`` into ``target`` and return its facts."""
    facts: dict[str, Any] = {"root": str(root), "hash": code_hash(root), "packages": versions()}
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD") if top and Path(top.strip()).resolve() == root.resolve() else None
    if commit is None:
        files = [path for package in CODE for path in sorted((root / package).rglob("*.py"))]
        _archive(root, files, target / "code.tar.gz")
        facts["archive"] = "code.tar.gz"
    else:
        facts["commit"] = commit.strip()
        diff = redact(_git(root, "diff", "HEAD") or "")
        write_text(target / "diff.patch", diff)
        listed = (_git(root, "ls-files", "--others", "--exclude-standard", "-z") or "").split("\0")
        files = [root / name for name in listed if name.endswith((".py", ".yaml", ".yml", ".toml", ".json"))]
        _archive(root, files, target / "untracked.tar.gz")
        facts |= {"modified": bool(diff), "untracked": len(files)}
    write_json(target / "code.json", facts)
    return facts


def _archive(root: Path, files: list[Path], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    size = 0
    with tarfile.open(partial, "w:gz") as archive:
        for path in files:
            if not path.is_file() or path.is_symlink():
                continue
            data = redact(path.read_text(encoding="utf-8", errors="replace")).encode()
            size += len(data)
            if size > _MAX_UNTRACKED_BYTES:
                break
            entry = tarfile.TarInfo(str(path.relative_to(root)))
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    partial.replace(target)
