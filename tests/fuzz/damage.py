"""Ways to damage a file. A damage is a list of JSON values, [kind, arguments...]; numbers that point into a file are taken
modulo its size, so that a damage fits every file and can be written down to be repeated.
"""

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml
from hypothesis import strategies as st

BIG = 10**9
Damage = list[Any]

# What stands where a value was, by kind. Texts are written into the file as they are.
NUMBERS = {
    "nan": "NaN",
    "infinite": "Infinity",
    "beyond_float": "1e400",
    "huge": "1e308",
    "digits": "9" * 400,
    "negative": "-1",
    "zero": "0",
    "fraction": "0.5",
    "past_int64": "9223372036854775808",
}
OTHERS = {
    "null": "null",
    "bool": "true",
    "empty_text": '""',
    "text": '"seven"',
    "long_text": '"' + "x" * 5000 + '"',
    "surrogate": '"\\ud800"',
    "null_byte": '"a\\u0000b"',
    "outside": '"../../outside"',
    "absolute": '"/etc/passwd"',
    "list": "[1, 2]",
    "object": '{"a": 1}',
    "empty_list": "[]",
    "empty_object": "{}",
    "deep": "[" * 3000 + "]" * 3000,
}
VALUES = NUMBERS | OTHERS
_YAML = {"nan": ".nan", "infinite": ".inf", "surrogate": '"\\uD800"', "null_byte": '"a\\0b"'}
_TOML = {"nan": "nan", "infinite": "inf", "null": '"null"', "object": "{a = 1}"}
# A result that differs after one of these was computed from something that is no value at all.
NEVER_A_VALUE = ("nan", "infinite", "beyond_float", "digits", "deep", "surrogate", "bool_for_number", "list_for_number",
                 "object_for_number", "text_for_number", "twice")  # fmt: skip

_APPENDED = ("\n", "{}", "\0", "x", "\n\n[", '{"step": 1', "ÿþ")
_INSERTED = ("\0", "\r", "\udcff", "\ufeff", "\t", "\n", "\u2028", '"', "{")
_INSTEAD = ("null", "[]", "5", '"x"', "[" * 20000, '{"a":' * 20000)
_KEYS = ("", "1", "~", "true", "a.b", "../x", "x" * 3000)
_CELLS = ("", "nan", "inf", "-1", "0", "1e400", "1e308", "1e-320", "true", "seven", "1,5", '"', "9" * 400, "0x10", "1_000",
          " 1 ", "٣")  # fmt: skip


def _bytes(rng: Random) -> Damage:
    place, size = rng.randrange(BIG), rng.randint(1, 64)
    return rng.choice(
        (
            ["flip", place, rng.randrange(8)],
            ["flip", place, rng.randrange(8)],
            ["cut", place],
            ["append", rng.choice(_APPENDED)],
            ["zero_block", place, size],
            ["swap_bytes", place, rng.randrange(BIG)],
            ["drop_block", place, size],
            ["double_block", place, size],
        )
    )


def _path(rng: Random) -> Damage:
    return [rng.choice(list(_ON_PATHS))]


def _text(rng: Random) -> Damage:
    place = rng.randrange(BIG)
    return rng.choice(
        (
            ["swap_lines", place, rng.randrange(BIG)],
            ["double_line", place],
            ["drop_line", place],
            ["insert", place, rng.choice(_INSERTED)],
            ["only", rng.choice(_INSTEAD)],
            [rng.choice(("bom", "crlf", "utf16"))],
        )
    )


def _structure(rng: Random) -> Damage:
    place = rng.randrange(BIG)
    value = ["value", place, rng.choice(sorted(VALUES))]
    return rng.choice(
        (
            value,
            value,
            value,
            ["twice", place],
            ["without", place],
            ["unknown", place],
            ["key", place, rng.choice(_KEYS)],
        )
    )


def _cells(rng: Random) -> Damage:
    place = rng.randrange(BIG)
    cell = ["cell", place, rng.choice(_CELLS)]
    column = ["column_renamed", place, rng.choice(("", "x", "loss"))]
    return rng.choice((cell, cell, cell, ["column_twice", place], column, ["row_long", place], ["row_short", place]))


