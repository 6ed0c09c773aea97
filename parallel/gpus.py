"""Counts the GPUs that a process can use, without importing torch (which would delay every command by seconds)."""

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path


def visible_gpus(environ: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> int:
    """The number of NVIDIA GPUs that torch would find: 0 without GPUs, with a CPU build of torch, or where the system does
    not list its GPUs in ``devices`` (only torch can tell then)."""
    environ = os.environ if environ is None else environ
    if not _torch_has_cuda():
        return 0
    there = len([path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return there
    valid = 0
    for name in chosen.split(","):  # CUDA stops at the first name that is not one
        if not name.strip() or name.strip() == "-1":
            break
        valid += 1
    return min(there, valid)


def _torch_has_cuda() -> bool:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda\b.*= *['\"]\d", text, re.MULTILINE) is not None
