"""Test documents from what every machine has: Python's own standard library, and tasks that are computed.

Functions that the YAML files beside this one name. lm-evaluation-harness calls them with a task's metadata and
``dataset_kwargs``, and takes a split by name from the result.
"""

import ast
import random
import re
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

from qwen_moe.data.tasks import tasks

# Modules with much text, in all supported versions of Python.
_MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "cmd", "codecs", "collections/__init__", "concurrent/futures/_base",
    "configparser", "contextlib", "copy", "csv", "datetime", "difflib", "doctest", "enum", "fileinput", "fractions",
    "functools", "gzip", "heapq", "imaplib", "inspect", "ipaddress", "json/__init__", "json/decoder", "logging/__init__",
    "logging/handlers", "mailbox", "netrc", "optparse", "pathlib", "pdb", "pickle", "pickletools", "platform", "plistlib",
    "pprint", "random", "sched", "selectors", "shelve", "shlex", "shutil", "smtplib", "socket", "socketserver", "ssl",
    "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace",
    "traceback", "typing", "unittest/case", "unittest/mock", "urllib/parse", "urllib/request", "uuid", "warnings", "weakref",
    "zipfile",
)  # fmt: skip
_WRONG = 3  # choices beside the right one
_CONTEXT = 6  # lines of source before the one that is asked for


@cache
def _sources() -> tuple[str, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for name in _MODULES if (path := root / f"{name}.py").is_file()]
    return tuple(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def _splits(documents: list[dict[str, Any]], examples: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(documents)} | ({"train": Dataset.from_list(examples)} if examples else {})


def _docstrings(source: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [text for text in found if text]


def _sentences(text: str) -> list[str]:
    """Sentences of the paragraphs of a docstring that are running text."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    plain = [part for part in paragraphs if re.fullmatch(r"[\w ,.;:'()\"-]+", part)]
    return [sentence for part in plain for sentence in re.split(r"(?<=\.) ", part)]


@cache
def _all_sentences() -> list[str]:
    return sorted({one for source in _sources() for text in _docstrings(source) for one in _sentences(text)})


def pydoc_cloze(count: int = 300, **metadata: Any) -> dict[str, Any]:
    """Sentences of docstrings up to a word, and four words of which one follows."""
    rng = random.Random("pydoc_cloze")
    found = []
    for sentence in _all_sentences():
        words = sentence.split(" ")
        places = [i for i, word in enumerate(words) if i >= 5 and re.fullmatch(r"[a-z]{5,}", word)]
        if places:
            place = rng.choice(places)
            found.append((" ".join(words[:place]), words[place]))
    rng.shuffle(found)
    pool = sorted({word for _, word in found})
    documents = []
    for text, word in found[:count]:
        choices = [word, *rng.sample([other for other in pool if other != word], _WRONG)]
        rng.shuffle(choices)
        documents.append({"text": text, "choices": choices, "answer": choices.index(word)})
    return _splits(documents)


def python_next_line(count: int = 300, **metadata: Any) -> dict[str, Any]:
    """Lines of source, and four lines of the same file of which one follows."""
    rng = random.Random("python_next_line")
    documents = []
    for source in _sources():
        lines = [line for line in source.splitlines() if line.strip()]
        pool = sorted({line for line in lines if len(line.strip()) >= 12})
        for place in rng.sample(range(_CONTEXT, len(lines)), min(12, len(lines) - _CONTEXT)):
            right = lines[place]
            drawn = rng.sample(pool, min(2 * _WRONG, len(pool)))
            others = [line for line in drawn if line.strip() != right.strip()][:_WRONG]
            if len(right.strip()) < 12 or len(others) < _WRONG:
                continue
            choices = [right, *others]
            rng.shuffle(choices)
            text = "\n".join(lines[place - _CONTEXT : place]) + "\n"
            documents.append({"text": text, "choices": choices, "answer": choices.index(right)})
    rng.shuffle(documents)
    return _splits(documents[:count])


def python_text(count: int = 30, characters: int = 4000, **metadata: Any) -> dict[str, Any]:
    """Beginnings of source files."""
    return _splits([{"text": source[:characters]} for source in _sources()[:count]])


def computed(kind: str, count: int = 200, **metadata: Any) -> dict[str, Any]:
    """Held-out tasks of `qwen_moe.data.tasks`, and tasks of training as examples."""
    return _splits(tasks(f"tasks:{kind}:{count}:heldout"), tasks(f"tasks:{kind}:64"))
