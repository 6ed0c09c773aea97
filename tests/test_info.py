"""`qwen-moe info`: presets, recipes, saved models, and what it says of an unknown name."""

import json
from pathlib import Path

import pytest

from qwen_moe.cli import main

DEMO = Path(__file__).parents[1] / "recipes" / "demo.yaml"


def test_a_preset_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "qwen3-30b-a3b", "--json", "--seq-len", "8192"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["total"] == 30_532_122_624
    forward = dict(facts["forward_flops_per_token"])
    assert forward.pop("total") == pytest.approx(sum(forward.values()))
    assert facts["training_flops_per_token"] == pytest.approx(3 * facts["forward_flops_per_token"]["total"])
    assert facts["training_bytes"]["optimizer"] == 8 * facts["parameters"]["total"]


def test_a_recipe_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(DEMO)]) == 0
    text = capsys.readouterr().out
    assert "4 of 16 experts" in text and "FLOPs per token" in text


def test_an_unknown_name_suggests_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "qwen2.5-7"]) == 2
    assert "did you mean 'qwen2.5-7b'" in capsys.readouterr().err


def test_a_folder_that_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_info_says_how_this_machine_multiplies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--machine", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["products"]) == {"float32", "bfloat16", "float16"}
    for name, entry in facts["products"].items():
        assert entry["flops_per_second"] > 1e8
        assert entry["in_hardware"] == ("rounded to" not in entry["how"])
        assert entry["how"].startswith(name)
    assert main(["info", "--machine"]) == 0
    text = capsys.readouterr().out
    assert "GFLOP/s  bfloat16 products" in text and f"{facts['cores']} cores" in text
