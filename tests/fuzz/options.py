"""Odd values of every option of every verb, found by walking the parser, and of every key of a recipe."""

import argparse
import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import strategies as st
from pydantic import BaseModel

from qwen_moe.cli import build_parser
from qwen_moe.config import RunConfig
from tests.fuzz.draws import SLOW_SECONDS, Fuzz, wrong_answer
from tests.fuzz.targets import not_finite
from tests.fuzz.world import World

NO_NUMBERS = ("nan", "inf", "-inf", "1e400", "NaN", "-Infinity")
ODD_NUMBERS = (
    *NO_NUMBERS, *NO_NUMBERS, "-1", "0", "-0.0", "1e-300", "1e300", "9" * 400, "1" + "0" * 18, "9223372036854775808",
    "18446744073709551616", "4294967296", "2147483648", "", " ", "1.5", "0x10", "1_0", "true", "seven", "1e3", "3,5",
    "٣", "-5", "1e-5", "[1]", "3",
)  # fmt: skip
SMALL_NUMBERS = tuple(value for value in ODD_NUMBERS if len(value) < 4)
ODD_TEXTS = (
    "", " ", "\n", "a\nb", "\udcff", "a;b", "'", '"', "$(touch hacked)", "`touch hacked`", "x" * 5000, "=", ",", ",,",
    "0", "-1", "nan", "%s", "{}", "{0}", "[", "a=b", "A=b=c", "1:2", "\u2028", "ü", "a b", "#", "\\", "-", "99:99:99",
    "1-1", "tp=2", "tp=0", "tp=9999999999999", "pp=1,pp=2", "5GB", "1e400GB", "nanGB", "-5GB", "0.0001B",
)  # fmt: skip
ODD_PATHS = (
    "", ".", "..", "missing", "missing/x", "text.jsonl", "text.jsonl/x", "bin", "loop", "loop/x", "x" * 300,
    "y/" * 3000, "\udcff", "a\nb", "ü", " ", "hf", "run", "recipe.yaml", "fit", "empty",
)  # fmt: skip
ODD_YAML = (
    *ODD_NUMBERS, ".nan", ".inf", "-.inf", "1e400", "true", "null", "[]", "{}", "[1, 2]", "{a: 1}", "'", "[", "&a [*a]",
    "!!python/object/apply:os.getcwd []", "2026-11-26", "0o17", "1:30", "~", "x" * 3000, "[" * 500 + "]" * 500,
)  # fmt: skip

