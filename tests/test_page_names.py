"""What pages name exists: options of commands, settings of recipes, and modules with what they define."""

import argparse
import ast
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from qwen_moe.cli import build_parser
from qwen_moe.config.run import RunConfig
from tests.test_links import PAGES, ROOT

PACKAGES = "qwen_moe|parallel|scaling_laws|launchers"
PARSER = build_parser()
SECTIONS = "|".join(sorted(RunConfig.model_fields.keys() - {"stages"}))  # a stage has the name that a recipe gives it


def _verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(subparsers[0].choices) if subparsers else {}


def wrong_options(text: str) -> list[str]:
    """Options that the verb of their command does not have."""
    found = []
    for words in re.findall(r"qwen-moe ([a-z][^`|#;&\n]*)", text.replace("\\\n", " ")):
        parser, used = PARSER, []
        for word in words.split():
            if word not in _verbs(parser):
                break
            parser = _verbs(parser)[word]
            used.append(word)
        known = {option for action in parser._actions for option in action.option_strings}
        options = re.findall(r"(?<![\w-])--[a-z][\w-]*", words) if used else []
        found += [f"{' '.join(used)} {option}" for option in options if option not in known]
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a setting may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _is_setting(name: str) -> bool:
    models: list[type[BaseModel]] = [RunConfig]
    for part in name.split("."):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if not fields:
            return False
        models = [model for field in fields for model in _models(field.annotation)]
    return True


def _defined(path: Path) -> set[str]:
    """The names that a file defines or imports at its top."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            names |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}  # of __all__
    return names


def _is_module_name(name: str) -> bool:
    """Whether ``name`` is a package, a module, or what a module defines. Methods are not followed."""
    path, parts = ROOT, name.split(".")
    while parts and (path / parts[0]).is_dir():
        path, parts = path / parts[0], parts[1:]
    if parts and (path / f"{parts[0]}.py").is_file():
        path, parts = path / f"{parts[0]}.py", parts[1:]
    file = path if path.is_file() else path / "__init__.py"
    return not parts or (file.is_file() and parts[0] in _defined(file))


def wrong_names(text: str) -> list[str]:
    """Settings and names of modules that do not exist: `section.key`, `section.key=value`, `package.module.name`."""
    spans = re.findall(rf"`((?:{SECTIONS})\.[a-z_0-9.]+|(?:{PACKAGES})\.[\w.]+)(?:[=:(][^`]*)?`", text)
    overrides = re.findall(rf"(?<![\w.])((?:{SECTIONS})\.[a-z_0-9.]+)=", text)
    names = {name.rstrip(".") for name in spans + overrides}
    names |= {f"{where}.{what}" for where, all_of in re.findall(rf"^from ((?:{PACKAGES})[\w.]*) import (.*)$", text, re.M)
              for what in all_of.split(", ")}  # fmt: skip
    files = (".py", ".yaml", ".md", ".json", ".html", ".png")
    return sorted(
        name
        for name in names
        if not name.endswith(files)
        and not _is_setting(name)
        and not (re.match(PACKAGES, name) and _is_module_name(name))
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_pages_name_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert wrong_options(text) == [] and wrong_names(text) == []


def test_wrong_names_are_found() -> None:
    assert wrong_options("`qwen-moe scaling fit --output x --outptu y` (qwen-moe is x --y)") == ["scaling fit --outptu"]
    text = (
        "`training.epochs` `training.epoch: 1` x data.prepare.inptu=a `parallel.tp=2` `parallel.gemm.widen` `parallel.gem` "
        "`qwen_moe.data.checked.share_checked(a)` `qwen_moe.curation.leaks.record.share_checked(a)`\n"
        "from qwen_moe.scoring.model import ScoringModel, ScoreModel\n"
    )
    assert wrong_names(text) == [
        "data.prepare.inptu",
        "parallel.gem",
        "qwen_moe.curation.leaks.record.share_checked",
        "qwen_moe.scoring.model.ScoreModel",
        "training.epoch",
    ]
