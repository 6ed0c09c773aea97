"""No file over 400 lines, no function over 60, no parameter list over 8; the places that are still over are listed here."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8

# Exact sizes: none may grow, and an entry must be removed once its place is within the limits.
ALLOWED = {
    # A stand-in for Apex's class, with its signature.
    "tests/training/test_optimizer_providers.py FakeFusedAdam.__init__: parameters": 10,
}


def functions(node: ast.AST, within: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function under ``node``, nested ones and methods too, with its dotted name."""
    for child in ast.iter_child_nodes(node):
        name = within
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{within}.{child.name}" if within else child.name
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, child
        yield from functions(child, name)


def parameter_count(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """``*args`` and ``**kwargs`` count as one each, a leading self, cls or ctx as none."""
    listed = function.args
    names = [one.arg for one in (*listed.posonlyargs, *listed.args)]
    starred = [one for one in (listed.vararg, listed.kwarg) if one is not None]
    return len(names) + len(listed.kwonlyargs) + len(starred) - (names[:1] in (["self"], ["cls"], ["ctx"]))


def too_large(path: Path, name: str) -> dict[str, int]:
    """What is over a limit in the file ``path``, called ``name``: its size by place."""
    text = path.read_text(encoding="utf-8")
    found = {}
    if (lines := len(text.splitlines())) > FILE_LINES:
        found[f"{name}: lines"] = lines
    for function, node in functions(ast.parse(text)):
        assert node.end_lineno is not None
        if (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES:
            found[f"{name} {function}: lines"] = lines
        if (parameters := parameter_count(node)) > PARAMETERS:
            found[f"{name} {function}: parameters"] = parameters
    return found


def sources() -> list[str]:
    """Every Python file that git tracks or would track."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what belongs to the project is not known")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted({name for name in listed if (ROOT / name).is_file()})


def test_nothing_is_too_large() -> None:
    found: dict[str, int] = {}
    names = sources()
    assert Path(__file__).relative_to(ROOT).as_posix() in names
    for name in names:
        found |= too_large(ROOT / name, name)
    over = {place: size for place, size in found.items() if ALLOWED.get(place) != size}
    assert not over, f"over {FILE_LINES} lines a file, {FUNCTION_LINES} a function, or {PARAMETERS} parameters: {over}"
    assert ALLOWED.keys() <= found.keys(), f"no longer too large, remove: {ALLOWED.keys() - found.keys()}"


def test_the_checker_sees_what_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    line = "        x = 1\n"
    body = line * 60
    names = ", ".join(f"p{number}" for number in range(6))
    path.write_text(
        f"class A:\n    def f(self, /, {names}, *q, r=1):\n{body}"  # 61 lines, 8 parameters
        f"    def g({names}, *q, r=1, **s):\n{body[: -len(line)]}"  # 60 lines, 9 parameters
        f"async def h(ctx, {names}, *, self, t):\n    def inner({names}, a, b, ctx): pass\n" + "#\n" * 280
    )
    assert len(path.read_text().splitlines()) == 404
    assert too_large(path, "long.py") == {
        "long.py: lines": 404,
        "long.py A.f: lines": 61,
        "long.py A.g: parameters": 9,
        "long.py h.inner: parameters": 9,
    }
