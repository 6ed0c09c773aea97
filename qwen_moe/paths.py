"""Checks file names that were read from a file: such a name must not lead out of its directory."""

import re
from pathlib import Path
from typing import Any

_DRIVE = re.compile(r"[A-Za-z]:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_name(name: Any) -> str:
    """Return ``name`` if it is a relative path of plain parts with "/" between them. Otherwise raise ValueError: for an
    absolute path, "..", a drive letter, a backslash, a control character, or a value that is not text."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r} is not a file name")
    if name.startswith("/") or _DRIVE.match(name):
        raise ValueError(f"{name!r} is an absolute path, expected one relative to the directory")
    if "\\" in name or _CONTROL.search(name) or not _encodes(name):
        raise ValueError(f"{name!r} has a character that is not allowed in a file name")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r} leads out of the directory, or is not written plainly")
    return name


def _encodes(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def leads_out(path: Path, root: Path) -> bool:
    """Whether ``path``, which is below ``root`` by name, resolves to a place outside of ``root`` or to a circle of links."""
    try:
        return not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links in a circle: RuntimeError before Python 3.13
        return True


def inside(root: Path, name: Any) -> Path:
    """The path of file ``name`` in ``root``, where ``name`` was read from a file. Raises ValueError for a name that is not
    plain (`check_name`), and for a link that leads out of ``root``."""
    path = root / check_name(name)
    if leads_out(path, root):
        raise ValueError(f"{name!r} is a link that leads out of {root}, or in a circle")
    return path
