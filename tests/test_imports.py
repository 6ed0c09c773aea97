"""Who may import whom, by syntax tree, and what `qwen-moe --help` may wait for."""

import ast
import re
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
        ("qwen_moe/data", {"torch", "numpy", "tqdm", "tokenizers", "transformers", "zstandard", "megatron",
                           "qwen_moe.alone", "qwen_moe.config", "qwen_moe.documents", "qwen_moe.errors",
                           "qwen_moe.options", "qwen_moe.packages", "qwen_moe.progress", "qwen_moe.data",
                           "parallel.mesh", "parallel.sequence", "parallel.threads",
                           "launchers.counted", "launchers.folder.atomic", "launchers.local.signals"}),
    ],
)  # fmt: skip
def test_folders_import_only_what_they_may(folder: str, allowed: set[str]) -> None:
    for path in files(folder):
        assert outside(path, allowed) == [], path


def test_models_know_nothing_of_ranks() -> None:
    """Of `parallel` they import how this CPU multiplies (`parallel.gemm`), and nothing else."""
    for path in files("qwen_moe/models"):
        assert not {name for name in imports(path) if name.split(".")[0] == "parallel"} - {"parallel.gemm"}, path


# The rooms of a package from the ground up. A file imports from its own room and from those below it, not from beside it.
# `launchers.conductor` and `launchers.node_facts` are names for scripts of earlier versions. Nothing imports `qwen_moe.cli`:
# it imports every room that has a verb, and what a verb needs of it is handed over.
FLOORS = {
    "qwen_moe": (
        ("errors", "paths", "progress"),
        ("alone", "documents", "line_file", "options", "packages"),
        ("config",),
        ("models", "data"),
        ("objectives",),
        ("sharding",),
        ("checkpoint",),
        ("runs",),
        ("machine", "schedule_picture", "generation"),
        ("scoring",),
        ("rollout",),
        ("info",),
        ("training",),
        ("verify", "launch", "evaluation", "tracing"),
        ("scaling", "planning"),
        ("workflow",),
        ("posttraining",),
        ("curation",),
        ("cli",),
        ("__main__",),
    ),
    "launchers": (
        ("errors", "duration", "counted"),
        ("folder",),
        ("local",),
        ("slurm",),
        ("job",),
        ("conductor", "node_facts"),
    ),
}


def room(module: str) -> str:
    """The folder, or the file beside the folders, of a package that ``module`` is in."""
    return ".".join(module.split(".")[1:2])


def not_below(module: str, names: set[str]) -> list[str]:
    """Of the imports ``names`` of ``module``, those of the same package but not of a lower floor or of its own room."""
    package = module.split(".")[0]
    floor = {name: number for number, beside in enumerate(FLOORS[package]) for name in beside}
    others = {name for name in names if name.startswith(f"{package}.") and room(name) != room(module)}
    return [name for name in sorted(others) if floor[room(name)] >= floor[room(module)]]


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_import_only_what_is_below_them(package: str) -> None:
    for path in files(package):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if room(module) != "__init__":
            assert not_below(module, set(imports(path))) == [], path


def test_the_floors_see_a_climb() -> None:
    names = {"qwen_moe.training.step", "qwen_moe.models.decoder", "qwen_moe.planning.search"}
    assert not_below("qwen_moe.checkpoint.sharded", names) == ["qwen_moe.planning.search", "qwen_moe.training.step"]
    names = {"launchers.job.status", "launchers.errors", "launchers.local.lock"}
    assert not_below("launchers.folder.logs", names) == ["launchers.job.status", "launchers.local.lock"]


def names_qwen_moe(path: Path) -> set[str]:
    """Strings of ``path``, docstrings among them, that name a module of qwen_moe."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in strings if re.search(r"\bqwen_moe\b", text)}


# Of jobs that an earlier version submitted: their launch.json does not say what they start.
TOLD_BY_NOTHING = {"launchers/conductor.py": {"qwen_moe.launch.agent", "qwen_moe"}}


@pytest.mark.parametrize("folder", ["parallel", "launchers", "scaling_laws"])
def test_no_string_names_a_module_above(folder: str) -> None:
    """What launchers start is told to them."""
    for path in files(folder):
        assert names_qwen_moe(path) == TOLD_BY_NOTHING.get(path.relative_to(ROOT).as_posix(), set()), path


def test_the_checker_sees_a_name_in_a_string(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("AGENT = f'python -m qwen_moe.launch.agent {1}'\nCOMMAND = 'qwen-moe launch'\n")
    assert names_qwen_moe(path) == {"python -m qwen_moe.launch.agent "}


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