# What each verb is called with beside the drawn option, and what of the world it reads. Flags that wait or run for ever,
# and numbers of which so many are done, are left out.
BASE: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("train",): (("stopped.yaml",), ("stopped.yaml", "stopped", "data")),
    ("report",): (("run",), ("run",)),
    ("verify",): (("recipe.yaml", "--shapes", "1"), ("recipe.yaml",)),
    ("info",): (("recipe.yaml",), ("recipe.yaml",)),
    ("data", "prepare"): (
        ("--input", "text.jsonl", "--output", "data/new", "--tokenizer", "data/corpus-tokenizer", "--workers", "1"),
        ("data", "text.jsonl"),
    ),
    ("data", "chat"): (
        ("--input", "chats.jsonl", "--output", "data/new", "--tokenizer", "data/corpus-tokenizer", "--workers", "1"),
        ("data", "chats.jsonl"),
    ),
    ("data", "decontaminate"): (
        ("--input", "text.jsonl", "--against", "text.jsonl", "--output", "new", "--workers", "1"), ("text.jsonl",),
    ),
    ("data", "info"): (("data/corpus",), ("data",)),
    ("data", "score"): (
        ("--input", "text.jsonl", "--output", "new", "--scorer", "run", "--dimensions", "quality", "--document-tokens",
         "20"),
        ("run", "text.jsonl"),
    ),
    ("convert", "from-hf"): (("hf", "out"), ("hf",)),
    ("convert", "to-hf"): (("ckpt", "out"), ("ckpt",)),
    ("convert", "upcycle"): (
        ("dense", "out", "--experts", "4", "--top-k", "2", "--expert-size", "8", "--shared-expert", "12"), ("dense",),
    ),
    ("generate",): (("--checkpoint", "run", "--prompt", "router", "--max-new-tokens", "3"), ("run",)),
    ("score",): (("--checkpoint", "run", "--input", "text.jsonl", "--output", "new.jsonl"), ("run", "text.jsonl")),
    ("rollout",): (
        ("--checkpoint", "run", "--input", "tasks:sort:2", "--samples", "2", "--max-new-tokens", "3", "--reward", "exact",
         "--output", "new"), ("run",),
    ),
    ("data", "pairs"): (("run", "--output", "data/new"), ("run",)),
    ("post-train",): (("large.yaml",), ("large.yaml",)),
    ("data", "curate"): (("large.yaml",), ("large.yaml",)),
    ("evaluate", "passkey"): (("--checkpoint", "run", "--lengths", "500", "--depths", "1"), ("run",)),
    ("evaluate", "ruler"): (
        ("--checkpoint", "run", "--lengths", "700", "--tasks", "niah_single_1", "--samples", "1"), ("run",),
    ),
    ("evaluate", "tasks"): (
        ("--checkpoint", "run", "--tasks", "pydoc_cloze", "--limit", "2"), ("run",),
    ),
    ("scaling", "fit"): (("runs.csv", "--output", "new", "--samples", "0"), ("runs.csv",)),
    ("scaling", "recommend"): (("fit", "--n-total", "1e9", "--tokens", "2e10", "--seq-len", "1024"), ("fit",)),
    ("scaling", "report"): (("fit",), ("fit",)),
    ("scaling", "ladder"): (("large.yaml", "--flops-budget", "1e15", "--output", "new"), ("large.yaml", "fit")),
    ("scaling", "next"): (("large.yaml", "--runs", "runs.csv", "--output", "new"), ("large.yaml", "runs.csv")),
    ("scaling", "collect"): (("ladder", "--output", "new.csv"), ("ladder",)),
    ("scaling", "predict"): (("ladder/runs/run_000", "--like", "ladder/runs/run_001"), ("ladder",)),
    ("pipeline",): (
        ("large.yaml", "--flops-budget", "1e15", "--output", "new", "--until", "ladder"), ("large.yaml", "data", "fit"),
    ),
    ("launch",): (
        ("launched.yaml", "--site", "site.toml", "--nproc", "1", "--dry-run"), ("launched.yaml", "launched", "site.toml"),
    ),
    ("status",): (("launched",), ("launched",)),
    ("logs",): (("launched",), ("launched",)),
    ("cancel",): (("launched",), ("launched",)),
    ("plan",): (
        ("large.yaml", "--gpus", "4", "--gpu", "gpu.yaml", "--network", "network.yaml", "--top", "1"),
        ("large.yaml", "gpu.yaml", "network.yaml"),
    ),
    ("trace",): (("recipe.yaml", "--gpus", "1"), ("recipe.yaml",)),
}  # fmt: skip
WAITS = {"--follow": "it waits for what comes", "--help": "argparse's own"}
AS_MANY_AS_ASKED = {"--samples", "--fuzz", "--depths"}


Verb = tuple[str, ...]


