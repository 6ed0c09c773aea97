"""Names of files that come out of a file: a name from elsewhere must not lead out of the directory that it belongs to."""

import re
from pathlib import Path
from typing import Any

_DRIVE = re.compile(r"[A-Za-z]:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_name(name: Any) -> str:
    """``name`` itself when it is a relative path of plain parts, with "/" between them. Raises ValueError saying why not:
    absolute, with "..", a drive letter, a backslash or a control character, or no text at all."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r} is not the name of a file")
    if name.startswith("/") or _DRIVE.match(name):
        raise ValueError(f"{name!r} is an absolute path, expected one relative to the directory")
    if "\\" in name or _CONTROL.search(name) or not _encodes(name):
        raise ValueError(f"{name!r} has a character that no name of a file here has")
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
    """Whether ``path``, a file below ``root``, is really somewhere else, or nowhere: a link, or behind one, to outside of
    ``root`` or in a circle."""
    try:
        return not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links in a circle: RuntimeError before Python 3.13
        return True


def inside(root: Path, name: Any) -> Path:
    """The file that ``name``, which was read from a file, means in ``root``. Raises ValueError for a name that is not
    plain (`check_name`), and for a link that leads out of ``root``."""
    path = root / check_name(name)
    if leads_out(path, root):
        raise ValueError(f"{name!r} is a link that leads out of {root}, or in a circle")
    return path
