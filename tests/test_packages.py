"""A trainer without the packages of the extras: what works, and what the rest says."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qwen_moe.cli import main
from qwen_moe.config import find_recipe, load_config
from qwen_moe.packages import EXTRAS
from tests.runs.test_report import record, write_run

ROOT = Path(__file__).parents[1]
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({list(EXTRAS)}))\n"


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)


def test_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package, extra in EXTRAS.items():
        assert any(item.replace("-", "_").startswith(package) for item in project["optional-dependencies"][extra])
        assert not any(item.replace("-", "_").startswith(package) for item in project["dependencies"])


def test_training_imports_none_of_them() -> None:
    script = WITHOUT + (
        "import qwen_moe.training.loop, qwen_moe.runs.finish, qwen_moe.data.batches, qwen_moe.generation.session\n"
        "import qwen_moe.checkpoint.huggingface, qwen_moe.launch.rank, qwen_moe.verify.ranks, qwen_moe.data.prepare\n"
        "from qwen_moe.cli import main\n"
        "assert main(['info', 'demo']) == 0\n"
        "assert main(['info', '--schedule', 'zbv', '--pp', '2', '--micro-batches', '4']) == 0"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "no picture: matplotlib is not installed: pip install 'qwen-moe[plot]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scaling", "fit", "runs.csv", "--output", "fit"], "qwen-moe scaling fit: scipy and pandas are not installed: "
         "pip install 'qwen-moe[scaling]'"),
        (["scaling", "report", "fit"], "pip install 'qwen-moe[plot,scaling]'"),
        (["pipeline", "demo"], "pip install 'qwen-moe[plot,scaling]'"),
        (["data", "curate", "curate_demo"], "datatrove is not installed: pip install 'qwen-moe[curate]'"),
        (["info", "--schedule", "zbv", "--pp", "2", "--micro-batches", "4", "--output", "x.png"], "'qwen-moe[plot]'"),
        (["train", "demo", "logging.tensorboard=true"], "logging.tensorboard: tensorboard is not installed: pip install "
         "'qwen-moe[tensorboard]', or set it to auto or false"),
        (["train", "demo", "logging.wandb={project: p}"], "logging.wandb: wandb is not installed"),
        (["evaluate", "tasks", "--tasks", "arc_easy"], "lm_eval is not installed: pip install 'qwen-moe[eval]'"),
        (["data", "prepare", "--input", "a.txt.zst", "--output", "x", "--train-tokenizer", "--vocab-size", "300"],
         "a.txt.zst is packed with zstandard: zstandard is not installed: pip install 'qwen-moe[data]'"),
    ],
)  # fmt: skip
def test_one_message_before_any_work(
    arguments: list[str], message: str, missing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt.zst"]


def test_a_report_without_pictures(missing: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, [record(1)])
    assert main(["report", str(tmp_path), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["pictures"] == [] and said.err.count("\n") == 1 and "qwen-moe[plot]" in said.err


def test_recipes_come_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = load_config(ROOT / "recipes/demo.yaml")
    assert load_config(Path("demo")) == ours and capsys.readouterr().err == ""
    assert load_config(Path("recipes/demo.yaml")) == ours and "comes with qwen-moe" in capsys.readouterr().err
    (tmp_path / "demo").write_text("mine")
    assert find_recipe(Path("demo")) == Path("demo") and find_recipe(Path("other/demo.yaml")) == Path("other/demo.yaml")
