"""A wheel built from the tree, installed in another virtual environment, trains a recipe that comes with it."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ("training.train_tokens=4096", "data.prepare.vocab_size=300", "model.vocab_size=300", "model.num_hidden_layers=1",
        "schedule.warmup_tokens=0", "schedule.decay_tokens=2048", "launch.nproc=1", "checkpoint.export_hf=false",
        "sample_prompt=", "data.prepare.input=[text.txt]")  # fmt: skip


@pytest.mark.slow
def test_a_wheel_trains_outside_of_the_checkout(tmp_path: Path) -> None:
    tree, out, env = tmp_path / "tree", tmp_path / "out", tmp_path / "env"
    # From a copy: a build leaves files of its own, and finds those of an earlier one.
    tree.mkdir()
    for name in ("qwen_moe", "parallel", "scaling_laws", "launchers", "recipes"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip"]
    options = ["--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "wheel", *options, "--no-build-isolation", "-w", str(out), str(tree)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    python = env / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(env), "platbase": str(env)}))
    subprocess.run([*pip, "--python", str(python), "install", *options, str(next(out.glob("*.whl")))], check=True)
    # What this environment has, but for its link to the checkout: a .pth file in a folder named by one is not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = tmp_path / "work"
    work.mkdir()
    (work / "text.txt").write_text("router expert token gradient\n" * 4000)
    environment = {"PATH": f"{env / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [str(env / "bin" / "qwen-moe"), "train", "demo", *TINY],
        cwd=work, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((work / "runs/demo/checkpoints").glob("step_*2")) and (work / "runs/demo/loss.png").is_file()
    where = [str(python), "-c", "import qwen_moe.planning as p; print(p.__path__[0])"]
    found = Path(subprocess.run(where, cwd=work, env=environment, capture_output=True, text=True).stdout.strip())
    assert found.is_relative_to(site) and {file.suffix for file in (found / "gpus").iterdir()} == {".yaml"}
