"""Text that every machine with Python has: what the inputs `python-docs` and `python-packages` consist of."""

import ast
import importlib.metadata
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

PYTHON_DOCS, PYTHON_PACKAGES = "python-docs", "python-packages"
_LEAST = 200  # characters of a document
_ENDINGS = (".md", ".rst", ".txt")

Item = tuple[str, Callable[[], str]]  # the name of a document, and what reads its text; empty if it has none


def python_docs() -> Iterator[Item]:
    """The topics of `help()`, and of each module of the standard library its docstrings as one document."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", partial(topics.__getitem__, name)
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} & set(relative.parts):
            yield relative.as_posix(), partial(docstrings, path)


def docstrings(path: Path) -> str:
    """The docstrings of a Python file, in order; empty if there is little of them, or if it is no Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]
    text = "\n\n".join(found)
    return text if len(text) >= _LEAST else ""


def python_packages() -> Iterator[Item]:
    """Of every installed package its description, and the text files that it brought: licenses, notes, documentation."""
    met = set()
    for one in sorted(importlib.metadata.distributions(), key=lambda one: str(one.metadata["Name"]).lower()):
        name = f"{one.metadata['Name']}-{one.version}"
        if name in met:
            continue
        met.add(name)
        yield f"{name}/description", partial(_description, one)
        for file in sorted(one.files or (), key=str):
            path = Path(str(one.locate_file(file)))
            if path.name.lower().endswith(_ENDINGS) and ".dist-info/" not in str(file).replace("licenses/", ""):
                yield f"{name}/{file}", partial(_text, path)


def _description(one: importlib.metadata.Distribution) -> str:
    text = one.metadata.get_payload()  # type: ignore[attr-defined]
    return text if isinstance(text, str) and len(text) >= _LEAST else ""


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return text if len(text) >= _LEAST and "\0" not in text else ""


ITEMS: dict[str, Callable[[], Iterator[Item]]] = {PYTHON_DOCS: python_docs, PYTHON_PACKAGES: python_packages}
