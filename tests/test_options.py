"""Options of the command line: values that are none, and what the command makes of failures."""

import argparse
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_moe import cli
from qwen_moe.cli import build_parser, main
from qwen_moe.errors import UserError
from qwen_moe.options import given_prefix, number, whole


@pytest.mark.parametrize(
    ("convert", "text", "value"),
    [(whole(), "0", 0), (whole(1), "2e6", 2_000_000), (whole(), "2_000", 2000), (whole(), str(2**63 - 1), 2**63 - 1),
     (number(), "-1.5", -1.5), (number(above=0, most=1), "1", 1.0)],
)  # fmt: skip
def test_numbers(convert: Callable[[str], float], text: str, value: float) -> None:
    assert convert(text) == value and type(convert(text)) is type(value)


@pytest.mark.parametrize(
    ("convert", "text"),
    [(whole(), "-1"), (whole(1), "0"), (whole(), "1.5"), (whole(), "nan"), (whole(), "inf"), (whole(), "1e400"),
     (whole(), str(2**63)), (whole(), "9" * 5000), (whole(), ""), (whole(), "true"), (whole(0, 8), "9"),
     (number(), "nan"), (number(), "inf"), (number(), "-inf"), (number(), "1e999"), (number(), "true"), (number(), ""),
     (number(least=0), "-1"), (number(above=0), "0"), (number(most=1), "1.1"), (given_prefix, "."), (given_prefix, " ")],
)  # fmt: skip
def test_what_is_no_number_in_range(convert: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected") as error:
        convert(text)
    assert len(str(error.value)) < 200


def _parsers(parser: argparse.ArgumentParser, name: str = "") -> list[tuple[str, argparse.ArgumentParser]]:
    found = [(name, parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, child in action.choices.items():
                found += _parsers(child, f"{name} {verb}".strip())
    return found


def test_every_option_of_every_verb_refuses_what_is_no_value() -> None:
    """Empty paths, numbers that are not finite and ones of 400 digits: for options that nobody has thought of yet too."""
    wrong = {int: ["", "nan", "9" * 400, "1.5"], float: ["", "nan", "inf", "9" * 400], Path: ["", "a\0b"]}
    seen = 0
    for name, parser in _parsers(build_parser()):
        for action in parser._actions:
            converted = action.type in wrong or callable(action.type)
            if not converted or action.choices is not None:
                continue
            told = {"whole": int, "number": float}.get(getattr(action.type, "__qualname__", "").split(".")[0])
            for text in wrong.get(told or action.type, []):  # type: ignore[call-overload]
                seen += 1
                with pytest.raises(argparse.ArgumentError):
                    parser._get_value(action, text)
                    pytest.fail(f"{name} {action.dest} took {text[:20]!r}")
    assert seen > 150


def test_a_mistake_in_the_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "demo", "--seq-len", "0"]) == 2
    told = capsys.readouterr().err
    assert (
        told.startswith("error: argument --seq-len: '0': expected a whole number, 1 or more") and told.count("\n") == 1
    )
    assert main(["info", "demo", "--nothing"]) == 2
    assert "unrecognized arguments: --nothing (see qwen-moe info --help)" in capsys.readouterr().err
    assert main(["info", "demo", "--seqlen", "0", "x.y=3"]) == 2
    assert "unrecognized arguments: --seqlen 0; did you mean --seq-len?" in capsys.readouterr().err


def run_instead(func: Callable[[object], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command runs ``func``, whatever its arguments."""
    parser = argparse.ArgumentParser()
    parser.set_defaults(func=func, traceback=False, verb="info")
    monkeypatch.setattr(cli, "build_parser", lambda: parser)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (IsADirectoryError(errno.EISDIR, "Is a directory", "runs"), "runs is a folder: give a file"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x.partial", None, "x"), "error: x is a folder: give a file"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a part of this path is a file"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: this user may not read or write there"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "x: this file system is read-only: give another path"),
        (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
        (OSError(errno.EFBIG, "File too large"), "raise the limit (ulimit -f)"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad start"), "not UTF-8 text (bad start at byte 0)"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), "cannot be written as utf-8"),
        (RecursionError("deep"), "nested too deeply"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out of memory"),
    ],
)  # fmt: skip
def test_what_the_machine_refuses_is_one_line(
    failure: Exception, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise failure

    run_instead(fail, monkeypatch)
    assert main([]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


# It said "[Errno 17] File exists" of a link to a disk that is not mounted.
@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_run_folder_that_is_none_is_said(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.symlink_to("/nonexistent/disk") if kind == "link" else folder.touch()
    assert main(["train", "demo", f"run_dir={folder}", "launch.nproc=1"]) == 2
    expected = "is a link to /nonexistent/disk, which does not exist: make it" if kind == "link" else "is a file: give"
    assert f"error: {folder} {expected}" in capsys.readouterr().err
    assert main(["launch", "demo", f"run_dir={folder}", "--local", "--nproc", "1"]) == 2
    assert f"{folder} {expected}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "failure", [KeyError("x"), TypeError("x"), ValueError("x"), AssertionError(), RuntimeError("x")]
)
def test_our_own_mistakes_keep_their_traceback(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise failure

    run_instead(fail, monkeypatch)
    with pytest.raises(type(failure)):
        main([])


def test_a_reader_that_has_seen_enough(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> int:
        raise BrokenPipeError

    run_instead(fail, monkeypatch)
    assert main([]) == 141
    assert capsys.readouterr().err == ""


def test_an_error_of_the_verb_is_not_an_error_of_the_parser() -> None:
    with pytest.raises(UserError, match="see qwen-moe --help"):
        build_parser().parse_args(["nothing"])
