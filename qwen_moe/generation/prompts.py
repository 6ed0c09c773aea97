"""Files of prompts and of answers: JSON lines, continued after a stop where they ended."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from launchers.folder.atomic import write_text
from qwen_moe.data.conversations import BadRow, tools_of
from qwen_moe.data.tasks import is_tasks, tasks_bytes
from qwen_moe.documents import json_object
from qwen_moe.errors import UserError
from qwen_moe.generation.tokenizer import chat_tokens, text_tokens
from qwen_moe.line_file import LineFile

FORMS = ("prompt", "messages", "tokens")
_FORMS = '"prompt" (text), "messages" (a conversation) or "tokens" (ids)'


@dataclass(frozen=True)
class PromptRow:
    """A line of a file of prompts: its values and its tokens."""

    values: dict[str, Any]
    tokens: list[int]


def read_prompts(path: Path, tokenizer: Any, chat: bool) -> list[PromptRow]:
    """The prompts of a JSONL file, each line an object with one of _FORMS. With ``chat``, a "prompt" is the user's message.
    Raises UserError naming the line."""
    rows: list[PromptRow] = []
    for where, line in prompt_lines(path):
        row = prompt_row(where, line, tokenizer, chat)
        check_index(row.values, len(rows), where)
        rows.append(row)
    if not rows:
        raise UserError(f"--input {path} has no prompts: give JSON lines with {_FORMS}")
    return rows


def check_index(values: Mapping[str, Any], number: int, where: str) -> None:
    """Raise UserError if a line has another "index" than its number, from 0, which `Answers` writes under that key."""
    if "index" in values and (type(values["index"]) is not int or values["index"] != number):
        raise UserError(
            f"{where}: index is {values['index']!r:.60}, and the output has the number of the line under this key, here "
            f'{number}: give the key another name, such as "id"'
        )


def prompt_lines(path: Path) -> list[tuple[str, bytes]]:
    """The lines that are not empty of a JSONL file, or of `tasks:KIND:COUNT`, each with its place for messages. Raises
    UserError."""
    try:
        lines = (tasks_bytes(str(path)) if is_tasks(str(path)) else path.read_bytes()).splitlines()
    except OSError as error:
        raise UserError(f"--input {path} cannot be read: {error.strerror}") from None
    return [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def prompt_row(where: str, line: bytes, tokenizer: Any, chat: bool) -> PromptRow:
    """The prompt that ``line`` holds. Raises a UserError that begins with ``where``."""
    try:
        values = json_object(line.decode("utf-8-sig"), where)
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start})") from None
    return PromptRow(values, _tokens(values, tokenizer, chat, where))


def form_of(values: Mapping[str, Any], where: str) -> str:
    """The one of `FORMS` that a line has. Raises a UserError that begins with ``where``."""
    given = [name for name in FORMS if name in values]
    if len(given) != 1:
        raise UserError(f"{where} has {' and '.join(given) or 'no prompt'}: give one of {_FORMS}")
    return given[0]


def _tokens(values: dict[str, Any], tokenizer: Any, chat: bool, where: str) -> list[int]:
    form = form_of(values, where)
    value = values[form]
    if form == "messages":
        messages = value if isinstance(value, list) else []
        tokens = chat_tokens(tokenizer, messages, f"{where}: messages", _tools(values, where))
        if value[-1]["role"] == "assistant":
            raise UserError(
                f"{where}: the last message is the assistant's, so nothing is asked: end with the user's or a tool's"
            )
        return tokens
    if form == "prompt":
        if not isinstance(value, str):
            raise UserError(f"{where}: prompt is {value!r}, expected text")
        if chat:
            asked = [{"role": "user", "content": value}]
            return chat_tokens(tokenizer, asked, f"{where}: prompt", _tools(values, where))
        return text_tokens(tokenizer, value, f"{where}: prompt")
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise UserError(f"{where}: tokens must be a list of ids")
    return value


def _tools(values: dict[str, Any], where: str) -> list[Any] | None:
    try:
        return tools_of(values)
    except BadRow as error:
        raise UserError(f"{where}: {error}") from None


class Answers:
    """Answers to prompts, in a file that grows while they are made and appears under its own name when all are there.

    The growing file is OUTPUT.partial. Its first line holds ``settings``; a stopped command with equal settings goes on. A
    line that a kill cut off is dropped. Raises UserError if OUTPUT exists, was begun with other settings, or is written by
    another process now. With ``writes`` False, on ranks that do not report, nothing is read or written. A context manager:
    the growing file is locked until it is left.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], writes: bool = True) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.partial")
        self._rows: dict[int, dict[str, Any]] = {}
        self._file: LineFile | None = None
        if not writes:
            return
        if path.exists():
            raise UserError(f"--output {path} exists: give another file, or remove it")
        if not path.parent.is_dir():
            raise UserError(f"--output {path}: the folder {path.parent} does not exist: make it first")
        self._file = LineFile(self._partial, _whole, "wait for it, or give another --output")
        try:
            if path.exists():  # another process has finished it just now, and this one made a growing file anew
                self._partial.unlink(missing_ok=True)
                raise UserError(f"--output {path} exists: give another file, or remove it")
            self._go_on(dict(settings))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)
            self._file = None

    def _go_on(self, settings: dict[str, Any]) -> None:
        """Read what an earlier attempt has left, or begin the growing file."""
        assert self._file is not None
        now = json.loads(json.dumps(settings, sort_keys=True))  # as they are read back
        whole = self._partial.read_bytes()
        if not whole:
            self._file.append(now)
            return
        first, *lines = whole.split(b"\n")[:-1]
        before = self._object(first, 1)
        if before != now:
            changed = [
                f"{name} {before.get(name)} is now {now.get(name)}"
                for name in {**before, **now}
                if before.get(name) != now.get(name)
            ]
            raise UserError(
                f"{self._partial} was begun with other settings ({'; '.join(changed)}): repeat the command with the former "
                "to go on, or remove the file to begin anew"
            )
        for number, line in enumerate(lines, 2):
            row = self._object(line, number)
            if type(row.get("index")) is not int:
                raise UserError(
                    f"{self._partial}, line {number} is damaged: remove it, and its prompt is answered again"
                )
            self._rows[row["index"]] = row

    def _object(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            return json_object(line.decode(), f"{self._partial}, line {number}")
        except UnicodeDecodeError:
            raise UserError(f"{self._partial}, line {number} is damaged: it is not UTF-8 text") from None

    @property
    def done(self) -> frozenset[int]:
        """Prompts that have their answers."""
        return frozenset(self._rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows that are there, in the order of the prompts."""
        return [self._rows[index] for index in sorted(self._rows)]

    def add(self, index: int, row: Mapping[str, Any]) -> None:
        """Write the answers to prompt ``index``. They are on the disk when this returns."""
        self._rows[index] = {"index": index, **row}
        assert self._file is not None, "answers are added where they are written, before the file is closed"
        self._file.append(self._rows[index])

    def finish(self) -> None:
        """Write OUTPUT, in the order of the prompts."""
        write_text(self._path, "".join(json.dumps(self._rows[index]) + "\n" for index in sorted(self._rows)))
        self._partial.unlink(missing_ok=True)


def _whole(path: Path) -> int:
    """The bytes of a file's whole lines."""
    return path.read_bytes().rfind(b"\n") + 1


def digest(rows: Iterable[PromptRow]) -> str:
    """A hash of prompts, which tells whether a file has changed."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([row.values, row.tokens]).encode())
    return found.hexdigest()[:16]
