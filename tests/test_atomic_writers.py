"""Each package writes files atomically in one place; elsewhere only folders, and files that belong together, are moved."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import launchers.folder.atomic
import parallel.atomic
import scaling_laws.atomic

ROOT = Path(__file__).parents[1]
PACKAGES = ("qwen_moe", "launchers", "parallel", "scaling_laws", "benchmarks")

# scaling_laws and parallel import nothing of the others: each has a writer of its own, and one only.
WRITERS = {"launchers/folder/atomic.py", "parallel/atomic.py", "scaling_laws/atomic.py"}
MOVES = {
    "qwen_moe/checkpoint/directory.py": "a checkpoint's folder",
    "qwen_moe/checkpoint/retention.py": "a checkpoint's folder, before it is deleted",
    "qwen_moe/checkpoint/huggingface/export.py": "an exported folder",
    "qwen_moe/data/tokenizer.py": "a tokenizer's folder",
    "qwen_moe/data/output.py": "data, index, tokenizer and manifest, put in place together",
    "qwen_moe/curation/scores/store.py": "a file of scored documents, which grew block by block",
    "qwen_moe/training/reference.py": "the reference's folder",
    "qwen_moe/workflow/state.py": "a ladder's folder, moved aside",
    "qwen_moe/training/extension.py": "an exported folder, moved aside",
}


def moves(tree: ast.AST) -> Iterator[str]:
    """Calls that give a file the name of another: os.replace, os.rename, shutil.move, and a Path's replace and rename."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, owner, count = node.func.attr, ast.unparse(node.func.value), len(node.args)
            if owner in ("os", "shutil") and name in ("replace", "rename", "renames", "move", "link"):
                yield f"{owner}.{name}"
            elif (
                owner not in ("dataclasses", "os")
                and count == 1
                and not node.keywords
                and name in ("replace", "rename")
            ):
                yield f"{owner}.{name}"  # a string's replace takes two


def test_no_second_copy_of_an_atomic_writer() -> None:
    found = set()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if list(moves(ast.parse(path.read_text(encoding="utf-8")))):
                found.add(path.relative_to(ROOT).as_posix())
    # The one that links: of several processes that failed, the first keeps its word.
    assert found - {"qwen_moe/training/worker.py"} == WRITERS | set(MOVES)


@pytest.mark.parametrize("line", ["os.replace(a, b)", "a.replace(b)", "a.rename(b)", "shutil.move(a, b)"])
def test_the_search_sees_a_writer(line: str) -> None:
    assert len(list(moves(ast.parse(line)))) == 1


@pytest.mark.parametrize("line", ["text.replace('a', 'b')", "replace(config, x=1)", "dataclasses.replace(a)"])
def test_the_search_leaves_strings_alone(line: str) -> None:
    assert list(moves(ast.parse(line))) == []


@pytest.mark.parametrize("module", [launchers.folder.atomic, scaling_laws.atomic])
def test_what_fails_half_way_leaves_the_file_as_it_was(module: object, tmp_path: Path) -> None:
    path = tmp_path / "made" / "figures.txt"
    module.write_text(path, "old")  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError), module.replaced(path) as file:  # type: ignore[attr-defined]
        file.write(b"ne")
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    module.write_text(path, "new")  # type: ignore[attr-defined]
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_what_ranks_hand_over_is_whole(tmp_path: Path) -> None:
    parallel.atomic.write_bytes(tmp_path / "0.pkl", b"all")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("0.pkl", b"all")]
