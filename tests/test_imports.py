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
        ("qwen_moe/models", {"torch", "qwen_moe.config", "qwen_moe.models", "parallel.gemm"}),
        ("qwen_moe/objectives", {"torch", "qwen_moe.config", "qwen_moe.models", "qwen_moe.objectives", "parallel"}),
        ("qwen_moe/data", {"torch", "numpy", "tqdm", "tokenizers", "zstandard", "megatron", "qwen_moe.config",
                           "qwen_moe.errors", "qwen_moe.fields", "qwen_moe.options", "qwen_moe.data", "parallel.mesh"}),
    ],
)  # fmt: skip
def test_folders_import_only_what_they_may(folder: str, allowed: set[str]) -> None:
    for path in files(folder):
        assert outside(path, allowed) == [], path


def test_models_know_nothing_of_ranks() -> None:
    """Of `parallel` they import how this CPU multiplies (`parallel.gemm`), and nothing else."""
    for path in files("qwen_moe/models"):
        assert not {name for name in imports(path) if name.split(".")[0] == "parallel"} - {"parallel.gemm"}, path


# The rooms of qwen_moe from the ground up. A file imports from its own room and from those below it.
FLOORS = (
    ("errors", "fields", "paths", "progress"),
    ("documents", "options"),
    ("presets", "model_config"),
    ("config",),
    ("models", "data"),
    ("objectives",),
    ("sharding",),
    ("checkpoint", "planning"),
    ("runs",),
    ("machine", "schedule_picture", "generate"),
    ("info",),
    ("training",),
    ("verify", "launch"),
    ("scaling",),
    ("cli",),
    ("pipeline",),
    ("__main__",),
)


def room(path: Path) -> str:
    inside = path.relative_to(ROOT / "qwen_moe")
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def climbs(room: str, names: set[str]) -> list[str]:
    """Those of the imports ``names`` of a file of ``room`` that are of a room beside it or above it."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    others = {name for name in names if name.startswith("qwen_moe.") and name.split(".")[1] != room}
    return [name for name in sorted(others) if floor[name.split(".")[1]] >= floor[room]]


def test_no_room_imports_from_beside_or_above() -> None:
    for path in files("qwen_moe"):
        if path != ROOT / "qwen_moe" / "__init__.py":
            assert climbs(room(path), set(imports(path))) == [], path


def test_the_floors_see_a_climb() -> None:
    assert climbs("checkpoint", {"qwen_moe.training.step", "qwen_moe.models.decoder"}) == ["qwen_moe.training.step"]
    assert climbs("models", {"qwen_moe.data.batches"}) == ["qwen_moe.data.batches"]


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
