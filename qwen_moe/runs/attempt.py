"""Records each attempt of a run: one JSON line in attempts.jsonl, and the resolved config beside it."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from launchers.folder.atomic import write_text
from parallel.gemm import description
from parallel.process import ProcessInfo
from parallel.threads import DECIDED
from qwen_moe.config import RunConfig, dump_config
from qwen_moe.runs.records import ATTEMPTS, RESOLVED

_PACKAGES = ("qwen-moe", "torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a run's results."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def code_commit() -> dict[str, Any]:
    """The commit of this checkout and whether files differ from it. Empty if the code is not in git, also when it is
    installed inside a checkout of something else."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def record_attempt(config: RunConfig, info: ProcessInfo, device: torch.device, *, resumed_step: int) -> None:
    """Append this attempt to the run folder's attempts.jsonl and save the resolved config."""
    run_dir = config.run_dir
    write_text(run_dir / RESOLVED, dump_config(config))
    record = {
        "time": time.time(),
        "resumed_step": resumed_step,
        "world_size": info.world_size,
        "host": platform.node(),
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "bf16_products": description(torch.bfloat16) if device.type == "cpu" else "by the device",
        "threads_why": os.environ.get(DECIDED, "").partition(" ")[2],
        "packages": package_versions(),
        "code": code_commit(),
    }
    with (run_dir / ATTEMPTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
