"""Run folders as `qwen-moe train` leaves them, written by hand: a recipe and a curve."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

STEPS = 1000
VOCABULARY = 256


def write_recipe(folder: Path, name: str, **changes: Any) -> Path:
    """A recipe of 1,000 steps of 8 sequences of 32 tokens; ``changes`` as section__key."""
    values: dict[str, Any] = {
        "run_dir": str(folder / "runs" / name),
        "model": {
            "family": "qwen3_moe",
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        "data": {"train": [{"prefix": str(folder / "tokens")}], "sequence_length": 32},
        "training": {"train_tokens": STEPS * 256, "micro_batch_size": 8, "global_batch_size": 8},
        "optimizer": {"learning_rate": 3e-3},
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        values.setdefault(section, {})[key] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_run(recipe: Path, losses: Sequence[float], validation: float | None = None, **failure: str) -> Path:
    """What a run of ``recipe`` left after as many steps as there are ``losses``; ``failure``: kind and message."""
    values = yaml.safe_load(recipe.read_text())
    run = Path(values["run_dir"])
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(recipe.read_text())
    lines = [{"step": number, "loss": loss} for number, loss in enumerate(losses, start=1)]
    if validation is not None:
        lines.append({"step": len(losses), "validation_loss": validation})
    # Python's json writes NaN as the recorder does.
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if failure:
        (run / "failure.json").write_text(json.dumps(failure))
    return run
