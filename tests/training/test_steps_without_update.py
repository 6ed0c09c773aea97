"""A step that has nothing to learn from changes nothing, and AdamW does not count it: not in a run that goes on, nor in one
that is resumed, whose moments are corrected by the number of updates."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_moe.cli import main
from qwen_moe.config import RunConfig
from qwen_moe.data.chat_tokenizer import trained_chat_tokenizer
from qwen_moe.data.tasks import tasks
from tests.distributed import run_distributed
from tests.small import model_values
from tests.training.staged_runs import figures, go, last, settings

LENGTH, STEPS, UNJUDGED = 96, 5, (0, 2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tokenizer = trained_chat_tokenizer(("tasks:addition:150",), 288, folder / "data")
    rows = [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": "0"} for row in tasks("tasks:addition:12")]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--input", str(folder / "pairs.jsonl"), "--output", str(folder / "pairs")]
    assert main(["data", "chat", *arguments, "--tokenizer", str(tokenizer)]) == 0
    return folder / "pairs"


def reward_model(pairs: Path, run_dir: Path) -> RunConfig:
    data = {"train": [{"prefix": str(pairs)}], "sequence_length": LENGTH}
    return settings(
        run_dir,
        pairs,
        objective={"kind": "reward_model"},
        model=model_values(vocab_size=288, initializer_range=0.2),
        data=data | {"tokenizer": str(pairs.with_name("data-tokenizer"))},
        stages=[],
        schedule={"kind": "constant"},
        training={
            "micro_batch_size": 1,
            "global_batch_size": 2,
            "train_tokens": STEPS * 2 * LENGTH,
            "validation_interval": 0,
        },
        checkpoint={"interval": 1, "export_hf": False},
    )


def train(config: RunConfig, dies: str = "") -> tuple[int, str]:
    """`go`, with no judged pair in the steps UNJUDGED."""
    from qwen_moe.data.inputs import RunInputs

    read = RunInputs.train_micro_batches

    def some_unjudged(self: RunInputs, step: int) -> Any:
        batches = read(self, step)
        if step in UNJUDGED:
            for batch in batches:
                batch["preferences"].zero_()
        return batches

    RunInputs.train_micro_batches = some_unjudged  # type: ignore[method-assign]
    return go(config, dies)


def test_a_run_that_is_resumed_after_them_has_the_same_bits(pairs: Path, tmp_path: Path) -> None:
    """It dies after as many updates as it had steps without one, and has saved before its first update."""
    ((code, said),) = run_distributed(train, 1, reward_model(pairs, tmp_path / "whole"))
    assert code == 0, said
    resumed = reward_model(pairs, tmp_path / "resumed")
    ((died, _),) = run_distributed(train, 1, resumed, f"step {STEPS - 1}")
    ((code, said),) = run_distributed(train, 1, resumed)
    assert (died, code) == (-9, 0) and f"(step {STEPS - 1} of {STEPS})" in said, said
    assert figures(tmp_path / "resumed") == figures(tmp_path / "whole")
    assert [line[2] == 0.0 for line in figures(tmp_path / "whole")] == [step in UNJUDGED for step in range(STEPS)]
    expected, found = (last(tmp_path / name, STEPS) for name in ("whole", "resumed"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
