"""DPO in stages of growing length: each stage compares with the model that the run began from, not with the stage before."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_moe.checkpoint.huggingface.convert import from_pretrained, save_pretrained
from qwen_moe.cli import main
from qwen_moe.config import RunConfig
from qwen_moe.data.chat_tokenizer import trained_chat_tokenizer
from qwen_moe.data.rows import OpenSet
from qwen_moe.data.tasks import tasks
from qwen_moe.data.tokenizer import read_tokenizer
from qwen_moe.runs.records import read_lines
from tests.models.hf_reference import draw_weights
from tests.small import small_model
from tests.training.staged_runs import settings, train

SHORT, LONG = 96, 128
# Two steps of 4 x 96 tokens, then two of 2 x 128.
STAGES: list[dict[str, Any]] = [
    {"name": "short", "tokens": 768},
    {"name": "long", "tokens": 512, "data": {"sequence_length": LONG}, "training": {"global_batch_size": 2}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a model `hf` and `short` and `long` pairs: the right sum against a wrong one."""
    folder = tmp_path_factory.mktemp("dpo")
    tokenizer = trained_chat_tokenizer(("tasks:addition:150",), 288, folder / "data")
    model = draw_weights(small_model(vocab_size=288, max_position_embeddings=LONG), 4, torch.float64)
    save_pretrained(model, folder / "hf", tokenizer=read_tokenizer(tokenizer))
    rng = random.Random(1)
    for name, count, again in (("short", 24, 1), ("long", 10, 2)):
        rows = [
            {
                "prompt": " ".join([row["prompt"]] * again),
                "chosen": row["answer"],
                "rejected": str(int(row["answer"]) + rng.choice([-1, 1])),
            }
            for row in tasks(f"tasks:addition:{count}")
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = ["--input", str(folder / f"{name}.jsonl"), "--output", str(folder / name)]
        assert main(["data", "chat", *arguments, "--tokenizer", str(tokenizer)]) == 0
    return folder


def dpo(folder: Path, run_dir: Path) -> RunConfig:
    stages = [STAGES[0], STAGES[1] | {"data": {"sequence_length": LONG, "train": [{"prefix": str(folder / "long")}]}}]
    data = {
        "train": [{"prefix": str(folder / "short")}],
        "validation": [{"prefix": str(folder / "short")}],
        "tokenizer": str(folder / "data-tokenizer"),
        "sequence_length": SHORT,
    }
    return settings(
        run_dir,
        folder,
        objective={"kind": "dpo"},
        model=small_model(vocab_size=288, max_position_embeddings=LONG).model_dump(mode="json"),
        data=data,
        stages=stages,
        training={"micro_batch_size": 1, "global_batch_size": 4, "validation_interval": 2},
        schedule={},
        checkpoint={"load_from": str(folder / "hf"), "interval": 1, "keep": 1, "export_hf": False},
    )


def records(run_dir: Path) -> list[dict[str, Any]]:
    names = (
        "step",
        "stage",
        "loss",
        "grad_norm",
        "margin",
        "validation_loss",
        "validation_loss_96",
        "validation_loss_128",
    )
    return [{name: line[name] for name in names if name in line} for line in read_lines(run_dir / "metrics.jsonl")]


def plain(folder: Path, prefix: Path) -> np.ndarray:
    """What the model of the begin gives to each learned label, document by document."""
    model, opened = from_pretrained(folder / "hf", torch.float64), OpenSet(prefix, LONG, "error")
    found = np.zeros(len(opened.tokens))
    for document in range(len(opened.lengths)):
        at = opened.at(document)
        tokens = torch.from_numpy(opened.tokens[at].astype(np.int64))
        with torch.no_grad():
            log_probs = model(tokens[None])[0].log_softmax(-1)
        labels = log_probs[:-1].gather(1, tokens[1:, None])[:, 0].numpy()
        found[at][:-1] = np.where(opened.learn[at][1:] > 0, labels, 0.0)
    return found


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    train(dpo(folder, folder / "whole"))
    return folder / "whole"


def test_every_stage_compares_with_the_model_of_the_begin(folder: Path, whole: Path) -> None:
    for kept, name in (("reference", "short"), ("reference_2", "long")):
        expected = plain(folder, folder / name)
        assert np.count_nonzero(expected) > 20
        np.testing.assert_allclose(np.fromfile(whole / kept / "0.bin"), expected, rtol=0, atol=1e-10)
    # Validation reads the short pairs at both lengths.
    np.testing.assert_allclose(
        np.fromfile(whole / "reference_2" / "1.bin"), plain(folder, folder / "short"), rtol=0, atol=1e-10
    )
    found = records(whole)
    steps = [one for one in found if "loss" in one]
    assert [one["stage"] for one in steps] == ["short", "short", "long", "long"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-12) and steps[0]["margin"] == pytest.approx(
        0, abs=1e-12
    )
    assert abs(steps[2]["margin"]) > 1e-3  # it has moved in the stage before
    validated = [one for one in found if "validation_loss" in one]
    assert {"validation_loss_96", "validation_loss_128"} <= set(validated[-1])
    # The same pairs, packed into rows of another length.
    assert validated[-1]["validation_loss_96"] == pytest.approx(validated[-1]["validation_loss_128"], abs=1e-10)


@pytest.mark.parametrize("gone", ["", "reference", "reference_2"])
def test_a_stage_that_dies_goes_on_to_the_same_bits(gone: str, folder: Path, whole: Path, tmp_path: Path) -> None:
    config = dpo(folder, tmp_path / "run")
    train(config, dies="step 3")
    if gone:
        shutil.rmtree(tmp_path / "run" / gone)
    said = train(config)
    assert ("computed again" in said) == bool(gone)
    assert records(tmp_path / "run") == records(whole)
