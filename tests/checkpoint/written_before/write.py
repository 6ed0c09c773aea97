"""Make a fixture with the code that it is named for, and note what later code gives when it goes on with it.

    python -m tests.checkpoint.written_before.write CHECKOUT NAME           make the fixture NAME
    python -m tests.checkpoint.written_before.write CHECKOUT NAME COMMIT    go on with it by COMMIT's code

CHECKOUT is a tree of the commit. Its own `train` takes five steps; the fixture keeps the checkpoint of step 3 with the
run's metrics, its settings as that code wrote them, and the figures of steps 4 and 5.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from parallel.gemm import has_hardware

HERE = Path(__file__).parent
SAVED, STEPS = 3, 5
SEQUENCE, BATCH = 16, 4
VOCABULARY = 24

UNTIED = {
    "family": "qwen2_moe",
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,  # rows of 16 bytes, which the first versions needed
    "shared_expert_intermediate_size": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,  # so that the layers, and not the embeddings alone, decide the loss
}
TIED = UNTIED | {"tie_word_embeddings": True}
# Operands of FP8 products are whole multiples of 16.
OF_SIXTEEN = UNTIED | {"hidden_size": 16, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
FP8 = {"compute": "fp8", "fp8": {"recipe": "delayed", "amax_history_len": 4}}
WSD = {"kind": "wsd", "warmup_tokens": 64, "decay_tokens": 128, "min_learning_rate": 0.001}
BIAS = {"coefficient": 0.0, "scope": "none", "bias_update_rate": 0.01}

# name -> changes of the recipe; the name begins with the commit. `launch.nproc` is the number of ranks that wrote it.
CASES: dict[str, dict[str, Any]] = {
    "716d90a-untied": {"model": UNTIED, "launch": {"nproc": 2}},
    "24399c7-tied-tp-ep": {"model": TIED, "launch": {"nproc": 2}, "parallel": {"tp": 2, "ep": 2}},
    "69081ad-tied-pp": {
        "model": TIED,
        "launch": {"nproc": 2},
        "parallel": {"pp": 2},
        "schedule": WSD,
        "training": {"spike_nats": 5.0},
    },
    "ab0e925-untied": {"model": UNTIED, "launch": {"nproc": 1}},
    "ab0e925-fp8": {"model": OF_SIXTEEN | {"num_hidden_layers": 1}, "launch": {"nproc": 2}, "precision": FP8},
    "6e2aa79-tied-bias": {"model": TIED, "launch": {"nproc": 1}, "balance": BIAS, "schedule": WSD},
    "197e92b-fp8-tied": {
        "model": OF_SIXTEEN | {"num_hidden_layers": 1, "tie_word_embeddings": True},
        "launch": {"nproc": 1},
        "precision": FP8,
    },
}


def write_tokens(prefix: Path) -> Path:
    """The data of every fixture, always the same bytes; made here, since the code under test only reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in range(12):
        tokens = [(5 * document + 7 * i + i * i // 3) % VOCABULARY for i in range(90)]
        builder.add_item(torch.tensor(tokens))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def recipe(name: str, folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "seed": 7,
        "data": {"train": [{"prefix": str(folder / "tokens")}], "sequence_length": SEQUENCE, "split": "100,0,0"},
        "training": {
            "train_tokens": STEPS * BATCH * SEQUENCE,
            "micro_batch_size": 2,
            "global_batch_size": BATCH,
            "validation_interval": 0,
        },
        "optimizer": {"learning_rate": 0.02},
        "schedule": {"kind": "constant"},
        "balance": {"coefficient": 0.01, "z_loss_coefficient": 1e-3},
        "checkpoint": {"interval": SAVED, "keep": STEPS, "export_hf": False},
        "logging": {"tensorboard": False},
    }
    for section, changes in CASES[name].items():
        values[section] = values.get(section, {}) | changes
    values["launch"]["threads"] = 1
    return values


def machine() -> dict[str, Any]:
    """What decides the last bits of a loss, beside the code."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    vectors = sorted(name for name, value in has.items() if value is True and name.startswith(("avx", "amx")))
    return {
        "torch": torch.__version__,
        "cpu": " ".join([str(has.get("cpu_name")), f"l2_cache_size={has.get('l2_cache_size')}", *vectors]),
        "bf16_in_hardware": has_hardware(torch.bfloat16),
    }


def figures_of(metrics: Path) -> dict[str, dict[str, float]]:
    """Loss and gradient norm of each step after the checkpoint."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    later = [record for record in records if "loss" in record and record["step"] > SAVED]
    return {str(record["step"]): {key: record[key] for key in ("loss", "grad_norm")} for record in later}


def unpack(name: str, folder: Path) -> list[str]:
    """The run of a fixture in ``folder`` as it was left after its checkpoint, with its data. The overrides of its
    settings that say where they are."""
    with tarfile.open(HERE / name / "run.tar.xz") as archive:
        archive.extractall(folder / "run", filter="data")
    prefix = write_tokens(folder / "tokens")
    return [f"run_dir={folder / 'run'}", f"data.train=[{{prefix: {prefix}}}]"]


def train(checkout: Path, folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "qwen_moe", "train", *arguments]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(checkout)}, cwd=folder, check=True)


def note(name: str, by: str, steps: dict[str, dict[str, float]]) -> None:
    file = HERE / name / "figures.json"
    known = json.loads(file.read_text())["by"] if file.exists() else {}
    file.write_text(json.dumps({"machine": machine(), "by": known | {by: steps}}, indent=1) + "\n")


def write(checkout: Path, name: str) -> None:
    """Make the fixture ``name``; ``checkout`` is of the commit that it is named for."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        run = folder / "run"
        write_tokens(folder / "tokens")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(name, folder)))
        train(checkout, folder, "recipe.yaml")
        target = HERE / name
        target.mkdir(exist_ok=True)
        (target / "figures.json").unlink(missing_ok=True)
        (target / "settings.yaml").write_text((run / "config.yaml").read_text().replace(str(folder), "."))
        note(name, name.partition("-")[0], figures_of(run / "metrics.jsonl"))
        with tarfile.open(target / "run.tar.xz", "w:xz") as archive:
            for part in ("metrics.jsonl", f"checkpoints/step_{SAVED:08d}"):
                archive.add(run / part, part)


def go_on(checkout: Path, name: str, commit: str) -> None:
    """Note what the code in ``checkout``, which is of ``commit``, gives when it goes on with the fixture ``name``."""
    with tempfile.TemporaryDirectory() as made:
        places = unpack(name, Path(made))
        train(checkout, Path(made), str(HERE / name / "settings.yaml"), *places)
        note(name, commit, figures_of(Path(made) / "run" / "metrics.jsonl"))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        write(Path(sys.argv[1]).resolve(), sys.argv[2])
    else:
        go_on(Path(sys.argv[1]).resolve(), *sys.argv[2:])