_OF_FORM: dict[str, tuple[Callable[[Random], Damage], ...]] = {
    "bytes": (_bytes, _bytes, _bytes, _bytes, _bytes, _path),
    "text": (_bytes, _bytes, _bytes, _text, _text, _path),
    "csv": (_bytes, _bytes, _text, _cells, _cells, _cells, _path),
}
_NESTED = (_bytes, _bytes, _bytes, _text, _structure, _structure, _structure, _path)


def strategy(form: str) -> st.SearchStrategy[Damage]:
    """Damages for a file of ``form``: json, jsonl, yaml, toml, csv, text or bytes; its own kinds as often as bytes."""
    kinds = _OF_FORM.get(form, _NESTED)
    return st.randoms(use_true_random=True).map(lambda rng: rng.choice(kinds)(rng))


def damage_file(path: Path, form: str, damage: Damage) -> str:
    """Damage ``path``; the kind of what was done, more exact than the damage's own name where the content says more."""
    kind, *arguments = damage
    if kind in _ON_PATHS:
        _ON_PATHS[kind](path)
        return kind
    content = path.read_bytes()
    if kind in _ON_BYTES:
        changed = _ON_BYTES[kind](content, *arguments)
    else:
        text, kind = _on_text(content.decode("utf-8", "surrogateescape"), form, kind, arguments)
        changed = text.encode("utf-16" if kind == "utf16" else "utf-8", "surrogateescape")
    path.unlink()  # it may be a link to what other draws read
    path.write_bytes(changed)
    return kind


# ---------------------------------------------------------------------- the path


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _directory(path: Path) -> None:
    _remove(path)
    path.mkdir()


def _loop(path: Path) -> None:
    _remove(path)
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    _remove(path)
    path.symlink_to("nowhere")


def _empty(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"")


_ON_PATHS: dict[str, Callable[[Path], None]] = {
    "missing": _remove,
    "directory": _directory,
    "loop": _loop,
    "dangling": _dangling,
    "empty": _empty,
}

# ---------------------------------------------------------------------- bytes


def _flip(content: bytes, place: int, bit: int) -> bytes:
    at = place % max(1, len(content))
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def _swap_bytes(content: bytes, one: int, other: int) -> bytes:
    a, b = one % len(content), other % len(content)
    changed = bytearray(content)
    changed[a], changed[b] = changed[b], changed[a]
    return bytes(changed)


def _zero_block(content: bytes, place: int, size: int) -> bytes:
    at = place % len(content)
    return content[:at] + bytes(len(content[at : at + size])) + content[at + size :]


def _drop_block(content: bytes, place: int, size: int) -> bytes:
    at = place % len(content)
    return content[:at] + content[at + size :]


def _double_block(content: bytes, place: int, size: int) -> bytes:
    at = place % len(content)
    return content[: at + size] + content[at:]


_ON_BYTES: dict[str, Callable[..., bytes]] = {
    "flip": _flip,
    "swap_bytes": _swap_bytes,
    "zero_block": _zero_block,
    "drop_block": _drop_block,
    "double_block": _double_block,
    "cut": lambda content, place: content[: place % max(1, len(content))],
    "append": lambda content, text: content + text.encode(),
}

# ---------------------------------------------------------------------- texts