def verbs(parser: argparse.ArgumentParser, path: Verb = ()) -> Iterator[tuple[Verb, argparse.ArgumentParser]]:
    """Every verb and its parser."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield path, parser
    for action in nested:
        for name, child in action.choices.items():
            yield from verbs(child, (*path, name))


PARSERS = dict(verbs(build_parser()))


@dataclass(frozen=True)
class OptionDraw:
    """A verb, what stands behind it, and what of that may not be accepted."""

    verb: list[str]
    argv: list[str]
    wrong: list[str]

    def repeat(self) -> str:
        return f"python -m tests.fuzz.draws '{json.dumps(asdict(self))}'"


def _made(action: argparse.Action) -> object:
    """What the option makes of a plain value."""
    if not callable(action.type):
        return None
    for plain in ("7", "0.5", "plain"):
        with contextlib.suppress(Exception):
            return action.type(plain)
    return None


def _is_number(action: argparse.Action) -> bool:
    return isinstance(_made(action), int | float)


def _is_path(action: argparse.Action) -> bool:
    return isinstance(_made(action), Path)


def _value(action: argparse.Action, rng: Random) -> str:
    if _is_number(action):
        return rng.choice(SMALL_NUMBERS if AS_MANY_AS_ASKED & set(action.option_strings) else ODD_NUMBERS)
    return rng.choice(ODD_PATHS if _is_path(action) else (*ODD_TEXTS, *map(str, action.choices or ())))


def _draw(verb: Verb, rng: Random) -> OptionDraw:
    actions = [a for a in PARSERS[verb]._actions if not WAITS.keys() & set(a.option_strings)]
    positional = [a for a in actions if not a.option_strings and a.dest != "overrides"]
    optional = [a for a in actions if a.option_strings]
    argv, wrong = list(BASE[verb][0]), []
    if positional and (not optional or rng.random() < 0.2):
        argv[0] = _value(positional[0], rng)
        return OptionDraw(list(verb), argv, ["the empty path"] if _is_path(positional[0]) and not argv[0] else [])
    for action in rng.sample(optional, min(len(optional), rng.randint(1, 2))):
        if action.nargs == 0:
            argv.append(action.option_strings[-1])
            continue
        value = _value(action, rng)
        argv.append(f"{action.option_strings[-1]}={value}")
        if (_is_number(action) and value in NO_NUMBERS) or (_is_path(action) and not value):
            wrong.append(argv[-1])
    return OptionDraw(list(verb), argv, wrong)


def option_draws(verb: Verb) -> st.SearchStrategy[OptionDraw]:
    """One or two options of ``verb`` with odd values, or an odd positional."""
    return st.randoms(use_true_random=True).map(lambda rng: _draw(verb, rng))


def settings(section: type[BaseModel] = RunConfig, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and annotation of every key of a recipe."""
    for name, entry in section.model_fields.items():
        kinds = [entry.annotation, *getattr(entry.annotation, "__args__", ())]
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if nested and "tuple" not in str(entry.annotation):
            yield from settings(nested[0], f"{path}{name}.")
        else:
            yield f"{path}{name}", entry.annotation


SETTINGS = dict(settings())
_TAKES = {("train",): 1, ("launch",): 2, ("plan",): 1}


def _draw_setting(rng: Random) -> OptionDraw:
    verb = rng.choice([verb for verb, times in _TAKES.items() for _ in range(times)])
    key, value = rng.choice(sorted(SETTINGS)), rng.choice(ODD_YAML)
    kind = str(SETTINGS[key])
    number = ("int" in kind or "float" in kind) and not any(other in kind for other in ("str", "tuple", "list", "bool"))
    wrong = number and value in (*NO_NUMBERS, ".nan", ".inf", "-.inf", "true", "[1, 2]", "{a: 1}")
    override = f"{key}={value}"
    return OptionDraw(list(verb), [*BASE[verb][0], override], [override] if wrong else [])


def override_draws() -> st.SearchStrategy[OptionDraw]:
    """A recipe's key with an odd value, for a verb that takes overrides."""
    return st.randoms(use_true_random=True).map(_draw_setting)


def judge_options(fuzz: Fuzz, draw: OptionDraw, show: bool = False) -> str | None:
    """None when the answer was a right one, else what was wrong with it."""
    folder = fuzz.copy(BASE[tuple(draw.verb)][1])
    try:
        (folder / "loop").symlink_to("loop")
        (folder / "empty").mkdir()
        answer = fuzz.world.server.run([*draw.verb, *draw.argv], folder, SLOW_SECONDS, **World.environment(folder))
        fuzz.last = answer
        if show:
            print(f"exit code {answer.code} after {answer.seconds:.1f} s\n{answer.out}\n{answer.err}")
        wrong = wrong_answer(answer)
        if wrong or answer.code:
            return wrong
        if (folder / "hacked").exists():
            return "a shell ran what was inside an option"
        if draw.wrong:
            return f"accepted: {', '.join(draw.wrong)[:200]}"
        try:
            found = json.loads(answer.out)
        except ValueError:
            return None
        return "a number that is none in the result" if not_finite(found) else None
    finally:
        shutil.rmtree(folder.parent)
