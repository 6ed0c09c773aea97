"""Caches a run's index arrays of megatron-core. Complete arrays are sealed with their hashes; others are made again."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from launchers.folder.atomic import write_json
from qwen_moe.data.content import sha256

SEAL = "sealed.json"


class IndexCache:
    """A folder of arrays that depend only on ``contents`` (hashes of the data).

    A folder without a matching seal was left by an interrupted start, is damaged, or belongs to other data.
    """

    def __init__(self, folder: Path, contents: list[str]) -> None:
        self.folder = folder
        self._contents = hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def clear_unless_whole(self) -> bool:
        """Delete the folder unless it matches its seal. Returns True if there is something to load."""
        if self._is_whole():
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            # It is not a folder, or we may not delete it; then the error says why.
            os.unlink(self.folder) if not self.folder.is_dir() else shutil.rmtree(self.folder)
        return False

    def seal(self) -> None:
        """Record that everything in the folder is complete."""
        files = {path.name: sha256(path) for path in sorted(self.folder.iterdir()) if path.is_file()}
        files.pop(SEAL, None)
        write_json(self.folder / SEAL, {"contents": self._contents, "files": files})

    def _is_whole(self) -> bool:
        try:
            seal: Any = json.loads((self.folder / SEAL).read_text(encoding="utf-8"))
            if seal["contents"] != self._contents:
                return False
            there = {path.name for path in self.folder.iterdir()} - {SEAL}
            return there == set(seal["files"]) and all(
                sha256(self.folder / name) == digest for name, digest in seal["files"].items()
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return False
