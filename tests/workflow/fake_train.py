"""In place of `qwen-moe train` where a test needs many runs: leaves the folder of a finished run whose loss follows a
known law. ``python fake_train.py RECIPE [section.key=value ...]``; imports no torch, and takes tenths of a second.

A file ``fail`` in the folder that holds the run's folder makes runs end before they are done: its text is an exit code.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

from launchers.folder.atomic import write_json
from qwen_moe.config import RunConfig, dump_config, load_config
from qwen_moe.models.flops import count_parameters


def optimum(n: float, d: float) -> tuple[float, float]:
    """Learning rate and batch size in tokens of least loss: Step Law's exponents, other constants."""
    return 1.3 * n**-0.713 * d**0.307, 0.7 * d**0.571


def best_loss(n: float, d: float) -> float:
    return 1.5 + 8 * n**-0.2 + 60 * d**-0.35


def loss_of(config: RunConfig) -> float:
    """Nats per token, with a thousandth of noise drawn from the settings."""
    n, d = float(count_parameters(config.model).non_vocabulary_total), float(config.training.train_tokens)
    rate, batch = optimum(n, d)
    u = math.log(config.optimizer.learning_rate / rate)
    v = math.log(config.tokens_per_step / batch)
    seed = f"{n} {d} {config.optimizer.learning_rate} {config.tokens_per_step}".encode()
    noise = int.from_bytes(hashlib.sha256(seed).digest()[:4], "big") / 2**32 - 0.5
    return min(5.0, best_loss(n, d) * math.exp(0.01 * u * u + (0.08 * v - 0.03 * u) ** 2 + 1e-3 * noise))


def main(recipe: Path, overrides: list[str]) -> int:
    config = load_config(recipe, overrides)
    run = config.run_dir
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump_config(config))
    failing = run.parent / "fail"
    if failing.exists():
        return int(failing.read_text())
    steps = range(max(1, config.train_steps - 19), config.train_steps + 1)
    lines = [{"step": step, "loss": loss_of(config), "model_flops_per_second": 1e9} for step in steps]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(run / "checkpoints" / f"step_{config.train_steps:08d}" / "manifest.json", {})
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
