"""Reads YAML and JSON that people write, and refuses input that these formats would silently misread."""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from qwen_moe.errors import UserError

MOST_VALUES = 1_000_000  # aliases can make a few lines stand for billions of values
_INT, _FLOAT, _TIME = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


class _Twice(yaml.MarkedYAMLError):
    """A key given twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its surprises: the last of two equal keys wins, 010 is 8, 1:30 is 90, 2026-01-31 is a date."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem=f"a key is a list or a mapping, in line {line}: keys are names")
            if key.value in lines:
                raise _Twice(problem=f"{key.value!r} is given twice, in lines {lines[key.value]} and {line}: keep one")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag not in (_INT, _FLOAT, _TIME)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# These forms are also valid in YAML 1.1, so a value that PyYAML writes without quotes is read back unchanged.
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def _check_size(values: Any) -> None:
    """Raise ValueError if lists and mappings contain themselves or more than `MOST_VALUES` values in total."""
    left, count = [values], 0
    while left:
        value = left.pop()
        count += 1
        if count > MOST_VALUES:
            raise ValueError("its aliases make it contain itself, or more than a million values")
        if isinstance(value, dict):
            odd = [key for key in value if not isinstance(key, str)]
            if odd:
                raise ValueError(f"the key {odd[0]!r} is not a name: put it in quotes, or correct it")
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)


def yaml_value(text: str, where: str) -> Any:
    """The value of a YAML text; keys of mappings are names. Raises a UserError that begins with ``where`` for invalid YAML,
    and for a key given twice (with both lines)."""
    try:
        text.encode()
        values = yaml.load(text, _Loader)
        _check_size(values)
        return values
    except _Twice as error:
        raise UserError(f"{where}: {error.problem}") from None
    except (
        UnicodeEncodeError
    ) as error:  # Python keeps bytes of the command line that are not text of the locale in this way
        raise UserError(
            f"{where} has a byte that is not text here (character {error.start + 1}): set PYTHONUTF8=1 if it is UTF-8"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where} is not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{where} is not valid YAML: it is nested too deeply") from None


def read_text(path: Path, what: str, example: str) -> str:
    """The text of a UTF-8 file without its byte order mark. Raises UserError. ``example``: what to give if it is missing."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist: give {example}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} cannot be read: it is not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def yaml_mapping(text: str, where: str) -> dict[str, Any]:
    """The mapping that a YAML text holds (see `yaml_value`)."""
    values = yaml_value(text, where)
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a mapping of names to values, found {type(values).__name__}")
    return values


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads(object_pairs_hook=...)``, which keeps the last of two equal keys: raises ValueError for them."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice: keep one")
    return values


def json_value(text: str, where: str) -> Any:
    """The value of a JSON text. Raises a UserError that begins with ``where``, also for a key given twice."""
    try:
        return json.loads(text, object_pairs_hook=once)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where} is not valid JSON: it is nested too deeply") from None


def json_object(text: str, where: str) -> dict[str, Any]:
    """The object that a JSON text holds (see `json_value`)."""
    values = json_value(text, where)
    if not isinstance(values, dict):
        raise UserError(f"{where} must hold a JSON object, found {type(values).__name__}")
    return values
