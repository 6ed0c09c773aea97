"""Named validation sets: each has the loss of a run that validates on it alone, in every layout, in metrics and report."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_moe.cli import main
from qwen_moe.data.tokenizer import train_tokenizer
from qwen_moe.errors import UserError
from qwen_moe.runs.records import read_lines
from tests.small import exact_run, model_values
from tests.training.commands import run_to_end

LAYOUTS = {
    "tensor and expert": ("parallel.tp=2", "parallel.ep=2", "launch.nproc=2"),
    "pipeline and data": ("parallel.pp=2", "training.micro_batch_size=1", "launch.nproc=4"),
    "context": ("parallel.cp=2", "parallel.cp_kind=ring", "launch.nproc=2"),
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three prefixes with one tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    texts = {
        "code": "def f ( x ) : return x + 1",
        "prose": "the old man and the sea went home",
        "train": "x home + sea",
    }
    train_tokenizer([*texts.values()] * 3, 280, folder / "train-tokenizer")
    for name, text in texts.items():
        words = text.split()
        documents = [" ".join(words[(i * k) % len(words)] for k in range(120)) for i in range(1, 9)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
        prepare = ["--input", str(folder / f"{name}.jsonl"), "--output", str(folder / name), "--workers", "1"]
        assert main(["data", "prepare", *prepare, "--tokenizer", str(folder / "train-tokenizer")]) == 0
    return {name: folder / name for name in texts}


def blends(corpora: dict[str, Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Two sets of one prefix each, and a blend of both."""
    one = {name: [{"prefix": str(corpora[name])}] for name in ("code", "prose")}
    return one, [{"prefix": str(corpora[name]), "weight": weight} for name, weight in (("code", 2.0), ("prose", 1.0))]


@pytest.fixture(scope="module")
def in_one_process(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of a run in one process that validates on the blend, too, as a set."""
    one, both = blends(corpora)
    return train(tmp_path_factory.mktemp("one"), corpora, {"validation_sets": one | {"mix": both}})


def train(folder: Path, corpora: dict[str, Path], data: dict[str, Any], *options: str) -> list[dict[str, Any]]:
    """The records of validation. Prints what the command said."""
    recipe = {
        "run_dir": str(folder / "run"),
        "model": model_values(vocab_size=300, max_position_embeddings=64),
        "data": {
            "train": [{"prefix": str(corpora["train"])}],
            "tokenizer": str(corpora["train"].with_name("train-tokenizer")),
            "sequence_length": 32,
            "split": "1,0,0",
        }
        | data,
        "training": {
            "train_tokens": 4 * 4 * 32,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "validation_interval": 2,
            "validation_sequences": 11,
        },
        "optimizer": {"learning_rate": 0.01, "eps": 1e-5},
        "precision": {"compute": "fp64", "master": "fp64"},
        "checkpoint": {"export_hf": False},
    }
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    outcome = run_to_end(folder / "recipe.yaml", *(options or ("launch.nproc=1",)))
    assert outcome.returncode == 0, outcome.stderr
    print(outcome.stdout, outcome.stderr)
    return [record for record in read_lines(folder / "run" / "metrics.jsonl") if "loss" not in record]


def test_each_set_has_its_own_loss(corpora: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, both = blends(corpora)
    records = train(tmp_path / "sets", corpora, {"validation_sets": one | {"mix": both}})
    said = capfd.readouterr()
    assert [record["step"] for record in records] == [2, 4]
    assert all(set(r) >= {"validation_loss/code", "validation_loss/prose", "validation_loss/mix"} for r in records)
    assert "validation_loss" not in records[0]
    assert f"validation loss {records[-1]['validation_loss/code']:.4f} of code" in said.out + said.err
    alone = [record["validation_loss"] for record in train(tmp_path / "code", corpora, {"validation": one["code"]})]
    assert [record["validation_loss/code"] for record in records] == pytest.approx(alone, rel=1e-12)
    assert main(["report", str(tmp_path / "sets" / "run")]) == 0
    assert f"validation sets   {records[-1]['validation_loss/code']:.4f} of code" in capfd.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_losses_of_sets_are_those_of_one_process_in_every_layout(
    corpora: dict[str, Path], in_one_process: list[dict[str, Any]], tmp_path: Path, layout: tuple[str, ...]
) -> None:
    one, both = blends(corpora)
    records = train(tmp_path, corpora, {"validation_sets": one, "validation": both}, *layout)
    assert [record["step"] for record in records] == [2, 4]
    for record, expected in zip(records, in_one_process, strict=True):
        assert record["validation_loss"] == pytest.approx(expected["validation_loss/mix"], rel=1e-10)
        for name in ("validation_loss/code", "validation_loss/prose"):
            assert record[name] == pytest.approx(expected[name], rel=1e-10)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"a/b": [{"prefix": "x"}]}, "'a/b' is not a name"),
        ({"code": []}, "code is empty"),
        ({"code": [{"prefx": "x"}]}, "prefx"),
    ],
)
def test_sets_that_are_refused(sets: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        exact_run(model_values(), 32, data__validation_sets=sets)


def test_a_set_without_a_sequence_is_refused(corpora: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"error: data\.validation_sets\.code has less than one sequence"):
        train(
            tmp_path, corpora, {"validation_sets": {"code": [{"prefix": str(corpora["code"])}]}, "sequence_length": 8192},
            "model.max_position_embeddings=8192", "training.train_tokens=32768", "training.global_batch_size=2",
            "launch.nproc=1",
        )  # fmt: skip
