"""Tiny recipes, and a launched run seen from outside: its attempts, its decisions, its losses."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from launchers.folder.run_folder import RunFolder


def write_recipe(folder: Path, corpus: Path, *, steps: int, name: str = "run", **changes: Any) -> Path:
    """A model so small that steps take some hundredths of a second, saved every ten."""
    values: dict[str, Any] = {
        "run_dir": str(folder / name),
        "model": {
            "family": "qwen2_moe",
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 32,
            "max_position_embeddings": 256,
        },
        "data": {
            "train": [{"prefix": str(corpus / "tokens")}],
            "tokenizer": str(corpus / "tokens-tokenizer"),
            "sequence_length": 32,
            "split": "100,0,0",
        },
        "training": {
            "train_tokens": steps * 8 * 32,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "validation_interval": 0,
        },
        "optimizer": {"learning_rate": 0.01},
        "checkpoint": {"interval": 10, "keep": 2, "export_hf": False},
        "logging": {"tensorboard": False},
        "launch": {"threads": 1},
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        values.setdefault(section, {})[key] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_site(path: Path, text: str = "") -> Path:
    """Short patience: the runs of the tests take seconds."""
    path.write_text(
        "[slurm]\nsignal_seconds = 30\n"
        '[preflight]\nlevel = "quick"\ntimeout_seconds = 120\nmin_free_disk_gb = 0.001\nmessage_mb = 4\n'
        "[survive]\nhang_seconds = 15\nstartup_seconds = 180\nstop_seconds = 20\n" + text
    )
    return path


class Launched:
    """A run folder, read as a user would."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.folder = run_dir, RunFolder(run_dir)

    @property
    def job(self) -> str:
        return str(self.folder.facts()["job"])

    def losses(self) -> list[tuple[int, float]]:
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [(record["step"], record["loss"]) for record in map(json.loads, lines)]

    def steps(self) -> int:
        try:
            return len(self.losses())
        except (FileNotFoundError, ValueError):
            return 0

    def decisions(self) -> list[dict[str, Any]]:
        return [d for d in (a.read("decision.json") for a in self.folder.attempts()) if d is not None]

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 150) -> None:
        end = time.monotonic() + seconds
        while not condition():
            last = self.decisions()[-1:] or [{"action": ""}]
            assert last[0]["action"] != "stop", f"{last[0]['reason']}\n{self.everything()}"
            assert time.monotonic() < end, f"waited {seconds:g} s for {what}\n{self.everything()}"
            time.sleep(0.1)

    def wait_until_done(self, seconds: float = 200) -> None:
        self.wait(lambda: self.decisions() and self.decisions()[-1]["action"] == "done", "the end of the run", seconds)

    def everything(self) -> str:
        """All logs, for a failed test."""
        parts = []
        launch = self.folder.launch
        for path in [*launch.glob("*.out"), *launch.glob("attempts/*/*.log"), *launch.glob("attempts/*/ranks/*")]:
            parts.append(f"--- {path.relative_to(launch)}\n" + "\n".join(path.read_text().splitlines()[-15:]))
        return "\n".join(parts)

    def pid_of_rank(self, rank: int) -> int:
        """Pids are the machine's: the test cluster's hosts share its process table."""
        for report in self.folder.attempts()[-1].read_all("nodes").values():
            if str(rank) in report["ranks"]:
                return int(report["ranks"][str(rank)]["pid"])
        raise AssertionError(f"rank {rank} has not been seen")

    def host_of_rank(self, rank: int) -> str:
        for host, report in self.folder.attempts()[-1].read_all("nodes").items():
            if str(rank) in report["ranks"]:
                return host
        raise AssertionError(f"rank {rank} has not been seen")


def kill_rank(run: Launched, rank: int, number: int) -> None:
    os.kill(run.pid_of_rank(rank), number)
