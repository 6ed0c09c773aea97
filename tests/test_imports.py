"""Who may import whom, by syntax tree, and what `qwen-moe --help` may wait for."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"qwen_moe", "parallel", "scaling_laws", "launchers"}
STDLIB = sys.stdlib_module_names


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def outside(path: Path, allowed: set[str]) -> list[str]:
    """Imports of ``path`` that are neither the standard library nor under one of ``allowed``."""
    return [
        name
        for name in imports(path)
        if name.split(".")[0] not in STDLIB and not any(name == a or name.startswith(a + ".") for a in allowed)
    ]


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("parallel", {"torch", "parallel", "transformer_engine"}),
        ("launchers", {"launchers"}),
        ("scaling_laws", {"numpy", "scipy", "pandas", "matplotlib", "tqdm", "scaling_laws"}),
        ("qwen_moe/models", {"torch", "qwen_moe.config", "qwen_moe.models", "parallel"}),
        ("qwen_moe/data", {"torch", "numpy", "tqdm", "tokenizers", "zstandard", "megatron", "qwen_moe.config",
                           "qwen_moe.errors", "qwen_moe.fields", "qwen_moe.options", "qwen_moe.packages", "qwen_moe.data"}),
    ],
)  # fmt: skip
def test_folders_import_only_what_they_may(folder: str, allowed: set[str]) -> None:
    for path in files(folder):
        assert outside(path, allowed) == [], path


def test_of_the_models_only_the_plan_knows_of_parallelism() -> None:
    """How this CPU multiplies (`parallel.gemm`) apart. And no other file of the model but the initial values names the plan,
    for its type."""
    for path in files("qwen_moe/models"):
        names = set(imports(path))
        if path.name != "plan.py":
            assert not {name for name in names if name.split(".")[0] == "parallel"} - {"parallel.gemm"}, path
            assert "qwen_moe.models.plan" not in names or path.name == "init.py", path


def test_the_checker_sees_a_forbidden_import(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from qwen_moe.training import loop\n")
    assert outside(path, {"torch", "qwen_moe.models"}) == ["qwen_moe.training"]


def test_help_does_not_wait_for_anything_heavy() -> None:
    script = (
        "import sys; from qwen_moe.cli import build_parser; build_parser().format_help(); "
        "print([m for m in ('torch', 'transformers', 'megatron', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert outcome.stdout.strip() == "[]"
