"""From a recipe and a machine to a number of processes."""

import pytest

from qwen_moe.config import parse_config
from qwen_moe.errors import UserError
from qwen_moe.sharding.layout import processes


def test_a_run_starts_no_more_processes_than_gpus() -> None:
    values = {
        "run_dir": "unused",
        "model": {"preset": "demo"},
        "data": {"train": [{"prefix": "unused"}], "sequence_length": 16},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"train_tokens": 1024, "micro_batch_size": 1, "global_batch_size": 8},
        "launch": {"nproc": 4},
    }
    alone, split = parse_config(values, "t"), parse_config(values | {"parallel": {"tp": 2}}, "t")
    assert [processes(alone, gpus) for gpus in (0, 1, 2, 8)] == [4, 1, 2, 4]
    assert [processes(split, gpus) for gpus in (0, 2, 3)] == [4, 2, 2]
    with pytest.raises(UserError, match="needs 2 processes, each with its own GPU, and this machine has 1"):
        processes(split, 1)
