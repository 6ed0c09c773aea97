"""`qwen-moe info`: presets, recipes, saved models, and what it says of an unknown name."""

import json
from pathlib import Path

import pytest

from qwen_moe.cli import main
from qwen_moe.info import resolve_model

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


def test_a_recipe_is_described_as_it_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With its own sequence length and dtypes, unless others are given."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(DEMO.read_text().replace("compute: bf16", "compute: fp32"))

    def facts(*options: str) -> tuple[int, str, float]:
        assert main(["info", str(recipe), "--json", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["sequence_length"], found["training_bytes"]["compute"], found["training_flops_per_token"]

    length, compute, own = facts()
    assert (length, compute) == (256, "fp32")
    length, compute, other = facts("--seq-len", "4096", "--compute", "bf16")
    assert (length, compute) == (4096, "bf16") and other > own


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


@pytest.mark.parametrize(
    ("name", "preset", "positions", "eps"),
    [
        ("Qwen3-30B-A3B", "qwen3-30b-a3b", 40960, 1e-6),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b", 40960, 1e-6),
        (" qwen/QWEN3-30b-a3b ", "qwen3-30b-a3b", 40960, 1e-6),
        ("https://huggingface.co/Qwen/Qwen3-30B-A3B/", "qwen3-30b-a3b", 40960, 1e-6),
        ("Qwen3-30B-A3B-Base", "qwen3-30b-a3b", 32768, 1e-6),
        ("Qwen/Qwen2.5-72B-Instruct", "qwen2.5-72b", 32768, 1e-6),
        ("Qwen2.5-72B", "qwen2.5-72b", 131072, 1e-5),
        ("Turbo_Style", "turbo_style", 32768, 1e-6),
    ],
)
def test_names_as_people_paste_them(name: str, preset: str, positions: int, eps: float) -> None:
    """The same parameters; what the published config.json of a variant says otherwise is the variant's."""
    from qwen_moe.config import parse_model

    config = parse_model({"preset": name}, "recipe")
    assert resolve_model(name) == config
    base = parse_model({"preset": preset}, "recipe")
    assert config.max_position_embeddings == positions and config.rms_norm_eps == eps
    changed = {"max_position_embeddings": positions, "rms_norm_eps": eps}
    assert config == base.model_copy(update=changed)


def test_a_version_that_is_not_known_names_its_own_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "Qwen/Qwen3-30B-A3B-Instruct-2507"]) == 2
    assert "did you mean 'qwen3-30b-a3b'?" in capsys.readouterr().err


def test_a_directory_goes_before_a_preset_of_another_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen3-30B-A3B").mkdir()
    (tmp_path / "Qwen3-30B-A3B" / "config.json").write_text('{"a": 1, "a": 2}')
    assert main(["info", "Qwen3-30B-A3B"]) == 2
    assert "config.json is not valid JSON: 'a' is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_not_this_folder(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", name]) == 2
    assert "names no model" in capsys.readouterr().err


def test_a_recipe_of_stages(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(DEMO.with_name("long_context_demo.yaml"))
    assert main(["info", recipe, "--json"]) == 0
    short, long = json.loads(capsys.readouterr().out)["stages"]
    assert (short["name"], short["steps"], short["tokens"], short["rope_theta"]) == ("short", 600, 1_228_800, 1e4)
    assert (long["steps"], long["sequence_length"], long["long_share"]) == (120, 2048, 0.6)
    assert long["training_flops_per_token"] > short["training_flops_per_token"]
    assert short["share_of_flops"] + long["share_of_flops"] == pytest.approx(1)
    assert main(["info", recipe]) == 0
    assert "stage             long: 120 steps, 491,520 tokens in sequences of 2,048" in capsys.readouterr().out
