"""Who runs a demonstration before the one that it builds on is told which to run first."""

from pathlib import Path

import pytest

from qwen_moe.checkpoint.resolve import check_exists, resolve_checkpoint
from qwen_moe.config.load import RECIPES
from qwen_moe.config.writers import writer
from qwen_moe.data.tokenizer import load_tokenizer
from qwen_moe.errors import UserError
from qwen_moe.runs.report import summarize

SFT = "`qwen-moe train recipes/sft_demo.yaml` writes it: run that first"


@pytest.mark.parametrize("name", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_every_recipe_writes_its_folder(name: str) -> None:
    verb = {"curate_demo": "data curate", "post_training_demo": "post-train"}.get(name, "train")
    assert (
        writer(Path("runs", name, "checkpoints"))
        == f". `qwen-moe {verb} recipes/{name}.yaml` writes it: run that first"
    )
    assert writer(Path("runs", f"{name}2")) == writer(Path("runs")) == writer(Path("elsewhere", name)) == ""


def test_what_reads_a_demonstration_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for read, path in (
        (load_tokenizer, "runs/sft_demo/hf"),
        (check_exists, "runs/sft_demo"),
        (resolve_checkpoint, "runs/sft_demo"),
        (summarize, "runs/sft_demo"),
    ):
        with pytest.raises(UserError, match="does not exist") as error:
            read(Path(path))
        assert SFT in str(error.value)
        with pytest.raises(UserError, match="does not exist") as error:
            read(Path("runs/mine"))
        assert "run that first" not in str(error.value)