def _on_text(text: str, form: str, kind: str, arguments: list[Any]) -> tuple[str, str]:
    if kind in ("bom", "crlf", "utf16", "only", "insert"):
        return _whole(text, kind, arguments), kind
    if kind in ("swap_lines", "double_line", "drop_line"):
        return _lines(text, kind, arguments), kind
    if form == "csv":
        return _table(text, kind, arguments), kind
    if form == "toml":
        return _toml(text, kind, arguments)
    if form == "jsonl":
        lines = text.splitlines()
        at = arguments[0] % len(lines)
        lines[at], kind = _document(lines[at], "json", kind, [arguments[0] // len(lines), *arguments[1:]])
        return "\n".join(lines) + "\n", kind
    return _document(text, form, kind, arguments)


def _whole(text: str, kind: str, arguments: list[Any]) -> str:
    if kind == "only":
        return str(arguments[0])
    if kind == "insert":
        at = arguments[0] % max(1, len(text))
        return text[:at] + arguments[1] + text[at:]
    return "\ufeff" + text if kind == "bom" else text.replace("\n", "\r\n") if kind == "crlf" else text


def _lines(text: str, kind: str, arguments: list[Any]) -> str:
    lines = text.splitlines(keepends=True)
    places = [place % len(lines) for place in arguments]
    if kind == "swap_lines":
        one, other = places
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == "double_line":
        lines.insert(places[0], lines[places[0]])
    else:
        del lines[places[0]]
    return "".join(lines)


def _table(text: str, kind: str, arguments: list[Any]) -> str:
    rows = list(csv.reader(io.StringIO(text)))
    place = arguments[0]
    if kind in ("column_twice", "column_renamed"):
        column = place % len(rows[0])
        for number, row in enumerate(rows):
            if kind == "column_twice":
                row.append(row[column] if number == 0 else "1")
            elif number == 0:
                row[column] = arguments[1]
    else:
        row = rows[1 + place % (len(rows) - 1)]
        column = place // len(rows) % len(row)
        if kind == "cell":
            row[column] = arguments[1]
        elif kind == "row_long":
            row.append("1")
        else:
            row.pop()
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _toml(text: str, kind: str, arguments: list[Any]) -> tuple[str, str]:
    lines = text.splitlines()
    settings = [number for number, line in enumerate(lines) if "=" in line]
    at = settings[arguments[0] % len(settings)]
    name, _, old = lines[at].partition(" = ")
    if kind == "value":
        kind = _exact(arguments[1], old.strip()[:1].isdigit())
        lines[at] = f"{name} = {_TOML.get(arguments[1], VALUES[arguments[1]])}"
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "without":
        del lines[at]
    elif kind == "unknown":
        lines.insert(at, "unheard_of = 1")
    else:
        lines[at] = f'"{arguments[1]}" = {old}'
    return "\n".join(lines) + "\n", kind


_MARK = "@@the place@@"


def _containers(value: Any) -> list[Any]:
    """Every object and list of a document, the outermost first."""
    found, look = [], [value]
    while look:
        node = look.pop(0)
        if isinstance(node, dict | list):
            found.append(node)
            look += list(node.values() if isinstance(node, dict) else node)
    return found


def _document(text: str, form: str, kind: str, arguments: list[Any]) -> tuple[str, str]:
    """Change one place of a JSON or YAML document."""
    value = yaml.safe_load(text) if form == "yaml" else json.loads(text)
    places = [
        (node, key) for node in _containers(value) for key in (node if isinstance(node, dict) else range(len(node)))
    ]
    if not places:
        return "null", "only"
    node, key = places[arguments[0] % len(places)]
    old = node[key]
    raw = None
    if kind == "value":
        raw = (_YAML if form == "yaml" else {}).get(arguments[1], VALUES[arguments[1]])
        kind = _exact(arguments[1], isinstance(old, int | float) and not isinstance(old, bool))
        node[key] = _MARK
    elif kind == "without":
        del node[key]
    elif not isinstance(node, dict):
        node.append(old)  # a list with one item twice
        kind = "item_again"
    elif kind == "unknown":
        node["unheard_of"] = 1
    elif kind == "twice":
        node["@@twice@@"] = 1
    else:
        del node[key]
        node[arguments[1]] = old
    dumped = yaml.safe_dump(value, sort_keys=False) if form == "yaml" else json.dumps(value)
    if raw is not None:
        quoted = json.dumps(_MARK) if form != "yaml" else f"'{_MARK}'"
        dumped = dumped.replace(quoted, raw).replace(_MARK, raw)
    if kind == "twice":
        name = json.dumps(str(key)) if form != "yaml" else str(key)
        dumped = dumped.replace('"@@twice@@"', name).replace("'@@twice@@'", name)
    return dumped, kind


def _exact(kind: str, was_number: bool) -> str:
    if not was_number:
        return kind
    simple = {
        "bool": "bool",
        "text": "text",
        "empty_text": "text",
        "long_text": "text",
        "list": "list",
        "object": "object",
    }
    return f"{simple[kind]}_for_number" if kind in simple else kind


def same_content(path: Path, content: bytes) -> bool:
    """Whether the damage changed nothing, as when two equal lines are swapped."""
    return path.is_file() and not os.path.islink(path) and path.read_bytes() == content
