"""Edits a recipe as text, so that it keeps its comments and its order."""

import re
from typing import Any

import yaml

Settings = dict[str, dict[str, Any]]


def _value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _wanted(values: dict[str, Any], settings: Settings) -> dict[str, Any]:
    found = dict(values)
    for section, entries in settings.items():
        found[section] = dict(found.get(section) or {}) | {key: yaml.safe_load(_value(v)) for key, v in entries.items()}
    return found


def _edit_section(lines: list[str], section: str, entries: dict[str, Any]) -> list[str]:
    """``lines`` with ``entries`` set in the block ``section``, which is appended if it is missing."""
    for place, line in enumerate(lines):
        if re.match(rf"{re.escape(section)}:\s*\{{.*\}}\s*(#.*)?$", line):  # a section on one line gets a line per key
            own, comment = yaml.safe_load(line)[section], re.search(r"\}\s*(#.*)?$", line)
            head = f"{section}:" + (f"  {comment[1]}" if comment and comment[1] else "")
            block = [f"  {key}: {_value(value)}" for key, value in (own | entries).items()]
            return [*lines[:place], head, *block, *lines[place + 1 :]]
    start = next((i for i, line in enumerate(lines) if re.match(rf"{re.escape(section)}:\s*(#.*)?$", line)), None)
    if start is None:
        gap = [""] if lines and lines[-1].strip() else []
        return [*lines, *gap, f"{section}:", *(f"  {key}: {_value(value)}" for key, value in entries.items())]
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or lines[end][0] in " #"):
        end += 1
    while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
        end -= 1
    block = lines[start + 1 : end]
    indent = next((re.match(r" *", line)[0] for line in block if line.strip() and line.strip()[0] != "#"), "  ")  # type: ignore[index]
    for key, value in entries.items():
        pattern = re.compile(rf"({indent}{re.escape(key)}:)(\s*)([^#]*?)(\s*#.*)?$")
        for place, line in enumerate(block):
            if match := pattern.match(line):
                block[place] = f"{match[1]} {_value(value)}{match[4] or ''}"
                break
        else:
            block.append(f"{indent}{key}: {_value(value)}")
    return [*lines[: start + 1], *block, *lines[end:]]


def edit_recipe(text: str, settings: Settings) -> tuple[str, bool]:
    """(``text`` with ``settings`` in it, whether its comments were kept). Without them the recipe is rewritten."""
    wanted = _wanted(yaml.safe_load(text) or {}, settings)
    lines = text.splitlines()
    for section, entries in settings.items():
        lines = _edit_section(lines, section, entries)
    edited = "\n".join(lines) + "\n"
    try:
        if yaml.safe_load(edited) == wanted:
            return edited, True
    except yaml.YAMLError:
        pass
    return yaml.safe_dump(wanted, sort_keys=False), False


def differences(values: dict[str, Any], settings: Settings) -> dict[str, tuple[Any, Any]]:
    """The settings that change: ``section.key`` -> (the recipe's value or None, the new value)."""
    found = {}
    for section, entries in settings.items():
        own = values.get(section) or {}
        for key, value in entries.items():
            plain = yaml.safe_load(_value(value))
            if own.get(key) != plain:
                found[f"{section}.{key}"] = (own.get(key), plain)
    return found
