"""Transformer Engine's Python sources as syntax trees, and what a file of ours uses of them.

The wheel ``transformer-engine`` (pure Python, about 1 MB) holds the sources of `transformer_engine.pytorch` and of the
recipes; importing them needs the compiled wheels and a GPU, reading them does not.
"""

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PYTORCH, RECIPES = "transformer_engine.pytorch", "transformer_engine.common.recipe"
Definition = ast.ClassDef | ast.FunctionDef


def fetch(version: str, folder: Path) -> Path | str:
    """The wheel of ``version``, downloaded once into ``folder``, or why it is not to be had."""
    found = list(folder.glob(f"transformer_engine-{version}-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        outcome = subprocess.run(
            [*command, "--timeout=15", "--retries=1", f"--dest={folder}", f"transformer-engine=={version}"],
            capture_output=True,
            text=True,
        )
        found = list(folder.glob(f"transformer_engine-{version}-*.whl"))
        if outcome.returncode or not found:
            return outcome.stderr.strip().splitlines()[-1] if outcome.stderr.strip() else "pip found no wheel"
    return found[0]


class Sources:
    """The sources in one wheel. Names are resolved as imports would, through re-exports."""

    def __init__(self, wheel: Path) -> None:
        self.archive = zipfile.ZipFile(wheel)
        self.files = set(self.archive.namelist())
        self.tree = cache(self._tree)

    def _tree(self, path: str) -> ast.Module:
        return ast.parse(self.archive.read(path))

    def _file(self, module: str) -> str | None:
        path = module.replace(".", "/")
        return next((p for p in (f"{path}.py", f"{path}/__init__.py") if p in self.files), None)

    def find(self, module: str, name: str) -> tuple[str, Definition | None] | None:
        """(module that defines it, its definition) of ``name`` as ``module`` offers it; without a definition where it is
        a plain variable. None where there is no such name."""
        path = self._file(module)
        if path is None:
            return None
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        for node in _top_level(self.tree(path)):
            if isinstance(node, Definition) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
                source = ".".join(part for part in (base, node.module or "") if part)
                for alias in node.names:
                    if alias.name == "*" and (found := self.find(source, name)):
                        return found
                    if (alias.asname or alias.name) == name:
                        return self.find(source, alias.name)
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                if isinstance(node.value, ast.Name):
                    return self.find(module, node.value.id)
                return module, None
        return None

    def lineage(self, module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and those that it inherits from, as far as they are in this wheel."""
        found = self.find(module, name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return
        yield found[0], found[1]
        for base in found[1].bases:
            if isinstance(base, ast.Name):
                yield from self.lineage(found[0], base.id)

    def attributes(self, module: str, name: str) -> set[str]:
        """Methods, fields and ``self.x`` of the class and its bases."""
        names = set()
        for _, node in self.lineage(module, name):
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef):
                    names.add(part.name)
                elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and _is(part.value, "self"):
                    names.add(part.attr)
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    names.add(part.target.id)
                elif isinstance(part, ast.Assign):
                    names |= {target.id for target in part.targets if isinstance(target, ast.Name)}
        return names

    def fields(self, module: str, name: str) -> list[str]:
        """Annotated fields in order: the arguments of a dataclass."""
        found = [node for _, node in self.lineage(module, name)]
        return [
            part.target.id
            for node in reversed(found)
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        ]

    def methods(self, module: str, name: str, method: str) -> list[ast.arguments]:
        """The arguments of ``method`` (without self) in the class and its bases, nearest first."""
        found = []
        for _, node in self.lineage(module, name):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == method:
                    found.append(part.args)
        return found


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    for node in tree.body:
        yield node
        if isinstance(node, ast.Try | ast.If):
            yield from (inner for inner in node.body)


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def positional(arguments: ast.arguments, bound: bool) -> list[str]:
    """Names of what may be given by position; ``bound`` leaves out self."""
    return [a.arg for a in arguments.posonlyargs + arguments.args][bound:]


def required(arguments: ast.arguments, bound: bool) -> list[str]:
    """Names of positional arguments that have no default."""
    names = [a.arg for a in arguments.posonlyargs + arguments.args]
    return names[bound : len(names) - len(arguments.defaults)]


def accepted(arguments: ast.arguments, bound: bool) -> list[str]:
    """Names of what may be given by keyword."""
    return positional(arguments, bound) + [a.arg for a in arguments.kwonlyargs]


@dataclass
class Call:
    """A call of ours: of ``what`` ("te.Linear", "te_recipe.DelayedScaling", or "Linear()" for calling an instance, or
    "Linear.method")."""

    what: str
    count: int
    keywords: tuple[str, ...]
    line: int


@dataclass
class Uses:
    """What a source of ours uses: names, attributes of instances by class, strings by which weights are lent."""

    names: set[str] = field(default_factory=set)  # "te.Linear", "te_recipe.Format.HYBRID"
    attributes: set[tuple[str, str]] = field(default_factory=set)  # ("Linear", "fp8_meta")
    calls: list[Call] = field(default_factory=list)
    lent: dict[str, set[str]] = field(default_factory=dict)  # class -> {"weight", "weight{}"}
    instances: dict[str, set[str]] = field(default_factory=dict)  # variable -> classes


def uses(source: str, aliases: dict[str, set[str]]) -> Uses:
    """Read from the syntax tree: every ``te.X`` and ``te_recipe.X``, what is done with variables (or attributes of self)
    that hold ``te.X(...)``, and what ``functional_call`` gives to them. ``aliases``: more variables and their classes."""
    tree, found = ast.parse(source), Uses(instances={name: set(classes) for name, classes in aliases.items()})
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target, value in _pairs(node):
                if isinstance(value, ast.Call) and re.match(r"te\.[A-Z]", name := _dotted(value.func)):
                    found.instances.setdefault(_last(target), set()).add(name.removeprefix("te."))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = _dotted(node)
            if name.startswith(("te.", "te_recipe.")):
                found.names.add(name)
            else:
                for kind in found.instances.get(_last(node.value), ()):
                    found.attributes.add((kind, node.attr))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if not isinstance(node, ast.Call):
                continue
            keywords = tuple(k.arg for k in node.keywords if k.arg)
            name = _dotted(node.func)
            if name.startswith(("te.", "te_recipe.")):
                found.calls.append(Call(name, len(node.args), keywords, node.lineno))
            elif name == "functional_call":
                for kind in found.instances.get(_last(node.args[0]), ()):
                    values = {_last(a.targets[0]): a.value for a in ast.walk(function) if isinstance(a, ast.Assign)}
                    options, given = values[_last(node.args[3])], node.args[2]
                    assert isinstance(options, ast.Dict) and isinstance(given, ast.Tuple)
                    names = tuple(key.value for key in options.keys if isinstance(key, ast.Constant))
                    found.calls.append(Call(f"{kind}()", len(given.elts), names, node.lineno))
                    found.lent.setdefault(kind, set()).update(_keys(values[_last(node.args[1])]))
            elif isinstance(node.func, ast.Attribute) and _last(node.func) in found.instances:
                for kind in found.instances[_last(node.func)]:
                    found.calls.append(Call(f"{kind}()", len(node.args), keywords, node.lineno))
            elif isinstance(node.func, ast.Attribute):
                for kind in found.instances.get(_last(node.func.value), ()):
                    found.calls.append(Call(f"{kind}.{node.func.attr}", len(node.args), keywords, node.lineno))
    return found


def _pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=True)
        else:
            yield target, node.value


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _last(node: ast.AST) -> str:
    """``x`` of ``x`` and of ``self.x``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _keys(node: ast.expr) -> Iterator[str]:
    """Keys of dict displays and comprehensions anywhere in an expression; ``f"weight{i}"`` is "weight{}"."""
    for part in ast.walk(node):
        if isinstance(part, ast.Dict):
            yield from (key.value for key in part.keys if isinstance(key, ast.Constant))
        elif isinstance(part, ast.DictComp):
            yield pattern(part.key)


def pattern(node: ast.expr) -> str:
    """A string, with {} for what an f-string fills in; "" for anything else."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    return ""
