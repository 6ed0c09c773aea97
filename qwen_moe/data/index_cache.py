"""megatron-core's index arrays of a run, sealed with their hashes when they are whole; made again where they are not."""

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
    """A folder of arrays that follow from ``contents`` (hashes of the data) alone.

    Without a seal that fits, a folder is what an interrupted start has left, or damaged, or of other data.
    """

    def __init__(self, folder: Path, contents: list[str]) -> None:
        self.folder = folder
        self._contents = hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def clear_unless_whole(self) -> bool:
        """Delete the folder unless it is as it was sealed; True when there is something to load."""
        if self._is_whole():
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            # Not a folder, or one that is not ours to delete: the error says which.
            os.unlink(self.folder) if not self.folder.is_dir() else shutil.rmtree(self.folder)
        return False

    def seal(self) -> None:
        """Say that everything in the folder is whole."""
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
