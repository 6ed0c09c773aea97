"""Whole runs that fine-tune and that learn from pairs, through the command line, in two processes."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_moe.cli import main
from qwen_moe.data.examples import PackedExamples
from qwen_moe.data.rows import ExampleSet, Order
from qwen_moe.data.tasks import tasks
from qwen_moe.runs.records import read_lines
from tests.posttraining.walks import MODEL
from tests.training.commands import run_to_end


def recipe(folder: Path, name: str, kind: str, **sections: Any) -> Path:
    values: dict[str, Any] = {
        "run_dir": str(folder / name),
        "objective": kind,
        "model": MODEL,
        "data": {"sequence_length": 128},
        "training": {"epochs": 2, "micro_batch_size": 1, "global_batch_size": 4, "validation_interval": 0},
        "optimizer": {"learning_rate": 1e-3},
        "precision": {"compute": "fp32", "compile": "never"},
        "checkpoint": {"interval": 2},
        "launch": {"nproc": 2},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes if isinstance(changes, dict) else changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def trained(path: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train to the end. Returns the records of steps."""
    result = run_to_end(path, *overrides)
    assert result.returncode == 0, result.stderr
    folder = Path(yaml.safe_load(path.read_text())["run_dir"])
    return [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fine-tuned run, `sft`, whose tokenizer was trained with its data."""
    folder = tmp_path_factory.mktemp("post")
    prepare = {"input": ["tasks:addition:150"], "output": str(folder / "sft-data"), "train_tokenizer": True}
    path = recipe(folder, "sft", "sft", data={"sequence_length": 128, "prepare": prepare | {"vocab_size": 288}})
    trained(path)
    return folder


@pytest.fixture(scope="module")
def pairs(tuned: Path) -> Path:
    """Prepared pairs: the right sum against a wrong one."""
    rng = random.Random(1)
    rows = [
        {"prompt": row["prompt"], "chosen": row["answer"], "rejected": str(int(row["answer"]) + rng.choice([-1, 1]))}
        for row in tasks("tasks:addition:60")
    ]
    (tuned / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--input", str(tuned / "pairs.jsonl"), "--output", str(tuned / "pairs")]
    assert main(["data", "chat", *arguments, "--tokenizer", str(tuned / "sft" / "hf")]) == 0
    return tuned / "pairs"


def dpo(folder: Path, pairs: Path, name: str, **sections: Any) -> Path:
    data = {"train": [{"prefix": str(pairs)}], "validation": [{"prefix": str(pairs)}]}
    training = {"epochs": 1, "validation_interval": 3}
    start = {"load_from": str(folder / "sft" / "hf"), "interval": 2}
    return recipe(folder, name, "dpo", **{"data": data, "training": training, "checkpoint": start} | sections)


@pytest.mark.slow
def test_epochs_are_whole_and_what_is_learned_is_what_was_prepared(tuned: Path) -> None:
    order = Order(length=128, seed=1234, epochs=2, rows_per_step=4)
    examples = PackedExamples([ExampleSet(prefix=tuned / "sft-data")], order, vocab_size=288, cache=tuned / "cache")
    records = [line for line in read_lines(tuned / "sft" / "metrics.jsonl") if "loss" in line]
    assert len(records) == len(examples.rows) // 4
    settings = yaml.safe_load((tuned / "sft" / "config.yaml").read_text())
    assert settings["training"]["train_tokens"] == len(examples.rows) * 128
    assert records[-1]["loss"] < records[0]["loss"]
    again = run_to_end(tuned / "sft.yaml")
    assert again.returncode == 0, again.stderr
    assert "resumed" in again.stderr


@pytest.mark.slow
def test_a_third_epoch_goes_on_from_the_second(tuned: Path, tmp_path: Path) -> None:
    """With a constant rate the steps that are done are those of the longer run too."""
    data = {"train": [{"prefix": str(tuned / "sft-data")}], "tokenizer": str(tuned / "sft-data-tokenizer")}
    path = recipe(tmp_path, "more", "sft", data=data, schedule={"kind": "constant"})
    two = trained(path)
    three = trained(path, "training.epochs=3")
    straight = trained(
        recipe(tmp_path, "straight", "sft", data=data, schedule={"kind": "constant"}), "training.epochs=3"
    )
    assert len(three) == len(straight) == 3 * len(two) // 2
    assert [line["loss"] for line in three] == [line["loss"] for line in straight]


def test_dpo_begins_at_ln_2_and_learns_the_pairs(tuned: Path, pairs: Path) -> None:
    records = trained(dpo(tuned, pairs, "dpo"))
    first, last = records[0], records[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-15)
    assert first["margin"] == first["reward_chosen"] == first["reward_rejected"] == 0.0
    assert last["loss"] < math.log(2) and last["margin"] > 0
    evaluated = [line for line in read_lines(tuned / "dpo" / "metrics.jsonl") if "validation_loss" in line]
    assert evaluated and evaluated[-1]["validation_loss"] < math.log(2)


@pytest.mark.slow
def test_a_reference_that_is_gone_is_that_of_the_first_weights_again(tuned: Path, pairs: Path) -> None:
    expected = trained(dpo(tuned, pairs, "whole"))
    path = dpo(tuned, pairs, "stopped")
    assert run_to_end(path, "training.epochs=1").returncode == 0
    folder = tuned / "stopped"
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    (folder / "reference" / "0.bin").write_bytes(b"damaged")
    result = run_to_end(path)
    assert result.returncode == 0 and "computed again" in result.stderr, result.stderr
    losses = [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    assert losses == [line["loss"] for line in expected]
    (folder / "reference" / "0.bin").write_bytes(b"damaged")
    shutil.rmtree(sorted((folder / "checkpoints").iterdir())[-1])
    other = run_to_end(path, f"checkpoint.load_from={tuned / 'whole'}")
    assert other.returncode != 0 and "is not the model that" in other.stderr


@pytest.mark.slow
def test_a_reward_model_begins_from_a_language_model_and_scores_pairs(
    tuned: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blend = [{"prefix": str(pairs)}]
    data = {"train": blend, "validation": blend, "tokenizer": str(tuned / "sft" / "hf")}
    changes = {"objective": "reward_model", "optimizer": {"learning_rate": 5e-3}, "data": data}
    path = dpo(tuned, pairs, "reward", **changes)
    records = trained(path, "training.epochs=6")
    first, last = records[0], records[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=0.1) and last["loss"] < first["loss"]
    evaluated = [line for line in read_lines(tuned / "reward" / "metrics.jsonl") if "validation_loss" in line]
    assert evaluated and evaluated[-1]["validation_loss"] < evaluated[0]["validation_loss"]
    result = run_to_end(path, "training.epochs=6")
    assert result.returncode == 0 and "resumed" in result.stderr, result.stderr
    config = json.loads((tuned / "reward" / "hf" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2MoeForSequenceClassification"]
    assert config["id2label"] == {"0": "preference"}
    scored = tuned / "scores.jsonl"
    arguments = ["--checkpoint", str(tuned / "reward"), "--input", str(tuned / "pairs.jsonl"), "--output", str(scored)]
    capsys.readouterr()
    assert main(["score", *arguments, "--json"]) == 0
    agreement = json.loads(capsys.readouterr().out)["agreement"]["preference"]
    assert agreement["judged"] == 60
    # What it says of the pairs is what training measured on them.
    differences = [row["score"]["chosen"] - row["score"]["rejected"] for row in map(json.loads, scored.open())]
    loss = sum(math.log1p(math.exp(-z)) for z in differences) / 60
    assert loss == pytest.approx(evaluated[-1]["validation_loss"], abs=1e-5)
    assert "scores texts by preference and writes none" in _refused("generate", tuned / "reward", capsys)
    other = ["objective={kind: reward_model, reward: {criteria: [kind]}}", f"run_dir={tuned / 'kind'}"]
    assert "no pair was judged by kind: objective.reward.criteria can name preference" in refusal(path, *other)


def _refused(verb: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([verb, "--checkpoint", str(checkpoint), "--prompt", "1"]) == 2
    return capsys.readouterr().err


def refusal(path: Path, *overrides: str) -> str:
    result = run_to_end(path, *overrides)
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    return result.stderr


def test_another_tokenizer_than_that_of_the_weights_is_named(tuned: Path, tmp_path: Path) -> None:
    """Ids of one tokenizer were learned as those of another without a word. It needs no <|endoftext|> for conversations."""
    other = tmp_path / "other"
    shutil.copytree(tuned / "sft" / "hf", other)
    (other / "generation_config.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_text((other / name).read_text().replace("<|endoftext|>", "</s>"))
    prepare = {"input": ["tasks:addition:20"], "output": str(tmp_path / "data")}
    path = recipe(
        tmp_path,
        "other_run",
        "sft",
        data={"sequence_length": 128, "prepare": prepare, "tokenizer": str(other)},
        training={"epochs": 1},
        checkpoint={"load_from": str(tuned / "sft" / "hf")},
        launch={"nproc": 1},
    )
    result = run_to_end(path)
    assert result.returncode == 0, result.stderr
    assert "warning: 1 of 288 token ids mean other text" in result.stderr and str(other) in result.stderr
    same = run_to_end(
        path,
        f"data.tokenizer={tuned / 'sft' / 'hf'}",
        f"run_dir={tmp_path / 'same'}",
        f"data.prepare.output={tmp_path / 'same-data'}",
    )
    assert same.returncode == 0 and "mean other text" not in same.stderr


def test_data_and_settings_that_do_not_fit_the_objective_are_refused(tuned: Path, pairs: Path) -> None:
    path = dpo(tuned, pairs, "refused")
    talks = f"data.train=[{{prefix: {tuned / 'sft-data'}}}]"
    assert "holds conversations, and objective.kind dpo reads pairs of answers" in refusal(path, talks)
    assert "give checkpoint.load_from" in refusal(path, "checkpoint.load_from=null")
    assert "holds pairs of answers, and objective.kind sft reads conversations" in refusal(path, "objective=sft")
    assert "data.split is for text" in refusal(path, "data.split='90,10,0'")
    assert "longer than data.sequence_length 16" in refusal(path, "data.sequence_length=16")
    assert "of this data take" in refusal(path, "training.train_tokens=4096")
    assert "training.epochs is for conversations and pairs" in refusal(path, "objective=likelihood")
    bases = "stages=[{name: a, tokens: 4096}, {name: b, tokens: 4096, model: {rope_theta: 2.0e+6}}]"
    assert "compares with the model that the run begins from, which has one" in refusal(
        path, bases, "training.epochs=0"
    )
