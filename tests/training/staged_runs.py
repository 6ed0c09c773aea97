"""Tiny runs of two stages that tests share, the ways in which they die, and what is compared of them."""

import contextlib
import io
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_moe.config import RunConfig, parse_config
from qwen_moe.errors import UserError
from qwen_moe.runs.records import read_lines
from tests.distributed import run_distributed
from tests.small import VOCAB, changed, model_values

SHORT, LONG = 16, 32
# Four steps of 4 x 16 tokens, then four of 2 x 32.
STAGES: list[dict[str, Any]] = [
    {"name": "short", "tokens": 256},
    {
        "name": "long",
        "tokens": 256,
        "data": {"sequence_length": LONG, "long_share": 0.5},
        "model": {"rope_theta": 5e5},
        "training": {"micro_batch_size": 1, "global_batch_size": 2},
    },
]


def write_tokens(prefix: Path) -> Path:
    """Documents of 6 to 80 tokens in which a token depends on the one before."""
    from qwen_moe.data.megatron import IndexedDatasetBuilder

    rng = random.Random(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(80):
        document = [rng.randrange(VOCAB)]
        document += [(3 * document[-1] + rng.choice([1, 2])) % VOCAB for _ in range(rng.choice([5, 20, 60, 79]))]
        document = [(token * 3 + k) % VOCAB for k, token in enumerate(document)]
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def settings(run_dir: Path, tokens: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": model_values(rope_theta=1e4, max_position_embeddings=64, initializer_range=0.2),
        "data": {"train": [{"prefix": str(tokens)}], "sequence_length": SHORT, "split": "80,20,0"},
        "training": {
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "validation_interval": 3,
            "validation_sequences": 4,
        },
        "optimizer": {"learning_rate": 0.01, "eps": 1e-5},
        "schedule": {"warmup_tokens": 128, "min_learning_rate": 0.001},
        "balance": {"scope": "sequence", "coefficient": 0.1, "z_loss_coefficient": 0.01},
        "precision": {"compute": "fp64", "master": "fp64"},
        "checkpoint": {"interval": 3, "keep": 1, "export_hf": False},
        "logging": {"tensorboard": False},
    }
    return parse_config(changed(values, {"stages": STAGES} | changes), "test")


def go(config: RunConfig, dies: str = "") -> tuple[int, str]:
    """Train as this rank, in a process that dies (without a word) at ``dies``: `step N`, `save N` or `saved N`. `bad N` does
    not die: that step is a bad one, the first time. `broken N`: the same, after the checkpoint of step 4 was damaged."""
    import os

    from parallel.process import process_info
    from qwen_moe.checkpoint import distributed
    from qwen_moe.training import loop
    from qwen_moe.training.step import BadStep, Trainer

    met: list[int] = []
    what, _, number = dies.partition(" ")
    step, save = Trainer.step, distributed.CheckpointWriter.save

    def dying_step(self: Any, done: int, *rest: Any) -> Any:
        if what == "step" and done == int(number):
            raise KeyboardInterrupt
        if what in ("bad", "broken") and done == int(number) and not met:
            met.append(done)
            if what == "broken":
                (config.run_dir / "checkpoints" / "step_00000004" / "train_state.json").write_text("{}")
            raise BadStep("a spike")
        return step(self, done, *rest)

    def dying_save(self: Any, model: Any, optimizer: Any, state: Any) -> None:
        if what == "save" and state.step == int(number):
            raise KeyboardInterrupt
        save(self, model, optimizer, state)
        if what == "saved" and state.step == int(number):
            raise KeyboardInterrupt

    Trainer.step, distributed.CheckpointWriter.save = dying_step, dying_save  # type: ignore[method-assign, assignment]
    loop.measure_matmul_peak = lambda dtype, device: 1e9  # type: ignore[assignment]
    os.environ.pop("WANDB_MODE", None)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = loop.train(config, process_info(), torch.device("cpu"))
        except KeyboardInterrupt:
            code = -9
        except UserError as error:
            return 2, str(error)
    return code, said.getvalue()


def train(config: RunConfig, processes: int = 1, dies: str = "") -> str:
    (code, said), *_ = run_distributed(go, processes, config, dies)
    assert code == (-9 if dies and dies.split()[0] not in ("bad", "broken") else 0), said
    return said


def refused(config: RunConfig) -> str:
    ((code, said),) = run_distributed(go, 1, config)
    assert code == 2, said
    return said


def figures(run_dir: Path) -> list[tuple[Any, ...]]:
    """Everything computed, exactly, in order."""
    computed = (
        "step",
        "tokens",
        "loss",
        "grad_norm",
        "learning_rate",
        "validation_loss",
        "validation_loss_16",
        "stage",
    )
    computed += ("validation_loss_32",)
    return [tuple(r.get(name) for name in computed) for r in read_lines(run_dir / "metrics.jsonl")]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp

    from qwen_moe.checkpoint.metadata import SafeReader, TensorsOnly

    reader = SafeReader(checkpoint)
    known = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in known.items()
        if hasattr(found, "size") and not name.startswith("rng")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.distributed is not initialized
        dcp.load(state, storage_reader=SafeReader(checkpoint), planner=TensorsOnly(), no_dist=True)
    return state


def last(run_dir: Path, step: int = 8) -> dict[str, torch.Tensor]:
    return weights(run_dir / "checkpoints" / f"step_{step:08d}")
