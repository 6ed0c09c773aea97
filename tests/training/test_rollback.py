"""Steps that must not be taken: found, gone back from, their batches left out, counted; and the same after a resume."""

import json
import random
import shutil
from pathlib import Path
from statistics import median

import pytest

from qwen_moe.cli import main
from qwen_moe.runs.records import read_lines
from qwen_moe.training.rollback import LEAST, History
from tests.training.commands import run_to_end
from tests.training.test_run import write_recipe

STEPS = 40


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of few words, and one document of signs that come nowhere else."""
    folder = tmp_path_factory.mktemp("poisoned")
    rng = random.Random(0)
    words = ["router", "expert", "token", "gradient"]
    documents = [" ".join(rng.choices(words, k=220)) for _ in range(32)]
    documents.insert(16, "".join(rng.choices("QXZJKVWY#@%&0123456789", k=160)))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    arguments = ["--input", str(folder / "text.jsonl"), "--output", str(folder / "tokens")]
    assert main(["data", "prepare", *arguments, "--train-tokenizer", "--vocab-size", "300", "--workers", "1"]) == 0
    return folder


def recipe(folder: Path, corpus: Path) -> Path:
    folder.mkdir(exist_ok=True)
    changes = {"training__train_tokens": STEPS * 8 * 32, "training__validation_interval": 0, "data__split": "100,0,0"}
    return write_recipe(folder, corpus, **changes, checkpoint__interval=5)


@pytest.fixture(scope="module")
def before(poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run that takes every step."""
    folder = tmp_path_factory.mktemp("plain")
    assert run_to_end(recipe(folder, poisoned)).returncode == 0
    return [record["loss"] for record in read_lines(folder / "run" / "metrics.jsonl")]


def limit_below_the_worst(before: list[float]) -> tuple[int, str]:
    """The step of the poison, and a limit that it alone exceeds."""
    worst = max(range(LEAST, STEPS), key=lambda step: before[step])
    rest = sorted(before[LEAST:worst] + before[worst + 1 :])
    assert before[worst] > rest[-1] + 0.2, "the poison is seen in the losses"
    return worst, f"training.spike_nats={before[worst] - median(before[:worst]) - 0.2:.3f}"


@pytest.mark.slow
def test_a_spike_is_left_out_and_a_resume_agrees(poisoned: Path, before: list[float], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    worst, limit = limit_below_the_worst(before)
    outcome = run_to_end(recipe(whole, poisoned), limit)
    assert outcome.returncode == 0, outcome.stderr
    records = read_lines(whole / "run" / "metrics.jsonl")
    (event,) = [record for record in records if "skipped_batches" in record]
    assert event["step"] == worst // 5 * 5 and event["skipped_batches"] == worst % 5 + 1
    assert "is a spike" in event["reason"] and "Back to step" in outcome.stderr
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == STEPS and losses[: event["step"]] == before[: event["step"]]
    assert max(losses[LEAST:]) < before[worst] - 0.1
    # The batch after the skipped ones comes next: at the same weights its loss is that of the run that took it then.
    assert losses[event["step"]] != before[event["step"]]

    # Gone on with from the first checkpoint after the spike: the skip and the losses that it is judged by are remembered.
    path = recipe(parts, poisoned)
    assert run_to_end(path, limit, "checkpoint.keep=20").returncode == 0
    resumed_at = event["step"] + 5
    for folder in (parts / "run" / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > resumed_at:
            shutil.rmtree(folder)
    again = run_to_end(path, limit, "checkpoint.keep=20")
    assert again.returncode == 0 and f"step {resumed_at} of {STEPS}" in again.stderr
    assert [r["loss"] for r in read_lines(parts / "run" / "metrics.jsonl") if "loss" in r] == losses


def test_it_is_tried_only_so_often(poisoned: Path, before: list[float], tmp_path: Path) -> None:
    _, limit = limit_below_the_worst(before)
    outcome = run_to_end(recipe(tmp_path / "x", poisoned), limit, "training.max_skips=0")
    assert outcome.returncode == 2, outcome.stderr
    assert "Batches were already skipped 0 times; training.max_skips allows no more" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_which_batches_are_taken() -> None:
    history = History()
    assert [history.data_step(step, 10) for step in (0, 9)] == [0, 9]
    assert history.skip(4, 6) == 3  # batches 4, 5, 6 are not taken again
    assert [history.data_step(step, 10) for step in range(3, 10)] == [3, 7, 8, 9, 0, 1, 2]
    assert history.skip(5, 5) == 1
    assert [history.data_step(step, 10) for step in (4, 5)] == [7, 9]
    # A stage that begins at step 5 numbers its own batches: what was skipped in the stage before is not skipped again.
    assert [history.data_step(step, 10, first=5) for step in (5, 6)] == [1, 2]
    assert [history.data_step(step, 10, first=6) for step in (6, 7)] == [0, 1]
    assert history.highest_loss(0.5) == float("inf")
    history.losses.extend([2.0] * LEAST)
    assert history.highest_loss(0.5) == 2.5 and history.highest_loss(0.0) == float("inf")
